"""What a clip looks like while it is sampled: one small picture for each latent frame, by a linear map to colours.

The map is fitted to a VAE (`LatentColours.fitted`) and belongs to a checkpoint, as its latent statistics do.

Shapes: `C T H W` = channels, latent frames, latent rows, latent columns.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch.nn import functional

from .errors import LatentsError, WeightsError
from .shapes import FRAMES_PER_LATENT, PIXELS_PER_LATENT

METADATA = "latent_colours"


@dataclass(frozen=True)
class LatentColours:
    """Red, green and blue, -1 to 1, of a latent in model space: `factors` (C rows of 3) and an offset."""

    factors: tuple[tuple[float, ...], ...]
    offset: tuple[float, ...] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        rows = (*self.factors, self.offset)
        if not self.factors or any(len(row) != 3 or not all(map(math.isfinite, row)) for row in rows):
            raise WeightsError(
                f"The colours of latents are {rows}",
                "each channel and the offset must have 3 finite numbers",
                "Fit them again",
            )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "LatentColours | None":
        """Those of a checkpoint, its `latent_colours`: a JSON list of a row for each channel, then the offset."""
        if METADATA not in metadata:
            return None
        try:
            *factors, offset = (tuple(map(float, row)) for row in json.loads(metadata[METADATA]))
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise WeightsError(
                f"The checkpoint's {METADATA} cannot be read ({error!r})",
                "it must be a JSON list of rows of 3 numbers",
                "Get the file again",
            ) from error
        return cls(tuple(factors), offset)

    @property
    def metadata(self) -> dict[str, str]:
        """What `from_metadata` reads."""
        return {METADATA: json.dumps([[round(value, 5) for value in row] for row in (*self.factors, self.offset)])}

    @classmethod
    def fitted(cls, latents: torch.Tensor, videos: torch.Tensor) -> "LatentColours":
        """The map that comes nearest (least squares) to what a VAE decodes `latents` to.

        `latents`: `B C T H W` in model space; `videos`: their frames, `B F 8H 8W 3` from 0 to 1, F = 6(T - 1) + 1.
        """
        wanted = rearrange(at_latent_size(videos) * 2 - 1, "b t h w c -> (b t h w) c")
        given = rearrange(latents.double(), "b c t h w -> (b t h w) c")
        ones = torch.ones(len(given), 1, dtype=given.dtype)
        solution = torch.linalg.lstsq(torch.cat([given, ones], dim=1), wanted, driver="gelsd").solution
        *factors, offset = (tuple(row) for row in solution.tolist())
        return cls(tuple(factors), offset)

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """`C T H W` in model space -> `T H W 3`, uint8, on the CPU. Raises `LatentsError` on other channels."""
        if latents.ndim != 4 or latents.shape[0] != len(self.factors):
            raise LatentsError(
                f"The latents have shape {tuple(latents.shape)}",
                f"they must be {len(self.factors)} x T x H x W",
                "Use one clip of this model's latents",
            )
        values = {"dtype": torch.float32, "device": latents.device}
        colours = functional.linear(
            latents.float().movedim(0, -1), torch.tensor(self.factors, **values).T, torch.tensor(self.offset, **values)
        )
        return ((colours + 1) * 127.5).nan_to_num().round().clamp(0, 255).to(torch.uint8).cpu()


def at_latent_size(videos: torch.Tensor) -> torch.Tensor:
    """What each latent is seen as, on average: `B F 8H 8W 3`, F = 6(T - 1) + 1 -> `B T H W 3` in float64."""
    first, rest = videos[:, :1], videos[:, 1:]
    rest = rearrange(rest, "b (t f) h w c -> b t f h w c", f=FRAMES_PER_LATENT).mean(2)
    pictures = rearrange(torch.cat([first, rest], dim=1), "b t h w c -> (b t) c h w")
    small = functional.avg_pool2d(pictures.double(), PIXELS_PER_LATENT)
    return rearrange(small, "(b t) c h w -> b t h w c", b=len(videos))
