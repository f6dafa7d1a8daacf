"""Precision: the reference computes norms, gates and rotations in float32 whatever the weights are, and so do we."""

import torch


def widen(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, or in float64 if it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
