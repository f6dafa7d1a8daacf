"""LoRAs on the host's MODEL: patches of weights that are floats; branches beside other weights, and for DoRA."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_base
import torch
from comfy.weight_adapter.lora import LoRAAdapter

from mochi_core.errors import LoraError
from mochi_core.weights.lora_file import Lora, LowRank, read_lora

from .native_dit import LORAS, MochiModel
from .native_weights import is_quantized_layer

log = logging.getLogger("mochi_video")


def with_loras(model: Any, loras: Sequence[tuple[str, float]]) -> Any:
    """A clone of the model with the LoRAs of these files at their strengths; the model itself stays as it is.

    Raises `LoraError` when the model is no Mochi, or a file does not fit it.
    """
    if not isinstance(model.model, comfy.model_base.GenmoMochi):
        raise LoraError(
            f"The model is a {type(model.model).__name__}",
            "Mochi's LoRAs are for Mochi's DiT",
            "Connect a model from Mochi Video DiT Loader",
        )
    network = model.model.diffusion_model
    beside = isinstance(model.model, MochiModel)
    clone = model.clone()
    for path, strength in loras:
        lora = read_lora(path, network)
        branch = {n: change for n, change in lora.layers.items() if beside and _needs_branch(network, n, change)}
        patched = {name: change for name, change in lora.layers.items() if name not in branch}
        if any(change.magnitude is not None for change in patched.values()):
            raise LoraError(
                f"{path} is a DoRA, and the model is not from Mochi Video DiT Loader",
                "the host's patches give another result than DoRA was trained for",
                "Load the model with Mochi Video DiT Loader",
            )
        if branch:
            options = clone.model_options.setdefault("transformer_options", {})
            options[LORAS] = (*options.get(LORAS, ()), (Lora(lora.source, branch, ()), strength))
        if patched and strength:
            clone.add_patches({f"diffusion_model.{name}.weight": _patch(c) for name, c in patched.items()}, strength)
        log.info(
            "%s at strength %g: %d layers patched, %d changed beside their weights%s",
            Path(path).name,
            strength,
            len(patched),
            len(branch),
            f", {len(lora.unmatched)} tensors not used" if lora.unmatched else "",
        )
    return clone


def _needs_branch(network: torch.nn.Module, name: str, change: LowRank) -> bool:
    """Whether a change cannot be a patch: of a weight that is no floats, or DoRA, which the host computes otherwise."""
    return change.magnitude is not None or is_quantized_layer(network.get_submodule(name))


def _patch(change: LowRank) -> LoRAAdapter:
    """A change as the host adds it to a weight: it divides by the rank what it is given as alpha."""
    return LoRAAdapter(set(), (change.up, change.down, change.scale * change.rank, None, None, None))
