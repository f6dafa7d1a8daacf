"""The kinds of file that hold weights, told apart by their content: safetensors, GGUF, torch archives, folders of them.

Each reader has the same face: names, metadata as text, and each tensor's shape, type and data on demand. Nothing in a
file is trusted: no code in it runs, and no count in it is believed before it was compared with the file's size.
"""

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from ..errors import WeightsError
from .blocks import Packed

TORCH_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
INDEXES = ("*.safetensors.index.json", "*.bin.index.json")
# The parts of a diffusers pipeline, a folder each.
PIPELINE_FOLDERS = ("transformer", "vae", "text_encoder")
LARGEST_JSON = 32 << 20
LARGEST_METADATA = 1 << 16
# How many times the size of a torch archive its tensors may be together: some are there under several names.
MOST_SHARING = 4


class Reader(Protocol):
    """What a file holds. Shapes are logical, rows first; types are names such as `BF16` or `Q8_0`."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def type_name(self, name: str) -> str: ...
    def tensor(self, name: str) -> torch.Tensor | Packed: ...


def opened(path: str | Path) -> Reader:
    """A reader for a file or folder. Raises `WeightsError` when it is none that this library reads."""
    path = Path(path)
    if _is(path.is_dir):
        return Folder(path)
    if not _is(path.is_file):
        raise WeightsError(
            f"{path} does not exist or is no file",
            "a weight file must be a safetensors file, a GGUF file or a folder of shards",
            "Check the path, or download the file again",
        )
    with path.open("rb") as file:
        start = file.read(9)
    if path.name.endswith(".index.json"):
        return Folder(path.parent)
    if start.startswith(b"GGUF"):
        from .gguf_file import GGUFFile  # needs a package that not every machine has

        return GGUFFile(path)
    # A safetensors file starts with the length of its header, whose bytes may be any.
    if start.startswith(TORCH_MAGIC) and start[8:] != b"{":
        return TorchFile(path)
    return SafetensorsFile(path)


class Unchanged:
    """Remembers how a weight file, or each one of a folder, is; called, it raises when that is no longer so.

    Tensors are views of mapped files, and to read what a file no longer has ends the process. Whoever reads them long
    after opening calls this first. A file that becomes shorter between the call and the reading is not caught.
    """

    def __init__(self, path: str | Path):
        """Raises `WeightsError` when there is no file."""
        path = Path(path)
        folder = path.parent if path.name.endswith(".index.json") else path
        found = [path]
        if _is(folder.is_dir):
            parts = [file for name in PIPELINE_FOLDERS for file in _weight_files(folder / name)]
            found = _weight_files(folder) or parts
        self._seen = {file: _stamp(file) for file in found}

    def __call__(self) -> None:
        """Raises `WeightsError` when a file changed or is gone."""
        for file, (size, changed) in self._seen.items():
            now = _stamp(file)
            if now != (size, changed):
                was = f"{now[0]} bytes instead of {size}" if now[0] != size else "written anew"
                raise WeightsError(
                    f"{file} has changed since it was opened: {was}",
                    "a weight file must stay as it is while it is in use",
                    "Wait until whatever writes it is done, and load it again",
                )


def _stamp(file: Path) -> tuple[int, int]:
    """Size and time of the last change. Raises `WeightsError` when there is no such file."""
    try:
        status = file.stat()
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{file} is gone or cannot be reached ({error.strerror if isinstance(error, OSError) else error})",
            "a weight file must stay where it is while it is in use",
            "Put it back, or choose another, and load it again",
        ) from error
    return status.st_size, status.st_mtime_ns


def _is(check: Callable[[], bool]) -> bool:
    """What a path is; a name that no file can have, such as a very long one, is nothing."""
    try:
        return check()
    except (OSError, ValueError):
        return False


class SafetensorsFile:
    """A safetensors file; tensors are views of the mapped file."""

    def __init__(self, path: Path):
        self._path = path
        try:
            self._file = safe_open(path, framework="pt")
            self.names = tuple(self._file.keys())
            self.metadata: Mapping[str, str] = self._file.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightsError(
                f"{path} ({path.stat().st_size} bytes) cannot be read: {error}",
                "a weight file must be a whole safetensors file",
                "It may be truncated or of another format: download it again",
            ) from error

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def type_name(self, name: str) -> str:
        return self._file.get_slice(name).get_dtype()

    def tensor(self, name: str) -> torch.Tensor:
        try:
            return self._file.get_tensor(name)
        except SafetensorError as error:
            raise WeightsError(
                f"{self._path} has {name} in {self.type_name(name)} ({error})",
                "torch must have a type for each tensor",
                "Get the file in another format",
            ) from error


class TorchFile:
    """A torch archive (.pt, .bin, .ckpt), read by torch's restricted unpickler: what wants to run code is refused."""

    def __init__(self, path: Path):
        read: Callable[..., Any] = torch.load
        try:
            mapped = zipfile.is_zipfile(path)  # an archive of the old kind cannot be mapped
            if mapped:
                _refuse_squeezed(path)
            content = read(path, map_location="cpu", weights_only=True, mmap=mapped)
        except WeightsError:
            raise
        except Exception as error:  # the unpickler raises of every kind
            # torch puts its own advice in the place of the error, which is to trust the file.
            unsafe = isinstance(error, UnpicklingError)
            what = error.__context__ if unsafe and error.__context__ else error
            first = f"{type(what).__name__} {what}".splitlines()[0].partition(". ")[0]
            raise WeightsError(
                f"{path} cannot be read{' without running code from it' if unsafe else ''}: {first[:200].rstrip('.')}",
                "only tensors and plain values are read from torch archives, and no code in them runs",
                "Get the file as safetensors, or convert it where you trust it",
            ) from error
        tensors, self.metadata = _state_dict(content)
        self._tensors = {name: t for name, t in tensors.items() if isinstance(name, str) and torch.is_tensor(t)}
        self.names = tuple(self._tensors)
        if not self.names:
            raise WeightsError(f"{path} holds no tensors", "it must be a state dict", "Choose another file")
        self._check_tensors(path)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def type_name(self, name: str) -> str:
        return TYPE_NAMES.get(self._tensors[name].dtype, str(self._tensors[name].dtype))

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()

    def _check_tensors(self, path: Path) -> None:
        """Raises `WeightsError` on sparse tensors and the like, and on few bytes that pose as many."""
        strange = [name for name, tensor in self._tensors.items() if not _is_dense(tensor)]
        if strange:
            raise WeightsError(
                f"{path} has {len(strange)} sparse, nested or quantised tensors, or without data, such as {strange[0]}",
                "torch archives are read for plain tensors",
                "Save them as plain tensors",
            )
        held, size = sum(tensor.nbytes for tensor in self._tensors.values()), path.stat().st_size
        if held > MOST_SHARING * size:
            raise WeightsError(
                f"{path} ({size} bytes) has tensors of {held} bytes",
                "each tensor must have its numbers in the file",
                "Save it again with each tensor made contiguous",
            )


