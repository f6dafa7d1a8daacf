"""The DiT's training clips as the VAE sees them, encoded once: posteriors, and what each clip shows.

Shapes: `n` clips, `C t h w` = channels, latent frames, rows, columns.
"""

import json
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from einops import rearrange

from ...latents import LatentStatistics
from ...numerics import widen
from ...vae import Encoder
from ...weights.files import TYPE_NAMES, SafetensorsFile
from ...weights.writer import Output, write_safetensors
from . import scenes

AT_ONCE = 8
SEED = 17  # clips of this seed are the training set


@dataclass(frozen=True)
class Cache:
    """Posteriors of clips of one length: `mean` and `deviation` are `n C t h w`, of bfloat16's range and precision."""

    mean: torch.Tensor
    deviation: torch.Tensor
    shown: tuple[scenes.Scene, ...]

    def __len__(self) -> int:
        return len(self.shown)

    def sample(self, places: torch.Tensor, frames: int, chance: torch.Generator) -> torch.Tensor:
        """A draw of the first `frames` latent frames of some clips: the VAE is causal, they are a shorter clip's."""
        mean, deviation = (held[places, :, :frames].float() for held in (self.mean, self.deviation))
        return mean + deviation * torch.randn(mean.shape, generator=chance)

    def statistics(self) -> LatentStatistics:
        """Of draws, as the DiT is trained on them."""
        mean, deviation = self.mean.double(), self.deviation.double()
        axes = (0, 2, 3, 4)
        variance = mean.var(axes, correction=0) + deviation.square().mean(axes)
        return LatentStatistics(
            tuple(round(value, 6) for value in mean.mean(axes).tolist()),
            tuple(round(value, 6) for value in variance.sqrt().tolist()),
        )

    def write(self, path: Path) -> None:
        tensors = {"mean": self.mean, "deviation": self.deviation}
        outputs = [
            Output(name, TYPE_NAMES[held.dtype], tuple(held.shape), lambda held=held: held)
            for name, held in tensors.items()
        ]
        write_safetensors(path, outputs, {"shown": json.dumps([astuple(scene) for scene in self.shown])})

    @classmethod
    def read(cls, path: Path) -> "Cache":
        file = SafetensorsFile(path)
        shown = tuple(scenes.Scene(*words) for words in json.loads(file.metadata["shown"]))
        return cls(file.tensor("mean").clone(), file.tensor("deviation").clone(), shown)


@torch.no_grad()
def encoded(
    encoder: Encoder, count: int, frames: int, first: int = 0, done: Callable[[int], None] = lambda _: None
) -> Cache:
    """The posteriors of clips `first` to `first + count` of the training set; `done` is told how many there are."""
    means, deviations, shown = [], [], []
    device = next(encoder.parameters()).device
    for start in range(first, first + count, AT_ONCE):
        clips = [scenes.training_clip(SEED, i, frames) for i in range(start, min(start + AT_ONCE, first + count))]
        video = torch.stack([clip.frames for clip in clips]).to(device) * 2 - 1
        with torch.autocast(device.type, torch.bfloat16):
            posterior = encoder(rearrange(video, "B T H W C -> B C T H W"))
        means.append(posterior.mean.to("cpu", torch.bfloat16))
        deviations.append(torch.exp(0.5 * widen(posterior.logvar).clamp(-12, 4)).to("cpu", torch.bfloat16))
        shown += [clip.scene for clip in clips]
        done(len(shown))
    return Cache(torch.cat(means), torch.cat(deviations), tuple(shown))
