"""Weights of every format in networks made of the host's layers.

Plain and 8-bit weights are the host's to cast, scale, stream and patch. Packed blocks are no numbers to it: they get a
layer of ours, which the host moves like any other and which makes floats of them at each use.
"""

import json
from collections.abc import Mapping
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from torch import nn
from torch.nn import functional as F

from mochi_core.errors import LoraError
from mochi_core.weights.blocks import Packed, dequantize
from mochi_core.weights.checkpoint import replace
from mochi_core.weights.formats import (
    FLOAT8,
    PACKED_SUFFIXES,
    PLAIN,
    QUANT_CONF,
    Entry,
    Scaled,
    Weight,
    is_quantized,
    plain,
)

# Hosts before 0.4 have operations for files of scaled 8-bit floats; later ones have them for each layer.
SCALED_BY_FILE = hasattr(comfy.ops, "scaled_fp8_ops")


class PackedLinear(comfy.ops.manual_cast.Linear):
    """The host's linear layer with packed bytes for a weight."""

    def __init__(self, packed: Packed, bias: torch.Tensor | None):
        rows, columns = packed.shape
        super().__init__(columns, rows, bias is not None, device="meta")
        self.format = packed.format
        self.weight = nn.Parameter(packed.data, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
        # Hosts that stream weights patch them here instead of asking `convert_weight`.
        if self.weight_function or getattr(self, "weight_lowvram_function", None) is not None:
            raise self._unpatchable()
        # The host moves the bytes; asked for their own dtype, it leaves them as they are.
        moved = comfy.ops.cast_bias_weight(
            self, dtype=torch.uint8, device=input.device, bias_dtype=input.dtype, offloadable=True
        )
        weight, bias, stream = moved
        out = F.linear(input, dequantize(weight, self.format, input.dtype), bias)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return out

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as floats, where it lies."""
        return dequantize(self.weight, self.format, dtype)

    def convert_weight(self, weight: torch.Tensor, inplace: bool = False, **_: Any) -> torch.Tensor:
        """The host asks this before it patches a weight: patches cannot be added to packed bytes."""
        raise self._unpatchable()

    def _unpatchable(self) -> LoraError:
        return LoraError(
            f"A LoRA or other patch is for a layer that is packed as {self.format.name}",
            "the host's own loaders can only patch weights that are floats",
            "Use Mochi Video LoRA Loader, which works beside packed weights, or load the DiT with dtype bfloat16",
        )


def wanted(entries: Mapping[str, Entry], dtype: torch.dtype | None) -> dict[str, Weight]:
    """A file's weights, read; turned into `dtype` if one is given. What cannot stay as it is becomes bfloat16."""
    weights: dict[str, Weight] = {}
    for name, entry in entries.items():
        weight = entry.load()
        if isinstance(weight, Scaled):  # the host's layers have one scale, and 8-bit floats
            stays = weight.scale.ndim == 0 and weight.data.dtype in FLOAT8.values()
        else:
            stays = isinstance(weight, Packed) or entry.kind in (*PLAIN, *FLOAT8)
        to = dtype or (None if stays else torch.bfloat16)
        weights[name] = plain(weight, to) if to else weight
    return weights


def floats(layer: nn.Module) -> torch.Tensor:
    """The weight of a layer of any kind as floats, where it lies."""
    weight: Any = layer.weight
    if isinstance(layer, PackedLinear):
        return layer.dequantized(torch.float32)
    if hasattr(weight, "_qdata"):
        return weight.dequantize()
    scale = getattr(layer, "scale_weight", None)
    return weight.to(torch.float32) * (1 if scale is None else scale.to(weight.device))


def savable(state: dict[str, Any], network: nn.Module, prefix: str) -> dict[str, Any]:
    """A state dict of `network`, behind `prefix`, with packed weights as a safetensors file can hold them."""
    suffixes = {block.name: suffix for suffix, block in PACKED_SUFFIXES.items()}
    for name, layer in network.named_modules():
        key = f"{prefix}{name}.weight"
        if isinstance(layer, PackedLinear) and key in state:
            weight = state.pop(key)
            if layer.format.name in suffixes:
                state[f"{prefix}{name}{suffixes[layer.format.name]}"] = weight
            else:
                state[key] = dequantize(weight, layer.format, torch.bfloat16)
    return state


def has_scales(weights: Mapping[str, Weight]) -> bool:
    return any(isinstance(weight, Scaled) for weight in weights.values())


def weight_dtype(weights: Mapping[str, Weight]) -> torch.dtype | None:
    """The dtype that most numbers of a file have; None when scales or packing make it say nothing."""
    sizes: dict[torch.dtype, int] = {}
    for weight in weights.values():
        if not isinstance(weight, torch.Tensor):
            return None
        sizes[weight.dtype] = sizes.get(weight.dtype, 0) + weight.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def is_mixed(weights: Mapping[str, Weight]) -> bool:
    """Whether layers must cast what they hold: packed weights, or plain ones of several dtypes."""
    return len({w.dtype if isinstance(w, torch.Tensor) else None for w in weights.values()}) > 1


def quantized_options(weights: Mapping[str, Weight]) -> dict[str, Any]:
    """What tells the host's text encoders that there are scales."""
    if not has_scales(weights):
        return {}
    if SCALED_BY_FILE:
        return {"scaled_fp8": _scaled_dtype(weights)}
    return {"quantization_metadata": {"mixed_ops": True}}


def describe_scales(supported: Any, weights: Mapping[str, Weight]) -> None:
    """Tells the host's model description that there are scales, and whether products may be in 8 bits."""
    if not has_scales(weights):
        return
    if SCALED_BY_FILE:
        fast = not any(isinstance(weight, Scaled) and weight.wide_product for weight in weights.values())
        supported.scaled_fp8 = _scaled_dtype(weights)
        supported.optimizations = {**supported.optimizations, "fp8": fast}
    else:
        supported.quant_config = {"mixed_ops": True}


def _scaled_dtype(weights: Mapping[str, Weight]) -> torch.dtype:
    return next(weight.data.dtype for weight in weights.values() if isinstance(weight, Scaled))


def loads_on_meta(operations: Any) -> bool:
    """Whether layers of these operations may be made on the meta device: those with a format each load to where
    they were made."""
    return not hasattr(operations, "_quant_config")


def fill_native(network: nn.Module, weights: Mapping[str, Weight]) -> None:
    """Makes `weights` the parameters of a network of host layers. They must have been checked to fit."""
    state: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        layer_name, _, last = name.rpartition(".")
        is_linear = last == "weight" and hasattr(network.get_submodule(layer_name), "in_features")
        if isinstance(weight, Packed) and is_linear:
            bias = weights.get(f"{layer_name}.bias")
            replace(network, layer_name, PackedLinear(weight, None if bias is None else plain(bias)))
        elif isinstance(weight, Scaled) and is_linear:
            state |= _scaled_state(layer_name, weight)
        else:
            state[name] = plain(weight, None if isinstance(weight, torch.Tensor) else torch.bfloat16)
    network.load_state_dict(state, strict=False, assign=True)
    for name, parameter in list(network.named_parameters()):
        if parameter.is_meta:  # a scale that the host's layer has and the file does not
            layer_name, _, last = name.rpartition(".")
            one = nn.Parameter(torch.ones((), dtype=torch.float32), requires_grad=False)
            setattr(network.get_submodule(layer_name), last, one)
    network.requires_grad_(False)


def _scaled_state(layer: str, weight: Scaled) -> dict[str, torch.Tensor]:
    """A scaled weight under the names that this host gives its pieces."""
    state = {f"{layer}.weight": weight.data}
    names = ("scale_weight", "scale_input") if SCALED_BY_FILE else ("weight_scale", "input_scale")
    state[f"{layer}.{names[0]}"] = weight.scale
    if weight.input_scale is not None:
        state[f"{layer}.{names[1]}"] = weight.input_scale
    if not SCALED_BY_FILE:
        format = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}[weight.data.dtype]
        conf = json.dumps({"format": format, "full_precision_matrix_mult": weight.wide_product})
        state[f"{layer}.{QUANT_CONF}"] = torch.tensor(list(conf.encode()), dtype=torch.uint8)
    return state


def is_quantized_layer(layer: nn.Module) -> bool:
    """Whether a layer's weight is stored in fewer than 16 bits."""
    weight = getattr(layer, "weight", None)
    return isinstance(layer, PackedLinear) or hasattr(weight, "_qdata") or (weight is not None and is_quantized(weight))
