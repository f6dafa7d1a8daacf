"""Convolutions that look only backwards in time, and where the frames before the first come from.

Shapes: `B C T H W` = batch, channels, frames, rows, columns.
"""

from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F


class TemporalContext(Protocol):
    """Gives each causal layer the frames before those it is shown.

    `is_first` says whether the clip starts with the frames at hand. `extend(layer, x, frames)` returns `x`
    (`B C T H W`) with `frames` earlier ones in front; `layer` tells the layers apart.
    """

    is_first: bool

    def extend(self, layer: nn.Module, x: torch.Tensor, frames: int) -> torch.Tensor: ...


class WholeClip:
    """The whole clip at once: before its first frame stands that frame again."""

    is_first = True

    def extend(self, layer: nn.Module, x: torch.Tensor, frames: int) -> torch.Tensor:
        return torch.cat([*[x[:, :, :1]] * frames, x], dim=2)


class KeptContext:
    """A clip in consecutive pieces: each layer's last input frames are kept for the next piece.

    What comes out is what the whole clip at once would give. One instance serves one clip, `next_piece` between
    its pieces.
    """

    def __init__(self) -> None:
        self.is_first = True
        self._kept: dict[nn.Module, torch.Tensor] = {}

    def extend(self, layer: nn.Module, x: torch.Tensor, frames: int) -> torch.Tensor:
        earlier = [x[:, :, :1]] * frames if self.is_first else [self._kept[layer]]
        extended = torch.cat([*earlier, x], dim=2)
        self._kept[layer] = extended[:, :, extended.shape[2] - frames :].clone()
        return extended

    def next_piece(self) -> None:
        """The frames to come follow those already shown."""
        self.is_first = False


def causal_conv3d(
    operations: Any, in_channels: int, out_channels: int, kernel: tuple[int, int, int], *, strided: bool, **factory: Any
) -> nn.Module:
    """The layer that `run_causal` runs; `strided` ones step by their kernel, the others by one."""
    return operations.Conv3d(in_channels, out_channels, kernel, stride=kernel if strided else 1, **factory)


def run_causal(conv: nn.Module, x: torch.Tensor, context: TemporalContext) -> torch.Tensor:
    """`conv` over each frame and those before it, the picture's edge repeated outwards. `x`: `B C T H W`.

    The padding is made here rather than by the layer: ComfyUI's layers may run cuDNN directly, which knows zeros only.
    """
    frames, rows, columns = ((size - 1) for size in conv.kernel_size)  # pyright: ignore[reportGeneralTypeIssues]
    if max(conv.stride) == 1 and (rows or columns):  # pyright: ignore[reportArgumentType]
        x = F.pad(x, (columns // 2, columns // 2, rows // 2, rows // 2, 0, 0), mode="replicate")
    if frames:
        x = context.extend(conv, x, frames)
    return conv(x)
