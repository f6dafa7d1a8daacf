"""How many floating-point operations a DiT forward takes: its matrix products, two operations a multiply-add.

Norms, gates and rotations are not counted. Shapes: `N` visual tokens, `L` valid text tokens.
"""

from ..config import DiTConfig
from ..shapes import LatentSize


def visual_tokens(config: DiTConfig, size: LatentSize) -> int:
    """How many tokens a clip of this size is to the transformer."""
    return size.frames * (size.height // config.patch_size) * (size.width // config.patch_size)


def attention_flops(config: DiTConfig, tokens: int) -> int:
    """Scores and weighted values of one block's attention over `tokens` = N + L."""
    return 4 * tokens**2 * config.visual_dim


def linear_flops(config: DiTConfig, visual_tokens: int, text_tokens: int) -> int:
    """All linear layers of one forward; the vector-sized ones of the conditioning included."""
    visual, text = config.visual_dim, config.text_dim
    patch_values = config.patch_size**2 * config.latent_channels
    total = 0
    for index in range(config.depth):
        updates_text = index < config.depth - 1
        # qkv, output, the MLP's three matrices
        total += visual_tokens * (3 * visual * visual + visual * visual + 3 * visual * config.visual_mlp_dim)
        total += text_tokens * 3 * text * visual
        total += visual * (4 * visual + (4 if updates_text else 1) * text)
        if updates_text:
            total += text_tokens * (visual * text + 3 * text * config.text_mlp_dim)
    total += visual_tokens * 2 * patch_values * visual  # patches in and out
    total += text_tokens * config.text_feature_dim * text
    total += (text_tokens + 1) * 2 * config.text_feature_dim**2 + config.text_feature_dim**2  # pooling
    total += config.text_feature_dim * visual + 256 * visual + visual**2 + 2 * visual**2  # and the other vectors
    return 2 * total


def dit_flops(config: DiTConfig, visual_tokens: int, text_tokens: int) -> int:
    """One forward for one prompt."""
    attention = config.depth * attention_flops(config, visual_tokens + text_tokens)
    return attention + linear_flops(config, visual_tokens, text_tokens)
