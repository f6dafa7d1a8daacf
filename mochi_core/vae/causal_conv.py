"""Convolutions that look only backwards in time, and where the frames before those at hand come from.

Shapes: `B C T H W` = batch, channels, frames, rows, columns.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

Frames = Sequence[torch.Tensor]

# How many values of an activation a streaming context lets the wide stages work on at once: two frames of the widest
# stage at 848x480. Each part copies the frames before it, so smaller ones copy more; larger ones hold more.
VALUES_AT_ONCE = 112 * 2**20


class TemporalContext(Protocol):
    """Gives each layer the frames before those it is shown; `layer` tells the layers apart.

    `first_time(layer)`: whether the clip starts with the frames now at this layer. `before(layer, x, frames)`: the
    `frames` frames before `x` (`B C T H W`), tensors that follow each other in time. `at_once(values)`: how many
    frames, or rows, of so many values a layer should be given, None for all.
    """

    def first_time(self, layer: nn.Module) -> bool: ...

    def before(self, layer: nn.Module, x: torch.Tensor, frames: int) -> Frames: ...

    def at_once(self, values: int) -> int | None: ...


class WholeClip:
    """The whole clip at once: before its first frame stands that frame again."""

    def first_time(self, layer: nn.Module) -> bool:
        return True

    def before(self, layer: nn.Module, x: torch.Tensor, frames: int) -> Frames:
        return [x[:, :, :1]] * frames

    def at_once(self, values: int) -> int | None:
        return None


class FrameStore(Protocol):
    """Where a streaming context keeps frames between pieces: what was put for a layer is taken once."""

    def put(self, layer: nn.Module, frames: Frames) -> None: ...

    def take(self, layer: nn.Module) -> Frames: ...


class OnDevice:
    """Frames stay where they were made."""

    def __init__(self) -> None:
        self._frames: dict[nn.Module, Frames] = {}

    def put(self, layer: nn.Module, frames: Frames) -> None:
        self._frames[layer] = frames

    def take(self, layer: nn.Module) -> Frames:
        return self._frames.pop(layer)


class KeptContext:
    """A clip in consecutive pieces: each layer's last input frames are kept for its next piece.

    What comes out is what the whole clip at once would give. One instance serves one clip. Frames are kept in `store`,
    on the device unless it knows better; `values_at_once` bounds the work of wide layers, which then go through a
    piece by frames and, where one frame is too many, by rows.
    """

    def __init__(self, store: FrameStore | None = None, values_at_once: int = VALUES_AT_ONCE) -> None:
        self._store = OnDevice() if store is None else store
        self._values_at_once = values_at_once
        self._known: set[nn.Module] = set()

    def first_time(self, layer: nn.Module) -> bool:
        is_first = layer not in self._known
        self._known.add(layer)
        return is_first

    def before(self, layer: nn.Module, x: torch.Tensor, frames: int) -> Frames:
        earlier = [x[:, :, :1]] * frames if self.first_time(layer) else self._store.take(layer)
        self._store.put(layer, _last(frames, [*earlier, x]))
        return earlier

    def at_once(self, values: int) -> int | None:
        return max(1, self._values_at_once // values)


def _last(count: int, pieces: Frames) -> Frames:
    """The last `count` frames, without holding on to others."""
    kept: list[torch.Tensor] = []
    for piece in reversed(pieces):
        frames = piece.shape[2]
        if frames <= count:
            kept.insert(0, piece)
        else:
            kept.insert(0, piece[:, :, frames - count :].clone())
        count -= min(frames, count)
        if not count:
            break
    return kept


def causal_conv3d(
    operations: Any, in_channels: int, out_channels: int, kernel: tuple[int, int, int], *, strided: bool, **factory: Any
) -> nn.Module:
    """The layer that `run_causal` runs; `strided` ones step by their kernel, the others by one."""
    return operations.Conv3d(in_channels, out_channels, kernel, stride=kernel if strided else 1, **factory)


def run_causal(conv: nn.Module, x: torch.Tensor, context: TemporalContext) -> torch.Tensor:
    """`conv` over each frame and those before it, the picture's edge repeated outwards. `x`: `B C T H W`.

    A strided layer's pieces after the first must hold whole steps. The padding is made here rather than by the layer:
    ComfyUI's layers may run cuDNN directly, which knows zeros only.
    """
    kernel: tuple[int, int, int] = conv.kernel_size  # pyright: ignore[reportAssignmentType]
    if max(conv.stride) > 1:  # pyright: ignore[reportArgumentType]
        starts = kernel[0] > 1 and context.first_time(conv)
        return conv(torch.cat([x[:, :, :1]] * (kernel[0] - 1) + [x], dim=2) if starts else x)

    batch, channels, frames, height, width = x.shape
    earlier = context.before(conv, x, kernel[0] - 1) if kernel[0] > 1 else ()
    pieces, edge = [*earlier, x], (kernel[1] // 2, kernel[2] // 2)
    rows = context.at_once(batch * channels * (frames + kernel[0] - 1) * width)
    if rows is None or rows >= height:
        return conv(framed(pieces, 0, height, edge))
    out = channels_last(x, (batch, conv.out_channels, frames, height, width))  # pyright: ignore[reportArgumentType]
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        out[..., top:bottom, :] = conv(framed(pieces, top, bottom, edge))
    return out


def framed(pieces: Frames, top: int, bottom: int, edge: tuple[int, int]) -> torch.Tensor:
    """The rows from `top` to `bottom` of all the pieces' frames, with `edge` more rows and columns on each side.

    Outside the picture stand its outermost pixels. Made in one pass, channels-last on every device.
    """
    batch, channels, _, height, width = pieces[0].shape
    more_rows, more_columns = edge
    # What of the rows asked for lies in the picture, and where the picture lies in what is made.
    first, last = max(0, top - more_rows), min(height, bottom + more_rows)
    above, below = first - (top - more_rows), (bottom + more_rows) - last
    frames = sum(piece.shape[2] for piece in pieces)
    shape = (batch, channels, frames, bottom - top + 2 * more_rows, width + 2 * more_columns)
    out = channels_last(pieces[0], shape)
    inside = out[..., above : shape[3] - below, more_columns : more_columns + width]
    at = 0
    for piece in pieces:
        inside[:, :, at : at + piece.shape[2]] = piece[..., first:last, :]
        at += piece.shape[2]
    if more_columns:
        out[..., :more_columns] = out[..., more_columns : more_columns + 1]
        out[..., -more_columns:] = out[..., -more_columns - 1 : -more_columns]
    if above:
        out[..., :above, :] = out[..., above : above + 1, :]
    if below:
        out[..., -below:, :] = out[..., -below - 1 : -below, :]
    return out


def channels_last(like: torch.Tensor, shape: tuple[int, ...], device: torch.device | None = None) -> torch.Tensor:
    """An empty tensor of this shape (`B C T H W`), channels-last in memory, otherwise like another."""
    batch, channels, *rest = shape
    return like.new_empty((batch, *rest, channels), device=device).movedim(-1, 1)
