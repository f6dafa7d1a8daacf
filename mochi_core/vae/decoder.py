"""Latents to frames.

Shapes: `B C T H W` = batch, channels, frames, rows, columns; `t h w` the same in latent space.
"""

from collections.abc import Iterator
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

    def forward(self, latents: torch.Tensor, context: TemporalContext | None = None) -> torch.Tensor:
        """`B C t h w` in VAE space -> `B 3 T H W`, about -1 to 1; `to_frames` makes a picture of it.

        Without a context the latents are a whole clip and `T` is `6(t-1)+1`. Raises `LatentsError` on a wrong shape.
        """
        channels = self.config.latent_channels
        if latents.ndim != 5 or latents.shape[1] != channels or 0 in latents.shape:
            raise LatentsError(
                f"The latents have shape {tuple(latents.shape)}",
                f"they must be B x {channels} x T x H x W",
                "Use latents of this model: its sampler or its encoder makes them",
            )
        context = context or WholeClip()
        embed, first, upsample, last = self._stages()
        x = embed(latents.contiguous(memory_format=torch.channels_last_3d))
        for block in (*first, *upsample, *last):
            x = block(x, context)
        return pointwise(self.output_proj, F.silu(x, inplace=True))

    def _stages(self) -> tuple[nn.Module, list[nn.Module], list[nn.Module], list[nn.Module]]:
        first, *upsample, last = self.blocks
        embed, *res_blocks = first.children()
        return embed, res_blocks, upsample, list(last.children())

    def stream(self, latents: torch.Tensor, latents_at_once: int = 1) -> Iterator[torch.Tensor]:
        """Decodes `latents_at_once` latent frames at a time and yields what `forward` would give, piece by piece.

        Exact: the frames that each convolution needs of the piece before are kept, nothing is blended or lost.
        """
        if latents_at_once < 1:
            raise ShapeError(f"latents_at_once is {latents_at_once}", "a piece must have at least one", "Use 1 or more")
        return self._pieces(latents, latents_at_once)

    def _pieces(self, latents: torch.Tensor, latents_at_once: int) -> Iterator[torch.Tensor]:
        context = KeptContext()
        for piece in latents.split(latents_at_once, dim=2):
            yield self(piece, context)
            context.next_piece()


def to_frames(raw: torch.Tensor) -> torch.Tensor:
    """The decoder's output (`B 3 T H W`) as pictures: `B T H W 3`, 0 to 1, float32 or wider."""
    return rearrange(widen(raw).add(1).div_(2).clamp_(0, 1), "B C T H W -> B T H W C")
