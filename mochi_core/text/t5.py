"""The T5 encoder, which is transformers' own."""

import torch
from transformers import T5Config, T5EncoderModel

from ..config import TextConfig


def empty_t5(config: TextConfig) -> T5EncoderModel:
    """A T5 encoder of this size on the meta device, without weights."""
    hugging_face = T5Config(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        d_kv=config.d_kv,
        d_ff=config.d_ff,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        relative_attention_num_buckets=config.relative_attention_num_buckets,
        relative_attention_max_distance=config.relative_attention_max_distance,
        layer_norm_epsilon=float(config.layer_norm_epsilon),  # a whole number is refused
        feed_forward_proj=config.feed_forward_proj,
        dropout_rate=0.0,
    )
    with torch.device("meta"):
        return T5EncoderModel(hugging_face)
