"""How the two streams attend to each other: every token, visual or text, sees every visual and valid text token.

The streams come in apart because a parallel form shards the visual tokens while the text is on every rank.

Shapes: `B` batch, `N` visual tokens, `L` text tokens, `A` heads, `D` head width.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch.nn import functional as F

from .kernels import check_name, get_kernel


class QKV(NamedTuple):
    """Queries, keys and values of one stream, each `B tokens A D`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class JointAttention(Protocol):
    """`(visual, text, text_mask) -> (visual, text)`: attention outputs, each `B tokens A*D`.

    `text_mask` is `B L`, true for real tokens, or None when every one is. Outputs of masked tokens are finite and
    meaningless: nothing attends to them.
    """

    def __call__(self, visual: QKV, text: QKV, text_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]: ...


def side_by_side(visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """`B N A D` and `B L A D` as one `B A N+L D`: a view where they already lie so in memory, else a copy."""
    batch, tokens, heads, width = visual.shape
    together = (
        visual.stride() == text.stride()
        and text.storage_offset() == visual.storage_offset() + tokens * visual.stride(1)
        # The address of the storage object, which tensors without memory have too.
        and visual.untyped_storage()._cdata == text.untyped_storage()._cdata
        # A view over both would lose the gradient of the second.
        and not (torch.is_grad_enabled() and (visual.requires_grad or text.requires_grad))
    )
    if together:
        return visual.as_strided((batch, tokens + text.shape[1], heads, width), visual.stride()).transpose(1, 2)
    return torch.cat([visual.transpose(1, 2), text.transpose(1, 2)], dim=2)


@dataclass(frozen=True)
class PlainJointAttention:
    """Both streams side by side in one call of a kernel from the table. Raises `KernelError` on an unknown name."""

    kernel: str = "auto"

    def __post_init__(self) -> None:
        check_name(self.kernel)

    def __call__(self, visual: QKV, text: QKV, text_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        visual_tokens = visual.q.shape[1]
        # Joined as B A N D: CPU kernels are faster on heads that lie together, and the copy is made anyway.
        q, k, v = (side_by_side(*pair) for pair in zip(visual, text))
        key_mask = None if text_mask is None else F.pad(text_mask, (visual_tokens, 0), value=True)
        out = get_kernel(self.kernel, q.device, q.dtype)(q, k, v, key_mask)  # B A N+L D
        out = out.transpose(1, 2).flatten(2)
        return out[:, :visual_tokens], out[:, visual_tokens:]
