"""A network whose blocks do not all fit on the device: some stay there, the others come when it is their turn.

A streamed block's weights are bytes one after the other on the host. They are copied as a whole into one of two slots
on the device, and the weights are views of the slot. While a block computes in one slot, the next one's bytes arrive in
the other: the copies hide behind the work, nothing is allocated on the way, and the peak is known beforehand.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ..errors import MochiError
from .borrowing import Check, Weight, borrowed, exact, move, no_check, weights_of
from .copies import SideStream
from .turns import Streamer, Traffic
from .waiting import SLOTS, Layout, MappedFile, PinnedHost, Source, aligned


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
    device, check = exact(device), check or no_check
    with borrowed(network) as weights, ExitStack() as stack:
        layouts = _layouts(blocks, resident)
        if copies is None and all(weight.original.device == device for weight in weights):
            layouts = {}
        move(_staying(weights, layouts), device, check)
        traffic = Traffic(resident=len(blocks) - len(layouts), most=len(blocks) - len(layouts))
        if layouts:
            copies = copies or SideStream(device)
            kind = PinnedHost if source == "pinned" else MappedFile
            streamer = Streamer(layouts, len(blocks), device, kind(layouts, device, copies, check), copies, traffic)
            stack.callback(streamer.close)
            for index, block in enumerate(blocks):
                for hook in streamer.hooks(index, block):
                    stack.callback(hook.remove)
            streamer.prefetch()
        yield traffic


def block_bytes(blocks: Iterable[nn.Module]) -> list[int]:
    """What the weights of each block take on a device."""
    return [Layout(block).size for block in blocks]


def device_bytes(network: nn.Module, blocks: Sequence[nn.Module], resident: int) -> int:
    """What the weights take on the device while the network is `streamed` with so many resident blocks."""
    layouts = _layouts(blocks, resident)
    staying = {id(weight.original): weight.original for weight in _staying(weights_of(network), layouts)}
    largest = max((layout.size for layout in layouts.values()), default=0)
    return sum(aligned(tensor.nbytes) for tensor in staying.values()) + min(SLOTS, len(layouts)) * largest


def spread(count: int, resident: int) -> list[int]:
    """Which of `count` blocks are streamed so that `resident` are not: they lie as evenly as can be.

    Between two of them there is always about the same work, which is the time a copy has. With the resident blocks all
    in one place the copies would have to keep up with the device elsewhere, and idle there, as no slot is free.
    """
    moving = max(count - resident, 0)
    return [(2 * i + 1) * count // (2 * moving) for i in range(moving)]


def _layouts(blocks: Sequence[nn.Module], resident: int) -> dict[int, Layout]:
    return {index: Layout(blocks[index]) for index in spread(len(blocks), resident)}


def _staying(weights: Iterable[Weight], layouts: dict[int, Layout]) -> list[Weight]:
    leaving = {weight.key for layout in layouts.values() for weight in layout.weights}
    return [weight for weight in weights if weight.key not in leaving]
