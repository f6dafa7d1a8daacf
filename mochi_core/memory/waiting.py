"""Streamed blocks while they wait: their weights as bytes on the host, pinned or in the file, and the way to a slot."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Protocol

import torch
from torch import nn

from .borrowing import Check, weights_of
from .copies import SideStream, Ticket, pinned_pieces

Source = Literal["pinned", "file"]
# Gives the ticket to wait for, or raises.
Arrival = Callable[[], Ticket]

SLOTS = 2
# Device allocators round to this, and no kernel asks for more.
ALIGNMENT = 512


class Layout:
    """A block's weights as bytes one after the other. Trainable ones are left out: a copy would learn nothing."""

    def __init__(self, block: nn.Module):
        self.weights = [weight for weight in weights_of(block) if not weight.original.requires_grad]
        self.offsets: dict[int, int] = {}
        self.size = 0
        for weight in self.weights:
            if id(weight.original) not in self.offsets:
                self.offsets[id(weight.original)] = self.size
                self.size += aligned(weight.original.nbytes)

    def pack(self, pieces: Sequence[torch.Tensor]) -> None:
        """Writes the weights, from wherever they are, into host buffers that are at least as long together."""
        for tensor in {id(weight.original): weight.original for weight in self.weights}.values():
            stored, offset = tensor.detach().reshape(-1).view(torch.uint8), self.offsets[id(tensor)]
            start = 0
            for piece in pieces:
                first, last = max(offset, start), min(offset + len(stored), start + len(piece))
                if first < last:
                    piece[first - start : last - start].copy_(stored[first - offset : last - offset])
                start += len(piece)

    def put(self, slot: torch.Tensor) -> None:
        """Makes the slot's bytes the weights of the block."""
        views: dict[int, torch.Tensor] = {}
        for weight in self.weights:
            own, offset = weight.original, self.offsets[id(weight.original)]
            if id(own) not in views:
                views[id(own)] = weight.wrapped(slot[offset : offset + own.nbytes].view(own.dtype).view(own.shape))
            weight.put(views[id(own)])

    def put_back(self) -> None:
        for weight in self.weights:
            weight.put_back()


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Host(Protocol):
    def start(self, index: int, number: int, slot: torch.Tensor) -> Arrival:
        """Starts to bring a block's bytes into a slot. What it returns gives the ticket to wait for, or raises."""
        ...

    def close(self) -> None: ...


def send(copies: SideStream, pieces: Iterable[torch.Tensor], size: int, slot: torch.Tensor) -> Ticket:
    start = 0
    for piece in pieces:
        length = min(len(piece), size - start)
        copies.copy(piece[:length], slot[start : start + length])
        start += length
        if start == size:
            break
    return copies.mark()


class PinnedHost:
    """Each block's bytes, in pinned memory."""

    def __init__(self, layouts: dict[int, Layout], device: torch.device, copies: SideStream, check: Check):
        self._copies, self._layouts = copies, layouts
        self._packed: dict[int, list[torch.Tensor]] = {}
        for index, layout in layouts.items():
            check()
            self._packed[index] = pinned_pieces(layout.size, device)
            layout.pack(self._packed[index])

    def start(self, index: int, number: int, slot: torch.Tensor) -> Arrival:
        ticket = send(self._copies, self._packed[index], self._layouts[index].size, slot)
        return lambda: ticket

    def close(self) -> None:
        self._packed.clear()


class MappedFile:
    """Reads a block's bytes anew each time, in a thread, so that the disk too works beside the device."""

    def __init__(self, layouts: dict[int, Layout], device: torch.device, copies: SideStream, check: Check):
        self._copies, self._layouts, self._check = copies, layouts, check
        largest = max(layout.size for layout in layouts.values())
        slots = range(min(SLOTS, len(layouts)))
        self._staging = [pinned_pieces(largest, device) for _ in slots]
        self._sent: list[Ticket] = [None for _ in slots]
        self._worker = ThreadPoolExecutor(1, "mochi-blocks")

    def start(self, index: int, number: int, slot: torch.Tensor) -> Arrival:
        future = self._worker.submit(self._read, index, number, slot)

        def arrive() -> Ticket:
            ticket = future.result()
            # Without streams only the caller's thread may touch the device.
            return ticket if self._copies.overlaps else self._send(index, number, slot)

        return arrive

    def _read(self, index: int, number: int, slot: torch.Tensor) -> Ticket:
        # Computing waits for copies on the device only: the host may be far ahead of them.
        if self._sent[number] is not None:
            self._copies.finish(self._sent[number])
        self._check()
        self._layouts[index].pack(self._staging[number])
        if self._copies.overlaps:
            self._sent[number] = self._send(index, number, slot)
        return self._sent[number]

    def _send(self, index: int, number: int, slot: torch.Tensor) -> Ticket:
        return send(self._copies, self._staging[number], self._layouts[index].size, slot)

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._staging.clear()
