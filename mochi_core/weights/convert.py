"""A weight file in another layout or format, a tensor at a time.

Layouts: genmo's own names, ComfyUI's (the same, or an all-in-one file with prefixes), diffusers' folders. Formats: the
floats of the input (`keep`), 32 or 16 bits, 8-bit floats with or without a scale, blocks of 8 or 4 bits. The last four
are for the large matrices inside the blocks; the rest is bfloat16.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..config import DiTConfig, TextConfig, VAEConfig
from ..errors import ConfigError, WeightsError
from ..latents import LatentStatistics
from . import build, layouts
from .blocks import BLOCK_FORMATS, Packed, quantize
from .checkpoint import Checkpoint
from .formats import (
    FLOAT8,
    PACKED_SUFFIXES,
    PLAIN,
    QUANTIZED,
    SCALED_MARKER,
    Entry,
    Scaled,
    Scales,
    plain,
    quantized_float8,
)
from .layouts import DECODER, DIT, ENCODER, T5, Part
from .writer import Output, write_safetensors, write_whole

log = logging.getLogger(__name__)

LAYOUTS = ("genmo", "comfy", "diffusers")
FLOATS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
FORMATS = ("keep", *FLOATS, *QUANTIZED)
PARTS = {"dit": (DIT,), "vae": (DECODER, ENCODER), "t5": (T5,)}

COMFY_PREFIXES = {
    DIT: "model.diffusion_model.",
    DECODER: "vae.decoder.",
    ENCODER: "vae.encoder.",
    T5: "text_encoders.t5xxl.transformer.",
}
COMFY_VAE_PREFIXES = {DECODER: "decoder.", ENCODER: "encoder."}
GENMO_NAMES = {DIT: "dit", DECODER: "decoder", ENCODER: "encoder", T5: "t5"}
DIFFUSERS_FOLDERS = {"dit": "transformer", "vae": "vae", "t5": "text_encoder"}

FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class _File:
    """One file to write, and the `config.json` to write beside it."""

    path: Path
    outputs: tuple[Output, ...]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None = None

    @property
    def config_path(self) -> Path:
        return self.path.parent / "config.json"


def convert(
    source: str | Path,
    target: str | Path,
    layout: str = "comfy",
    format: str = "keep",
    part: str | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[Path]:
    """Writes `source` as `target`, and returns the files written.

    `target` is a file when it ends in `.safetensors`, else a folder. `part` (`dit`, `vae` or `t5`) picks one of an
    all-in-one file. `progress(name, done, total)` is told of each tensor. Peak memory is that of a few tensors.

    Raises `WeightsError` or `ConfigError` when the input cannot be read or the output cannot hold it. All that can
    be told before numbers are read is checked before anything is written; each file appears whole or not at all.
    """
    _choice("layout", layout, LAYOUTS)
    _choice("format", format, FORMATS)
    if part is not None:
        _choice("part", part, PARTS)
    checkpoint, target = Checkpoint(source), Path(target)
    wanted = PARTS[part] if part else layouts.PARTS
    found = {one: place for one in wanted if (place := one.found_in(checkpoint.names)) is not None}
    if not found:
        layouts.find(checkpoint, wanted[0])  # raises
    entries = {one: layouts.read(checkpoint, place) for one, place in found.items()}
    files = list(_planned(checkpoint, target, layout, format, entries))
    for file in files:
        for path in (file.path, *((file.config_path,) if file.config is not None else ())):
            if path.resolve() == Path(source).resolve():
                raise WeightsError(f"{path} is the input", "it is read while it is written", "Choose another name")
            if path.exists() and not overwrite:
                raise WeightsError(
                    f"{path} is there already", "nothing is overwritten unasked", "Choose another name, or overwrite"
                )

    total, done = sum(len(file.outputs) for file in files), 0

    def advance(output: Output) -> None:
        nonlocal done
        done += 1
        progress(output.name, done, total)

    for file in files:
        write_safetensors(file.path, file.outputs, file.metadata, advance)
        if file.config is not None:
            write_whole(file.config_path, (json.dumps(file.config, indent=2) + "\n").encode())
    return [file.path for file in files]


def _choice(name: str, value: str, options: Any) -> None:
    if value not in options:
        raise WeightsError(f"{name} is {value!r}", f"it must be one of {', '.join(options)}", "Choose one of them")


def _planned(
    checkpoint: Checkpoint, target: Path, layout: str, format: str, entries: dict[Part, build.Entries]
) -> Iterator[_File]:
    """What to write where. Everything is checked here, before the first byte is written."""
    source = str(checkpoint.path)
    one_file = target.suffix == ".safetensors"
    metadata = {
        name: checkpoint.metadata[name] for name in ("latents_mean", "latents_std") if name in checkpoint.metadata
    }
    metadata |= {"format": "pt", "made_by": f"mochi-video {__version__}, {layout}, {format}"}
    config = build.own_config(checkpoint)
    if layout == "diffusers":
        if format in QUANTIZED:
            raise WeightsError(
                f"The layout is diffusers and the format {format}",
                "nothing reads such a file: diffusers' layout is for floats",
                f"Choose the layout comfy or genmo, or one of {', '.join(FLOATS)}",
            )
        yield from _diffusers(checkpoint, target, format, entries, metadata)
        return

    for part, held in entries.items():
        _architecture(checkpoint, part, entries)
        _check_kept(held, format, source)
    own = {} if config is None else {"config": json.dumps(config)}
    is_vae = set(entries) <= {DECODER, ENCODER}
    if layout == "comfy" or (one_file and (len(entries) == 1 or is_vae)):
        alone = (len(entries) == 1 and not is_vae) or (layout == "genmo" and len(entries) == 1)
        prefixes = dict.fromkeys(entries, "") if alone else COMFY_VAE_PREFIXES if is_vae else COMFY_PREFIXES
        path = target if one_file else target / f"{'_'.join(GENMO_NAMES[part] for part in entries)}.safetensors"
        outputs = [output for part, held in entries.items() for output in _outputs(part, held, format, prefixes[part])]
        yield _File(path, tuple(outputs), metadata | own)
        return
    if one_file:
        raise WeightsError(
            f"{source} holds {' and '.join(part.title for part in entries)}",
            "genmo's layout has a file for each",
            f"Give a folder instead of {target.name}, or choose one part",
        )
    for part, held in entries.items():
        yield _File(
            target / f"{GENMO_NAMES[part]}.safetensors", tuple(_outputs(part, held, format, "")), metadata | own
        )


def _architecture(checkpoint: Checkpoint, part: Part, entries: Mapping[Part, build.Entries]) -> Any:
    """Raises unless the part is whole; returns its architecture."""
    if part is DIT:
        return build.checked_dit(checkpoint, entries[DIT])
    if part is T5:
        return build.checked_t5(checkpoint, entries[T5])
    return build.checked_vae(checkpoint, entries.get(DECODER), entries.get(ENCODER))


def _check_kept(held: Mapping[str, Entry], format: str, source: str) -> None:
    """A file's own format can be kept only if safetensors can hold it."""
    writable = {*PLAIN, "F8_E4M3", "F8_E5M2", "F8_E4M3 scaled", "F8_E5M2 scaled", "Q8_0", "Q4_0"}
    others = sorted({entry.kind for entry in held.values()} - writable)
    if format == "keep" and others:
        raise WeightsError(
            f"{source} holds {', '.join(others)}",
            "these cannot be kept in a safetensors file",
            f"Choose a format: {', '.join(FORMATS[1:])}",
        )


