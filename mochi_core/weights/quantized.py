"""A linear layer whose weight stays as the file has it and becomes floats at each use."""

import torch
from torch import nn
from torch.nn import functional as F

from .blocks import Packed
from .formats import Scaled, Weight, plain

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
        if self._block is not None:
            return Packed(self.stored, self._block)
        return self.stored if self.scale is None else Scaled(self.stored, self.scale)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as floats, `out_features x in_features`."""
        return plain(self.quantized, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dequantized(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def _apply(self, fn, recurse=True):
        """Moves between devices, but keeps the stored bytes when someone casts the network to a dtype."""
        stored, scale = self.stored, self.scale
        super()._apply(fn, recurse)
        self.stored = stored.to(self.stored.device)
        self.scale = None if scale is None else scale.to(self.stored.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def unpacking_bytes(network: nn.Module, dtype: torch.dtype) -> int:
    """What the largest quantised weight of a network takes while it is floats of `dtype`, 0 when there is none."""
    most = 0
    for layer in network.modules():
        if isinstance(layer, QuantizedLinear):
            beside = UNPACKING_BLOCKS if layer.scale is None else UNPACKING_SCALED
            most = max(most, layer.out_features * layer.in_features * (dtype.itemsize + beside))
    return most
