"""The host's description of our model, and its latents with a checkpoint's own statistics and colours."""

import comfy.latent_formats
import comfy.supported_models
import torch

from mochi_core.latents import MOCHI_1_STATISTICS, LatentStatistics
from mochi_core.preview import LatentColours
from mochi_core.weights.build import DiTFile


class MochiLatents(comfy.latent_formats.Mochi):
    """The host's Mochi latents with the statistics and colours of a checkpoint."""

    def __init__(self, statistics: LatentStatistics, colours: LatentColours | None):
        super().__init__()
        if statistics != MOCHI_1_STATISTICS:
            self.latents_mean = torch.tensor(statistics.mean).view(1, -1, 1, 1, 1)
            self.latents_std = torch.tensor(statistics.std).view(1, -1, 1, 1, 1)
            # Colours of the released model's latents say nothing about another VAE's.
            self.latent_rgb_factors = None
            self.latent_rgb_factors_bias = None
        if colours is not None:
            self.latent_rgb_factors = [list(row) for row in colours.factors]
            self.latent_rgb_factors_bias = list(colours.offset)

    @property
    def colours(self) -> LatentColours | None:
        """What previews are painted with, if anybody knows."""
        if self.latent_rgb_factors is None:
            return None
        return LatentColours(
            tuple(map(tuple, self.latent_rgb_factors)), tuple(self.latent_rgb_factors_bias or (0.0, 0.0, 0.0))
        )


class MochiSupported(comfy.supported_models.GenmoMochi):
    """The host's description of a model: ours, with its own latents."""

    def __init__(self, file: DiTFile):
        super().__init__({"image_model": "mochi_preview", "config": file.config})
        self.latent_format = MochiLatents(file.statistics, file.colours)
