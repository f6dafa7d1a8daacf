"""The projections around joint attention: into queries, keys and values, and back out of each stream.

Shapes: `B` batch, `N` visual tokens, `L` text tokens, `A` heads, `D` head width.
"""

from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..attention.joint import QKV, JointAttention, PlainJointAttention
from ..config import DiTConfig
from .layers import in_chunks, modulated_rms_norm
from .rope import FactoredRotations, Rotation, rotate

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
        rotation: Rotation,
        text_mask: torch.Tensor | None,
        *,
        tokens_at_once: int | None = None,
        projected: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`visual`: `B N visual_dim`, `text`: `B L text_dim`, scales: `B C`; None for text that is not updated.

        With `tokens_at_once` only the attention itself sees all visual tokens together. Unless `projected` both streams
        are as the attention left them, `B N visual_dim` and `B L visual_dim`: for whoever projects them.
        """
        if tokens_at_once is None:
            table = rotation.table() if isinstance(rotation, FactoredRotations) else rotation
            streams = self.visual_qkv(visual, visual_scale, table), self.text_qkv(text, text_scale)
        else:
            streams = self._qkv_in_chunks(visual, text, visual_scale, text_scale, rotation, tokens_at_once)
        visual_out, text_out = self.joint(*streams, text_mask)
        if not projected:
            return visual_out, text_out
        del streams  # three times the visual stream
        visual_branch = in_chunks(self.proj_x, tokens_at_once, visual_out)
        return visual_branch, None if self.proj_y is None else self.proj_y(text_out)

    def _qkv_in_chunks(
        self,
        visual: torch.Tensor,
        text: torch.Tensor,
        visual_scale: torch.Tensor,
        text_scale: torch.Tensor,
        rotation: Rotation,
        tokens_at_once: int,
    ) -> tuple[QKV, QKV]:
        """Both streams, each part written to where it lies side by side with the rest: joining them copies nothing."""
        text_qkv = self.text_qkv(text, text_scale)
        batch, tokens = visual.shape[:2]
        # Tokens before heads, so that fused kernels, whose output lies as the queries do, need no copy after them.
        shape = (batch, tokens + text.shape[1], *text_qkv.v.shape[2:])
        joined = QKV(*(text_qkv.v.new_empty(shape) for _ in QKV._fields))
        _put(text_qkv, joined, slice(tokens, None))
        for start in range(0, tokens, tokens_at_once):
            part = slice(start, min(start + tokens_at_once, tokens))
            _put(self.visual_qkv(visual[:, part], visual_scale, rotation[part]), joined, part)
        return QKV(*(x[:, :tokens] for x in joined)), QKV(*(x[:, tokens:] for x in joined))

    def visual_qkv(self, visual: torch.Tensor, scale: torch.Tensor, rotation: torch.Tensor) -> QKV:
        q, k, v = self._heads(self.qkv_x(modulated_rms_norm(visual, scale)))
        q, k = rotate(self.q_norm_x(q), rotation), rotate(self.k_norm_x(k), rotation)
        return QKV(q.to(v.dtype), k.to(v.dtype), v)

    def text_qkv(self, text: torch.Tensor, scale: torch.Tensor) -> QKV:
        q, k, v = self._heads(self.qkv_y(modulated_rms_norm(text, scale)))
        return QKV(self.q_norm_y(q), self.k_norm_y(k), v)

    def _heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)  # pyright: ignore[reportReturnType]


def _put(qkv: QKV, joined: QKV, tokens: slice) -> None:
    for x, whole in zip(qkv, joined):
        whole[:, tokens] = x
