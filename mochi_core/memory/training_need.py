"""How many bytes a forward and backward of the DiT with a LoRA need beside the frozen weights, at the worst moment.

What a backward needs of a block is kept from the forward, or computed once more when it is its turn (`Checkpoints`).
Counted is what tensors hold, as in `need`; the tests count the truth beside it.

Shapes: `B` batch, `N` visual tokens, `L` text tokens, `C` channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

import torch

from ..config import DiTConfig
from ..dit.flops import visual_tokens
from ..errors import TrainingError
from ..shapes import LatentSize

# The rank of each group of layers that the reference trains: into queries, keys and values, and out of the attention.
QKV_AND_OUT: Mapping[str, int] = MappingProxyType({"qkv": 16, "out": 16})
# A factor and its gradient in float32, and AdamW's two averages of it.
BYTES_A_PARAMETER = 4 + 4 + 2 * 4


@dataclass(frozen=True)
class Checkpoints:
    """How many blocks, from the first on, recompute a part for their gradients instead of keeping it.

    `qkv`: queries, keys and values with their norms and rotation. `post_attention`: what the attention gave, projected,
    gated and added. `feed_forward`: the MLP with its norm and gate. `blocks`: whole blocks, whatever the others say of
    them. More than there are means all: the reference's settings say 48 whatever the depth.

    Raises `TrainingError` when a count is negative.
    """

    qkv: int = 0
    feed_forward: int = 0
    post_attention: int = 0
    blocks: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            count = getattr(self, field.name)
            if count < 0:
                raise TrainingError(
                    f"The checkpoints say {field.name} = {count}",
                    "it is a number of blocks, and there cannot be less than none",
                    "Use 0 to keep everything, or 48 for each block of the released model",
                )

    def __str__(self) -> str:
        names = {field.name: field.name.replace("_", "-") for field in fields(self)} | {"blocks": "whole"}
        counts = [f"{getattr(self, name)} {word}" for name, word in names.items() if getattr(self, name)]
        return f"recomputed of blocks: {', '.join(counts)}" if counts else "nothing recomputed"


def training_activations(
    config: DiTConfig,
    size: LatentSize,
    *,
    checkpoints: Checkpoints = Checkpoints(),
    batch: int = 1,
    text_tokens: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    ranks: Mapping[str, int] = QKV_AND_OUT,
) -> int:
    """The most bytes alive in one forward and backward beside weights, LoRA and its gradients; inputs included.

    `ranks` are those of the trained groups `qkv`, `out`, `feed_forward` and `modulation`, without dropout. The kernel
    of the attention is a fused one, which never holds all scores.
    """
    block = _Block.of(config, visual_tokens(config, size), batch, text_tokens, dtype, ranks)
    kept = before = most = 0
    for index in range(config.depth):
        before, kept = kept, kept + block.kept(checkpoints, index)
        most = max(most, before + block.worst(checkpoints, index))
    # The last layer: its input, which then is widened, normed, scaled and shifted.
    most = max(most, kept + block.streams + 4 * block.wide_visual)

    value, wide = dtype.itemsize, max(dtype.itemsize, 4)
    dims, tokens = config.visual_dim + config.text_dim, visual_tokens(config, size)
    rotation = tokens * config.visual_dim * wide
    # Noisy latents, what the network says, and the loss between them in float32.
    latents = batch * tokens * config.patch_size**2 * config.latent_channels * (2 * value + 4 * 4)
    features = 2 * batch * text_tokens * config.text_feature_dim * value
    modulation = batch * dims * (8 * value + config.depth * 8 * wide)
    return rotation + latents + features + modulation + most


def lora_bytes(config: DiTConfig, ranks: Mapping[str, int] = QKV_AND_OUT, *, averaged: bool = False) -> int:
    """What a LoRA takes on the device while AdamW trains it: factors, gradients, states; `averaged` for an EMA too."""
    return lora_parameters(config, ranks) * (BYTES_A_PARAMETER + (4 if averaged else 0))


def lora_parameters(config: DiTConfig, ranks: Mapping[str, int] = QKV_AND_OUT) -> int:
    """How many numbers a LoRA has. The last block does not update the text and has fewer layers."""
    whole, last = (sum(rank * _ends(config, group, text) for group, rank in ranks.items()) for text in (True, False))
    return (config.depth - 1) * whole + last


def _ends(config: DiTConfig, group: str, updates_text: bool) -> int:
    """Inputs and outputs of all layers of a group in one block: a LoRA has its rank times that many numbers."""
    visual, text = config.visual_dim, config.text_dim
    layers = {
        "qkv": ([(visual, 3 * visual), (text, 3 * visual)], []),
        "out": ([(visual, visual)], [(visual, text)]),
        "feed_forward": (
            [(visual, 2 * config.visual_mlp_dim), (config.visual_mlp_dim, visual)],
            [(text, 2 * config.text_mlp_dim), (config.text_mlp_dim, text)],
        ),
        "modulation": ([(visual, 4 * visual), (visual, (4 if updates_text else 1) * text)], []),
    }
    always, with_text = layers[group]
    return sum(sum(ends) for ends in always + (with_text if updates_text else []))


@dataclass(frozen=True)
class _Block:
    """What a backward needs of one block, in bytes: of each part, and of what goes on beside them meanwhile.

    `streams` are both streams once. `qkv`, `post_attention` and `feed_forward` are what those parts keep unless they
    are recomputed, `attention` what is kept of the attention in any case.
    """

    streams: int
    wide_visual: int
    qkv: int
    attention: int
    post_attention: int
    feed_forward: int
    norm_backward: int
    mlp_backward: int
    attention_backward: int
    qkv_backward: int

    @classmethod
    def of(
        cls,
        config: DiTConfig,
        tokens: int,
        batch: int,
        text_tokens: int,
        dtype: torch.dtype,
        ranks: Mapping[str, int],
    ) -> "_Block":
        value, wide = dtype.itemsize, max(dtype.itemsize, 4)
        visual, text = config.visual_dim, config.text_dim
        everyone = batch * (tokens + text_tokens)
        streams = batch * (tokens * visual + text_tokens * text) * value
        hidden = batch * (tokens * config.visual_mlp_dim + text_tokens * config.text_mlp_dim) * value
        joined, wide_visual = everyone * visual * value, batch * tokens * visual * wide
        a_head = everyone * config.heads * 4
        # Of a LoRA: its factors as they are multiplied, and what is between them for each token.
        cast_value = 0 if dtype == torch.float32 else value
        trained = {
            group: rank * (_ends(config, group, True) * cast_value + everyone * value)
            for group, rank in ranks.items()
            if rank
        }
        # A gate that is learnt needs what it multiplied, in float32.
        gated = streams * wide // value if "modulation" in trained else 0
        attended = joined if batch > 1 else 0  # of a batch, each stream's part is copied out of the joined output

        qkv = (
            # Queries and keys before their norm: widened, or a part of the layer's whole output.
            (2 * everyone * visual * wide if wide > value else 3 * joined)
            + 2 * a_head
            + (streams + trained["qkv"] if "qkv" in trained else 0)
            + gated
        )
        post_attention = streams + (attended + trained["out"] if "out" in trained else 0) + gated
        feed_forward = (
            # Both halves of the hidden layer, and the one that is activated; the branch before its norm.
            3 * hidden
            + streams
            + (streams + hidden + 2 * trained["feed_forward"] if "feed_forward" in trained else 0)
            + 2 * gated
        )
        # Queries, keys, values, the output, and it again in order; of a ragged batch each prompt's, too.
        attention = 5 * joined + a_head + attended
        gradient, cast = streams, wide_visual * value // wide if wide > value else 0
        return cls(
            streams=streams,
            wide_visual=wide_visual,
            qkv=qkv,
            attention=attention,
            post_attention=post_attention,
            feed_forward=feed_forward,
            norm_backward=gradient + cast + 3 * wide_visual + gated,
            mlp_backward=gradient + 3 * hidden - streams,
            attention_backward=gradient + 4 * joined + a_head + attended,
            qkv_backward=gradient + joined + 6 * everyone * visual * wide,
        )

    def kept(self, checkpoints: Checkpoints, index: int) -> int:
        """What a block keeps from its forward to its backward."""
        if index < checkpoints.blocks:
            return self.streams
        # Before the attention and after it.
        streams = 2 * self.streams
        return streams + self.attention + self._qkv(checkpoints, index) + self._after(checkpoints, index)

    def worst(self, checkpoints: Checkpoints, index: int) -> int:
        """The most that is alive of a block while it is its turn in the backward, which ends at its queries."""
        if index < checkpoints.blocks:
            checkpoints = Checkpoints()
        qkv = self._qkv(checkpoints, index)
        until_post = qkv + self.streams + self.attention
        post_attention = 0 if index < checkpoints.post_attention else self.post_attention
        moments = (
            until_post + post_attention + self.streams + self.feed_forward + max(self.norm_backward, self.mlp_backward),
            until_post + self.post_attention + self.norm_backward,
            until_post + self.attention_backward,
            self.streams + self.qkv + self.qkv_backward,
        )
        return max(moments)

    def _qkv(self, checkpoints: Checkpoints, index: int) -> int:
        return 0 if index < checkpoints.qkv else self.qkv

    def _after(self, checkpoints: Checkpoints, index: int) -> int:
        post_attention = 0 if index < checkpoints.post_attention else self.post_attention
        return post_attention + (0 if index < checkpoints.feed_forward else self.feed_forward)