def _is_large_matrix(part: Part, name: str, entry: Entry) -> bool:
    """Whether a quantised format is for this weight: a linear layer inside the blocks."""
    stem = {DIT: "blocks.", T5: "encoder.block."}.get(part)
    is_linear = stem is not None and name.startswith(stem) and name.endswith(".weight") and len(entry.shape) == 2
    return is_linear and "relative_attention_bias" not in name


def _outputs(part: Part, held: Mapping[str, Entry], format: str, prefix: str) -> Iterator[Output]:
    """The tensors that a part becomes."""
    if format in QUANTIZED and part not in (DIT, T5):
        log.info("%s stays in floats: only linear layers of the DiT and the T5 are quantised", part.title)
    scaled = False
    for name, entry in held.items():
        wanted = format
        if format in QUANTIZED and not _is_large_matrix(part, name, entry):
            wanted = "bf16"
        one = list(_tensors(prefix + name, entry, wanted))
        scaled = scaled or any(output.name.endswith(".scale_weight") for output in one)
        yield from one
    if scaled:
        # Two elements ask the host for products in 16 bits, as the input did.
        wide = any(entry.scales is not None and entry.scales.wide_product for entry in held.values())
        size = 2 if wide else 0
        yield Output(f"{prefix}{SCALED_MARKER}", "F8_E4M3", (size,), lambda: torch.zeros(size).to(torch.float8_e4m3fn))


