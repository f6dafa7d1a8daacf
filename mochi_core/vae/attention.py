"""Temporal attention of the encoder: each pixel's frames attend to the frames before them.

Shapes: `B C T H W` = batch, channels, frames, rows, columns, `A` heads, `D` head width.
"""

from types import ModuleType
from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from ..config import GROUP_NORM_GROUPS, VAE_HEAD_DIM
from .norm import normed_by, per_frame, statistics

# CUDA's attention kernels take no more than 2**16 - 1 sequences at once.
SEQUENCES_AT_ONCE = 1 << 15


class TemporalAttention(nn.Module):
    """Causal attention over time with queries and keys of unit length."""

    def __init__(self, channels: int, operations: ModuleType | Any, **factory: Any):
        super().__init__()
        self.qkv = operations.Linear(channels, 3 * channels, bias=False, **factory)
        self.out = operations.Linear(channels, channels, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, _, height, width = x.shape
        pixels = rearrange(x, "B C T H W -> (B H W) T C")
        attended = torch.cat([self._attend(some) for some in pixels.split(SEQUENCES_AT_ONCE)])
        return rearrange(attended, "(B H W) T C -> B C T H W", B=batch, H=height, W=width)

    def _attend(self, pixels: torch.Tensor) -> torch.Tensor:
        q, k, v = rearrange(self.qkv(pixels), "P T (three A D) -> three P A T D", three=3, D=VAE_HEAD_DIM)
        q, k = F.normalize(q, dim=-1).to(v.dtype), F.normalize(k, dim=-1).to(v.dtype)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(rearrange(out, "P A T D -> P T (A D)"))


class TemporalAttentionBlock(nn.Module):
    """Norm and temporal attention, added to the input."""

    def __init__(self, channels: int, operations: ModuleType | Any, **factory: Any):
        super().__init__()
        self.norm = operations.GroupNorm(GROUP_NORM_GROUPS, channels, **factory)
        self.attn = TemporalAttention(channels, operations, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attn(per_frame(self.norm, x))


# What attention makes of each value that enters: the norm, queries, keys, values and the output, some of them twice.
COPIES = 8


def attend_by_rows(block: TemporalAttentionBlock, x: torch.Tensor, device: torch.device, values_at_once: int) -> None:
    """`x = block(x)` in place, a few pixels of all frames at a time on `device`; `x` stays where it lies.

    The norms see whole frames: their statistics are taken before. Needs no gradients.
    """
    batch, channels, frames, height, width = x.shape
    at_once = max(1, values_at_once // (batch * channels * height * width))
    pieces = [statistics(block.norm, piece.to(device)) for piece in x.split(at_once, dim=2)]
    means, inverses = (torch.cat(some, dim=1) for some in zip(*pieces))
    pixels = max(1, values_at_once // (COPIES * batch * channels * frames))
    for rows in x.split(max(1, pixels // width), dim=3):
        for some in rows.split(min(width, pixels), dim=4):
            here = some.to(device)
            some.copy_(here + block.attn(normed_by(block.norm, here, means, inverses)))
