"""One block: joint attention, then an MLP for each stream, each branch normed, gated and added.

Shapes: `B` batch, `N` visual tokens, `L` text tokens.
"""

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..config import DiTConfig
from .attention import AsymmetricAttention
from .layers import GatedMLP, gated_residual, in_chunks, modulated_rms_norm
from .rope import Rotation


class AsymmetricJointBlock(nn.Module):
    """The last block of a model does not update the text: nothing reads it afterwards.

    `tokens_at_once` is a plain attribute that the caller may set on a finished model: how many visual tokens what is
    done to each token alone is done to, None for all. It saves memory and changes nothing else. `after_attention`,
    `feed_forward` and the attention's `visual_qkv` and `text_qkv` may be replaced too, by something around them.
    """

    tokens_at_once: int | None = None

    def __init__(self, config: DiTConfig, update_text: bool, operations: ModuleType | Any, **factory: Any):
        super().__init__()
        visual, text = config.visual_dim, config.text_dim
        self.mod_x = operations.Linear(visual, 4 * visual, **factory)
        self.mod_y = operations.Linear(visual, (4 if update_text else 1) * text, **factory)
        self.attn = AsymmetricAttention(config, update_text, operations, **factory)
        self.mlp_x = GatedMLP(visual, config.visual_mlp_dim, operations, **factory)
        self.mlp_y = GatedMLP(text, config.text_mlp_dim, operations, **factory) if update_text else None

    def forward(
        self,
        visual: torch.Tensor,
        text: torch.Tensor,
        conditioning: torch.Tensor,
        rotation: Rotation,
        text_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`visual`: `B N visual_dim`, `text`: `B L text_dim`, `conditioning`: `B visual_dim`; the streams again."""
        conditioning = F.silu(conditioning)
        attn_scale, attn_gate, mlp_scale, mlp_gate = self.mod_x(conditioning).chunk(4, dim=-1)
        text_attn_scale, *text_rest = self.mod_y(conditioning).split(text.shape[-1], dim=-1)

        at_once = self.tokens_at_once
        visual_attended, text_attended = self.attn(
            visual, text, attn_scale, text_attn_scale, rotation, text_mask, tokens_at_once=at_once, projected=False
        )
        add_attended = partial(self.after_attention, self.attn.proj_x, gate=attn_gate)
        visual = in_chunks(add_attended, at_once, visual, visual_attended)
        if self.mlp_y is not None:
            text_attn_gate, text_mlp_scale, text_mlp_gate = text_rest
            text = self.after_attention(self.attn.proj_y, text, text_attended, gate=text_attn_gate)
            text = self.feed_forward(self.mlp_y, text, scale=text_mlp_scale, gate=text_mlp_gate)
        del visual_attended, text_attended  # as large as the streams, and the MLP is where memory is short
        add_mlp = partial(self.feed_forward, self.mlp_x, scale=mlp_scale, gate=mlp_gate)
        visual = in_chunks(add_mlp, at_once, visual)
        return visual, text

    def after_attention(
        self, project: Any, x: torch.Tensor, attended: torch.Tensor, *, gate: torch.Tensor
    ) -> torch.Tensor:
        """A stream, `B N C`, with what it got from the attention, `B N visual_dim`, projected and gated by `B C`."""
        return gated_residual(x, project(attended), gate)

    def feed_forward(self, mlp: Any, x: torch.Tensor, *, scale: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """A stream, `B N C`, with its MLP's branch; `scale` and `gate`: `B C`."""
        return gated_residual(x, mlp(modulated_rms_norm(x, scale)), gate)
