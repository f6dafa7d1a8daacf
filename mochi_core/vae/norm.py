"""Group norm one frame at a time: no frame can tell what the others hold, so a clip can be decoded in pieces.

Shapes: `B C T H W` = batch, channels, frames, rows, columns.
"""

from typing import Any

import torch
from einops import rearrange
from torch import nn

from ..numerics import widen


def per_frame(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Group norm with statistics of each frame alone: no frame can tell what others hold."""
    batch = x.shape[0]
    normed = norm(rearrange(x, "B C T H W -> (B T) C H W"))
    return rearrange(normed, "(B T) C H W -> B C T H W", B=batch)


def statistics(norm: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `per_frame` would measure of whole frames: the mean and one over the deviation, both `B T groups`."""
    values = widen(rearrange(x, "B (G c) T H W -> B T G (c H W)", G=norm.num_groups))
    variance, mean = torch.var_mean(values, dim=-1, correction=0)
    return mean, torch.rsqrt(variance + norm.eps)


def normed_by(norm: Any, x: torch.Tensor, mean: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """`per_frame` of some rows of the frames whose `statistics` are given."""
    weight, bias = (widen(p.to(x.device)) for p in (norm.weight, norm.bias))
    each = x.shape[1] // mean.shape[2]
    mean, inverse = (rearrange(s.repeat_interleave(each, dim=2), "B T C -> B C T 1 1") for s in (mean, inverse))
    gain = inverse * weight.view(-1, 1, 1, 1)
    return torch.addcmul(bias.view(-1, 1, 1, 1) - mean * gain, widen(x), gain).to(x.dtype)
