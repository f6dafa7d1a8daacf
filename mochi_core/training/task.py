"""The task of teaching the DiT a dataset: all of it, or a LoRA beside it.

Shapes: `B C T H W` = batch, channels, latent frames, latent rows, latent columns; `L` text tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..dit import AsymmDiT
from ..dit.model import RunBlock
from ..latents import LatentStatistics
from ..text.conditioning import TextConditioning
from ..weights.files import TYPE_NAMES
from ..weights.writer import Output, write_safetensors
from .batches import Order
from .config import Data
from .dataset import Dataset, Sample
from .draws import generator
from .loop import Loss
from .lora import TrainableLora
from .objective import flow_matching_loss


@dataclass(frozen=True)
class Batch:
    """What a micro-batch is trained on: clean latents and noise in model space, levels, text; all on the CPU."""

    clips: tuple[str, ...]
    clean: torch.Tensor
    noise: torch.Tensor
    sigma: torch.Tensor
    features: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Batches:
    """The micro-batches of a training, each a function of its index."""

    dataset: Dataset
    statistics: LatentStatistics
    options: Data
    seed: int
    order: Order = field(init=False)

    def __post_init__(self) -> None:
        clips = self.dataset.clips
        if self.options.single_clip:
            clips = clips[:1] * self.options.batch_size
        object.__setattr__(self, "order", Order(clips, self.options.batch_size, self.seed))

    def __getitem__(self, index: int) -> Batch:
        drawn = generator(self.seed, "batch", index)
        samples = [self.dataset.load(clip) for clip in self.order[index]]
        latents = []
        for sample in samples:
            # A posterior, not a picture: each epoch sees another draw of it.
            spread = torch.exp(0.5 * sample.logvar) * torch.randn(sample.mean.shape, generator=drawn)
            latents.append(sample.mean + spread)
        clean = self.statistics.to_model_space(torch.stack(latents))
        noise = torch.randn(clean.shape, generator=drawn)
        sigma = self.options.noise_levels.draw(len(samples), drawn)
        dropped = torch.rand(len(samples), generator=drawn) < self.options.caption_dropout
        features, mask = _joined(samples, dropped)
        return Batch(tuple(sample.name for sample in samples), clean, noise, sigma, features, mask)


def _joined(samples: list[Sample], dropped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features `B L C` and mask `B L`, padded to the longest; a dropped caption is the null prompt: zero, no token."""
    longest = max(1, *(len(sample.features) for sample in samples))
    features = torch.zeros(len(samples), longest, samples[0].features.shape[1])
    mask = torch.zeros(len(samples), longest, dtype=torch.bool)
    for index, sample in enumerate(samples):
        if not dropped[index]:
            features[index, : len(sample.features)] = sample.features
            mask[index, : len(sample.features)] = True
    return features, mask


@dataclass
class DiTTask:
    """A `loop.Task`: `network` predicts on `device`, and `lora` is learnt, or with none the network's own weights.

    `run_block` is `checkpointing.checkpointed`'s. `samples` draws what the model makes.
    """

    network: AsymmDiT
    lora: TrainableLora | None
    batches: Batches
    device: torch.device
    run_block: RunBlock | None = None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    samples: Callable[["DiTTask", Path], Path] | None = None

    @property
    def trained(self) -> nn.Module:
        return self.network if self.lora is None else self.lora

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return next(parameter.dtype for parameter in self.network.parameters() if parameter.is_floating_point())

    def predict(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: TextConditioning) -> torch.Tensor:
        """`sampling.guidance.Predict`, through the blocks as they are trained."""
        more: dict[str, Any] = {} if self.run_block is None else {"run_block": self.run_block}
        features, mask = conditioning.features.to(self.device), conditioning.mask.to(self.device)
        return self.network(latents.to(self.device, self.dtype), sigma.to(self.device), features, mask, **more)

    def loss(self, index: int) -> Loss:
        batch = self.batches[index]
        text = TextConditioning(batch.features, batch.mask)
        if self.lora is not None:
            self.lora.dropped = index
        losses = flow_matching_loss(
            lambda latents, sigma: self.predict(latents, sigma, text),
            batch.clean.to(self.device),
            batch.noise.to(self.device),
            batch.sigma.to(self.device),
        )
        epoch = self.batches.order.epoch(index)
        return Loss(losses.mean(), batch.clips, {"sigma": batch.sigma.mean().item(), "epoch": epoch})

    def write(self, folder: Path, name: str) -> Path:
        if self.lora is not None:
            path = folder / f"{name}.lora.safetensors"
            self.lora.write(path, self.metadata)
            return path
        path = folder / f"{name}.safetensors"
        outputs = [
            Output(key, TYPE_NAMES[weight.dtype], tuple(weight.shape), partial(_on_cpu, weight))
            for key, weight in self.network.state_dict().items()
        ]
        write_safetensors(path, outputs, self.metadata)
        return path

    def sample(self, folder: Path, name: str) -> Path | None:
        if self.samples is None:
            return None
        if self.lora is not None:
            self.lora.dropped = None
        return self.samples(self, folder / "samples" / f"{name}.mp4")


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu()
