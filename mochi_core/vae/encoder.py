"""Frames to the posterior over latents.

Shapes: `B C T H W` = batch, channels, frames, rows, columns; `t h w` the same in latent space.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..config import GROUP_NORM_GROUPS, MOCHI_1, VAEConfig
from ..errors import ShapeError
from ..numerics import widen
from ..progress import Progress, silent
from ..shapes import FRAMES_PER_LATENT, snap_frames
from .attention import TemporalAttentionBlock, attend_by_rows
from .blocks import DownsampleBlock, ResBlock, pointwise
from .causal_conv import VALUES_AT_ONCE, KeptContext, TemporalContext, WholeClip, channels_last, run_causal
from .norm import per_frame

# A pixel value also enters as sine and cosine of itself at these powers of two.
FOURIER_OCTAVES = (6, 7)


@dataclass(frozen=True)
class Posterior:
    """What the encoder believes of the latents: a normal distribution for each value, in VAE space.

    `mean` and `logvar` are `B C t h w`.
    """

    mean: torch.Tensor
    logvar: torch.Tensor

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """A draw, from standard normal `noise` of the same shape."""
        return self.mean + torch.exp(self.logvar * 0.5) * noise


def fourier_features(video: torch.Tensor) -> torch.Tensor:
    """`B 3 T H W` -> `B 15 T H W`: the pixels, then sines, then cosines of `2 pi 2**octave` times them.

    Whole turns are taken off first, exactly, so that the large angles lose no digits.
    """
    octaves = [widen(video) * 2.0**octave for octave in FOURIER_OCTAVES]
    turns = torch.stack(octaves, dim=2).flatten(1, 2)  # each channel's octaves lie together
    angles = (turns - turns.round()) * (2 * math.pi)
    return torch.cat([widen(video), angles.sin(), angles.cos()], dim=1)


class Encoder(nn.Module):
    """Mochi 1's causal encoder (genmo/mochi-1-preview), temporal attention and all.

    `operations` is the namespace that layers with weights come from.
    """

    def __init__(
        self,
        config: VAEConfig = MOCHI_1.vae,
        *,
        operations: ModuleType | Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        factory: dict[str, Any] = dict(dtype=dtype, device=device)
        self.config = config
        half = config.encoder
        channels, counts, attends = half.channels, half.num_res_blocks, half.has_attention

        def res_blocks(stage: int, width: int) -> list[ResBlock]:
            return [ResBlock(width, attends[stage], operations, **factory) for _ in range(counts[stage])]

        self.layers = nn.ModuleList([operations.Linear(half.in_channels, channels[0], **factory)])
        self.layers.extend(res_blocks(0, channels[0]))
        for stage, (time, space) in enumerate(zip(config.temporal_factors, config.spatial_factors), start=1):
            self.layers.append(
                DownsampleBlock(
                    channels[stage - 1],
                    channels[stage],
                    counts[stage],
                    attends[stage],
                    time,
                    space,
                    operations,
                    **factory,
                )
            )
        self.layers.extend(res_blocks(-1, channels[-1]))
        self.output_norm = operations.GroupNorm(GROUP_NORM_GROUPS, channels[-1], **factory)
        self.output_proj = operations.Linear(channels[-1], 2 * config.latent_channels, bias=False, **factory)

    def forward(self, video: torch.Tensor, dtype: torch.dtype | None = None) -> Posterior:
        """`video`: `B 3 T H W`, -1 to 1, `T` of the form 6k+1, rows and columns multiples of 8.

        Computes in `dtype`, the video's own by default; the Fourier features are made before the video is rounded to
        it. Raises `ShapeError` on a clip that does not fit.
        """
        self.check(video)
        context, x = WholeClip(), video
        for step in self._steps(dtype or video.dtype):
            x = step(x) if isinstance(step, TemporalAttentionBlock) else step(x, context)
        return Posterior(*x.chunk(2, dim=1))

    def stagewise(
        self,
        video: torch.Tensor,
        dtype: torch.dtype | None = None,
        *,
        device: torch.device | str | None = None,
        values_at_once: int = VALUES_AT_ONCE,
        report: Progress = silent,
    ) -> Posterior:
        """What `forward` gives, in device memory that does not grow with the clip.

        Every layer but the temporal attention reads a few earlier frames only, so what lies between two attentions goes
        through the clip by frames, keeping what the convolutions need; the attention goes by rows of pixels, with all
        their frames. In between, the activations of the whole clip wait where the video lies: in host memory, when
        `device`, which computes (the video's own by default), is another. At most those of the second size of picture
        and of what is made of them: for Mochi 1, 32 values for each pixel of each frame, and 8 more.

        `report` is called after each of the steps. The rest as `forward`.
        """
        self.check(video)
        device = torch.device(device or video.device)
        steps = self._steps(dtype or video.dtype)
        x = video
        for index, step in enumerate(steps):
            if isinstance(step, TemporalAttentionBlock):
                attend_by_rows(step, x, device, values_at_once)
            else:
                x = step.by_frames(x, device, values_at_once, may_overwrite=x is not video)
            report(index + 1, len(steps))
        return Posterior(*x.chunk(2, dim=1))

    def check(self, video: torch.Tensor) -> None:
        """Raises `ShapeError` unless this is a clip that fits."""
        spatial = math.prod(self.config.spatial_factors)
        if video.ndim != 5 or video.shape[1] != 3 or 0 in video.shape or any(n % spatial for n in video.shape[3:]):
            raise ShapeError(
                f"The video has shape {tuple(video.shape)}",
                f"it must be B x 3 x T x H x W, with H and W multiples of {spatial}",
                "Crop or pad it to the grid",
            )
        frames = video.shape[2]
        if (frames - 1) % FRAMES_PER_LATENT:
            raise ShapeError(
                f"The video has {frames} frames",
                f"there must be {FRAMES_PER_LATENT}k+1",
                f"Cut or extend it, for example to {snap_frames(frames)}",
            )

    def _steps(self, dtype: torch.dtype) -> "list[Segment | TemporalAttentionBlock]":
        """The encoder from pixels to moments, cut where attention needs every frame."""
        embed, *layers = self.layers

        def enter(video: torch.Tensor, context: TemporalContext) -> torch.Tensor:
            features = fourier_features(video).to(dtype)
            return pointwise(embed, features.contiguous(memory_format=torch.channels_last_3d))

        def leave(x: torch.Tensor, context: TemporalContext) -> torch.Tensor:
            return pointwise(self.output_proj, F.silu(per_frame(self.output_norm, x), inplace=True))

        steps: list[Segment | TemporalAttentionBlock] = []
        channels = self.config.encoder.channels[0]
        segment = Segment(channels, [enter])
        for layer in layers:
            conv: Any
            blocks: Any = [layer]
            if isinstance(layer, DownsampleBlock):
                conv, *blocks = layer.layers
                channels = conv.out_channels
                segment.layers.append(partial(run_causal, conv))
                segment.time *= conv.stride[0]
            for block in blocks:
                segment.layers.append(block.convolve)
                if block.attn_block is not None:
                    steps += [segment, block.attn_block]
                    segment = Segment(channels, [])
        segment.layers.append(leave)
        return [*steps, segment]


@dataclass
class Segment:
    """Layers that read no more than a few earlier frames.

    `width` is how many values a pixel that enters becomes at most, `time` how many frames become one. The clip's first
    frame becomes one alone.
    """

    width: int
    layers: list[Callable[[torch.Tensor, TemporalContext], torch.Tensor]]
    time: int = 1

    def __call__(self, x: torch.Tensor, context: TemporalContext) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, context)
        return x

    def by_frames(
        self, x: torch.Tensor, device: torch.device, values_at_once: int, *, may_overwrite: bool
    ) -> torch.Tensor:
        """The same, a few frames at a time on `device`; `x` and what is returned lie where `x` does."""
        batch, _, frames, height, width = x.shape
        at_once = max(1, values_at_once // (batch * self.width * height * width * self.time)) * self.time
        context = KeptContext(values_at_once=values_at_once)
        out, start, written = None, 0, 0
        while start < frames:
            # The first frame alone, so that all the others make whole steps.
            end = min(frames, start + at_once) if start else 1
            piece = self(x[:, :, start:end].to(device), context)
            if out is None:
                shape = (batch, piece.shape[1], (frames - 1) // self.time + 1, *piece.shape[3:])
                out = x if may_overwrite and shape == x.shape else channels_last(piece, shape, x.device)
            out[:, :, written : written + piece.shape[2]] = piece
            start, written = end, written + piece.shape[2]
        assert out is not None
        return out
