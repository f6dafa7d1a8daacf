"""Latents in a file, as ComfyUI's Save Latent writes and its Load Latent reads them.

Shapes: `B C T H W` = batch, channels, latent frames, latent rows, latent columns.
"""

from pathlib import Path

import torch

from .errors import LatentsError, WeightsError
from .weights.files import SafetensorsFile
from .weights.writer import Output, write_safetensors

NAME = "latent_tensor"
# Without this mark the host takes the values for those of an old image model, and scales them.
MARK = "latent_format_version_0"


def write_latents(path: str | Path, latents: torch.Tensor) -> None:
    """Writes latents, `B C T H W` in VAE space, in float32. The file appears when it is whole."""
    values, mark = latents.float().cpu().contiguous(), torch.empty(0)
    outputs = [
        Output(NAME, "F32", tuple(values.shape), lambda: values),
        Output(MARK, "F32", tuple(mark.shape), lambda: mark),
    ]
    write_safetensors(Path(path), outputs, {})


def read_latents(path: str | Path) -> torch.Tensor:
    """The latents of a file, `B C T H W` in VAE space, float32. Raises `LatentsError` when it holds none of a video."""
    path = Path(path)
    try:
        file = SafetensorsFile(path)
    except WeightsError as error:
        raise LatentsError(f"{path} cannot be read", "it must be a file of latents", "Save it again") from error
    if NAME not in file.names or MARK not in file.names or len(file.shape(NAME)) != 5:
        raise LatentsError(
            f"{path} holds no latents of a video",
            "they must be saved as ComfyUI's Save Latent does",
            "Choose another file",
        )
    return file.tensor(NAME).float().clone()
