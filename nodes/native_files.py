"""Model files: what the host's folders offer, where a file lies, when it changed, what to say of a missing one."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import folder_paths

from mochi_core.errors import MochiError, WeightsError
from mochi_core.text.tokenizer import TOKENIZER_NAMES
from mochi_core.weights.build import TINY_NAME

from ._checks import quoted
from ._downloads import DOWNLOADS

# The choice of no LoRA.
NO_LORA = "none"

# What the host does not list as models: GGUF files, and the files that make a folder one.
OTHER_FILES = {".gguf", ".json", ".model"}
# What belongs to a file or folder and lies beside it: a LoRA's settings, a VAE's statistics, a T5's tokenizer.
BESIDE = ("adapter_config.json", "vae/config.json", "tokenizer")
# What was listed: by folder its roots, when they and the folders in them had changed, the names.
_listed: dict[str, tuple[tuple[str, ...], dict[str, float], list[str]]] = {}
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


def _other_files(folder: str) -> list[str]:
    """Files of a model folder with endings that the host does not look for; looked up again when a folder changed."""
    roots = tuple(folder_paths.get_folder_paths(folder))
    known = _listed.get(folder)
    if known is None or known[0] != roots or any(_changed(path) != time for path, time in known[1].items()):
        times: dict[str, float] = {root: _changed(root) for root in roots}
        names: set[str] = set()
        for root in roots:
            files, folders = folder_paths.recursive_search(root, excluded_dir_names=[".git"])
            names.update(folder_paths.filter_files_extensions(files, list(OTHER_FILES)))
            times |= {path: _changed(path) for path in folders}
        # Assigned whole: the host lists in one thread while it runs a prompt in another.
        known = _listed[folder] = (roots, times, sorted(names))
    return known[2]


def _changed(path: str) -> float:
    try:
        return Path(path).stat().st_mtime
    except OSError:
        return 0.0


def _weight_folders(others: Sequence[str]) -> list[str]:
    """Folders with weights, by the config or index that diffusers and transformers write into them."""
    marks = ("config.json", ".index.json", "model_index.json")
    found = [str(Path(name).parent) for name in others if name.endswith(marks)]
    return [f"{name}/" for name in dict.fromkeys(found) if name != "."]


def model_names(folders: Sequence[str]) -> list[str]:
    """What a loader offers: the embedded checkpoint, then the files of the host's model folders, each once.

    Folders of shards end in a slash; the shards themselves are not offered.
    """
    return [TINY_NAME, *file_names(folders)]


def file_names(folders: Sequence[str]) -> list[str]:
    """The same without the embedded checkpoint."""
    names: list[str] = []
    for folder in folders:
        others = _other_files(folder)
        names += [name for name in folder_paths.get_filename_list(folder) if not SHARD.search(name)]
        names += [name for name in others if name.endswith(".gguf")]
        names += _weight_folders(others)
    return list(dict.fromkeys(names))


def tokenizer_names(folders: Sequence[str]) -> list[str]:
    """The tokenizers that lie in model folders."""
    others = [name for folder in folders for name in _other_files(folder)]
    return list(dict.fromkeys(name for name in others if Path(name).name in TOKENIZER_NAMES))


def model_path(name: str, folders: Sequence[str]) -> str:
    """Where the file or folder called `name` lies. Raises `WeightsError` when no model folder has it."""
    for folder in folders:
        if name.endswith("/"):
            # Checked as it is written: what a user links into the folder is meant to be there.
            inside = not Path(name).is_absolute() and ".." not in Path(name).parts
            found = [Path(root) / name for root in folder_paths.get_folder_paths(folder) if inside]
            if any(path.is_dir() for path in found):
                return str(next(path for path in found if path.is_dir()))
            continue
        path = folder_paths.get_full_path(folder, name)
        if path is not None:
            return path
    raise WeightsError(
        f"There is no file {name!r}",
        f"it must lie in one of the host's model folders: {', '.join(folders)}",
        f"Put it there and reload the page, or choose {TINY_NAME}, which comes with this pack",
    )


def stamp(names: Iterable[str | None], folders: Sequence[str]) -> str:
    """Changes when one of these files does: what a loader is cached by. A linked value is None."""
    stamps = []
    for name in names:
        try:
            if not name or name in (TINY_NAME, "auto", NO_LORA):
                continue
            path = Path(model_path(name, folders))
            held = [path, *path.rglob("*"), *(path.parent / beside for beside in BESIDE)]
            for file in sorted({file for one in held for file in ([one, *one.glob("*")] if one.is_dir() else [one])}):
                if file.is_file():
                    stamps.append(f"{file.name}:{file.stat().st_mtime_ns}:{file.stat().st_size}")
        except (MochiError, OSError) as error:
            stamps.append(str(error))
    # Kept in every file that the host saves: it says that something changed, not what there is.
    return hashlib.sha256(" ".join(stamps).encode()).hexdigest()[:16] if stamps else ""


def no_such_file(name: str, value: str | None, folders: Sequence[str]) -> str:
    """What is wrong with the choice of a model file: where it is looked for, and where it can be had."""
    if value is None or value in model_names(folders):
        return ""
    return (
        f"{_missing(name, value, folders)} {_download(value)}Put it there and reload the page, or choose {TINY_NAME}, "
        "which comes with this pack."
    )


def no_such_lora(name: str, value: str | None, folders: Sequence[str], or_none: bool = False) -> str:
    """The same for a LoRA, of which none comes with the pack; the choice of no LoRA may be right."""
    if value is None or (or_none and value == NO_LORA) or value in file_names(folders):
        return ""
    return f"{_missing(name, value, folders)} Put it there and reload the page."


def _missing(name: str, value: str, folders: Sequence[str]) -> str:
    places = ", ".join(f"models/{folder}" for folder in folders)
    return f"{name} is {quoted(value)}: there is no such file in {places}."


def _download(value: str) -> str:
    """Where a well-known file can be had, and the name to give it when it has another there."""
    file = value.replace("\\", "/").rsplit("/", 1)[-1]
    address = DOWNLOADS.get(file)
    if address is None:
        return ""
    return f"Download {address}" + (". " if address.endswith(f"/{file}") else f" and name it {file}. ")
