"""A network's weights replaced for a time, by copies on a device or by others, and put back as they were."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from ..errors import MochiError

# Called before weights are read; raises when they must not be.
Check = Callable[[], Any]


@contextmanager
def on_device(network: nn.Module, device: torch.device | str, *, check: Check | None = None) -> Iterator[None]:
    """The network is wholly on `device` as long as the block runs; then it has its own tensors again, uncopied.

    `check`, errors and the rest as for `streamed`.
    """
    with borrowed(network) as weights:
        move(weights, exact(device), check or no_check)
        yield


@dataclass(frozen=True)
class Weight:
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


def weights_of(module: nn.Module) -> list[Weight]:
    return [
        Weight(entries, name, tensor)
        for part in module.modules()
        for entries in (part._parameters, part._buffers)
        for name, tensor in entries.items()
        if tensor is not None
    ]


_in_use: WeakSet[nn.Module] = WeakSet()


@contextmanager
def borrowed(network: nn.Module) -> Iterator[list[Weight]]:
    """The network's weights, to be replaced as one likes; afterwards they are what they were."""
    if network in _in_use:
        raise MochiError(
            f"This {type(network).__name__} is being moved or streamed to a device already",
            "a network can be in one place at a time",
            "Leave the first `with` before the second, or load the network twice",
        )
    _in_use.add(network)
    weights = weights_of(network)
    try:
        yield weights
    finally:
        for weight in weights:
            weight.put_back()
        _in_use.discard(network)


@torch.no_grad()
def move(weights: Iterable[Weight], device: torch.device, check: Check) -> None:
    check()
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


def no_check() -> None:
    pass


def exact(device: torch.device | str) -> torch.device:
    """With its index, as tensors have it."""
    return torch.empty(0, device=device).device
