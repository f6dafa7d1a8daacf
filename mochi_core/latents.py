"""The two latent spaces, and the one conversion between them.

*VAE space* is what the encoder makes and the decoder reads; every latent that leaves this library is in it.
*Model space* is the same with each channel's mean taken off and its standard deviation divided out; only the sampler
works there. The statistics belong to a checkpoint (its metadata; none means the released model's).

Shapes: `B C T H W` = batch, channels, latent frames, latent rows, latent columns.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .errors import LatentsError, WeightsError


@dataclass(frozen=True)
class LatentStatistics:
    """Per-channel mean and standard deviation of a VAE's latents."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "LatentStatistics":
        """Those of a checkpoint: its `latents_mean` and `latents_std`, or the released model's when it has neither."""
        if "latents_mean" not in metadata and "latents_std" not in metadata:
            return MOCHI_1_STATISTICS
        try:
            mean, std = (tuple(map(float, json.loads(metadata[f"latents_{name}"]))) for name in ("mean", "std"))
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise WeightsError(
                f"The checkpoint's latent statistics cannot be read ({error!r})",
                "latents_mean and latents_std must both be JSON lists of numbers",
                "Get the file again",
            ) from error
        if len(mean) != len(std) or not all(map(math.isfinite, mean + std)) or min(std, default=1) <= 0:
            raise WeightsError(
                f"The checkpoint has {len(mean)} latent means and standard deviations {std}",
                "there must be as many of each, all finite, and every deviation above zero",
                "Get the file again",
            )
        return cls(mean, std)

    def _columns(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if latents.ndim != 5 or latents.shape[1] != len(self.mean):
            raise LatentsError(
                f"The latents have shape {tuple(latents.shape)}",
                f"they must be B x {len(self.mean)} x T x H x W",
                "Use latents of this model: its size node or its encoder makes them",
            )
        mean, std = (
            torch.tensor(v, dtype=latents.dtype, device=latents.device).view(-1, 1, 1, 1) for v in (self.mean, self.std)
        )
        return mean, std

    def to_model_space(self, latents: torch.Tensor) -> torch.Tensor:
        """VAE space -> model space."""
        mean, std = self._columns(latents)
        return (latents - mean) / std

    def to_vae_space(self, latents: torch.Tensor) -> torch.Tensor:
        """Model space -> VAE space."""
        mean, std = self._columns(latents)
        return latents * std + mean


# Measured by Genmo over the encoder's outputs; published with the released weights.
MOCHI_1_STATISTICS = LatentStatistics(
    mean=(
        -0.06730895953510081,
        -0.038011381506090416,
        -0.07477820912866141,
        -0.05565264470995561,
        0.012767231469026969,
        -0.04703542746246419,
        0.043896967884726704,
        -0.09346305707025976,
        -0.09918314763016893,
        -0.008729793427399178,
        -0.011931556316503654,
        -0.0321993391887285,
    ),
    std=(
        0.9263795028493863,
        0.9248894543193766,
        0.9393059390890617,
        0.959253732819592,
        0.8244560132752793,
        0.917259975397747,
        0.9294154431013696,
        1.3720942357788521,
        0.881393668867029,
        0.9168315692124348,
        0.9185249279345552,
        0.9274757570805041,
    ),
)


def require_finite(latents: torch.Tensor, what: str) -> None:
    """Raises `LatentsError` when any value is NaN or infinite; `what` says whose latents they are."""
    if not torch.isfinite(latents).all():
        bad = int((~torch.isfinite(latents)).sum())
        raise LatentsError(
            f"{what}: {bad} of {latents.numel()} values are NaN or infinite",
            "every latent must be a finite number",
            "Find the step that made them: often float16 overflow, so try bfloat16 or float32",
        )
