"""What decoder and encoder are made of: per-frame norms, residual blocks, the layers that change size.

Activations lie channels-last in memory: norms and one-by-one convolutions then read them as they are.

Shapes: `B C T H W` = batch, channels, frames, rows, columns.
"""

from types import ModuleType
from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from ..config import GROUP_NORM_GROUPS
from .attention import TemporalAttentionBlock
from .causal_conv import TemporalContext, causal_conv3d, run_causal
from .norm import per_frame


def pointwise(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A linear layer over the channels."""
    return linear(x.movedim(1, -1)).movedim(-1, 1)


class ResBlock(nn.Module):
    """Twice norm, SiLU and causal convolution, added to the input; in the encoder temporal attention may follow."""

    def __init__(self, channels: int, has_attention: bool, operations: ModuleType | Any, **factory: Any):
        super().__init__()
        half = (
            lambda: operations.GroupNorm(GROUP_NORM_GROUPS, channels, **factory),
            nn.SiLU,
            lambda: causal_conv3d(operations, channels, channels, (3, 3, 3), strided=False, **factory),
        )
        self.stack = nn.ModuleList(make() for make in half + half)
        self.attn_block = TemporalAttentionBlock(channels, operations, **factory) if has_attention else None

    def forward(self, x: torch.Tensor, context: TemporalContext) -> torch.Tensor:
        x = self.convolve(x, context)
        return x if self.attn_block is None else self.attn_block(x)

    def convolve(self, x: torch.Tensor, context: TemporalContext) -> torch.Tensor:
        """All but the attention: the part that reads a few earlier frames only."""
        norm_1, _, conv_1, norm_2, _, conv_2 = self.stack
        branch = F.silu(per_frame(norm_1, x), inplace=True)
        branch = run_causal(conv_1, branch, context)
        # One name for each in turn, so that none outlives its use.
        branch = F.silu(per_frame(norm_2, branch), inplace=True)
        return run_causal(conv_2, branch, context).add_(x)


class UpsampleBlock(nn.Module):
    """Residual blocks, then each pixel unfolds into a small block of pixels and frames."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        blocks: int,
        has_attention: bool,
        time: int,
        space: int,
        operations: ModuleType | Any,
        **factory: Any,
    ):
        super().__init__()
        self.time, self.space = time, space
        self.blocks = nn.ModuleList(ResBlock(in_channels, has_attention, operations, **factory) for _ in range(blocks))
        self.proj = operations.Linear(in_channels, out_channels * time * space**2, **factory)

    def forward(self, x: torch.Tensor, context: TemporalContext) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, context)
        return self.unfold(x, context)

    def unfold(self, x: torch.Tensor, context: TemporalContext) -> torch.Tensor:
        """What follows the residual blocks: `B C T H W` to `time` times the frames, `space` times the rows, columns."""
        x = depth_to_space_time(pointwise(self.proj, x), self.time, self.space)
        # A clip's first frame unfolds into one frame only: those before its last never existed.
        return x[:, :, self.time - 1 :] if context.first_time(self) else x


def depth_to_space_time(x: torch.Tensor, time: int, space: int) -> torch.Tensor:
    """`B (C time space space) T H W` -> `B C T*time H*space W*space`, channels-last in memory."""
    unfolded = rearrange(x, "B (C t p q) T H W -> B (T t) (H p) (W q) C", t=time, p=space, q=space)
    return unfolded.movedim(-1, 1)


class DownsampleBlock(nn.Module):
    """A strided causal convolution, then residual blocks."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        blocks: int,
        has_attention: bool,
        time: int,
        space: int,
        operations: ModuleType | Any,
        **factory: Any,
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            [causal_conv3d(operations, in_channels, out_channels, (time, space, space), strided=True, **factory)]
        )
        self.layers.extend(ResBlock(out_channels, has_attention, operations, **factory) for _ in range(blocks))

    def forward(self, x: torch.Tensor, context: TemporalContext) -> torch.Tensor:
        conv, *blocks = self.layers
        x = run_causal(conv, x, context)
        for block in blocks:
            x = block(x, context)
        return x
