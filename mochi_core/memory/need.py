"""How many bytes a forward of the DiT or the T5 needs beside the weights: what is alive at the worst moment.

Counted is what tensors hold. A device needs more: its context, what kernels take inside themselves, and what the
allocator cannot fill; whoever has a budget for all of it keeps some back.

Each worst moment is written as a sum of what is alive then, from the numbers of the architecture; the tests count the
truth beside it.

Shapes: `B` batch, `N` visual tokens, `L` text tokens, `C` channels.
"""

import torch

from ..config import DiTConfig, TextConfig
from ..dit.flops import visual_tokens
from ..shapes import LatentSize

# Matrix products of so many rows are large ones. On a CPU chunks of a quarter of it cost nothing (docs/memory.md).
BUSY_TOKENS = 4096
# Below this many tokens at once, matrix products no longer keep a device busy, and hardly any memory is saved.
FEWEST_TOKENS = 1024
TOKEN_STEP = 256


def dit_activations(
    config: DiTConfig,
    size: LatentSize,
    *,
    batch: int = 1,
    text_tokens: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    tokens_at_once: int | None = None,
) -> int:
    """The most bytes that one forward of the DiT keeps alive beside its weights, its inputs included.

    `batch` counts what runs together: twice the videos where both halves of a guided step do; its prompts may be of
    unequal length. `tokens_at_once` is the network's (`AsymmDiT.tokens_at_once`). The attention kernel is a fused one,
    which never holds all scores, and gradients are off.
    """
    value, wide = dtype.itemsize, max(dtype.itemsize, 4)
    dim, tokens = config.visual_dim, visual_tokens(config, size)
    visual, text = batch * tokens * dim * value, batch * text_tokens * dim * value
    joined = visual + text
    text_stream = batch * text_tokens * config.text_dim * value

    # For each token: queries, keys and values, the norm of the keys; queries turned, keys before and after they turn.
    turned = batch * dim * (4 * value + (3 if wide > value else 2) * wide)
    # For each token: the normed input, both halves of the hidden layer and their product, the output.
    gated = batch * value * (2 * dim + 3 * config.visual_mlp_dim)
    # What turns a token: as much as its part of a wide stream.
    rotation = dim * wide

    if tokens_at_once is None:
        always = tokens * rotation
        moments = (
            visual + tokens * turned,
            # Queries, keys and values: as they are made, turned, joined. The outputs, which then are put in order.
            6 * visual + 5 * text + 5 * joined,
            # The stream before and after the attention, and the text.
            2 * visual + text_stream + tokens * gated,
        )
    else:
        at_once = min(tokens_at_once, tokens)
        always = (size.frames + tokens // size.frames) * rotation
        sums = batch * (tokens + text_tokens) * config.heads * 4  # a kernel's, of each query's softmax
        moments = (
            # Queries, keys and values joined, and those of a chunk and of the text on their way there.
            visual + 3 * joined + at_once * (turned + rotation) + 5 * text,
            # The outputs of a ragged batch are made one by one, then put together.
            visual + (4 if batch == 1 else 5) * joined + sums,
            # The stream before and after the attention, and after the MLP as soon as a first chunk is there.
            2 * visual + text_stream + at_once * gated,
            3 * visual + text_stream + min(at_once, tokens - at_once) * gated,
        )

    # More than the rest where there is little picture: features widened and masked, or beside their keys and values.
    pooling = batch * config.text_feature_dim * max(2 * text_tokens * wide, 3 * (text_tokens + 3) * value)

    latents = batch * tokens * config.patch_size**2 * config.latent_channels * value
    features = 2 * batch * text_tokens * config.text_feature_dim * value  # as they come, and without their padding
    modulation = 8 * batch * (config.visual_dim + config.text_dim) * value
    return always + latents + features + text_stream + modulation + max(*moments, pooling)


def t5_activations(
    config: TextConfig, *, batch: int = 1, tokens: int = 256, dtype: torch.dtype = torch.bfloat16
) -> int:
    """The most bytes that one forward of the T5 encoder keeps alive beside its weights.

    That is of transformers' attention that holds all scores, which older versions always take for T5.
    """
    value = dtype.itemsize
    states = batch * tokens * config.d_model * value
    hidden = batch * tokens * config.d_ff * value
    projected = batch * tokens * config.num_heads * config.d_kv * value
    scores = batch * config.num_heads * tokens**2 * value
    mask = batch * tokens**2 * value
    moments = (
        # The stream, its norm, what came of the attention; GELU's powers; positions as scores, and the last weights.
        4 * states + 4 * hidden + 2 * scores,
        3 * scores + 4 * projected,
        # Positions of pairs of tokens, as integers of 8 bytes, and as scores.
        7 * tokens**2 * 8 + scores,
    )
    inputs = 2 * batch * tokens * 8
    return inputs + mask + max(moments)