def _refuse_squeezed(path: Path) -> None:
    """Raises `WeightsError` when an archive's parts are compressed or overlap: a few KB could become gigabytes."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    if any(part.compress_type for part in parts) or sum(part.file_size for part in parts) > path.stat().st_size:
        raise WeightsError(
            f"{path} is compressed, or unpacks to more than its size",
            "torch archives are read where they lie",
            "Save it again with torch.save",
        )


def _is_dense(tensor: torch.Tensor) -> bool:
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return plain and not tensor.is_quantized and not tensor.is_nested


TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint8: "U8",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.bool: "BOOL",
}


def _state_dict(content: Any) -> tuple[Mapping[Any, Any], Mapping[str, str]]:
    """The tensors of a saved object, and what stands beside them as metadata (genmo's LoRA archives have `kwargs`)."""
    if not isinstance(content, Mapping):
        return {}, {}
    inner = content.get("state_dict")
    if not isinstance(inner, Mapping):
        return content, {}
    metadata: dict[str, str] = {}
    for name, value in content.items():
        if name != "state_dict" and isinstance(name, str):
            text = _as_json(value)
            if text is not None:  # a value that is no plain data means nothing here
                metadata[name] = text
    return inner, metadata


def _as_json(value: Any) -> str | None:
    """A value as JSON, None when it is no plain data or very long: lists in a pickle can hold each other many times."""
    parts, size = [], 0
    try:
        for part in json.JSONEncoder().iterencode(value):
            parts.append(part)
            size += len(part)
            if size > LARGEST_METADATA:
                return None
    except (TypeError, ValueError, RecursionError):
        return None
    return "".join(parts)


class Folder:
    """Shards with their index, a folder with one weight file, or a diffusers pipeline's folders side by side.

    In a pipeline the names start with the part's folder, as in `transformer/proj_out.weight`.
    """

    def __init__(self, path: Path):
        self.path = path
        parts = [path / name for name in PIPELINE_FOLDERS if _weight_files(path / name)]
        if parts and not _weight_files(path):
            self._readers = {f"{part.name}/": _Shards(part) for part in parts}
        else:
            self._readers = {"": _Shards(path)}
        self._owners = {
            prefix + name: (reader, name) for prefix, reader in self._readers.items() for name in reader.names
        }
        self.names = tuple(self._owners)
        shared: list[Mapping[str, str]] = [reader.metadata for reader in self._readers.values()]
        self.metadata: Mapping[str, str] = shared[0] if len(shared) == 1 else _common(shared)

    def shape(self, name: str) -> tuple[int, ...]:
        reader, inner = self._owners[name]
        return reader.shape(inner)

    def type_name(self, name: str) -> str:
        reader, inner = self._owners[name]
        return reader.type_name(inner)

    def tensor(self, name: str) -> torch.Tensor | Packed:
        reader, inner = self._owners[name]
        return reader.tensor(inner)


class _Shards:
    """The weight files of one folder as one."""

    def __init__(self, folder: Path):
        files = _weight_files(folder)
        if not files:
            raise WeightsError(
                f"{folder} is a folder without weights",
                "a folder must hold safetensors files, or an index that names them",
                "Choose the folder the weights are in",
            )
        readers = [opened(file) for file in files]
        self._owners: dict[str, Reader] = {}
        for file, reader in zip(files, readers):
            for name in reader.names:
                if name in self._owners:
                    raise WeightsError(
                        f"{folder} has {name} in {file.name} and in another file",
                        "a folder must hold one model",
                        "Choose the file you want instead of the folder",
                    )
                self._owners[name] = reader
        promised = _promised(folder)
        missing = sorted(promised - self._owners.keys())
        if missing:
            raise WeightsError(
                f"{folder} lacks {len(missing)} of the tensors that its index names, such as {missing[0]}",
                "every shard must be whole",
                "Download the folder again",
            )
        self.names = tuple(self._owners)
        self.metadata = {**readers[0].metadata, **_statistics_of(folder)}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._owners[name].shape(name)

    def type_name(self, name: str) -> str:
        return self._owners[name].type_name(name)

    def tensor(self, name: str) -> torch.Tensor | Packed:
        return self._owners[name].tensor(name)


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's tensors: those its index names, else all safetensors files, else torch archives.

    Raises `WeightsError` when the index names a file that is not there or lies elsewhere.
    """
    if not folder.is_dir():
        return []
    for index in _indexes(folder):
        names = sorted(set(_weight_map(index).values()))
        for name in names:
            if Path(name).name != name or name.endswith(".json") or not _is((folder / name).is_file):
                raise WeightsError(
                    f"{index} names the file {name!r}, which is not in its folder",
                    "an index names weight files beside it",
                    "Download the folder again",
                )
        return [folder / name for name in names]
    plain = sorted(folder.glob("*.safetensors"))
    # A folder may hold the same weights in several precisions: the plain name wins.
    whole = [file for file in plain if file.stem in ("diffusion_pytorch_model", "model")]
    return whole or plain or sorted(folder.glob("*.bin"))


def _indexes(folder: Path) -> list[Path]:
    return [index for pattern in INDEXES for index in sorted(folder.glob(pattern))][:1]


def _promised(folder: Path) -> set[str]:
    return {name for index in _indexes(folder) for name in _weight_map(index)}


def _weight_map(index: Path) -> Mapping[str, str]:
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(names, Mapping) or not names or not all(isinstance(file, str) for file in names.values()):
        raise WeightsError(
            f"{index} has no usable weight_map", "it must map each tensor to a file", "Download the folder again"
        )
    return names


def read_json(path: Path) -> Any:
    """A small JSON file. Raises `WeightsError` when it is large or no JSON."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it is {path.stat().st_size} bytes long")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read: {error}", "it must be a JSON file", "Download it again") from error


def _statistics_of(folder: Path) -> dict[str, str]:
    """The latent statistics that diffusers keeps in the VAE's config, which the transformer beside it shares."""
    for config in (folder / "config.json", folder.parent / "vae" / "config.json"):
        content = read_json(config) if config.is_file() else None
        if isinstance(content, Mapping) and content.get("latents_mean") and content.get("latents_std"):
            return {name: json.dumps(content[name]) for name in ("latents_mean", "latents_std")}
    return {}


def _common(metadata: list[Mapping[str, str]]) -> dict[str, str]:
    """What several files say and none denies."""
    merged: dict[str, str] = {}
    for one in metadata:
        merged.update(one)
    return {name: value for name, value in merged.items() if all(one.get(name, value) == value for one in metadata)}
