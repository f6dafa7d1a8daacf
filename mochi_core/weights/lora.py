"""LoRA on a finished network: branches beside its linear layers, put on and taken off without a trace.

The layer's own weight is never touched, so any format of it will do, order means nothing, and what is taken off leaves
every bit as it was.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import LoraError
from .lora_file import Lora, LowRank
from .quantized import QuantizedLinear

WeightOf = Callable[[nn.Module], torch.Tensor]


@dataclass(frozen=True)
class Branch:
    """What one layer gets: the sum of its low-rank changes, each with its strength."""

    changes: tuple[tuple[LowRank, float], ...]

    def __call__(self, layer: nn.Module, x: torch.Tensor, weight_of: WeightOf) -> torch.Tensor:
        """What to add to the layer's output for `x`: `... I` -> `... O`."""
        added = None
        for change, strength in self.changes:
            if change.magnitude is None:
                inner = F.linear(x, change.down.to(x)) * (strength * change.scale)
                one = F.linear(inner, change.up.to(x))
            else:
                weight = weight_of(layer).to(x.device, torch.float32)
                one = F.linear(x, (dora_difference(change, weight) * strength).to(x.dtype))
            added = one if added is None else added + one
        assert added is not None
        return added


def dora_difference(change: LowRank, weight: torch.Tensor) -> torch.Tensor:
    """By how much DoRA changes a weight (`O I`, float32): the sum gets rows of the trained lengths."""
    assert change.magnitude is not None
    down, up, magnitude = (x.to(weight) for x in (change.down, change.up, change.magnitude))
    moved = weight + change.scale * (up @ down)
    length = torch.linalg.vector_norm(moved, dim=1, keepdim=True).clamp(min=torch.finfo(moved.dtype).tiny)
    return moved * (magnitude[:, None] / length) - weight


def own_weight(layer: nn.Module) -> torch.Tensor:
    """The weight of a layer of torch's or of this library's as floats, `O I`."""
    return layer.dequantized(torch.float32) if isinstance(layer, QuantizedLinear) else layer.weight  # pyright: ignore


def branches(loras: Sequence[tuple[Lora, float]]) -> dict[str, Branch]:
    """What each layer gets from several LoRAs at their strengths; a strength of zero adds nothing."""
    changes: dict[str, tuple[tuple[LowRank, float], ...]] = {}
    for lora, strength in loras:
        if strength:
            for name, change in lora.layers.items():
                changes[name] = (*changes.get(name, ()), (change, strength))
    return {name: Branch(held) for name, held in changes.items()}


@contextmanager
def attached(network: nn.Module, by_layer: Mapping[str, Branch], weight_of: WeightOf = own_weight) -> Iterator[None]:
    """The network with branches beside its layers, as long as the block runs.

    Whoever else runs the same network meanwhile, in another thread, has them too. `weight_of` gives a layer's weight as
    floats, for DoRA.

    Raises `LoraError` when the network has no layer of a name.
    """
    handles = []
    try:
        for name, branch in by_layer.items():
            try:
                layer = network.get_submodule(name)
            except AttributeError as error:
                raise LoraError(
                    f"The LoRA changes {name}", f"{type(network).__name__} has no such layer", "Choose another LoRA"
                ) from error
            handles.append(layer.register_forward_hook(_hook(branch, weight_of)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(branch: Branch, weight_of: WeightOf) -> Any:
    def add(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + branch(layer, inputs[0], weight_of)

    return add
