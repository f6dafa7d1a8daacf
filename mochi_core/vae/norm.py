"""Group norm one frame at a time: no frame can tell what the others hold, so a clip can be decoded in pieces.

Shapes: `B C T H W` = batch, channels, frames, rows, columns.
"""

import torch
from einops import rearrange
from torch import nn


def per_frame(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Group norm with statistics of each frame alone: no frame can tell what others hold."""
    batch = x.shape[0]
    normed = norm(rearrange(x, "B C T H W -> (B T) C H W"))
    return rearrange(normed, "(B T) C H W -> B C T H W", B=batch)
