"""Reading GGUF files that nobody vouches for, without copying them: tensors are views of the mapped file.

The header is read here and not by the gguf package's reader, which believes every count in it: an array of 2^62 numbers
keeps it busy for ever, and an offset can point back into the header. Here nothing is allocated by a size that the
file names before the file has been seen to be that long. What the types of tensors are called, how large their blocks
are, and how to unpack those that `blocks.py` does not keep, is the gguf package's knowledge.
"""

import json
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import WeightsError
from .blocks import BLOCK_FORMATS, Packed, dequantize

MAGIC = b"GGUF"
VERSIONS = (2, 3)

# Far above what any file has (a vocabulary in a header is some 10 MB), and low enough to read within seconds.
LARGEST_HEADER = 64 * 2**20
MOST_ENTRIES = 2**16
MOST_DIMENSIONS = 8

DEFAULT_ALIGNMENT = 32

# The numbers of metadata types, and how `struct` calls them.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING = 8
ARRAY = 9

# What the shortest key with a value, tensor entry, text and array take in the header.
SHORTEST_VALUE = 13
SHORTEST_TENSOR = 24
SHORTEST_TEXT = 8
SHORTEST_ARRAY = 12

# Types that torch has.
PLAIN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
}


class _Broken(Exception):
    """What is wrong with a header."""


@dataclass(frozen=True)
class _Entry:
    """Where a tensor is: `start` and `size` in bytes of the file, `shape` with rows first."""

    type_name: str
    shape: tuple[int, ...]
    start: int
    size: int


class GGUFFile:
    """An open GGUF file: its tensor names, its metadata (texts and numbers, no arrays), its tensors on demand."""

    def __init__(self, path: str | Path):
        """Opens the file and checks its header.

        Raises `WeightsError` when `path` is no whole GGUF file, when it has a type of weights that cannot be unpacked,
        and when the gguf package is missing.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise WeightsError(
                f"{self.path} does not exist or is no file",
                "a GGUF file is needed here",
                "Check the path, or download the file again",
            )
        try:
            with self.path.open("rb") as file:
                magic = file.read(len(MAGIC))
                if magic != MAGIC:
                    raise _Broken(f"it begins with {magic!r} instead of {MAGIC!r}")
                self._gguf = _import_gguf(self.path)
                # Changes to a tensor stay in memory: the mapping is private.
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            values, self._entries = _read_header(self._mapped, self._gguf)
        except (_Broken, OSError) as error:
            raise WeightsError(
                f"{self.path} ({self.path.stat().st_size} bytes) cannot be read: {error}",
                "it must be a whole GGUF file, little-endian, of version 2 or 3",
                "It may be truncated or of another format: download it again",
            ) from error
        self._check_types()
        self.names = tuple(self._entries)
        self.metadata: Mapping[str, str] = {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in values.items()
            if value is not None
        }

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, rows first as torch has it, in weights."""
        return self._entries[name].shape

    def type_name(self, name: str) -> str:
        """How a tensor is stored: `F32`, `BF16`, `Q4_K`."""
        return self._entries[name].type_name

    def tensor(self, name: str) -> torch.Tensor | Packed:
        """A tensor, mapped from the file where it can stay as it is stored.

        That is so for plain numbers and for matrices in one of `BLOCK_FORMATS`; the rest is unpacked to float32.
        Raises `WeightsError` when the file has become shorter since it was opened.
        """
        entry = self._entries[name]
        # Touching a mapped page that the file no longer has would end the process.
        if self._mapped.size() < len(self._mapped):
            raise WeightsError(
                f"{self.path} has become shorter since it was opened",
                "a weight file must stay as it is while it is in use",
                "Wait until whatever writes it is done, and load it again",
            )
        stored = np.frombuffer(self._mapped, np.uint8, entry.size, entry.start)
        if entry.type_name in PLAIN:
            return torch.from_numpy(stored).view(PLAIN[entry.type_name]).view(entry.shape)
        rows = stored.reshape(math.prod(entry.shape[:-1]), -1)
        format = BLOCK_FORMATS.get(entry.type_name)
        if format is None:
            return torch.from_numpy(self._unpacked(rows, entry.type_name)).view(entry.shape)
        if len(entry.shape) == 2:
            return Packed(torch.from_numpy(rows), format)
        return dequantize(torch.from_numpy(rows), format, torch.float32).view(entry.shape)

    def _unpacked(self, rows: np.ndarray, type_name: str) -> np.ndarray:
        """Rows of bytes as float32, by the gguf package. Raises `NotImplementedError` when it cannot."""
        # Scales that are no numbers give weights that are no numbers, which is no news for a console.
        with np.errstate(all="ignore"):
            return self._gguf.quants.dequantize(rows, self._gguf.GGMLQuantizationType[type_name])

    def _check_types(self) -> None:
        """Raises `WeightsError` when a tensor has a type that nobody here can unpack, before anything is loaded."""
        for type_name in {entry.type_name for entry in self._entries.values()} - PLAIN.keys() - BLOCK_FORMATS.keys():
            _, block_bytes = self._gguf.GGML_QUANT_SIZES[self._gguf.GGMLQuantizationType[type_name]]
            try:
                self._unpacked(np.zeros((1, block_bytes), np.uint8), type_name)
            except NotImplementedError as error:
                raise WeightsError(
                    f"{self.path} has weights packed as {type_name}",
                    "the gguf package that is installed cannot unpack them",
                    f"Get the file in another format ({', '.join(BLOCK_FORMATS)}), or a newer gguf",
                ) from error


