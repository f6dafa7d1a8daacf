"""Writing safetensors a tensor at a time: the file appears whole under its name, or not at all."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from .files import TYPE_NAMES

ALIGNMENT = 8
DTYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}


@dataclass(frozen=True)
class Output:
    """A tensor to write: its place in the file is known before `load` makes it. `kind` is safetensors' type name."""

    name: str
    kind: str
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        count = DTYPES[self.kind].itemsize
        for length in self.shape:
            count *= length
        return count


def write_safetensors(
    path: Path, outputs: Iterable[Output], metadata: Mapping[str, str], done: Callable[[Output], None] = lambda _: None
) -> None:
    """Writes the file in memory of about one tensor; `done` is told of each that was written.

    Whatever fails, what was at `path` before is still there, and no part of a file is left behind.
    """
    # Wide types first, so that each tensor lies at a multiple of its item.
    ordered = sorted(outputs, key=lambda output: (-DTYPES[output.kind].itemsize, output.name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for output in ordered:
        stop = position + output.bytes
        header[output.name] = {"dtype": output.kind, "shape": output.shape, "data_offsets": (position, stop)}
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)

    with _appearing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for output in ordered:
            tensor = output.load()
            expected = (DTYPES[output.kind], output.shape)
            if (tensor.dtype, tuple(tensor.shape)) != expected:
                raise RuntimeError(f"{output.name} is {tensor.dtype} {tuple(tensor.shape)}, promised was {expected}")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            done(output)


def write_whole(path: Path, content: bytes) -> None:
    """A small file, whole or not at all."""
    with _appearing(path) as file:
        file.write(content)


@contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its place when the block has ended well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
