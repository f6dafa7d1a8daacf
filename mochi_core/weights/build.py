"""Networks from files: the architecture from metadata or shapes, built on meta, filled with mapped tensors."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import T5EncoderModel

from ..config import DiTConfig, TextConfig, VAEConfig
from ..dit import AsymmDiT
from ..errors import WeightsError
from ..latents import LatentStatistics
from ..preview import LatentColours
from ..text.t5 import empty_t5
from ..text.tokenizer import Tokenizer, read_tokenizer
from ..vae import Decoder, Encoder
from . import architecture, formats, layouts
from .checkpoint import Checkpoint, check_floating, check_names, fill, listing
from .formats import Entry

log = logging.getLogger(__name__)

# The T5's embedding has two names in transformers; files hold the first, or both.
T5_SECOND_NAME = "encoder.embed_tokens.weight"
# Far above what any model has.
MOST_LAYERS = 1000

TINY_ASSETS = Path(__file__).parent.parent / "assets" / "tiny"
TINY_NAME = "mochi-video-tiny"
TINY_DIT = TINY_ASSETS / "mochi_video_tiny_dit.safetensors"
TINY_VAE = TINY_ASSETS / "mochi_video_tiny_vae.safetensors"
TINY_T5 = TINY_ASSETS / "mochi_video_tiny_t5.safetensors"
TINY_TOKENIZER = TINY_ASSETS / "tokenizer.json"

Entries = dict[str, Entry]


@dataclass(frozen=True)
class DiTFile:
    """What a file says of a DiT. `entries` are its weights in our names, each of them checked, none read.

    `colours` are those of its latents, for previews, when the file has them.
    """

    path: str
    config: DiTConfig
    statistics: LatentStatistics
    colours: LatentColours | None
    entries: Entries


@dataclass(frozen=True)
class TextFile:
    """What a file says of a T5 encoder, its one embedding under its first name only."""

    path: str
    config: TextConfig
    entries: Entries


@dataclass(frozen=True)
class VAE:
    """What a VAE file held: either half may be missing."""

    decoder: Decoder | None
    encoder: Encoder | None
    statistics: LatentStatistics


# DiT


def open_dit(path: str | Path) -> DiTFile:
    """The DiT of a file or folder, for whoever builds the network.

    Raises `WeightsError` or `ConfigError` when the file is broken, incomplete or of another model.
    """
    checkpoint = Checkpoint(path)
    entries = layouts.read(checkpoint, layouts.find(checkpoint, layouts.DIT))
    config = checked_dit(checkpoint, entries)
    channels = config.latent_channels
    return DiTFile(str(path), config, _statistics(checkpoint, channels), _colours(checkpoint, channels), entries)


def checked_dit(checkpoint: Checkpoint, entries: Entries) -> DiTConfig:
    """The architecture of the file's DiT, from metadata or shapes. Raises unless it is whole."""
    source, values = str(checkpoint.path), own_config(checkpoint)
    config = architecture.dit_from(shapes_of(entries), source) if values is None else DiTConfig.from_metadata(values)
    check(_empty(lambda: AsymmDiT(config, device="meta"), config.depth, entries, source), entries, source)
    return config


def load_dit(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    keep_quantized: bool = True,
    operations: ModuleType | Any = nn,
) -> tuple[AsymmDiT, LatentStatistics]:
    """The DiT of a file or folder, on the CPU.

    It computes in `dtype`: by default that of the file, or bfloat16 when the file is quantised. Quantised linear
    layers stay as they are stored and become floats at each use; with `keep_quantized` off they are turned into
    `dtype` once.

    Raises `WeightsError` or `ConfigError` when the file is broken, incomplete or of another model.
    """
    file = open_dit(path)
    network = AsymmDiT(file.config, operations=operations, device="meta")
    _fill(network, file.entries, file.path, dtype, keep_quantized)
    return network.eval(), file.statistics


# VAE


def dit_outline(path: str | Path) -> AsymmDiT:
    """The network that `load_dit` makes of a file, on the meta device: as large, with nothing read but the header.

    Raises as `load_dit` does.
    """
    file = open_dit(path)
    network = AsymmDiT(file.config, device="meta")
    outlines = {name: replace(entry, load=partial(formats.stand_in, entry)) for name, entry in file.entries.items()}
    _fill(network, outlines, file.path, compute_dtype(file.entries), keep_quantized=True)
    return network.eval()


