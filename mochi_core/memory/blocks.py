"""A network whose blocks do not all fit on the device: some stay there, the others come when it is their turn.

A streamed block's weights are bytes one after the other on the host. They are copied as a whole into one of two slots
on the device, and the weights are views of the slot. While a block computes in one slot, the next one's bytes arrive in
the other: the copies hide behind the work, nothing is allocated on the way, and the peak is known beforehand.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from weakref import WeakSet

import torch
from torch import nn

from ..errors import MochiError
from .copies import SideStream, Ticket, pinned_pieces

Source = Literal["pinned", "file"]
Check = Callable[[], Any]

SLOTS = 2
# Device allocators round to this, and no kernel asks for more.
ALIGNMENT = 512
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


@contextmanager
def streamed(
    network: nn.Module,
    blocks: Sequence[nn.Module],
    device: torch.device | str,
    *,
    resident: int,
    source: Source = "pinned",
    check: Check | None = None,
    copies: SideStream | None = None,
) -> Iterator[Traffic]:
    """The network computes on `device` as long as the block runs, with `resident` of its blocks' weights there.

    `blocks` are modules of the network in the order they run. What is in none of them is on the device too, and so are
    trainable weights, which must be there before. `source` says where streamed weights wait: `pinned` keeps them in
    host memory that copies fast; `file` reads them again each time, which is for weights that are mapped from a file
    and a host with little memory. `check` is called before weights are read: give it `Unchanged`, as a mapped file that
    became shorter ends the process when it is read. `copies` is what copies; when given, blocks are streamed even when
    everything lies on `device` anyhow.

    Blocks may run in any order, forwards or backwards. For gradients each streamed block must be checkpointed by itself
    (`torch.utils.checkpoint`). Afterwards, also after an error or an interruption, the network has the tensors it had.
    It is for one caller: not for two threads at a time.

    Raises `MochiError` when the network is on a device by this means already, when `resident` is negative, or when
    trainable weights are elsewhere; when a block is run, if gradients still need weights that must make room; and
    whatever `check` raises, in both places.
    """
    if resident < 0:
        raise MochiError(f"{resident} blocks shall stay on the device", "there cannot be less than none", "Ask for 0")
    device, check = _exact(device), check or _no_check
    with _borrowed(network) as weights, ExitStack() as stack:
        layouts = _layouts(blocks, resident)
        if copies is None and all(weight.original.device == device for weight in weights):
            layouts = {}
        _move(_staying(weights, layouts), device, check)
        traffic = Traffic(resident=len(blocks) - len(layouts), most=len(blocks) - len(layouts))
        if layouts:
            copies = copies or SideStream(device)
            kind = _PinnedHost if source == "pinned" else _MappedFile
            streamer = _Streamer(layouts, len(blocks), device, kind(layouts, device, copies, check), copies, traffic)
            stack.callback(streamer.close)
            for index, block in enumerate(blocks):
                for hook in streamer.hooks(index, block):
                    stack.callback(hook.remove)
            streamer.prefetch()
        yield traffic


@contextmanager
def on_device(network: nn.Module, device: torch.device | str, *, check: Check | None = None) -> Iterator[None]:
    """The network is wholly on `device` as long as the block runs; then it has its own tensors again, uncopied.

    `check`, errors and the rest as for `streamed`.
    """
    with _borrowed(network) as weights:
        _move(weights, _exact(device), check or _no_check)
        yield


def block_bytes(blocks: Iterable[nn.Module]) -> list[int]:
    """What the weights of each block take on a device."""
    return [_Layout(block).size for block in blocks]


def device_bytes(network: nn.Module, blocks: Sequence[nn.Module], resident: int) -> int:
    """What the weights take on the device while the network is `streamed` with so many resident blocks."""
    layouts = _layouts(blocks, resident)
    staying = {id(weight.original): weight.original for weight in _staying(_weights(network), layouts)}
    largest = max((layout.size for layout in layouts.values()), default=0)
    return sum(_aligned(tensor.nbytes) for tensor in staying.values()) + min(SLOTS, len(layouts)) * largest


def spread(count: int, resident: int) -> list[int]:
    """Which of `count` blocks are streamed so that `resident` are not: they lie as evenly as can be.

    Between two of them there is always about the same work, which is the time a copy has. With the resident blocks all
    in one place the copies would have to keep up with the device elsewhere, and idle there, as no slot is free.
    """
    moving = max(count - resident, 0)
    return [(2 * i + 1) * count // (2 * moving) for i in range(moving)]


# Weights


@dataclass(frozen=True)
class _Weight:
    """A name that a module has for a tensor; a tied one has several."""

    entries: dict[str, Any]
    name: str
    original: torch.Tensor

    @property
    def key(self) -> tuple[int, str]:
        return id(self.entries), self.name

    def wrapped(self, tensor: torch.Tensor) -> torch.Tensor:
        """A parameter if the original is one."""
        return nn.Parameter(tensor, requires_grad=False) if isinstance(self.original, nn.Parameter) else tensor

    def put(self, tensor: torch.Tensor) -> None:
        self.entries[self.name] = tensor

    def put_back(self) -> None:
        self.entries[self.name] = self.original


def _weights(module: nn.Module) -> list[_Weight]:
    return [
        _Weight(entries, name, tensor)
        for part in module.modules()
        for entries in (part._parameters, part._buffers)
        for name, tensor in entries.items()
        if tensor is not None
    ]


class _Layout:
    """A block's weights as bytes one after the other. Trainable ones are left out: a copy would learn nothing."""

    def __init__(self, block: nn.Module):
        self.weights = [weight for weight in _weights(block) if not weight.original.requires_grad]
        self.offsets: dict[int, int] = {}
        self.size = 0
        for weight in self.weights:
            if id(weight.original) not in self.offsets:
                self.offsets[id(weight.original)] = self.size
                self.size += _aligned(weight.original.nbytes)

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


