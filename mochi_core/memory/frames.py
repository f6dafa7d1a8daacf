"""A streaming decoder's kept frames in host memory: they are most of what it holds, each needed when its layer runs.

Shapes: `B C T H W` = batch, channels, frames, rows, columns.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..vae.causal_conv import Frames
from .copies import SideStream, Ticket, pinned


@dataclass(frozen=True)
class _Parked:
    """A tensor on the host, its axes in the order in which they lie in memory; `order` leads back."""

    host: torch.Tensor
    order: tuple[int, ...]


@dataclass(frozen=True)
class _Moving:
    """A layer's tensors on the device, on their way in or out until the ticket's copies are done."""

    layer: nn.Module
    frames: list[torch.Tensor]
    ticket: Ticket


class HostFrames:
    """The `FrameStore` that keeps frames on the host, except for `keep_bytes` of them. `device` is what decodes.

    While a layer computes, the frames it left behind go, and those of the layer that ran after it last time come. So
    beside what is kept, the frames of at most four layers are on the device. The largest are kept there, for theirs are
    copied most often. `close` it when the clip is done or given up. Gradients do not come through.
    """

    def __init__(self, device: torch.device | str, keep_bytes: int = 0, *, synchronous: bool = False):
        self.device = torch.device(device)
        self._keep_bytes = keep_bytes
        # One for each direction: a bus carries both at once.
        self._leave = SideStream(self.device, synchronous=synchronous)
        self._enter = SideStream(self.device, synchronous=synchronous)
        self._sizes: dict[nn.Module, int] = {}
        self._kept: dict[nn.Module, Frames] = {}
        self._parked: dict[nn.Module, list[_Parked]] = {}
        self._leaving: _Moving | None = None
        self._coming: _Moving | None = None
        self._next: dict[nn.Module, nn.Module] = {}
        self._latest: nn.Module | None = None

    @property
    def kept_bytes(self) -> int:
        """Bytes of frames that are on the device to stay."""
        return sum(self._sizes[layer] for layer in self._kept)

    def put(self, layer: nn.Module, frames: Frames) -> None:
        self._sizes[layer] = sum(frame.nbytes for frame in frames)
        if self._may_stay(layer):
            self._kept[layer] = frames
            self._parked.pop(layer, None)
            return
        # What was leaving has had a layer's time to do it; from here on its device memory may be used again.
        self._settle_leaving()
        dense = [_dense(frame) for frame in frames]
        self._leave.follow()
        parked = self._buffers(layer, dense)
        for (source, _), one in zip(dense, parked):
            self._leave.copy(source, one.host)
        self._leaving = _Moving(layer, [source for source, _ in dense], self._leave.mark())
        self._parked[layer] = parked

    def take(self, layer: nn.Module) -> Frames:
        if self._latest is not None:
            self._next[self._latest] = layer
        self._latest = layer
        if layer in self._kept:
            frames: Frames = self._kept.pop(layer)
        else:
            coming = self._arrival(layer)
            self._enter.wait(coming.ticket)
            frames = coming.frames
        follower = self._next.get(layer)
        if self._coming is None and follower in self._parked and follower is not layer:
            self._coming = self._fetched(follower)
        return frames

    def close(self) -> None:
        """Ends what is on its way, and forgets every frame. Device memory may be given to others only after this."""
        for copies in (self._leave, self._enter):
            copies.wait(copies.mark())
        self._leaving = self._coming = self._latest = None
        self._kept.clear()
        self._parked.clear()

    def _may_stay(self, layer: nn.Module) -> bool:
        """Whether there is room for the frames of this layer, and of all layers with larger ones."""
        own = self._sizes[layer]
        larger = sum(size for size in self._sizes.values() if size > own)
        return max(larger, self.kept_bytes) + own <= self._keep_bytes

    def _arrival(self, layer: nn.Module) -> _Moving:
        """This layer's frames, on their way. What is coming for another layer was a wrong guess."""
        coming, self._coming = self._coming, None
        if coming is not None and coming.layer is layer:
            return coming
        if coming is not None:
            self._enter.wait(coming.ticket)
        return self._fetched(layer)

    def _fetched(self, layer: nn.Module) -> _Moving:
        if self._leaving is not None and self._leaving.layer is layer:
            self._settle_leaving()
        # The memory that is filled may be what the device still reads under its last owner.
        arriving = [torch.empty_like(one.host, device=self.device) for one in self._parked[layer]]
        self._enter.follow()
        for one, target in zip(self._parked[layer], arriving):
            self._enter.copy(one.host, target)
        frames = [target.permute(one.order) for one, target in zip(self._parked[layer], arriving)]
        return _Moving(layer, frames, self._enter.mark())

    def _settle_leaving(self) -> None:
        if self._leaving is not None:
            self._leave.wait(self._leaving.ticket)
            self._leaving = None

    def _buffers(self, layer: nn.Module, dense: "list[tuple[torch.Tensor, tuple[int, ...]]]") -> list[_Parked]:
        """Where on the host these go: where the layer's last ones were, or new memory when they differ."""
        old = self._parked.pop(layer, [])
        if [(one.host.shape, one.order) for one in old] == [(source.shape, order) for source, order in dense]:
            return old
        del old  # before more is taken
        return [_Parked(pinned(source, self.device), order) for source, order in dense]


def _dense(frame: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """A tensor as it lies in memory, so that copying it is one run of bytes, and the order of axes that leads back."""
    by_stride = sorted(range(frame.ndim), key=lambda axis: -frame.stride(axis))
    back = tuple(by_stride.index(axis) for axis in range(frame.ndim))
    return frame.permute(by_stride).contiguous(), back
