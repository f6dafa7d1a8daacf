"""Latents to frames.

Shapes: `B C T H W` = batch, channels, frames, rows, columns; `t h w` the same in latent space.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from ..config import MOCHI_1, VAEConfig
from ..errors import LatentsError, ShapeError
from ..numerics import widen
from .blocks import ResBlock, UpsampleBlock, pointwise
from .causal_conv import KeptContext, TemporalContext, WholeClip


class Decoder(nn.Module):
    """Mochi 1's causal decoder (genmo/mochi-1-preview): each latent frame after the first makes 6 frames.

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
        half = config.decoder
        # The config goes from the widest picture to the smallest; the decoder builds the other way.
        channels, counts, attends = half.channels[::-1], half.num_res_blocks[::-1], half.has_attention[::-1]

        def res_blocks(stage: int, width: int) -> list[ResBlock]:
            return [ResBlock(width, attends[stage], operations, **factory) for _ in range(counts[stage])]

        self.blocks = nn.ModuleList(
            [
                nn.ModuleList(
                    [operations.Conv3d(config.latent_channels, channels[0], 1, **factory), *res_blocks(0, channels[0])]
                )
            ]
        )
        factors = zip(reversed(config.temporal_factors), reversed(config.spatial_factors))
        for stage, (time, space) in enumerate(factors, start=1):
            self.blocks.append(
                UpsampleBlock(
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
        self.blocks.append(nn.ModuleList(res_blocks(-1, channels[-1])))
        self.output_proj = operations.Linear(channels[-1], 3, **factory)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """`B C t h w` in VAE space, a whole clip -> `B 3 6(t-1)+1 8h 8w`, about -1 to 1.

        `to_frames` makes a picture of it. Raises `LatentsError` on a wrong shape.
        """
        self.check(latents)
        (frames,) = self._pieces(latents, latents.shape[2], WholeClip())
        return frames

    def stream(
        self, latents: torch.Tensor, latents_at_once: int = 1, context: TemporalContext | None = None
    ) -> Iterator[torch.Tensor]:
        """What `forward` gives, in consecutive pieces as they are ready: the first frame first.

        `latents_at_once` latent frames enter at a time; the wide stages take them in smaller parts as `context` has it,
        a `KeptContext` of the caller's or a new one. Exact: the frames that each convolution needs of the piece before
        are kept, nothing is blended or lost. Raises `LatentsError` on a wrong shape.
        """
        if latents_at_once < 1:
            raise ShapeError(f"latents_at_once is {latents_at_once}", "a piece must have at least one", "Use 1 or more")
        self.check(latents)
        return self._pieces(latents, latents_at_once, context or KeptContext())

    def check(self, latents: torch.Tensor) -> None:
        """Raises `LatentsError` unless these are latents of this model."""
        channels = self.config.latent_channels
        if latents.ndim != 5 or latents.shape[1] != channels or 0 in latents.shape:
            raise LatentsError(
                f"The latents have shape {tuple(latents.shape)}",
                f"they must be B x {channels} x T x H x W",
                "Use latents of this model: its sampler or its encoder makes them",
            )

    def _pieces(self, latents: torch.Tensor, count: int, context: TemporalContext) -> Iterator[torch.Tensor]:
        stages = self._stages()
        for piece in latents.split(count, dim=2):
            yield from self._parts(piece.contiguous(memory_format=torch.channels_last_3d), stages, context)

    def _parts(self, x: torch.Tensor, stages: Sequence["Stage"], context: TemporalContext) -> Iterator[torch.Tensor]:
        """Depth first: a part of `x` goes through all the stages before the next one enters the first."""
        if not stages:
            yield pointwise(self.output_proj, F.silu(x, inplace=True))
            return
        stage, *rest = stages
        batch, _, frames, height, width = x.shape
        at_once = context.at_once(batch * stage.width * height * width) or frames
        for part in x.split(at_once, dim=2):
            yield from self._parts(stage(part, context), rest, context)

    def _stages(self) -> list["Stage"]:
        first: Any
        upsample: list[Any]
        last: Any
        first, *upsample, last = self.blocks
        embed: Any
        embed, *res_blocks = first
        blocks = [[*res_blocks, *upsample[0].blocks], *(list(block.blocks) for block in upsample[1:]), list(last)]
        stages = [Stage(lambda x, context: embed(x), embed.out_channels, blocks[0])]
        for block, own in zip(upsample, blocks[1:]):
            stages.append(Stage(block.unfold, block.proj.out_features, own))
        return stages


@dataclass(frozen=True)
class Stage:
    """All that happens at one size of picture: what brings activations there, then the residual blocks.

    `width` is how many values one pixel of a frame that enters becomes.
    """

    enter: Callable[[torch.Tensor, TemporalContext], torch.Tensor]
    width: int
    blocks: Sequence[nn.Module]

    def __call__(self, x: torch.Tensor, context: TemporalContext) -> torch.Tensor:
        x = self.enter(x, context)
        for block in self.blocks:
            x = block(x, context)
        return x


def to_frames(raw: torch.Tensor) -> torch.Tensor:
    """The decoder's output (`B 3 T H W`) as pictures: `B T H W 3`, 0 to 1, float32 or wider."""
    return rearrange(widen(raw).add(1).div_(2).clamp_(0, 1), "B C T H W -> B T H W C")