def _tensors(name: str, entry: Entry, format: str) -> Iterator[Output]:
    """The tensors that hold one weight."""
    kind = entry.kind
    if format in FLOATS:
        yield _plain_output(name, entry, FLOATS[format])
    elif format == "fp8":
        yield _float8_output(name, entry)
    elif format == "fp8_scaled":
        kept = entry.scales if entry.kind == "F8_E4M3 scaled" else None
        yield from _scaled_outputs(name, entry, "F8_E4M3", kept or Scales((), False, False))
    elif format in ("q8_0", "q4_0"):
        yield _packed_output(name, entry, format.upper())
    elif kind in BLOCK_FORMATS:
        yield _packed_output(name, entry, kind)
    elif kind.endswith(" scaled"):
        assert entry.scales is not None
        yield from _scaled_outputs(name, entry, kind.removesuffix(" scaled"), entry.scales)
    else:
        yield Output(name, kind, entry.shape, lambda: plain(entry.load()))


def _plain_output(name: str, entry: Entry, kind: str) -> Output:
    def load() -> torch.Tensor:
        weight = plain(entry.load())
        made = weight.to(FLOAT_DTYPES[kind])
        if kind == "F16" and not made.isfinite().all() and weight.isfinite().all():
            raise WeightsError(
                f"{name} has values up to {weight.abs().max().item():g}", "float16 ends at 65504", "Choose bf16"
            )
        return made

    return Output(name, kind, entry.shape, load)


def _float8_output(name: str, entry: Entry) -> Output:
    def load() -> torch.Tensor:
        weight = entry.load()
        if entry.kind == "F8_E4M3" and isinstance(weight, torch.Tensor):
            return weight
        made = quantized_float8(plain(weight, torch.float32), scaled=False)
        assert isinstance(made, torch.Tensor)
        return made

    return Output(name, "F8_E4M3", entry.shape, load)


def _scaled_outputs(name: str, entry: Entry, kind: str, scales: Scales) -> Iterator[Output]:
    """A scaled weight and what belongs to it. They lie far apart in the file, so each makes the weight anew."""

    def made() -> Scaled:
        weight = entry.load()
        if not isinstance(weight, Scaled) or entry.kind != f"{kind} scaled":
            weight = quantized_float8(plain(weight, torch.float32), scaled=True)
        assert isinstance(weight, Scaled)
        return weight

    def input_scale() -> torch.Tensor:
        scale = made().input_scale
        assert scale is not None
        return scale

    layer = name.removesuffix("weight")
    yield Output(name, kind, entry.shape, lambda: made().data)
    yield Output(f"{layer}scale_weight", "F32", scales.shape, lambda: made().scale)
    if scales.has_input_scale:
        yield Output(f"{layer}scale_input", "F32", (), input_scale)


