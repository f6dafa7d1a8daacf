"""Precision, and the one activation that a CPU needs help with."""

import torch
from torch.nn import functional as F

# What a core's second-level cache holds, temporaries and all.
CPU_CACHE_VALUES = 1 << 16


def widen(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, or in float64 if it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def silu(x: torch.Tensor) -> torch.Tensor:
    """`x * sigmoid(x)`; widened on a CPU without gradients.

    torch's SiLU takes several times as long there as its exponential does; the quotient `x / (1 + exp(-x))` is the
    same number to a rounding. (Its gradient is not: with gradients torch's own is used.)
    """
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return F.silu(x)
    return widen(x) / widen(x).neg().exp_().add_(1)


def silu_(x: torch.Tensor) -> torch.Tensor:
    """`silu` in place; on a CPU a cacheful at a time, which is what makes it fast."""
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return F.silu(x, inplace=True)
    channels_last = x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)
    if not (channels_last or x.is_contiguous()):
        return x.copy_(silu(x))
    for values in x.as_strided((x.numel(),), (1,)).split(CPU_CACHE_VALUES):
        values.copy_(silu(values))
    return x
