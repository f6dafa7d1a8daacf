"""Classifier-free guidance, with a scale for each step.

Shapes: `B C T H W` = batch, channels, latent frames, rows, columns.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..errors import ScheduleError
from ..numerics import widen

RELEASED_SCALE = 6.0


class Conditioning(Protocol):
    """What a prediction is told; the sampler only repeats and joins it."""

    def repeated(self, batch: int) -> Any: ...

    def joined(self, other: Any) -> Any: ...


class Predict(Protocol):
    """A model: `(latents B C T H W, sigma B, conditioning) -> clean minus noise`, in model space."""

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Any) -> torch.Tensor: ...


@dataclass(frozen=True)
class Guidance:
    """A model steered away from `negative` towards `positive`, `scales[step]` times as far.

    `batched` asks the model for both at once (faster, more memory); the numbers are the same to rounding. A scale of
    exactly 1 needs the positive prediction only.
    """

    predict: Predict
    positive: Conditioning
    negative: Conditioning
    scales: tuple[float, ...]
    batched: bool = False

    def __call__(self, latents: torch.Tensor, sigma: float, step: int) -> torch.Tensor:
        """The guided prediction for `latents` at noise level `sigma`, combined in float32 or wider."""
        batch, scale = len(latents), self.scales[step]
        positive, negative = self.positive.repeated(batch), self.negative.repeated(batch)

        def predict(latents: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
            sigmas = torch.full((len(latents),), sigma, dtype=widen(latents).dtype, device=latents.device)
            return widen(self.predict(latents, sigmas, conditioning))

        if scale == 1:
            return predict(latents, positive)
        if self.batched:
            towards, away = predict(torch.cat([latents, latents]), positive.joined(negative)).chunk(2)
        else:
            towards, away = predict(latents, positive), predict(latents, negative)
        return away + scale * (towards - away)


def constant(scale: float, steps: int) -> tuple[float, ...]:
    """The same scale at each step."""
    return checked([scale] * steps, steps)


def parse_schedule(text: str, steps: int) -> tuple[float, ...]:
    """Scales such as `6.0*32, 4.5*32`: a value, and how many steps it holds (once without a count).

    Raises `ScheduleError` when the text cannot be read or does not cover exactly `steps` steps.
    """
    scales: list[float] = []
    for item in filter(None, (item.strip() for item in re.split(r"[,\n]", text))):
        match = re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?:[*x]\s*(\d{1,6}))?", item)
        if match is None:
            raise ScheduleError(
                f"cfg_schedule has {item!r}",
                "each item is a scale, or a scale and the steps it holds",
                "Write it as in 6.0*32, 4.5*32",
            )
        scales += [float(match[1])] * int(match[2] or 1)
    return checked(scales, steps)


def checked(scales: Sequence[float], steps: int) -> tuple[float, ...]:
    """Raises `ScheduleError` unless there is one finite scale for each of `steps` steps."""
    if len(scales) != steps:
        raise ScheduleError(
            f"The CFG schedule covers {len(scales)} steps",
            f"the noise schedule has {steps}, and each needs one scale",
            f"Make the counts add up to {steps}",
        )
    for step, scale in enumerate(scales):
        if not math.isfinite(scale):
            raise ScheduleError(f"The CFG scale of step {step} is {scale}", "it must be a finite number", "Use 1 to 10")
    return tuple(map(float, scales))
