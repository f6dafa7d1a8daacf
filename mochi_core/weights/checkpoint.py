"""Reading safetensors files without copying them: tensors are views of the mapped file until someone changes them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import WeightsError

# How many names an error lists before it counts the rest.
NAMES_SHOWN = 8


class Checkpoint:
    """An open safetensors file: its tensor names, its metadata, its tensors on demand."""

    def __init__(self, path: str | Path):
        """Opens and checks the header. Raises `WeightsError` when `path` is no readable safetensors file."""
        self.path = Path(path)
        if not self.path.is_file():
            raise WeightsError(
                f"{self.path} does not exist or is no file",
                "a weight file must be a safetensors file",
                "Check the path, or download the file again",
            )
        try:
            self._file = safe_open(self.path, framework="pt")
            self.names = tuple(self._file.keys())
            self.metadata: Mapping[str, str] = self._file.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightsError(
                f"{self.path} ({self.path.stat().st_size} bytes) cannot be read: {error}",
                "a weight file must be a whole safetensors file",
                "It may be truncated or of another format: download it again",
            ) from error

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor called `name`, mapped from the file."""
        return self._file.get_tensor(name)

    def json_metadata(self, name: str) -> Any | None:
        """A metadata value parsed as JSON, None when absent. Raises `WeightsError` when it is not JSON."""
        if name not in self.metadata:
            return None
        try:
            return json.loads(self.metadata[name])
        except ValueError as error:
            raise WeightsError(
                f"{self.path}: the metadata {name!r} cannot be read ({error})", "it must be JSON", "Download it again"
            ) from error

    def tensors(self, prefix: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """All tensors whose name starts with `prefix`, by the rest of their name; cast only if `dtype` differs."""
        return {
            name[len(prefix) :]: self.tensor(name).to(dtype) if dtype else self.tensor(name)
            for name in self.names
            if name.startswith(prefix)
        }


def fill(module: nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Makes `tensors` the parameters of `module` (usually on the meta device), without copying.

    Raises `WeightsError` that names every kind of mismatch: missing, unknown and mis-shaped. `source` is for it.
    """
    check_names(module, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, source)
    whole_numbers = [name for name, tensor in tensors.items() if not tensor.dtype.is_floating_point]
    if whole_numbers:
        raise WeightsError(
            f"{source} has weights that are whole numbers: {listing('such', whole_numbers)}",
            "weights must be floating point",
            "It may be packed by a quantiser this version does not read: get the file unpacked",
        )
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(False)


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


def listing(kind: str, names: Iterable[str]) -> str:
    """`3 missing (a, b, c)`, the first few by name; empty when there are none."""
    names = list(names)
    if not names:
        return ""
    rest = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{len(names)} {kind} ({', '.join(names[:NAMES_SHOWN])}{rest})"