def _import_gguf(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise WeightsError(
            f"{path} is a GGUF file", "reading one needs the gguf package", "pip install gguf, then load the file again"
        ) from error
    return gguf


class _Cursor:
    """A place in the header that only moves on, and never beyond the header's largest possible end."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.place = 0
        self.end = min(len(data), LARGEST_HEADER)

    def skip(self, size: int) -> int:
        """Moves on by `size` bytes and returns where it was."""
        place = self.place
        if size > self.end - place:
            raise _Broken(f"its header does not end within its first {self.end} bytes")
        self.place += size
        return place

    def number(self, kind: str) -> Any:
        """The next number, of a kind that `struct` names."""
        layout = "<" + kind
        return struct.unpack_from(layout, self.data, self.skip(struct.calcsize(layout)))[0]

    def count(self, of: str, shortest: int, most: int) -> int:
        """How many things follow that take at least `shortest` bytes each: no more than `most`, or than fit."""
        count = self.number("Q")
        if count > min(most, (self.end - self.place) // shortest):
            raise _Broken(f"it claims to have {count} {of}")
        return count

    def text(self) -> str:
        size = self.number("Q")
        place = self.skip(size)
        try:
            return self.data[place : self.place].decode()
        except UnicodeDecodeError as error:
            raise _Broken(f"the text at byte {place} is not UTF-8") from error

    def skip_array(self) -> None:
        # Arrays of arrays are those arrays one after the other, however deep: it is enough to count what is to come.
        arrays = 1
        while arrays:
            arrays -= 1
            kind = self.number("I")
            if kind == ARRAY:
                arrays += self.count("arrays in an array", SHORTEST_ARRAY, LARGEST_HEADER)
            elif kind == STRING:
                for _ in range(self.count("texts in an array", SHORTEST_TEXT, LARGEST_HEADER)):
                    self.skip(self.number("Q"))
            else:
                size = struct.calcsize(_scalar(kind))
                self.skip(size * self.count("numbers in an array", size, LARGEST_HEADER))


def _scalar(kind: int) -> str:
    """How `struct` calls a metadata type."""
    if kind not in SCALARS:
        raise _Broken(f"it has a metadata type {kind}, which does not exist")
    return SCALARS[kind]


def _read_header(data: mmap.mmap, gguf: Any) -> tuple[dict[str, Any], dict[str, _Entry]]:
    """Metadata by key (None for arrays) and tensors by name, all checked to lie in the file."""
    cursor = _Cursor(data)
    cursor.skip(len(MAGIC))
    version = cursor.number("I")
    if version not in VERSIONS:
        raise _Broken(f"its version is {version}")
    tensors = cursor.count("tensors", SHORTEST_TENSOR, MOST_ENTRIES)
    keys = cursor.count("metadata keys", SHORTEST_VALUE, MOST_ENTRIES)

    values: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.text()
        if key in values:
            raise _Broken(f"it has the key {_shown(key)} twice")
        values[key] = _read_value(cursor)

    alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
    # Below 8, tensors could lie where their numbers cannot be read in place.
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise _Broken(f"general.alignment is {alignment}, which is no power of two from 8")

    relative: dict[str, _Entry] = {}
    for _ in range(tensors):
        name = cursor.text()
        if name in relative:
            raise _Broken(f"it has the tensor {_shown(name)} twice")
        relative[name] = _read_tensor(cursor, name, alignment, gguf)

    first = -(-cursor.place // alignment) * alignment
    entries = {
        name: _Entry(entry.type_name, entry.shape, first + entry.start, entry.size) for name, entry in relative.items()
    }
    _check_places(entries, len(data))
    return values, entries


def _read_value(cursor: _Cursor) -> str | int | float | bool | None:
    kind = cursor.number("I")
    if kind == ARRAY:
        return cursor.skip_array()
    return cursor.text() if kind == STRING else cursor.number(_scalar(kind))


def _read_tensor(cursor: _Cursor, name: str, alignment: int, gguf: Any) -> _Entry:
    """A tensor's entry, whose `start` counts from the first tensor."""
    dimensions = cursor.number("I")
    if dimensions > MOST_DIMENSIONS:
        raise _Broken(f"{_shown(name)} has {dimensions} dimensions")
    shape = tuple(reversed([cursor.number("Q") for _ in range(dimensions)]))
    if 0 in shape:
        raise _Broken(f"{_shown(name)} is empty: its shape is {shape}")
    kind = cursor.number("I")
    try:
        type_ = gguf.GGMLQuantizationType(kind)
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[type_]
    except (ValueError, KeyError) as error:
        raise _Broken(f"{_shown(name)} is of the type {kind}, which the gguf package does not know") from error
    columns = shape[-1] if shape else 1
    if columns % block_values:
        raise _Broken(f"{_shown(name)} has rows of {columns} weights, and blocks of {type_.name} have {block_values}")
    start = cursor.number("Q")
    if start % alignment:
        raise _Broken(f"{_shown(name)} begins at {start}, which is no multiple of {alignment}")
    return _Entry(type_.name, shape, start, math.prod(shape) // block_values * block_bytes)


def _check_places(entries: dict[str, _Entry], size: int) -> None:
    """Every tensor must end within the file's `size`, and have its bytes to itself."""
    # Tensors that share bytes would let a small file unpack to any amount of memory.
    end_before = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        end = entry.start + entry.size
        if end > size:
            raise _Broken(f"{_shown(name)} would end at byte {end}")
        if entry.start < end_before:
            raise _Broken(f"{_shown(name)} overlaps with another tensor")
        end_before = end


def _shown(name: str) -> str:
    """A name for a message, however long it is."""
    return repr(name[:80])
