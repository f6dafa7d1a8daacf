"""The T5's training: from every token, and from their mean, each thing that a caption tells must be readable.

The heads that read are thrown away; what stays is a text encoder whose features know which colour is whose. It reads of
the reserved shape and motion too: words are cheap, and it is the pictures that a LoRA has to learn.

Shapes: `B` captions, `L` tokens, `C` feature width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import T5EncoderModel

from ...config import TextConfig
from ...text.t5 import empty_t5
from ...text.tokenizer import PAD_ID, Tokenizer
from ...weights.writer import write_safetensors
from ..draws import generator
from ..loop import Loss
from . import scenes
from .files import bfloat16_outputs

CHOICES: Mapping[str, tuple[str, ...]] = {
    "colour": tuple(scenes.COLOURS),
    "shape": scenes.SHAPES,
    "background": scenes.BACKGROUNDS,
    "motion": scenes.MOTIONS,
}
FIRST_BIAS = 2.0
HARD = 0.5
SECOND_NAME = "encoder.embed_tokens.weight"


def new_t5(config: TextConfig, seed: int) -> T5EncoderModel:
    """With the first weights of T5 v1.1, drawn from a seed."""
    model, chance = empty_t5(config).to_empty(device="cpu"), generator(seed, "t5")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1)
            elif name.endswith("shared.weight"):
                weight.normal_(0, 1, generator=chance)
            elif "relative_attention_bias" in name:
                # Strong, so that some heads look at the word before and some at the next from the beginning: which
                # colour is whose is a matter of neighbours, and else learnt last.
                weight.normal_(0, FIRST_BIAS, generator=chance)
            else:
                extra = config.d_kv**-0.5 if name.endswith(".q.weight") else 1.0
                weight.normal_(0, extra * weight.shape[1] ** -0.5, generator=chance)
    model.tie_weights()
    return model


class Reader(nn.Module):
    """A T5 with one linear head for each thing that a caption tells."""

    def __init__(self, t5: T5EncoderModel):
        super().__init__()
        self.t5 = t5
        width = t5.config.d_model
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(words)) for name, words in CHOICES.items()})
        for head in self.heads.values():
            nn.init.zeros_(head.weight)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(head.bias)  # pyright: ignore[reportArgumentType]


def encode(t5: T5EncoderModel, tokenizer: Tokenizer, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features `B L C` and mask `B L`, as long as the longest; an empty caption has no token."""
    ids = [tokenizer.all_ids(caption) if caption else [] for caption in captions]
    longest, device = max(1, *map(len, ids)), t5.shared.weight.device
    padded = torch.tensor([[*some, *[PAD_ID] * (longest - len(some))] for some in ids], device=device)
    mask = torch.tensor([[place < len(some) for place in range(longest)] for some in ids], device=device)
    features = t5(input_ids=padded, attention_mask=mask.long()).last_hidden_state
    return features.masked_fill(~mask.unsqueeze(-1), 0), mask


@dataclass
class TextTask:
    """A `loop.Task`: the T5 learns to tell, from captions alone, what they say."""

    reader: Reader
    tokenizer: Tokenizer
    seed: int
    batch: int = 192
    mean_share: float = 0.5
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def trained(self) -> nn.Module:
        return self.reader

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return {"seed": self.seed, "batch": self.batch, "config": {"d_model": self.reader.t5.config.d_model}}

    def captions(self, index: int) -> tuple[list[str], list[scenes.Scene]]:
        """Micro-batch `index`; half of its captions have two colours of which each could be the background's."""
        chance = np.random.default_rng((self.seed, 2, index))
        every = told()
        hard = tuple(
            scene for scene in every if scene.colour in scenes.BACKGROUNDS and scene.background in scenes.COLOURS
        )
        some = [
            one[chance.integers(len(one))]
            for one in (hard if chance.random() < HARD else every for _ in range(self.batch))
        ]
        return [scene.caption(chance) for scene in some], some

    def loss(self, index: int) -> Loss:
        captions, told = self.captions(index)
        features, mask = encode(self.reader.t5, self.tokenizer, captions)
        mean = features.sum(1) / mask.sum(1, keepdim=True)
        value, right = features.new_zeros(()), mask.any(1)
        for name, words in CHOICES.items():
            wanted = features.new_tensor([words.index(getattr(scene, name)) for scene in told], dtype=torch.long)
            of_mean, of_tokens = self.reader.heads[name](mean), self.reader.heads[name](features)
            each = F.cross_entropy(of_tokens[mask], wanted[:, None].expand_as(mask)[mask])
            value = value + self.mean_share * F.cross_entropy(of_mean, wanted) + (1 - self.mean_share) * each
            right &= of_mean.argmax(-1) == wanted
        return Loss(value, metrics={"right": right.float().mean().item()})

    def write(self, folder: Path, name: str) -> Path:
        path = folder / f"{name}.safetensors"
        weights = {key: value for key, value in self.reader.t5.state_dict().items() if key != SECOND_NAME}
        write_safetensors(path, bfloat16_outputs(weights), self.metadata)
        return path

    def sample(self, folder: Path, name: str) -> Path | None:
        return None


def told() -> tuple[scenes.Scene, ...]:
    """What captions may tell while the T5 learns: all that is not held out, the reserved included."""
    return scenes.every_scene(held_out=False)


@torch.no_grad()
def reading_accuracy(reader: Reader, tokenizer: Tokenizer, told: Sequence[scenes.Scene], seed: int) -> dict[str, float]:
    """How much of what captions tell is read right: all four from the mean, and each token's readings."""
    chance = np.random.default_rng((seed, 3))
    features, mask = encode(reader.t5, tokenizer, [scene.caption(chance) for scene in told])
    mean = features.sum(1) / mask.sum(1, keepdim=True)
    all_right, token_right = mask.any(1), []
    for name, words in CHOICES.items():
        wanted = features.new_tensor([words.index(getattr(scene, name)) for scene in told], dtype=torch.long)
        all_right &= reader.heads[name](mean).argmax(-1) == wanted
        token_right.append((reader.heads[name](features).argmax(-1) == wanted[:, None])[mask].float().mean())
    return {"mean": all_right.float().mean().item(), "tokens": torch.stack(token_right).mean().item()}