def load_vae(path: str | Path, *, dtype: torch.dtype | None = None, operations: ModuleType | Any = nn) -> VAE:
    """The VAE halves that a file or folder holds, on the CPU, in the file's dtype unless `dtype` says otherwise.

    Raises `WeightsError` or `ConfigError` when the file is broken or of another model.
    """
    checkpoint = Checkpoint(path)
    decoder = _half(checkpoint, layouts.DECODER)
    encoder = _half(checkpoint, layouts.ENCODER)
    if encoder is None and decoder is None:
        layouts.find(checkpoint, layouts.DECODER)  # raises
    _refuse_strangers(checkpoint)
    config = checked_vae(checkpoint, decoder, encoder)
    networks: list[Any] = []
    for kind, entries in ((Decoder, decoder), (Encoder, encoder)):
        network = None if entries is None else kind(config, operations=operations, device="meta").eval()
        if network is not None and entries is not None:
            _fill(network, entries, str(path), dtype, keep_quantized=False)
        networks.append(network)
    return VAE(networks[0], networks[1], _statistics(checkpoint, config.latent_channels))


def load_decoder(path: str | Path, *, dtype: torch.dtype | None = None) -> Decoder:
    """The decoder of a VAE file or folder; the rest as for `load_vae`."""
    decoder = load_vae(path, dtype=dtype).decoder
    if decoder is None:
        raise WeightsError(
            f"{path} has no decoder", "decoding needs one", "Load decoder.safetensors, or the combined VAE"
        )
    return decoder


def checked_vae(checkpoint: Checkpoint, decoder: Entries | None, encoder: Entries | None) -> VAEConfig:
    """The architecture of the file's VAE, from metadata or shapes. Raises unless its halves are whole."""
    source, values = str(checkpoint.path), own_config(checkpoint)
    if values is None:
        halves = [None if half is None else shapes_of(half) for half in (decoder, encoder)]
        config = architecture.vae_from(halves[0], halves[1], source)
    else:
        config = VAEConfig.from_metadata(values)
    for kind, entries, half in ((Decoder, decoder, config.decoder), (Encoder, encoder, config.encoder)):
        if entries is not None:
            blocks = sum(half.num_res_blocks) + len(half.channel_multipliers)
            check(_empty(lambda kind=kind: kind(config, device="meta"), blocks, entries, source), entries, source)
    return config


def _half(checkpoint: Checkpoint, part: layouts.Part) -> Entries | None:
    found = part.found_in(checkpoint.names)
    return None if found is None else layouts.read(checkpoint, found)


def _refuse_strangers(checkpoint: Checkpoint) -> None:
    """A VAE file has nothing beside the VAE; one that holds the other networks too may have what it likes."""
    found = {part: part.found_in(checkpoint.names) for part in layouts.PARTS}
    if found[layouts.DIT] is not None or found[layouts.T5] is not None:
        return
    for part, prefix in ((layouts.DECODER, "decoder."), (layouts.ENCODER, "encoder.")):
        if found[part] is None and any(name.startswith(prefix) for name in checkpoint.names):
            layouts.find(checkpoint, part)  # raises: the half is there, but not the names it is known by
    halves = [half for half in (found[layouts.DECODER], found[layouts.ENCODER]) if half is not None]
    strangers = [name for name in checkpoint.names if not any(half.owns(name) for half in halves)]
    if strangers:
        raise WeightsError(
            f"{checkpoint.path} holds tensors of no half of the VAE: {listing('unknown', strangers)}",
            f"a combined file has only {' and '.join(half.prefix or half.part.title for half in halves)}",
            "Choose the file that belongs here",
        )


# T5


def open_t5(path: str | Path) -> TextFile:
    """The T5 encoder of a file or folder, for whoever builds the network.

    Raises `WeightsError` or `ConfigError` when the file is broken, incomplete or of another model.
    """
    checkpoint = Checkpoint(path)
    entries = layouts.read(checkpoint, layouts.find(checkpoint, layouts.T5))
    return TextFile(str(path), checked_t5(checkpoint, entries), entries)