def _layouts(blocks: Sequence[nn.Module], resident: int) -> dict[int, _Layout]:
    return {index: _Layout(blocks[index]) for index in spread(len(blocks), resident)}


def _staying(weights: Iterable[_Weight], layouts: dict[int, _Layout]) -> list[_Weight]:
    leaving = {weight.key for layout in layouts.values() for weight in layout.weights}
    return [weight for weight in weights if weight.key not in leaving]


_in_use: WeakSet[nn.Module] = WeakSet()


@contextmanager
def _borrowed(network: nn.Module) -> Iterator[list[_Weight]]:
    """The network's weights, to be replaced as one likes; afterwards they are what they were."""
    if network in _in_use:
        raise MochiError(
            f"This {type(network).__name__} is being moved or streamed to a device already",
            "a network can be in one place at a time",
            "Leave the first `with` before the second, or load the network twice",
        )
    _in_use.add(network)
    weights = _weights(network)
    try:
        yield weights
    finally:
        for weight in weights:
            weight.put_back()
        _in_use.discard(network)


@torch.no_grad()
def _move(weights: Iterable[_Weight], device: torch.device, check: Check) -> None:
    moved: dict[int, torch.Tensor] = {}
    for weight in weights:
        original = weight.original
        if original.device == device:
            continue
        if original.requires_grad:
            raise MochiError(
                f"The weight {weight.name} is trainable and on {original.device}",
                f"what is copied to {device} for a time learns nothing",
                "Freeze it (requires_grad_(False)), or move it there for good",
            )
        if id(original) not in moved:
            check()
            # What is made in inference mode could not be used to train something else.
            with torch.inference_mode(False):
                moved[id(original)] = weight.wrapped(original.detach().to(device))
        weight.put(moved[id(original)])


def _no_check() -> None:
    pass


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _exact(device: torch.device | str) -> torch.device:
    """With its index, as tensors have it."""
    return torch.empty(0, device=device).device


# Where streamed weights wait

Arrival = Callable[[], Ticket]


class _Host(Protocol):
    def start(self, index: int, number: int, slot: torch.Tensor) -> Arrival:
        """Starts to bring a block's bytes into a slot. What it returns gives the ticket to wait for, or raises."""
        ...

    def close(self) -> None: ...


def _send(copies: SideStream, pieces: Iterable[torch.Tensor], size: int, slot: torch.Tensor) -> Ticket:
    start = 0
    for piece in pieces:
        length = min(len(piece), size - start)
        copies.copy(piece[:length], slot[start : start + length])
        start += length
        if start == size:
            break
    return copies.mark()


class _PinnedHost:
    """Each block's bytes, in pinned memory."""

    def __init__(self, layouts: dict[int, _Layout], device: torch.device, copies: SideStream, check: Check):
        self._copies, self._layouts = copies, layouts
        self._packed: dict[int, list[torch.Tensor]] = {}
        for index, layout in layouts.items():
            check()
            self._packed[index] = pinned_pieces(layout.size, device)
            layout.pack(self._packed[index])

    def start(self, index: int, number: int, slot: torch.Tensor) -> Arrival:
        ticket = _send(self._copies, self._packed[index], self._layouts[index].size, slot)
        return lambda: ticket

    def close(self) -> None:
        self._packed.clear()


class _MappedFile:
    """Reads a block's bytes anew each time, in a thread, so that the disk too works beside the device."""

    def __init__(self, layouts: dict[int, _Layout], device: torch.device, copies: SideStream, check: Check):
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
        return _send(self._copies, self._staging[number], self._layouts[index].size, slot)

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._staging.clear()


# Taking turns


@dataclass
class _Slot:
    bytes: torch.Tensor
    block: int | None = None
    arrival: Arrival | None = None
    ticket: Ticket = None


class _Streamer:
    """Knows which block is in which slot, which comes next, and puts weights in and out around each block."""

    def __init__(
        self,
        layouts: dict[int, _Layout],
        count: int,
        device: torch.device,
        host: _Host,
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
        self._in_place: _Layout | None = None
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
