"""The projections around joint attention: into queries, keys and values, and back out of each stream.

Shapes: `B` batch, `N` visual tokens, `L` text tokens, `A` heads, `D` head width.
"""

from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..attention.joint import QKV, JointAttention, PlainJointAttention
from ..config import DiTConfig
from .layers import modulated_rms_norm
from .rope import rotate

HEAD_NORM_EPS = 1e-5


class AsymmetricAttention(nn.Module):
    """Joint attention over streams of different width; only visual tokens carry a position.

    `joint` is what attends, a plain attribute: a parallel or windowed form replaces it on a finished model.
    """

    joint: JointAttention

    def __init__(self, config: DiTConfig, update_text: bool, operations: ModuleType | Any, **factory: Any):
        super().__init__()
        visual, text = config.visual_dim, config.text_dim
        self.heads = config.heads
        self.joint = PlainJointAttention()
        self.qkv_x = operations.Linear(visual, 3 * visual, bias=False, **factory)
        self.qkv_y = operations.Linear(text, 3 * visual, bias=False, **factory)
        norm = dict(eps=HEAD_NORM_EPS, **factory)
        self.q_norm_x = operations.RMSNorm(config.head_dim, **norm)
        self.k_norm_x = operations.RMSNorm(config.head_dim, **norm)
        self.q_norm_y = operations.RMSNorm(config.head_dim, **norm)
        self.k_norm_y = operations.RMSNorm(config.head_dim, **norm)
        self.proj_x = operations.Linear(visual, visual, **factory)
        self.proj_y = operations.Linear(visual, text, **factory) if update_text else None

    def forward(
        self,
        visual: torch.Tensor,
        text: torch.Tensor,
        visual_scale: torch.Tensor,
        text_scale: torch.Tensor,
        rotation: torch.Tensor,
        text_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`visual`: `B N visual_dim`, `text`: `B L text_dim`, scales: `B C`; None for text that is not updated."""
        visual_out, text_out = self.joint(
            self.visual_qkv(visual, visual_scale, rotation), self.text_qkv(text, text_scale), text_mask
        )
        return self.proj_x(visual_out), None if self.proj_y is None else self.proj_y(text_out)

    def visual_qkv(self, visual: torch.Tensor, scale: torch.Tensor, rotation: torch.Tensor) -> QKV:
        q, k, v = self._heads(self.qkv_x(modulated_rms_norm(visual, scale)))
        q, k = rotate(self.q_norm_x(q), rotation), rotate(self.k_norm_x(k), rotation)
        return QKV(q.to(v.dtype), k.to(v.dtype), v)

    def text_qkv(self, text: torch.Tensor, scale: torch.Tensor) -> QKV:
        q, k, v = self._heads(self.qkv_y(modulated_rms_norm(text, scale)))
        return QKV(self.q_norm_y(q), self.k_norm_y(k), v)

    def _heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)  # pyright: ignore[reportReturnType]
