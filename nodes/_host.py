"""All that the nodes need of the host: devices, patchers, progress, interruption, model folders, version guards."""

import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy_api.latest import io

from mochi_core.errors import MochiError, WeightsError
from mochi_core.sampling.schedule import SigmaSchedule
from mochi_core.weights.build import TINY_NAME

log = logging.getLogger("mochi_video")

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


# Model files


def model_names(folders: Sequence[str]) -> list[str]:
    """What a loader offers: the embedded checkpoint, then the files of the host's model folders, each once."""
    names = [name for folder in folders for name in folder_paths.get_filename_list(folder)]
    return [TINY_NAME, *dict.fromkeys(names)]


def model_path(name: str, folders: Sequence[str]) -> str:
    """Where the file called `name` lies. Raises `WeightsError` when no folder has it."""
    for folder in folders:
        path = folder_paths.get_full_path(folder, name)
        if path is not None:
            return path
    raise WeightsError(
        f"There is no file {name!r}",
        f"it must lie in one of the host's model folders: {', '.join(folders)}",
        f"Put it there and reload the page, or choose {TINY_NAME}, which comes with this pack",
    )


# Devices


def patcher(model: torch.nn.Module, load_device: torch.device, offload_device: torch.device) -> Any:
    """The host's patcher, which moves, streams and patches the model's weights."""
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return kind(model, load_device=load_device, offload_device=offload_device)


def intermediate_device() -> torch.device:
    return comfy.model_management.intermediate_device()


def noise_device(choice: str) -> torch.device:
    """Where noise is drawn: `cpu`, or else the GPU, as the reference does. Raises `MochiError` without a GPU."""
    device = torch.device("cpu") if choice == "cpu" else comfy.model_management.get_torch_device()
    if choice != "cpu" and device.type == "cpu":
        raise MochiError(
            f"noise_device is {choice!r}, and this host has no GPU",
            "the reference draws its noise on one",
            "Choose cpu, which gives the same noise on every machine",
        )
    return device


# Running


def interruptible() -> None:
    """Raises the host's interruption when the user has asked for it."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def progress_bar(total: int) -> Callable[[], None]:
    """Advances the node's bar by one; raises when the user has interrupted."""
    bar = comfy.utils.ProgressBar(total)

    def advance() -> None:
        interruptible()
        bar.update(1)

    return advance


def progress_bars_enabled() -> bool:
    """Whether the host shows progress in its console."""
    return comfy.utils.PROGRESS_BAR_ENABLED


def sampler_callback(model: Any, steps: int) -> Callable[..., None]:
    """What the host's samplers call after each step: bar, preview, interruption."""
    return latent_preview.prepare_callback(model, steps)


def sigmas_tensor(schedule: SigmaSchedule) -> torch.Tensor:
    """The schedule as the host's SIGMAS."""
    return torch.tensor(schedule.levels, dtype=torch.float32)


def fitted_latents(model: Any, samples: torch.Tensor) -> torch.Tensor:
    """Empty latents of another family, given the channels of this model, as the host's samplers do."""
    return comfy.sample.fix_empty_latent_channels(model, samples)