def _packed_output(name: str, entry: Entry, block_name: str) -> Output:
    block = BLOCK_FORMATS[block_name]
    height, width = entry.shape
    if width % block.values:
        raise WeightsError(
            f"{name} has {width} columns",
            f"{block.name} packs {block.values} at a time",
            "Choose another format",
        )
    suffix = next(suffix for suffix, one in PACKED_SUFFIXES.items() if one.name == block_name)

    def load() -> torch.Tensor:
        weight = entry.load()
        if isinstance(weight, Packed) and weight.format.name == block_name:
            return weight.data
        return quantize(plain(weight, torch.float32), block).data

    shape = (height, width // block.values * block.bytes)
    return Output(name.removesuffix(".weight") + suffix, "U8", shape, load)


# diffusers


def _diffusers(
    checkpoint: Checkpoint,
    target: Path,
    format: str,
    entries: dict[Part, build.Entries],
    metadata: Mapping[str, str],
) -> Iterator[_File]:
    """A folder for each network, with its config; a single network may be a single file."""
    kinds = {name: parts for name, parts in PARTS.items() if any(part in entries for part in parts)}
    one_file = target.suffix == ".safetensors"
    if one_file and len(kinds) > 1:
        raise WeightsError(
            f"{checkpoint.path} holds {' and '.join(kinds)}", "diffusers has a folder for each", "Give a folder"
        )
    for name, parts in kinds.items():
        outputs: list[Output] = []
        config: dict[str, Any] = {}
        for part in parts:
            if part not in entries:
                raise WeightsError(
                    f"{checkpoint.path} lacks {part.title}", "diffusers' VAE has both halves", "Use a combined VAE file"
                )
            architecture = _architecture(checkpoint, part, entries)
            rules, prefix, config = _diffusers_naming(part, architecture, checkpoint)
            theirs = layouts.reversed_by(rules, entries[part]) if rules else entries[part]
            if any(not entry.is_plain and entry.kind not in FLOAT8 for entry in entries[part].values()):
                _check_floats(format, checkpoint)
            outputs += _outputs(part, {prefix + key: entry for key, entry in theirs.items()}, format, "")
        folder = target if len(kinds) == 1 else target / DIFFUSERS_FOLDERS[name]
        file = folder / ("model.safetensors" if name == "t5" else "diffusion_pytorch_model.safetensors")
        yield _File(target if one_file else file, tuple(outputs), metadata, None if one_file else config)


def _check_floats(format: str, checkpoint: Checkpoint) -> None:
    if format == "keep":
        raise WeightsError(
            f"{checkpoint.path} is quantised", "diffusers holds floats", f"Choose a format: {', '.join(FLOATS)}"
        )


def _diffusers_naming(
    part: Part, architecture: Any, checkpoint: Checkpoint
) -> tuple[layouts.Rules | None, str, dict[str, Any]]:
    """The rules, the prefix inside the file, and the config that diffusers (transformers for T5) builds it from."""
    if part is DIT:
        return layouts.diffusers_dit(architecture.depth), "", diffusers_dit_config(architecture)
    if part is T5:
        return None, "", transformers_t5_config(architecture)
    statistics = LatentStatistics.from_metadata(checkpoint.metadata)
    config = diffusers_vae_config(architecture, statistics)
    if part is DECODER:
        return layouts.diffusers_decoder(architecture.decoder.num_res_blocks[::-1]), "decoder.", config
    return layouts.diffusers_encoder(architecture.encoder.num_res_blocks), "encoder.", config


def diffusers_dit_config(config: DiTConfig) -> dict[str, Any]:
    """`MochiTransformer3DModel`'s config. Raises `ConfigError` when it has no way to say this architecture."""
    for dim, inner in ((config.visual_dim, config.visual_mlp_dim), (config.text_dim, config.text_mlp_dim)):
        # diffusers fixes the ratio at 4 and does not round to 256
        if inner != 4 * dim * 2 // 3:
            raise ConfigError(
                f"The DiT has feed-forward layers {inner} wide for {dim} channels",
                f"diffusers' are always {4 * dim * 2 // 3} wide",
                "Choose another layout",
            )
    return {
        "_class_name": "MochiTransformer3DModel",
        "patch_size": config.patch_size,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_dim,
        "num_layers": config.depth,
        "pooled_projection_dim": config.text_dim,
        "in_channels": config.latent_channels,
        "text_embed_dim": config.text_feature_dim,
        "time_embed_dim": 256,
        "activation_fn": "swiglu",
        "max_sequence_length": 256,
        "qk_norm": "rms_norm",
    }


def diffusers_vae_config(config: VAEConfig, statistics: LatentStatistics) -> dict[str, Any]:
    """`AutoencoderKLMochi`'s config. Raises `ConfigError` when it has no way to say this architecture."""
    if config.decoder.num_res_blocks != config.encoder.num_res_blocks:
        raise ConfigError(
            f"The halves have {config.decoder.num_res_blocks} and {config.encoder.num_res_blocks} residual blocks",
            "diffusers has one number for both",
            "Choose another layout",
        )
    return {
        "_class_name": "AutoencoderKLMochi",
        "in_channels": config.encoder.in_channels,
        "out_channels": 3,
        "latent_channels": config.latent_channels,
        "encoder_block_out_channels": config.encoder.channels,
        "decoder_block_out_channels": config.decoder.channels,
        "layers_per_block": config.decoder.num_res_blocks,
        "temporal_expansions": config.temporal_factors,
        "spatial_expansions": config.spatial_factors,
        "add_attention_block": config.encoder.has_attention,
        "latents_mean": statistics.mean,
        "latents_std": statistics.std,
        "scaling_factor": 1.0,
    }


def transformers_t5_config(config: TextConfig) -> dict[str, Any]:
    """`T5EncoderModel`'s config."""
    numbers = {name: getattr(config, name) for name in TextConfig.__dataclass_fields__}
    return {"architectures": ["T5EncoderModel"], "model_type": "t5", "dropout_rate": 0.0, **numbers}
