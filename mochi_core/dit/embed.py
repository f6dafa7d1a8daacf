"""What enters the blocks: patches of latents, the noise level, and the prompt as one vector.

Shapes: `B` batch, `C` channels, `T H W` latent frames, rows, columns, `N` visual tokens, `L` text tokens.
"""

import math
from types import ModuleType
from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from ..config import POOL_HEADS
from ..numerics import widen

TIMESTEP_FREQUENCIES = 256
LONGEST_PERIOD = 10_000


class PatchEmbed(nn.Module):
    """Each patch of each latent frame becomes one visual token."""

    def __init__(self, patch_size: int, channels: int, dim: int, operations: ModuleType | Any, **factory: Any):
        super().__init__()
        self.proj = operations.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size, **factory)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """`B C T H W` -> `B N dim`, tokens in frame, row, column order."""
        batch = latents.shape[0]
        tokens = self.proj(rearrange(latents, "B C T H W -> (B T) C H W"))
        return rearrange(tokens, "(B T) C H W -> B (T H W) C", B=batch)


def sinusoid(time: torch.Tensor) -> torch.Tensor:
    """Cosines, then sines, of `time` (`B`) at frequencies falling from 1 to 1/10000; widened, `B 256`."""
    half = TIMESTEP_FREQUENCIES // 2
    steps = torch.arange(half, device=time.device, dtype=time.dtype)
    angles = time[:, None] * torch.exp(steps * (-math.log(LONGEST_PERIOD) / half))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbed(nn.Module):
    """The noise level as a vector: `scale * (1 - sigma)` through sinusoids and two layers."""

    def __init__(self, dim: int, scale: float, operations: ModuleType | Any, **factory: Any):
        super().__init__()
        self.scale = scale
        self.mlp = nn.Sequential(
            operations.Linear(TIMESTEP_FREQUENCIES, dim, **factory), nn.SiLU(), operations.Linear(dim, dim, **factory)
        )

    def forward(self, sigma: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`sigma`: `B`, 1 for pure noise, 0 for clean. Returns `B dim` in `dtype`."""
        return self.mlp(sinusoid((1 - widen(sigma)) * self.scale).to(dtype))


class AttentionPool(nn.Module):
    """The prompt as one vector: the mean of its tokens attends to them and to itself."""

    def __init__(self, dim: int, out_dim: int, operations: ModuleType | Any, **factory: Any):
        super().__init__()
        self.to_kv = operations.Linear(dim, 2 * dim, **factory)
        self.to_q = operations.Linear(dim, dim, **factory)
        self.to_out = operations.Linear(dim, out_dim, **factory)

    def forward(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`features`: `B L dim`, `mask`: `B L`, true for real tokens (none may be). Returns `B out_dim`."""
        total = (widen(features) * mask.unsqueeze(-1)).sum(1, keepdim=True)
        mean = (total / mask.sum(1).clamp(min=1)[:, None, None]).to(features.dtype)
        keys, values = rearrange(
            self.to_kv(torch.cat([mean, features], dim=1)), "B L (two A D) -> two B A L D", two=2, A=POOL_HEADS
        )
        query = rearrange(self.to_q(mean), "B one (A D) -> B A one D", A=POOL_HEADS)
        attend = F.pad(mask, (1, 0), value=True)[:, None, None, :]
        pooled = F.scaled_dot_product_attention(query, keys, values, attn_mask=attend)
        return self.to_out(rearrange(pooled, "B A one D -> B (one A D)"))
