"""What a training minimises: flow matching as the released model was trained (docs/decisions/014).

Shapes: `B C T H W` = batch, channels, latent frames, latent rows, latent columns; all latents in model space.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import TrainingError
from ..numerics import widen

LEVELS = ("uniform", "logit_normal", "shifted")


@dataclass(frozen=True)
class NoiseLevels:
    """How the noise levels of a training are drawn, from 0 (clean) to 1 (pure noise).

    `uniform` is what the released model was trained with. `logit_normal` has a `mean` and a `std` before the sigmoid
    (Esser et al. 2024). `shifted` draws uniformly and moves the levels towards noise, `shift` times (the same paper).
    `stratified` spreads the levels of a batch evenly, one in each part.

    Raises `TrainingError` on a kind that does not exist or numbers that cannot be.
    """

    kind: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 3.0
    stratified: bool = False

    def __post_init__(self) -> None:
        if self.kind not in LEVELS:
            raise TrainingError(
                f"The noise levels are of kind {self.kind!r}", f"there are {', '.join(LEVELS)}", "Choose one"
            )
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf and 0 < self.shift < math.inf):
            raise TrainingError(
                f"The noise levels have mean {self.mean}, std {self.std}, shift {self.shift}",
                "they must be finite, the last two above zero",
                "Use 0, 1 and 3",
            )

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """`count` levels, float32, on the CPU."""
        uniform = torch.rand(count, generator=generator)
        if self.stratified:
            parts = torch.randperm(count, generator=generator)
            uniform = (parts + uniform) / count
        if self.kind == "logit_normal":
            inside = uniform.double().clamp(1e-9, 1 - 1e-9)
            return torch.sigmoid(self.mean + self.std * torch.special.ndtri(inside)).float()
        if self.kind == "shifted":
            return self.shift * uniform / (1 + (self.shift - 1) * uniform)
        return uniform


def noised(clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """What the sampler has at level `sigma` (`B`) on the straight way from `noise` to `clean`; `B C T H W`."""
    sigma = sigma.to(clean).view(-1, 1, 1, 1, 1)
    return (1 - sigma) * clean + sigma * noise


def flow_matching_loss(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    clean: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
) -> torch.Tensor:
    """How far `predict(noised, sigma)` is from clean minus noise: the mean of squares of each clip, `B`.

    The sampler adds `d sigma` times the prediction, and along the straight way that is what brings noise to clean.
    Taken in float32 or wider whatever the network computes in.
    """
    predicted = predict(noised(clean, noise, sigma), sigma)
    return (widen(predicted) - (clean - noise)).square().flatten(1).mean(1)
