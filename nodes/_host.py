"""All that the nodes need of the host: devices, patchers, progress, interruption, model folders, version guards."""

import dataclasses
import inspect
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.latest import io

from mochi_core.errors import MochiError, WeightsError
from mochi_core.progress import Progress
from mochi_core.sampling.schedule import SigmaSchedule
from mochi_core.text.tokenizer import TOKENIZER_NAMES
from mochi_core.weights.build import TINY_NAME

from ._memory import usable

log = logging.getLogger("mochi_video")

# The choice of no LoRA.
NO_LORA = "none"

# How many options an error lists.
OPTIONS_SHOWN = 12

DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


# Schemas


def schema(**fields: Any) -> io.Schema:
    """A node schema with those of `fields` that this host knows: one unknown keyword would lose every node."""
    known = {field.name for field in dataclasses.fields(io.Schema)}
    return io.Schema(**{name: value for name, value in fields.items() if name in known})


def advanced(widget: Any) -> Any:
    """Marks an input as advanced: newer hosts fold it away, older ones ignore the mark."""
    if hasattr(widget, "advanced"):
        widget.advanced = True
    else:
        widget.extra_dict["advanced"] = True
    return widget


def known_arguments(function: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """Those of `arguments` that this host's `function` takes."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in parameters}


def newer(module: Any, name: str, otherwise: Any) -> Any:
    """What newer hosts have in `module` under `name`, and `otherwise` where this host has no such thing."""
    return getattr(module, name, otherwise)


def valid_choices(**choices: tuple[str | None, Iterable[str]]) -> bool | str:
    """A node's answer to `validate_inputs`: true, or what is wrong with a value that is not among its options.

    The host itself does not look. `choices` are `name=(value, options)`; a linked value is None and passes.
    """
    for name, (value, options) in choices.items():
        options = list(options)
        if value is not None and value not in options:
            shown = ", ".join(options[:OPTIONS_SHOWN]) + (", ..." if len(options) > OPTIONS_SHOWN else "")
            return f"{name} is {value!r}: it must be one of {shown}. Choose one of them."
    return True


def accepted_by(check: Callable[..., Any], *values: Any) -> bool | str:
    """The same for values that must fit together: what `check(*values)` has against them.

    A linked value is None, and known only when it runs.
    """
    if None in values:
        return True
    try:
        check(*values)
    except MochiError as error:
        return str(error)
    return True


def valid_file(name: str, value: str | None, folders: Sequence[str]) -> bool | str:
    """The same for a model file: says where files are looked for."""
    if value is None or value in model_names(folders):
        return True
    places = ", ".join(f"models/{folder}" for folder in folders)
    return (
        f"{name} is {value!r}: there is no such file in {places}. "
        f"Put it there and reload the page, or choose {TINY_NAME}, which comes with this pack."
    )


def valid_lora(name: str, value: str | None, folders: Sequence[str], or_none: bool = False) -> bool | str:
    """The same for a LoRA, of which none comes with the pack; the choice of no LoRA may be valid."""
    if value is None or (or_none and value == NO_LORA) or value in file_names(folders):
        return True
    places = ", ".join(f"models/{folder}" for folder in folders)
    return f"{name} is {value!r}: there is no such file in {places}. Put it there and reload the page."


# Model files


# What the host does not list as models: GGUF files, and the files that make a folder one.
OTHER_FILES = {".gguf", ".json", ".model"}
# What belongs to a file or folder and lies beside it: a LoRA's settings, a VAE's statistics, a T5's tokenizer.
BESIDE = ("adapter_config.json", "vae/config.json", "tokenizer")
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


def _other_files(folder: str) -> list[str]:
    """Files of a model folder with endings that the host does not look for, through the host's cached listing."""
    key = f"mochi_video_{folder}"
    folder_paths.folder_names_and_paths[key] = (folder_paths.get_folder_paths(folder), OTHER_FILES)
    try:
        return folder_paths.get_filename_list(key)
    finally:  # its list of model folders is shown to users
        del folder_paths.folder_names_and_paths[key]


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
    return " ".join(stamps)


# Devices


def patcher(model: torch.nn.Module, load_device: torch.device, offload_device: torch.device) -> Any:
    """The host's patcher, which moves, streams and patches the model's weights."""
    kind = newer(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return kind(model, load_device=load_device, offload_device=offload_device)


def intermediate_device() -> torch.device:
    return comfy.model_management.intermediate_device()


def noise_device(choice: str) -> torch.device:
    """Where noise is drawn: `cpu`, or else the GPU, as the reference does. Raises `MochiError` without a GPU."""
    device = torch.device("cpu") if choice == "cpu" else sampling_device()
    if choice != "cpu" and device.type == "cpu":
        raise MochiError(
            f"noise_device is {choice!r}, and this host has no GPU",
            "the reference draws its noise on one",
            "Choose cpu, which gives the same noise on every machine",
        )
    return device


# Memory


def host_apart(device: torch.device) -> bool:
    """Whether the host's memory is other memory than the device's, and torch copies between them at its side."""
    return device.type not in ("cpu", "mps", "privateuseone")


def sampling_device() -> torch.device:
    """Where the host puts what it samples with."""
    return comfy.model_management.get_torch_device()


def usable_memory(device: torch.device) -> int:
    """Bytes of the device that models and their work may take, when all else is moved out."""
    management = comfy.model_management
    return usable(management.get_total_memory(device), management.extra_reserved_memory())


def free_memory(patcher: Any, device: torch.device) -> int:
    """Bytes that work on the device can have now."""
    # Newer hosts count what leaves the device by itself when others need it.
    ask = getattr(patcher, "get_free_memory", comfy.model_management.get_free_memory)
    return int(ask(device))


def out_of_memory(error: BaseException) -> bool:
    """Whether this says that the device has no memory left."""
    known = newer(comfy.model_management, "is_oom", None)
    return known(error) if known else isinstance(error, comfy.model_management.OOM_EXCEPTION)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device the current one, where the host may use several."""
    return newer(comfy.model_management, "cuda_device_context", lambda device: nullcontext())(device)


def empty_cache() -> None:
    comfy.model_management.soft_empty_cache()


def output_folder() -> Path:
    return Path(folder_paths.get_output_directory())


def temporary_folder() -> Path:
    """What the host empties when it starts; its page may read it."""
    return Path(folder_paths.get_temp_directory())


def graph_metadata(hidden: Any) -> dict[str, str]:
    """What the host writes into files it saves: the prompt and the graph that made them, unless it is told not to."""
    if args.disable_metadata:
        return {}
    values = {"prompt": getattr(hidden, "prompt", None), **(getattr(hidden, "extra_pnginfo", None) or {})}
    return {name: json.dumps(value) for name, value in values.items() if value is not None}


# Running


def interruptible() -> None:
    """Raises the host's interruption when the user has asked for it."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def progress() -> Progress:
    """Moves the node's bar; raises when the user has interrupted."""
    bar: Any = None

    def report(step: int, total: int, preview: torch.Tensor | None = None) -> None:
        nonlocal bar
        interruptible()
        bar = bar or comfy.utils.ProgressBar(total)
        bar.update_absolute(step, total)

    return report


def interruptions() -> tuple[type[BaseException], ...]:
    """What the host raises when the user has interrupted."""
    return (comfy.model_management.InterruptProcessingException,)


def progress_bars_enabled() -> bool:
    """Whether the host shows progress in its console."""
    return comfy.utils.PROGRESS_BAR_ENABLED


def sigmas_tensor(schedule: SigmaSchedule) -> torch.Tensor:
    """The schedule as the host's SIGMAS."""
    return torch.tensor(schedule.levels, dtype=torch.float32)


def fitted_latents(model: Any, samples: torch.Tensor) -> torch.Tensor:
    """Empty latents of another family, given the channels of this model, as the host's samplers do."""
    return comfy.sample.fix_empty_latent_channels(model, samples)
