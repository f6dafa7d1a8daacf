"""One block: joint attention, then an MLP for each stream, each branch normed, gated and added.

Shapes: `B` batch, `N` visual tokens, `L` text tokens.
"""

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
    done to each token alone is done to, None for all. It saves memory and changes nothing else.
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

        def add_branch(x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
            return gated_residual(x, branch, attn_gate)

        def add_mlp(x: torch.Tensor) -> torch.Tensor:
            return gated_residual(x, self.mlp_x(modulated_rms_norm(x, mlp_scale)), mlp_gate)

        at_once = self.tokens_at_once
        visual_branch, text_branch = self.attn(
            visual, text, attn_scale, text_attn_scale, rotation, text_mask, tokens_at_once=at_once
        )
        visual = in_chunks(add_branch, at_once, visual, visual_branch)
        del visual_branch  # as large as the stream, and the MLP is where memory is short
        visual = in_chunks(add_mlp, at_once, visual)
        if self.mlp_y is not None:
            text_attn_gate, text_mlp_scale, text_mlp_gate = text_rest
            text = gated_residual(text, text_branch, text_attn_gate)
            text = gated_residual(text, self.mlp_y(modulated_rms_norm(text, text_mlp_scale)), text_mlp_gate)
        return visual, text
