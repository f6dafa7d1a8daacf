"""All that the nodes need of the host: devices, patchers, progress, interruption, version guards."""

import dataclasses
import inspect
import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

from mochi_core.errors import MochiError
from mochi_core.progress import Progress
from mochi_core.sampling.schedule import SigmaSchedule

from ._memory import usable

log = logging.getLogger("mochi_video")

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


def training_dtype(device: torch.device) -> torch.dtype | None:
    """What encoders of training data compute in: on a CPU floats that it is made for, else what their files hold."""
    return torch.float32 if device.type == "cpu" else None


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


@contextmanager
def whole_device(device: torch.device) -> Iterator[None]:
    """A device for what plans all of its memory: the host's models leave it, and come back when they are used."""
    comfy.model_management.free_memory(math.inf, device)
    empty_cache()
    try:
        yield
    finally:
        empty_cache()


def output_folder() -> Path:
    return Path(folder_paths.get_output_directory())


def input_folder() -> Path:
    """What users put there for nodes to read."""
    return Path(folder_paths.get_input_directory())


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
