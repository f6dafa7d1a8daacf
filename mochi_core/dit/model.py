"""The whole transformer: latents, a noise level and text features in; clean minus noise out.

Parameter names are those of the released checkpoint.

Shapes: `B` batch, `C` channels, `T H W` latent frames, rows, columns, `N` visual tokens, `L` text tokens.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from einops import rearrange
from torch import nn

from ..config import MOCHI_1, DiTConfig
from ..errors import ConditioningError, LatentsError
from .block import AsymmetricJointBlock
from .embed import AttentionPool, PatchEmbed, TimestepEmbed
from .layers import FinalLayer, in_chunks
from .rope import rotations

Streams = tuple[torch.Tensor, torch.Tensor]
RunBlock = Callable[..., Streams]


def _run_block(index: int, block: AsymmetricJointBlock, *inputs: Any) -> Streams:
    return block(*inputs)


class AsymmDiT(nn.Module):
    """Mochi 1's network (genmo/mochi-1-preview, "Asymmetric Diffusion Transformer").

    `operations` is the namespace that layers with weights come from: `torch.nn`, or one that streams and casts them.
    """

    def __init__(
        self,
        config: DiTConfig = MOCHI_1.dit,
        *,
        operations: ModuleType | Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        factory: dict[str, Any] = dict(dtype=dtype, device=device)
        self.config = config
        dim = config.visual_dim
        self.x_embedder = PatchEmbed(config.patch_size, config.latent_channels, dim, operations, **factory)
        self.t_embedder = TimestepEmbed(dim, config.timestep_scale, operations, **factory)
        self.t5_y_embedder = AttentionPool(config.text_feature_dim, dim, operations, **factory)
        self.t5_yproj = operations.Linear(config.text_feature_dim, config.text_dim, **factory)
        self.pos_frequencies = nn.Parameter(torch.empty(3, config.heads, config.head_dim // 2, **factory))
        self.blocks = nn.ModuleList(
            AsymmetricJointBlock(config, index < config.depth - 1, operations, **factory)
            for index in range(config.depth)
        )
        patch_values = config.patch_size**2 * config.latent_channels
        self.final_layer = FinalLayer(dim, patch_values, operations, **factory)

    @property
    def tokens_at_once(self) -> int | None:
        """How many visual tokens what is done to each token alone is done to; None, as made, for all.

        Fewer need less memory, and more time only where they are too few to keep the device busy. The numbers are the
        same up to what a matrix product of another size rounds differently. `memory.plan` knows how many fit.
        """
        return self.blocks[0].tokens_at_once  # pyright: ignore[reportReturnType]

    @tokens_at_once.setter
    def tokens_at_once(self, tokens: int | None) -> None:
        for block in self.blocks:
            block.tokens_at_once = tokens  # pyright: ignore[reportArgumentType]

    def forward(
        self,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        text_features: torch.Tensor,
        text_mask: torch.Tensor,
        *,
        run_block: RunBlock = _run_block,
    ) -> torch.Tensor:
        """Predicts clean minus noise.

        `latents`: `B C T H W` in model space; their dtype is the compute dtype. `sigma`: `B`, from 1 (pure noise)
        to 0 (clean). `text_features`: `B L text_feature_dim`. `text_mask`: `B L`, nonzero for real tokens, in any
        place and number; masked tokens have no influence whatever they hold. `run_block(index, block, *inputs)`
        runs each block, for those who want to be around it. Returns `B C T H W`.

        Raises `LatentsError` or `ConditioningError` when the inputs do not fit this model.
        """
        self.check(latents, text_features, text_mask)
        frames, height, width = latents.shape[2:]
        rows, columns = height // self.config.patch_size, width // self.config.patch_size

        text_features, text_mask = compact(text_features.to(latents.dtype), text_mask != 0)
        conditioning = self.t_embedder(sigma, latents.dtype) + self.t5_y_embedder(text_features, text_mask)
        at_once = self.tokens_at_once
        rotation = rotations(self.pos_frequencies, frames, rows, columns, latents.device)
        if at_once is None:
            rotation = rotation.table()
        visual, text = self.x_embedder(latents), self.t5_yproj(text_features)
        ragged_mask = None if text_mask.all() else text_mask
        for index, block in enumerate(self.blocks):
            visual, text = run_block(index, block, visual, text, conditioning, rotation, ragged_mask)
        patches = in_chunks(lambda x: self.final_layer(x, conditioning), at_once, visual)
        return self.unpatchify(patches, frames, rows, columns)

    def unpatchify(self, patches: torch.Tensor, frames: int, rows: int, columns: int) -> torch.Tensor:
        """`B N patch_values` -> `B C T H W`."""
        p = self.config.patch_size
        return rearrange(patches, "B (T H W) (p q C) -> B C T (H p) (W q)", T=frames, H=rows, W=columns, p=p, q=p)

    def check(self, latents: torch.Tensor, text_features: torch.Tensor, text_mask: torch.Tensor) -> None:
        """Raises `LatentsError` or `ConditioningError` when the inputs do not fit this model."""
        channels, patch = self.config.latent_channels, self.config.patch_size
        fits = latents.ndim == 5 and latents.shape[1] == channels and 0 not in latents.shape
        if not fits or any(n % patch for n in latents.shape[3:]):
            raise LatentsError(
                f"The latents have shape {tuple(latents.shape)}",
                f"they must be B x {channels} x T x H x W, with H and W multiples of {patch}",
                "Use width and height that are multiples of 16",
            )
        width = self.config.text_feature_dim
        if text_features.ndim != 3 or text_features.shape[2] != width:
            raise ConditioningError(
                f"The text features have shape {tuple(text_features.shape)}",
                f"this DiT reads features of width {width}",
                "Encode the prompt with the T5 that belongs to this DiT",
            )
        if text_mask.shape != text_features.shape[:2] or len(text_features) != len(latents):
            raise ConditioningError(
                f"The text mask has shape {tuple(text_mask.shape)}, the features {tuple(text_features.shape)}, "
                f"the latents a batch of {len(latents)}",
                "mask and features must agree, one prompt for each latent",
                "Encode prompt and mask together, and repeat them for each latent of the batch",
            )


def compact(features: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves real tokens to the front and drops columns that are padding in every prompt.

    Text carries no position in this model, so the order of tokens means nothing. `features`: `B L C`, `mask`: `B L`
    boolean. What remains in masked places is zero, so that no NaN of the padding can spread.
    """
    longest = int(mask.sum(1).max())
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    mask = mask.gather(1, order)
    features = features.gather(1, order.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
    return features.masked_fill(~mask.unsqueeze(-1), 0), mask
