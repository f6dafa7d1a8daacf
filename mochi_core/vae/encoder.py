"""Frames to the posterior over latents.

Shapes: `B C T H W` = batch, channels, frames, rows, columns; `t h w` the same in latent space.
"""

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..config import GROUP_NORM_GROUPS, MOCHI_1, VAEConfig
from ..errors import ShapeError
from ..numerics import widen
from ..shapes import FRAMES_PER_LATENT, snap_frames
from .blocks import DownsampleBlock, ResBlock, pointwise
from .causal_conv import WholeClip
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
        context = WholeClip()
        x = fourier_features(video).to(dtype or video.dtype).contiguous(memory_format=torch.channels_last_3d)
        embed, *blocks = self.layers
        x = pointwise(embed, x)
        for block in blocks:
            x = block(x, context)
        moments = pointwise(self.output_proj, F.silu(per_frame(self.output_norm, x), inplace=True))
        return Posterior(*moments.chunk(2, dim=1))
