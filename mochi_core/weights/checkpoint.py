"""A weight file as the loaders see it, whatever its format: its metadata and its weights, read when asked for."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import WeightsError
from . import files, formats
from .formats import Entry, Weight
from .quantized import QuantizedLinear

# How many names an error lists before it counts the rest.
NAMES_SHOWN = 8


class Checkpoint:
    """An open file or folder: `entries` are its weights by name, each with its shape, none of them read yet."""

    def __init__(self, path: str | Path):
        """Opens and checks the header. Raises `WeightsError` when `path` is nothing that holds weights."""
        self.path = Path(path)
        reader = files.opened(self.path)
        self.metadata: Mapping[str, str] = reader.metadata
        self.entries: dict[str, Entry] = formats.entries(reader, str(self.path))
        self.names = tuple(self.entries)

    def tensor(self, name: str) -> Weight:
        """The weight called `name`, as it is stored; plain ones are mapped from the file."""
        return self.entries[name].load()

    def json_metadata(self, name: str) -> Any | None:
        """A metadata value parsed as JSON, None when absent. Raises `WeightsError` when it is not JSON."""
        if name not in self.metadata:
            return None
        try:
            return json.loads(self.metadata[name])
        except (ValueError, RecursionError) as error:
            raise WeightsError(
                f"{self.path}: the metadata {name!r} cannot be read ({error})", "it must be JSON", "Download it again"
            ) from error


def fill(
    module: nn.Module,
    weights: Mapping[str, Weight],
    source: str,
    dtype: torch.dtype | None = None,
    keep_quantized: bool = True,
) -> None:
    """Makes `weights` the parameters of `module` (usually on the meta device), without copying.

    Plain weights are cast if `dtype` differs. With `keep_quantized`, linear layers whose weight is quantised are
    replaced by `QuantizedLinear`; every other quantised weight is turned into floats.

    Raises `WeightsError` that names every kind of mismatch: missing, unknown and mis-shaped. `source` is for it.
    """
    check_names(module, {name: tuple(weight.shape) for name, weight in weights.items()}, source)
    check_floating({name: formats.kind_of(weight) for name, weight in weights.items()}, source)
    kept = {
        name: weight
        for name, weight in weights.items()
        if keep_quantized
        and name.endswith(".weight")
        and formats.is_quantized(weight)
        and isinstance(module.get_submodule(name.rpartition(".")[0]), nn.Linear)
    }
    plain = {name: formats.plain(weight, dtype) for name, weight in weights.items() if name not in kept}
    for name, weight in kept.items():
        layer_name = name.removesuffix(".weight")
        bias = plain.pop(f"{layer_name}.bias", None)
        replace(module, layer_name, QuantizedLinear(weight, bias))
    module.load_state_dict(plain, assign=True, strict=not kept)
    module.requires_grad_(False)


def replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts `layer` in the place of the submodule called `name`."""
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, layer)


def check_names(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raises `WeightsError` unless `shapes` has exactly the names and shapes that `module` expects."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = [
        listing("missing", sorted(expected.keys() - shapes.keys())),
        listing("unknown", sorted(shapes.keys() - expected.keys())),
        listing(
            "of a wrong shape",
            [
                f"{name} {shapes[name]} instead of {shape}"
                for name, shape in expected.items()
                if name in shapes and shapes[name] != shape
            ],
        ),
    ]
    problems = [problem for problem in problems if problem]
    if problems:
        raise WeightsError(
            f"{source} does not fit {type(module).__name__}: {'; '.join(problems)}",
            "a file must hold every tensor of the model, in its shape, and no others",
            "Choose the file that belongs here; if it is the right one, it is incomplete: download it again",
        )


def check_floating(kinds: Mapping[str, str], source: str) -> None:
    """Raises `WeightsError` when a weight is of a type that no format of floats has. `kinds` are `Entry.kind`."""
    others = [f"{name} in {kind}" for name, kind in kinds.items() if not formats.is_floating(kind)]
    if others:
        raise WeightsError(
            f"{source} has weights that are whole numbers or of an unknown kind: {listing('such', others)}",
            "weights must be floating point",
            "It may be packed by a quantiser this version does not read: get the file unpacked",
        )


def listing(kind: str, names: Iterable[str]) -> str:
    """`3 missing (a, b, c)`, the first few by name; empty when there are none."""
    names = list(names)
    if not names:
        return ""
    rest = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{len(names)} {kind} ({', '.join(names[:NAMES_SHOWN])}{rest})"
