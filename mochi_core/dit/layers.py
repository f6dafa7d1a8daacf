"""The small pieces that every block is made of: norms, gates, the gated MLP.

The reference keeps norms, gates and rotations in float32 whatever the weights are; so do we (float64 stays float64).

Shapes: `B` batch, `N` tokens, `C` channels.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..numerics import widen

NORM_EPS = 1e-6


def in_chunks(work: Callable[..., torch.Tensor], tokens_at_once: int | None, *streams: torch.Tensor) -> torch.Tensor:
    """`work(*streams)`, with what it makes on the way for a few tokens at a time; `work` must treat each token alone.

    `streams`: `B N ...`, which are cut into `tokens_at_once` tokens each (None: not at all). Returns `B N ...`.
    """
    tokens = streams[0].shape[1]
    if tokens_at_once is None or tokens_at_once >= tokens:
        return work(*streams)
    out, end = None, 0
    for part in zip(*(stream.split(tokens_at_once, dim=1) for stream in streams)):
        done = work(*part)
        if out is None:
            out = done.new_empty(done.shape[0], tokens, *done.shape[2:])
        # A new tensor, never the input in place: whoever is around a block may keep what went in.
        start, end = end, end + done.shape[1]
        out[:, start:end] = done
        del done  # not beside the next
    assert out is not None
    return out


def _rms_normalized(x: torch.Tensor) -> torch.Tensor:
    """`x` over its root mean square along the last axis, widened: one pass for the norm, one for the product."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return x * torch.rsqrt(norm.square() / x.shape[-1] + NORM_EPS)


def modulated_rms_norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """RMS norm whose gain, `1 + scale`, comes from the conditioning. `x`: `B N C`, `scale`: `B C`."""
    return _rms_normalized(x).mul_((1 + widen(scale)).unsqueeze(1)).to(x.dtype)


def gated_residual(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`x` plus the RMS-normed branch times `tanh(gate)`. `x`, `branch`: `B N C`, `gate`: `B C`."""
    return x + _rms_normalized(branch).mul_(widen(gate).tanh().unsqueeze(1)).to(x.dtype)


class GatedMLP(nn.Module):
    """`w2(silu(a) * b)`, where `w1` makes `a` and `b` at once (SwiGLU, Shazeer 2020)."""

    def __init__(self, dim: int, inner_dim: int, operations: ModuleType | Any, **factory: Any):
        super().__init__()
        self.w1 = operations.Linear(dim, 2 * inner_dim, bias=False, **factory)
        self.w2 = operations.Linear(inner_dim, dim, bias=False, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated, linear = self.w1(x).chunk(2, dim=-1)
        return self.w2(F.silu(activated).mul_(linear))


class FinalLayer(nn.Module):
    """Tokens to patches: layer norm, shift and scale from the conditioning, one linear map."""

    def __init__(self, dim: int, patch_values: int, operations: ModuleType | Any, **factory: Any):
        super().__init__()
        self.mod = operations.Linear(dim, 2 * dim, **factory)
        self.linear = operations.Linear(dim, patch_values, **factory)

    def forward(self, x: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """`x`: `B N C`, `conditioning`: `B C`; returns `B N patch_values`."""
        shift, scale = widen(self.mod(F.silu(conditioning))).unsqueeze(1).chunk(2, dim=-1)
        normalized = F.layer_norm(widen(x), x.shape[-1:], eps=NORM_EPS)
        return self.linear((normalized * (1 + scale) + shift).to(x.dtype))
