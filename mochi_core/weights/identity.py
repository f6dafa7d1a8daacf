"""What a file is known by: a hash of its content, or of enough of it."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..text.tokenizer import TOKENIZER_NAMES

# A file up to this size is known by all its bytes, a larger one by its size, its first and last bytes, where the header
# is, and samples between.
HASHED_WHOLE = 2 << 30
HASHED_HEADER, HASHED_SAMPLE, SAMPLES = 16 << 20, 1 << 20, 64
MODEL_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf", ".json", ".model")


def identity(path: Path) -> str:
    """What a model's file, or the files of its folder, is known by: `sha256:...`, or `sampled:...` of a large one."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in MODEL_SUFFIXES and file.is_file())
        named = [file for file in files if file.name in TOKENIZER_NAMES]
        return digest_of(*((str(file.relative_to(path)), identity(file)) for file in files or named))
    size = files[0].stat().st_size
    if size <= HASHED_WHOLE:
        return f"sha256:{sha256_of(path)}"
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for place, length in _samples(size):
            file.seek(place, os.SEEK_SET)
            found.update(file.read(length))
    return f"sampled:{found.hexdigest()}"


def _samples(size: int) -> Iterator[tuple[int, int]]:
    yield 0, HASHED_HEADER
    for number in range(SAMPLES):
        yield (size - HASHED_SAMPLE) * number // (SAMPLES - 1), HASHED_SAMPLE


def sha256_of(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def digest_of(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
