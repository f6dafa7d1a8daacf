"""A linear layer whose weight stays as the file has it and becomes floats at each use."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .blocks import BlockFormat, Packed
from .formats import Scaled, Weight, plain, quantized

# Bytes for each value, beside the floats themselves, while a weight becomes floats.
UNPACKING_SCALED, UNPACKING_BLOCKS = 8, 2


class QuantizedLinear(nn.Module):
    """`x W^T + bias` in the dtype of `x`, whatever `W` is stored as.

    There is no parameter called `weight`: its bytes are no numbers to cast, and some networks look at its dtype.
    """

    weight = None

    def __init__(self, weight: Weight, bias: torch.Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._block = weight.format if isinstance(weight, Packed) else None
        scaled = isinstance(weight, Scaled)
        self.register_buffer("stored", weight if isinstance(weight, torch.Tensor) else weight.data)
        self.register_buffer("scale", weight.scale if scaled else None)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def quantized(self) -> Weight:
        """The weight as it is stored."""
        return _weight(self._block, self.stored, self.scale)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as floats, `out_features x in_features`."""
        return plain(self.quantized, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            out: torch.Tensor = _Product.apply(x, self._block, self.stored, self.scale)  # pyright: ignore
            return out if bias is None else out + bias
        return F.linear(x, self.dequantized(x.dtype), bias)

    def _apply(self, fn, recurse=True):
        """Moves between devices, but keeps the stored bytes when someone casts the network to a dtype."""
        stored, scale = self.stored, self.scale
        super()._apply(fn, recurse)
        self.stored = stored.to(self.stored.device)
        self.scale = None if scale is None else scale.to(self.stored.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Product(torch.autograd.Function):
    """`x W^T` whose gradient unpacks `W` once more: between the two only the stored bytes are kept, not the floats."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        context: Any, x: torch.Tensor, block: BlockFormat | None, stored: torch.Tensor, scale: torch.Tensor | None
    ) -> torch.Tensor:
        context.block = block
        context.save_for_backward(stored, scale)
        return F.linear(x, plain(_weight(block, stored, scale), x.dtype))

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight = plain(_weight(context.block, *context.saved_tensors), gradient.dtype)
        return gradient @ weight, None, None, None


def _weight(block: BlockFormat | None, stored: torch.Tensor, scale: torch.Tensor | None) -> Weight:
    if block is not None:
        return Packed(stored, block)
    return stored if scale is None else Scaled(stored, scale)


def quantize_linears(network: nn.Module, format: str) -> None:
    """Stores the weight of every linear layer of a network in `format`: one of `formats.QUANTIZED`.

    One after the other, so that no more than one is there twice. Layers that are quantised already stay as they are.
    Raises `WeightsError` when the format cannot hold a weight.
    """
    for name, layer in list(network.named_modules()):
        if type(layer) is nn.Linear:
            parent, _, last = name.rpartition(".")
            bias, stored = None if layer.bias is None else layer.bias.detach(), quantized(layer.weight.detach(), format)
            setattr(network.get_submodule(parent), last, QuantizedLinear(stored, bias))


def unpacking_bytes(network: nn.Module, dtype: torch.dtype) -> int:
    """What the largest quantised weight of a network takes while it is floats of `dtype`, 0 when there is none."""
    most = 0
    for layer in network.modules():
        if isinstance(layer, QuantizedLinear):
            beside = UNPACKING_BLOCKS if layer.scale is None else UNPACKING_SCALED
            most = max(most, layer.out_features * layer.in_features * (dtype.itemsize + beside))
    return most
