"""The sampler, and the noise it starts from.

Shapes: `B C T H W` = batch, channels, latent frames, rows, columns.
"""

from typing import Protocol

import torch

from ..latents import require_finite
from ..numerics import widen
from ..progress import Progress, silent
from ..shapes import LatentSize
from .schedule import SigmaSchedule


class Direction(Protocol):
    """`(latents, sigma, step) -> clean minus noise`, guidance included."""

    def __call__(self, latents: torch.Tensor, sigma: float, step: int) -> torch.Tensor: ...


def draw_noise(
    size: LatentSize, channels: int, seed: int, *, batch: int = 1, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Standard normal noise, `B C T H W` in float32, from a generator of its own.

    On the CPU the same seed gives the same noise everywhere. The reference draws on the GPU: give that device for its
    videos.
    """
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(batch, channels, size.frames, size.height, size.width, generator=generator, device=device)


def euler(
    direction: Direction, latents: torch.Tensor, schedule: SigmaSchedule, progress: Progress = silent
) -> torch.Tensor:
    """Follows `direction` from the schedule's first level to its last, in float32 or wider.

    `latents`: `B C T H W` in model space, at the first level. Progress is told the clean video expected so far.
    Raises `LatentsError` when the latents are, or become, anything but numbers.
    """
    latents = widen(latents)
    require_finite(latents, "The latents to start from")
    for step in range(schedule.steps):
        sigma, next_sigma = schedule.levels[step], schedule.levels[step + 1]
        towards_clean = direction(latents, sigma, step)
        expected = latents + sigma * towards_clean
        latents = latents + (sigma - next_sigma) * towards_clean
        progress(step + 1, schedule.steps, expected)
    require_finite(latents, "The sampled latents")
    return latents
