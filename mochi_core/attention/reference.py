"""Attention as the formula says it: the kernel every other one is measured against."""

import torch


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """`softmax(q k^T / sqrt(D)) v`, the softmax in float32 or wider. See `kernels.AttentionKernel`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.mT).to(wide) * q.shape[-1] ** -0.5
    if key_mask is not None:
        # Not minus infinity: a sample without a valid key would become NaN. Any other's masked weights are zero.
        scores = scores.masked_fill(~key_mask[:, None, None, :], torch.finfo(wide).min)
    return scores.softmax(-1).to(v.dtype) @ v
