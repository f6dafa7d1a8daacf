"""Which block is in which slot, and which comes next: weights go in and out around each block."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import MochiError
from .copies import SideStream, Ticket
from .waiting import SLOTS, Arrival, Host, Layout

# Training runs for days; what is looked at is the last few steps.
COPIES_REMEMBERED = 1000


@dataclass
class Traffic:
    """What streaming did so far: for reports and tests.

    `resident` blocks stay on the device, `in_slots` are there on their turn or on their way; `most` is the highest
    number of both together. `order` are the indices of the blocks copied last, `bytes_copied` counts them all.
    """

    resident: int
    in_slots: int = 0
    most: int = 0
    order: deque[int] = field(default_factory=lambda: deque(maxlen=COPIES_REMEMBERED))
    bytes_copied: int = 0

    @property
    def on_device(self) -> int:
        """How many blocks have their weights on the device now."""
        return self.resident + self.in_slots


@dataclass
class _Slot:
    bytes: torch.Tensor
    block: int | None = None
    arrival: Arrival | None = None
    ticket: Ticket = None


class Streamer:
    """Knows which block is in which slot, which comes next, and puts weights in and out around each block."""

    def __init__(
        self,
        layouts: dict[int, Layout],
        count: int,
        device: torch.device,
        host: Host,
        copies: SideStream,
        traffic: Traffic,
    ):
        self._layouts, self._count, self._host, self._copies, self._traffic = layouts, count, host, copies, traffic
        largest = max(layout.size for layout in layouts.values())
        with torch.inference_mode(False):
            self._slots = [
                _Slot(torch.empty(largest, dtype=torch.uint8, device=device)) for _ in range(min(SLOTS, len(layouts)))
            ]
        self._own_uses = _uses(self._slots[0].bytes)
        self._in_place: Layout | None = None
        # As if a forward had just ended.
        self._last, self._step = count - 1, 1

    def hooks(self, index: int, block: nn.Module) -> Iterator[Any]:
        """Puts hooks on a block; they are what can be removed.

        A resident block has one too: when it runs, the block before it has done with its slot.
        """
        # Other hooks on the block are to find its weights too: those before it, and those after it that are there now.
        yield block.register_forward_pre_hook(lambda *_: self._before(index), prepend=True)
        if index in self._layouts:
            yield block.register_forward_hook(lambda *_: self._put_back(), always_call=True)

    def prefetch(self) -> None:
        """Starts to bring the blocks that come next into the slots that the block which ran last is not in."""
        free = [number for number, slot in enumerate(self._slots) if slot.block != self._last or slot.block is None]
        wanted = self._upcoming()[: len(free)]
        missing = [index for index in wanted if self._number_of(index) is None]
        idle = [number for number in free if self._slots[number].block not in wanted]
        for index, number in zip(missing, idle):
            self._fetch(index, number)

    def close(self) -> None:
        """Leaves the block its own weights and the slots to whoever wants the memory next."""
        self._put_back()
        self._host.close()
        # The memory goes back to the stream that computes: what is still on its way must have arrived before.
        self._copies.wait(self._copies.mark())
        self._slots.clear()
        self._traffic.in_slots = 0

    def _before(self, index: int) -> None:
        # torch calls no hook after a block that was interrupted from the keyboard.
        self._put_back()
        self._turn(index)
        number = self._number_of(index)
        if index in self._layouts and number is None:
            wanted = self._upcoming()[: len(self._slots) - 1]
            number = next(n for n, slot in enumerate(self._slots) if slot.block not in wanted)
            self._fetch(index, number)
        self.prefetch()
        if number is not None:
            self._put(index, number)

    def _turn(self, index: int) -> None:
        """Notices that the blocks run backwards, as they do when a checkpointed network is differentiated."""
        if index == 0:
            self._step = 1
        elif index != self._last:
            self._step = 1 if index > self._last else -1
        elif index == self._count - 1:
            self._step = -1
        self._last = index

    def _upcoming(self) -> list[int]:
        """All other streamed blocks in the order in which they will presumably run."""
        later, earlier = range(self._last + 1, self._count), range(self._last)
        order = [*later, *earlier] if self._step > 0 else [*reversed(earlier), *later]
        return [index for index in order if index in self._layouts]

    def _number_of(self, index: int) -> int | None:
        return next((number for number, slot in enumerate(self._slots) if slot.block == index), None)

    def _fetch(self, index: int, number: int) -> None:
        slot = self._slots[number]
        was_used = slot.arrival is None
        if was_used and torch.is_grad_enabled() and _uses(slot.bytes) > self._own_uses:
            raise MochiError(
                f"Gradients still need the weights of block {slot.block}, in whose place those of block {index} come",
                "each streamed block must be checkpointed by itself",
                "Run each block under torch.utils.checkpoint, or the network without gradients",
            )
        slot.block = None
        self._copies.follow()
        with torch.inference_mode(False), torch.no_grad():
            slot.arrival = self._host.start(index, number, slot.bytes)
        slot.block = index
        traffic = self._traffic
        traffic.order.append(index)
        traffic.bytes_copied += self._layouts[index].size
        self._count_slots()

    def _put(self, index: int, number: int) -> None:
        slot = self._slots[number]
        if slot.arrival is not None:
            arrival, slot.arrival, slot.block = slot.arrival, None, None
            try:
                with torch.inference_mode(False), torch.no_grad():
                    slot.ticket = arrival()
                slot.block = index
            finally:
                self._count_slots()
        # Each time: it may run on another stream than before.
        self._copies.wait(slot.ticket)
        self._in_place = self._layouts[index]
        # Like the network's own: what is made in inference mode has no version, for one.
        with torch.inference_mode(False):
            self._in_place.put(slot.bytes)

    def _put_back(self) -> None:
        if self._in_place is not None:
            self._in_place.put_back()
            self._in_place = None

    def _count_slots(self) -> None:
        self._traffic.in_slots = sum(slot.block is not None for slot in self._slots)
        self._traffic.most = max(self._traffic.most, self._traffic.on_device)


def _uses(tensor: torch.Tensor) -> int:
    """How many tensors share a tensor's memory, those that autograd has saved among them.

    Checkpointing saves tensors in a way that torch does not notice writes to, and wrong gradients would be silent.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)  # private: without it the docstring's rule is only a rule
    return 0 if count is None else count(tensor.untyped_storage()._cdata)
