"""What a model in training makes: the videos of its prompts beside each other, in one file.

Shapes: `T H W` = frames, rows, columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..memory.plan import MemoryPolicy
from ..pipeline import decode
from ..progress import Progress, silent
from ..sampling.guidance import Guidance
from ..sampling.samplers import draw_noise, euler
from ..text.conditioning import TextConditioning, TextEncoder
from ..vae import Decoder
from ..video_file import write_mp4
from .config import Samples
from .task import DiTTask

# Black columns between two videos.
GAP = 8


@dataclass(frozen=True)
class Prompts:
    """Prompts as the DiT reads them, one each, and what to stay away from."""

    positive: tuple[TextConditioning, ...]
    negative: TextConditioning

    @classmethod
    def encoded(cls, options: Samples, encoder: TextEncoder) -> "Prompts":
        positive = tuple(_cropped(encoder([prompt])) for prompt in options.prompts)
        return cls(positive, _cropped(encoder([options.negative])))


def _cropped(text: TextConditioning) -> TextConditioning:
    """Without most of its padding, on the CPU, and free to be trained beside."""
    tokens = max(1, int(text.mask.sum(1).max()))
    return TextConditioning(*(held[:, :tokens].clone().cpu() for held in (text.features, text.mask)))


@dataclass(frozen=True)
class Strips:
    """Makes such a file of a `DiTTask`. The latents of all prompts come first: the decoder and the DiT take turns."""

    options: Samples
    prompts: Prompts
    decoder: Decoder
    memory: MemoryPolicy
    progress: Progress = silent

    @torch.no_grad()
    def __call__(self, task: DiTTask, path: Path) -> Path:
        """Writes the strip to `path`. Raises what `progress` raises."""
        options, statistics = self.options, task.batches.statistics
        channels = task.network.config.latent_channels
        made = []
        for index, prompt in enumerate(self.prompts.positive):
            guidance = Guidance(task.predict, prompt, self.prompts.negative, options.scales)
            noise = draw_noise(options.size.latent, channels, options.seed + index).to(task.device)
            made.append(statistics.to_vae_space(euler(guidance, noise, options.schedule, self.progress)).cpu())
        path.parent.mkdir(parents=True, exist_ok=True)
        streams = [decode(self.decoder, latents, self.memory) for latents in made]
        write_mp4(path, _beside(streams))
        return path


def _beside(streams: list[Iterator[torch.Tensor]]) -> Iterator[torch.Tensor]:
    """Videos' pieces, `1 T H W 3`, beside each other: `T H W 3`."""
    # One after the other: two streams of one decoder at a time would be two sets of kept frames on the device.
    videos = [torch.cat(list(stream), dim=1)[0] for stream in streams]
    columns = []
    for video in videos:
        columns += [video.new_zeros(*video.shape[:2], GAP, 3), video] if columns else [video]
    yield torch.cat(columns, dim=2)
