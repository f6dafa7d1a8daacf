"""The DiT's training: flow matching on cached latents, with captions through a T5 that stays as it is.

Shapes: `B C T H W` = batch, channels, latent frames, latent rows, latent columns.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import T5EncoderModel

from ...attention.joint import PlainJointAttention
from ...config import DiTConfig
from ...dit import AsymmDiT
from ...latents import LatentStatistics
from ...shapes import FRAMES_PER_LATENT
from ...text.tokenizer import Tokenizer
from ...weights.writer import write_safetensors
from ..draws import generator
from ..loop import Loss
from ..objective import NoiseLevels, flow_matching_loss
from . import scenes
from .files import bfloat16_outputs
from .latents import Cache
from .text import encode

OPEN_GATE = 0.3
# Radians a latent frame, and radians a patch of a picture that is spread over 192: slow to fast.
TIME_FREQUENCIES = (0.2, 1.6)
PLACE_FREQUENCIES = (0.005, 0.06)
MAIN_FRAMES = (scenes.FRAMES - 1) // FRAMES_PER_LATENT + 1


@dataclass(frozen=True)
class DiTRecipe:
    """`lengths` are latent frames and how often a micro-batch has them; `null` of the captions are the null prompt."""

    batch: int = 64
    null: float = 0.1
    levels: NoiseLevels = NoiseLevels("shifted", shift=2.0, stratified=True)
    lengths: tuple[tuple[int, float], ...] = ((4, 0.82), (3, 0.08), (2, 0.05), (5, 0.05))
    bfloat16: bool = True


def new_dit(config: DiTConfig, seed: int) -> AsymmDiT:
    """With first weights drawn from a seed: gates a little open, an output of zero, no modulation yet."""
    dit, chance = AsymmDiT(config), generator(seed, "dit")
    with torch.no_grad():
        for name, weight in dit.named_parameters():
            if name == "pos_frequencies":
                continue
            if weight.ndim == 1:
                weight.fill_(1.0 if "norm" in name else 0.0)
            else:
                weight.normal_(0, weight[0].numel() ** -0.5, generator=chance)
        for block in dit.blocks:
            width, text = config.visual_dim, config.text_dim
            for mod, size in ((block.mod_x, width), (block.mod_y, text)):  # scale, gate, scale, gate
                mod.weight.zero_()  # pyright: ignore
                mod.bias.view(-1, size)[1::2] = OPEN_GATE  # pyright: ignore
        for last in (dit.final_layer.mod, dit.final_layer.linear):
            last.weight.zero_()
        for axis, (slow, fast) in enumerate((TIME_FREQUENCIES, PLACE_FREQUENCIES, PLACE_FREQUENCIES)):
            frequencies = dit.pos_frequencies[axis]
            spread = torch.rand(frequencies.shape, generator=chance)
            signs = torch.randint(0, 2, frequencies.shape, generator=chance) * 2 - 1
            frequencies.copy_(signs * torch.exp(math.log(slow) + spread * math.log(fast / slow)))
    return dit


@dataclass
class DiTTask:
    """A `loop.Task`: the DiT learns the clips of `caches`, which lie by their latent frames."""

    dit: AsymmDiT
    t5: T5EncoderModel
    tokenizer: Tokenizer
    caches: Mapping[int, Cache]
    statistics: LatentStatistics
    recipe: DiTRecipe
    seed: int
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for block in self.dit.blocks:
            block.attn.joint = PlainJointAttention("reference")  # pyright: ignore
        self.t5.requires_grad_(False)

    @property
    def trained(self) -> nn.Module:
        return self.dit

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        clips = {str(frames): len(cache) for frames, cache in self.caches.items()}
        return {"recipe": asdict(self.recipe), "seed": self.seed, "clips": clips}

    def batch(self, index: int) -> tuple[torch.Tensor, list[str]]:
        """Clean latents in model space, and a caption for each, sometimes none."""
        chance = np.random.default_rng((self.seed, 4, index))
        lengths, shares = zip(*self.recipe.lengths)
        frames = int(chance.choice(lengths, p=np.array(shares) / sum(shares)))
        cache = self.caches[min(held for held in self.caches if held >= frames)]
        places = torch.from_numpy(chance.integers(len(cache), size=self.recipe.batch))
        clean = cache.sample(places, frames, generator(self.seed, "posterior", index))
        captions = [
            "" if chance.random() < self.recipe.null else cache.shown[place].caption(chance)
            for place in places.tolist()
        ]
        return self.statistics.to_model_space(clean), captions

    def loss(self, index: int) -> Loss:
        device = self.dit.pos_frequencies.device
        clean, captions = self.batch(index)
        chance = generator(self.seed, "noise", index)
        noise, sigma = torch.randn(clean.shape, generator=chance), self.recipe.levels.draw(len(clean), chance)
        clean, noise, sigma = clean.to(device), noise.to(device), sigma.to(device)
        with torch.no_grad():
            features, mask = encode(self.t5, self.tokenizer, captions)

        def predict(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.bfloat16):
                return self.dit(latents, sigma, features, mask)

        return Loss(flow_matching_loss(predict, clean, noise, sigma).mean())

    def write(self, folder: Path, name: str) -> Path:
        path = folder / f"{name}.safetensors"
        write_safetensors(path, bfloat16_outputs(self.dit.state_dict()), self.metadata)
        return path

    def sample(self, folder: Path, name: str) -> Path | None:
        return None
