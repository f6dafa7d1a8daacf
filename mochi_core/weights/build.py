"""Networks from files: the architecture from the metadata, built on the meta device, filled with mapped tensors."""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import T5EncoderModel

from ..config import MOCHI_1, DiTConfig, TextConfig, VAEConfig
from ..dit import AsymmDiT
from ..errors import WeightsError
from ..latents import LatentStatistics
from ..text.t5 import empty_t5
from ..text.tokenizer import Tokenizer
from ..vae import Decoder, Encoder
from . import layouts
from .checkpoint import Checkpoint, fill, listing

Tensors = dict[str, torch.Tensor]

# The T5's embedding has two names in transformers; files hold the first, or both.
T5_SECOND_NAME = "encoder.embed_tokens.weight"

TINY_ASSETS = Path(__file__).parent.parent / "assets" / "tiny"
TINY_NAME = "mochi-video-tiny"
TINY_DIT = TINY_ASSETS / "mochi_video_tiny_dit.safetensors"
TINY_VAE = TINY_ASSETS / "mochi_video_tiny_vae.safetensors"
TINY_T5 = TINY_ASSETS / "mochi_video_tiny_t5.safetensors"
TINY_TOKENIZER = TINY_ASSETS / "tokenizer.json"


@dataclass(frozen=True)
class VAE:
    """What a VAE file held: either half may be missing."""

    decoder: Decoder | None
    encoder: Encoder | None
    statistics: LatentStatistics


def dit_config(checkpoint: Checkpoint) -> DiTConfig:
    """The DiT architecture that the file's metadata gives; none means the released one."""
    values = checkpoint.json_metadata("config")
    return MOCHI_1.dit if values is None else DiTConfig.from_metadata(values)


def vae_config(checkpoint: Checkpoint) -> VAEConfig:
    """The VAE architecture that the file's metadata gives; none means the released one."""
    values = checkpoint.json_metadata("config")
    return MOCHI_1.vae if values is None else VAEConfig.from_metadata(values)


def text_config(checkpoint: Checkpoint) -> TextConfig:
    """The T5 architecture that the file's metadata gives; none means T5 v1.1 XXL's encoder."""
    values = checkpoint.json_metadata("config")
    return MOCHI_1.text if values is None else TextConfig.from_metadata(values)


def load_dit(
    path: str | Path, *, dtype: torch.dtype | None = None, operations: ModuleType | Any = nn
) -> tuple[AsymmDiT, LatentStatistics]:
    """The DiT of a file, on the CPU, in the file's dtype unless `dtype` says otherwise.

    Raises `WeightsError` or `ConfigError` when the file is broken or of another model.
    """
    config, statistics, tensors = read_dit(path, dtype)
    network = AsymmDiT(config, operations=operations, device="meta")
    fill(network, tensors, str(path))
    return network.eval(), statistics


def read_dit(path: str | Path, dtype: torch.dtype | None) -> tuple[DiTConfig, LatentStatistics, Tensors]:
    """The architecture, latent statistics and tensors of a DiT file, for whoever builds the network.

    Raises `WeightsError` or `ConfigError` when the file is broken or of another model.
    """
    checkpoint = Checkpoint(path)
    prefix = layouts.find(checkpoint, layouts.DIT)
    config = dit_config(checkpoint)
    return config, _statistics(checkpoint, config.latent_channels), checkpoint.tensors(prefix, dtype)


def load_vae(path: str | Path, *, dtype: torch.dtype | None = None, operations: ModuleType | Any = nn) -> VAE:
    """The VAE halves that a file holds, on the CPU, in the file's dtype unless `dtype` says otherwise.

    Raises `WeightsError` or `ConfigError` when the file is broken or of another model.
    """
    checkpoint = Checkpoint(path)
    if layouts.ENCODER.prefix_in(checkpoint.names) is None:
        layouts.find(checkpoint, layouts.DECODER)
    config = vae_config(checkpoint)
    modules = {
        prefix: network(config, operations=operations, device="meta").eval()
        for prefix, network in _vae_halves(checkpoint).items()
    }
    strangers = [name for name in checkpoint.names if not name.startswith(tuple(modules))]
    if strangers:
        raise WeightsError(
            f"{path} holds tensors of no half of the VAE: {listing('unknown', strangers)}",
            f"a combined file has only {' and '.join(modules)}",
            "Choose the file that belongs here",
        )
    for prefix, module in modules.items():
        fill(module, checkpoint.tensors(prefix, dtype), str(path))
    halves = {type(module): module for module in modules.values()}
    statistics = _statistics(checkpoint, config.latent_channels)
    return VAE(halves.get(Decoder), halves.get(Encoder), statistics)  # pyright: ignore[reportArgumentType]


def _vae_halves(checkpoint: Checkpoint) -> dict[str, type[nn.Module]]:
    """Which networks a VAE file is for, by their prefix: prefixed halves, or one bare half."""
    prefixed = {"decoder.": Decoder, "encoder.": Encoder}
    found = {p: n for p, n in prefixed.items() if any(name.startswith(p) for name in checkpoint.names)}
    return found or {"": Decoder if layouts.DECODER.prefix_in(checkpoint.names) is not None else Encoder}


def _statistics(checkpoint: Checkpoint, channels: int) -> LatentStatistics:
    """The file's latent statistics. Raises `WeightsError` when there are not `channels` of them."""
    statistics = LatentStatistics.from_metadata(checkpoint.metadata)
    if len(statistics.mean) != channels:
        raise WeightsError(
            f"{checkpoint.path} has latent statistics of {len(statistics.mean)} channels",
            f"its config has {channels} latent channels",
            "Get the file again",
        )
    return statistics


def load_t5(path: str | Path, *, dtype: torch.dtype | None = None) -> T5EncoderModel:
    """The T5 encoder of a file, on the CPU, in the file's dtype unless `dtype` says otherwise.

    Raises `WeightsError` or `ConfigError` when the file is broken or of another model.
    """
    config, tensors = read_t5(path, dtype)
    network = empty_t5(config)
    fill(network, {**tensors, T5_SECOND_NAME: tensors["shared.weight"]}, str(path))
    network.tie_weights()
    return network.eval()


def read_t5(path: str | Path, dtype: torch.dtype | None) -> tuple[TextConfig, Tensors]:
    """The architecture and tensors of a T5 file, its one embedding under its first name only.

    Raises `WeightsError` or `ConfigError` when the file is broken or of another model.
    """
    checkpoint = Checkpoint(path)
    prefix = layouts.find(checkpoint, layouts.T5)
    tensors = checkpoint.tensors(prefix, dtype)
    tensors.pop(T5_SECOND_NAME, None)
    return text_config(checkpoint), tensors


def load_tiny_tokenizer() -> Tokenizer:
    """The embedded checkpoint's tokenizer."""
    return Tokenizer.from_path(TINY_TOKENIZER)