def checked_t5(checkpoint: Checkpoint, entries: Entries) -> TextConfig:
    """The architecture of the file's T5, from metadata or shapes. Raises unless its encoder is whole."""
    source, values = str(checkpoint.path), own_config(checkpoint)
    config = architecture.text_from(shapes_of(entries), source) if values is None else TextConfig.from_metadata(values)
    both = entries | ({T5_SECOND_NAME: entries["shared.weight"]} if "shared.weight" in entries else {})
    check(_empty(lambda: empty_t5(config), config.num_layers, entries, source), both, source)
    return config


def load_t5(path: str | Path, *, dtype: torch.dtype | None = None, keep_quantized: bool = True) -> T5EncoderModel:
    """The T5 encoder of a file or folder, on the CPU; `dtype` and `keep_quantized` as for `load_dit`.

    Raises `WeightsError` or `ConfigError` when the file is broken, incomplete or of another model.
    """
    file = open_t5(path)
    network = empty_t5(file.config)
    dtype = dtype or compute_dtype(file.entries)
    embedding = formats.plain(file.entries["shared.weight"].load(), dtype)
    both = dict.fromkeys(("shared.weight", T5_SECOND_NAME), Entry(tuple(embedding.shape), "", lambda: embedding))
    _fill(network, file.entries | both, file.path, dtype, keep_quantized)
    network.tie_weights()
    return network.eval()


def load_tiny_tokenizer() -> Tokenizer:
    """The embedded checkpoint's tokenizer."""
    return read_tokenizer(TINY_TOKENIZER)


# What they share


def shapes_of(entries: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in entries.items()}


def _empty(make: Callable[[], nn.Module], layers: int, entries: Entries, source: str) -> nn.Module:
    """`make()`, a network without weights. Raises `WeightsError` when no file could hold it, or this one cannot."""
    # A network takes memory for each of its layers even when they are empty.
    if layers > min(len(entries), MOST_LAYERS):
        raise WeightsError(
            f"{source} is of {layers} layers and has {len(entries)} tensors",
            f"each layer must have its own, and there may be {MOST_LAYERS}",
            "The file is damaged or has only a part of the layers: get it again",
        )
    try:
        return make()
    except RuntimeError as error:
        raise WeightsError(
            f"{source} has a config or shapes of impossible size ({error})",
            "the model's tensors must fit an address space",
            "The file is damaged: get it again",
        ) from error


def check(network: nn.Module, entries: Mapping[str, Entry], source: str) -> None:
    """Raises `WeightsError` unless the weights have exactly the names and shapes of `network`, and are floats."""
    check_names(network, shapes_of(entries), source)
    check_floating({name: entry.kind for name, entry in entries.items()}, source)


def compute_dtype(entries: Mapping[str, Entry]) -> torch.dtype:
    """What to compute in when nobody says: the dtype that most weights have, or bfloat16 for quantised ones."""
    plain = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    sizes: dict[str, int] = {}
    for entry in entries.values():
        sizes[entry.kind] = sizes.get(entry.kind, 0) + math.prod(entry.shape)
    return plain.get(max(sizes, key=lambda kind: sizes[kind]), torch.bfloat16)


def _fill(
    network: nn.Module, entries: Mapping[str, Entry], source: str, dtype: torch.dtype | None, keep_quantized: bool
) -> None:
    dtype = dtype or compute_dtype(entries)
    weights = {}
    for name, entry in entries.items():
        weight = entry.load()
        # Cast at once, so that no more than one weight is there twice.
        weights[name] = weight if keep_quantized and formats.is_quantized(weight) else formats.plain(weight, dtype)
    fill(network, weights, source, dtype, keep_quantized)


def own_config(checkpoint: Checkpoint) -> Any | None:
    """The `config` in a file's metadata, when the file holds one part only: of several it would describe one."""
    held = {part.title for part in layouts.PARTS if part.found_in(checkpoint.names) is not None}
    one_vae = held == {layouts.DECODER.title, layouts.ENCODER.title}
    values = checkpoint.json_metadata("config") if len(held) == 1 or one_vae else None
    return None if values == {} else values  # which says nothing


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


def _colours(checkpoint: Checkpoint, channels: int) -> LatentColours | None:
    """The colours of the file's latents, if it has any of `channels` channels; previews alone depend on them."""
    try:
        colours = LatentColours.from_metadata(checkpoint.metadata)
    except WeightsError as error:
        log.warning("%s: %s", checkpoint.path, error)
        return None
    return colours if colours is not None and len(colours.factors) == channels else None
