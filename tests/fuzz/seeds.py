"""Small valid files of every kind that the library reads: what the fuzzer starts from.

Each seed is a folder's worth of files and the path in it that is opened, "" for the folder itself.
"""

import io
import json
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file

from mochi_core.config import DiTConfig, StagesConfig, TextConfig, VAEConfig
from mochi_core.dit import AsymmDiT
from mochi_core.latents import MOCHI_1_STATISTICS
from mochi_core.text.t5 import empty_t5
from mochi_core.vae import Decoder, Encoder
from mochi_core.weights import layouts
from mochi_core.weights.blocks import BLOCK_FORMATS
from mochi_core.weights.convert import convert
from mochi_core.weights.formats import Entry, plain

Tensors = dict[str, torch.Tensor]

DIT = DiTConfig(depth=2, heads=2, visual_dim=32, text_dim=32, text_feature_dim=32)
VAE = VAEConfig(
    temporal_factors=(2,),
    spatial_factors=(2,),
    decoder=StagesConfig(32, (1, 1), (0, 1, 0), (False,) * 3),
    encoder=StagesConfig(32, (1, 1), (0, 1, 0), (False, True, True)),
)
T5 = TextConfig(
    vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, relative_attention_num_buckets=8
)

CONFIGS: dict[str, dict[str, Any]] = {
    "dit": {
        "depth": DIT.depth,
        "num_heads": DIT.heads,
        "hidden_size_x": DIT.visual_dim,
        "hidden_size_y": DIT.text_dim,
        "t5_feat_dim": DIT.text_feature_dim,
        "mlp_ratio_x": 4.0,
        "timestep_scale": 1000.0,
    },
    "vae": {
        "temporal_factors": VAE.temporal_factors,
        "spatial_factors": VAE.spatial_factors,
        **{
            name: {field: getattr(half, field) for field in half.__dataclass_fields__}
            for name, half in (("decoder", VAE.decoder), ("encoder", VAE.encoder))
        },
    },
    "t5": {field: getattr(T5, field) for field in T5.__dataclass_fields__},
}
STATISTICS = {
    "latents_mean": json.dumps(MOCHI_1_STATISTICS.mean),
    "latents_std": json.dumps(MOCHI_1_STATISTICS.std),
}
KWARGS = {
    "qkv_proj_lora_rank": 4,
    "qkv_proj_lora_alpha": 8,
    "out_proj_lora_rank": 4,
    "out_proj_lora_alpha": 4,
}


@dataclass(frozen=True)
class Seed:
    """Files by their path in a folder, and which of them is opened."""

    name: str
    files: dict[str, bytes]
    opened: str
    kind: str


def seeds() -> list[Seed]:
    """All of them. `kind` is what their headers are written in: safetensors, gguf, folder or archive."""
    with tempfile.TemporaryDirectory() as folder:
        return [*_safetensors(Path(folder)), *_ggufs(), *_folders(), *_archives()]


def networks() -> dict[str, Tensors]:
    """The weights of the small networks in our names, always the same."""
    generator = torch.Generator().manual_seed(0)

    def values(network: torch.nn.Module, prefix: str = "") -> Tensors:
        shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
        shapes.pop("encoder.embed_tokens.weight", None)  # the T5's embedding under its other name
        return {
            prefix + name: (torch.randn(shape, generator=generator) * 0.1).bfloat16() for name, shape in shapes.items()
        }

    vae = values(Decoder(VAE, device="meta"), "decoder.") | values(Encoder(VAE, device="meta"), "encoder.")
    return {"dit": values(AsymmDiT(DIT, device="meta")), "vae": vae, "t5": values(empty_t5(T5))}


# safetensors


def _safetensors(folder: Path) -> list[Seed]:
    held = networks()
    one = folder / "one"
    one.mkdir()
    for part, tensors in held.items():
        metadata = {"config": json.dumps(CONFIGS[part])} | (STATISTICS if part != "t5" else {})
        save_file(tensors, one / f"{part}.safetensors", metadata)
        save_file(tensors, one / f"{part}_bare.safetensors")
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in held["dit"].items()}
    vae = {f"vae.{name}": tensor for name, tensor in held["vae"].items()}
    t5 = {f"text_encoders.t5xxl.transformer.{name}": tensor for name, tensor in held["t5"].items()}
    save_file(prefixed, one / "dit_prefixed.safetensors")
    save_file(prefixed | vae | t5, one / "all_in_one.safetensors", STATISTICS)
    decoder = {
        name.removeprefix("decoder."): tensor for name, tensor in held["vae"].items() if name.startswith("decoder.")
    }
    save_file(decoder, one / "decoder.safetensors", {"config": json.dumps(CONFIGS["vae"])})
    for format in ("fp8", "fp8_scaled", "q8_0", "q4_0"):
        convert(one / "dit.safetensors", one / f"dit_{format}.safetensors", "comfy", format)
    convert(one / "t5.safetensors", one / "t5_fp8_scaled.safetensors", "comfy", "fp8_scaled")
    convert(one / "all_in_one.safetensors", one / "all_in_one_q8_0.safetensors", "comfy", "q8_0")
    for part, tensors in _diffusers(held).items():
        save_file(tensors, one / f"{part}_diffusers.safetensors")
    _write_newer_scaled(one / "dit_fp8_scaled.safetensors", one / "dit_comfy_quant.safetensors")
    for name, (tensors, metadata) in _loras(held["dit"]).items():
        save_file(tensors, one / f"lora_{name}.safetensors", metadata)
    return [Seed(path.stem, {path.name: path.read_bytes()}, path.name, "safetensors") for path in sorted(one.iterdir())]


def _diffusers(held: dict[str, Tensors]) -> dict[str, Tensors]:
    """The DiT and the VAE in diffusers' names."""

    def renamed(rules: layouts.Rules, prefix: str, tensors: Tensors) -> Tensors:
        ours = {
            name.removeprefix(prefix): Entry(tuple(tensor.shape), "BF16", lambda tensor=tensor: tensor)
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        theirs = layouts.reversed_by(rules, ours)
        return {prefix + name: plain(entry.load()).contiguous() for name, entry in theirs.items()}

    return {
        "dit": renamed(layouts.diffusers_dit(DIT.depth), "", held["dit"]),
        "vae": renamed(layouts.diffusers_decoder(VAE.decoder.num_res_blocks[::-1]), "decoder.", held["vae"])
        | renamed(layouts.diffusers_encoder(VAE.encoder.num_res_blocks), "encoder.", held["vae"]),
    }


def _write_newer_scaled(older: Path, path: Path) -> None:
    """Scaled 8-bit floats as newer files name them, with a scale for each row and one for activations."""
    held: Tensors = {}
    conf = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    for name, tensor in load_file(older).items():
        if name.endswith(".scale_weight"):
            layer = name.removesuffix(".scale_weight")
            rows = len(load_file(older)[f"{layer}.weight"])
            held[f"{layer}.weight_scale"] = tensor.expand(rows, 1).contiguous()
            held[f"{layer}.input_scale"] = torch.ones(())
            held[f"{layer}.comfy_quant"] = conf.clone()
        elif name != "scaled_fp8":
            held[name] = tensor
    save_file(held, path)


def _loras(dit: Tensors) -> dict[str, tuple[Tensors, dict[str, str] | None]]:
    """One for each trainer, as tensors and metadata."""
    layers = ("blocks.0.attn.qkv_x", "blocks.1.attn.proj_x", "blocks.0.mlp_x.w1")
    changes = {
        name: (torch.full((4, dit[f"{name}.weight"].shape[1]), 0.1), torch.full((len(dit[f"{name}.weight"]), 4), 0.1))
        for name in layers
    }
    genmo, peft, kohya, dora = {}, {}, {}, {}
    for name, (down, up) in changes.items():
        if ".attn." in name:  # genmo trains no others
            genmo |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        spelled = "lora_unet_" + name.replace(".", "_")
        kohya |= {f"{spelled}.lora_down.weight": down, f"{spelled}.lora_up.weight": up}
        kohya[f"{spelled}.alpha"] = torch.tensor(2.0)
        peft |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
        dora |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        dora[f"{name}.lora_magnitude_vector"] = torch.ones(len(up))
    pieces = {}
    for piece in "qkv":
        stem = f"transformer.transformer_blocks.0.attn1.to_{piece}"
        pieces |= {f"{stem}.lora_A.weight": torch.ones(2, 32), f"{stem}.lora_B.weight": torch.ones(32, 2)}
    adapter = {"r": 2, "lora_alpha": 4, "alpha_pattern": {"to_q": 2}}
    adapter = json.dumps({f"transformer.{name}": value for name, value in adapter.items()})
    return {
        "genmo": (genmo, {"kwargs": json.dumps(KWARGS)}),
        "peft": (peft, None),
        "kohya": (kohya, None),
        "dora": (dora, None),
        "diffusers": (pieces, {"lora_adapter_metadata": adapter}),
    }


# GGUF

# The numbers of the format's types: what a seed uses, and how many bytes a plain number takes.
GGUF_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "BF16": 30}
# Q3_K is one of those that only the gguf package unpacks.
GGUF_BLOCKS = {name: (block.values, block.bytes) for name, block in BLOCK_FORMATS.items()} | {"Q3_K": (256, 110)}
ALIGNMENT = 32


def text(content: str) -> list[tuple[str, bytes]]:
    """A text as the pieces of a header: each is what it means and its bytes."""
    return [("length", struct.pack("<Q", len(content.encode()))), ("text", content.encode())]


def encoded_gguf(pieces: list[tuple[str, bytes]], data: bytes) -> bytes:
    """The pieces of a header, and the tensors where its alignment puts them."""
    header = b"".join(content for _, content in pieces)
    return header + bytes(-len(header) % ALIGNMENT) + data


def gguf_pieces(tensors: Tensors, types: Any, metadata: dict[str, str]) -> tuple[list[tuple[str, bytes]], bytes]:
    """A file in pieces. `types(name, tensor)` names each tensor's type; packed ones hold zeros."""
    pieces = [("magic", b"GGUF"), ("version", struct.pack("<I", 3))]
    values = {"general.architecture": "mochi"} | metadata
    pieces += [("count", struct.pack("<Q", len(tensors))), ("count", struct.pack("<Q", len(values) + 2))]
    for key, value in values.items():
        pieces += [*text(key), ("type", struct.pack("<I", 8)), *text(value)]
    pieces += [*text("general.alignment"), ("type", struct.pack("<I", 4)), ("alignment", struct.pack("<I", ALIGNMENT))]
    pieces += [*text("tokens"), ("type", struct.pack("<I", 9)), ("type", struct.pack("<I", 8))]
    pieces += [("count", struct.pack("<Q", 2)), *text("a"), *text("b")]
    data = b""
    for name, tensor in tensors.items():
        type_name = types(name, tensor)
        if type_name in GGUF_BLOCKS:
            values_of, bytes_of = GGUF_BLOCKS[type_name]
            content = bytes(tensor.numel() // values_of * bytes_of)
        else:
            dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[type_name]
            content = tensor.to(dtype).view(torch.uint8).numpy().tobytes()
        pieces += [*text(name), ("dimensions", struct.pack("<I", tensor.ndim))]
        pieces += [("dimension", struct.pack("<Q", size)) for size in reversed(tensor.shape)]
        pieces += [("type", struct.pack("<I", GGUF_TYPES[type_name])), ("start", struct.pack("<Q", len(data)))]
        data += content + bytes(-len(content) % ALIGNMENT)
    return pieces, data


def ggufs() -> dict[str, tuple[list[tuple[str, bytes]], bytes]]:
    """Files in pieces, by name."""
    held = networks()
    wide = ("Q4_K", "Q5_K", "Q6_K", "Q3_K")

    def mixed(name: str, tensor: torch.Tensor) -> str:
        if tensor.ndim != 2 or not name.endswith(".weight"):
            return "F32"
        if tensor.shape[1] % 256 == 0:
            return wide[sum(name.encode()) % len(wide)]
        return ("Q8_0", "Q4_0", "F16", "BF16")[sum(name.encode()) % 4] if tensor.shape[1] % 32 == 0 else "BF16"

    llama = {}
    for rule in layouts.llama_t5(T5.num_layers):
        name = f"{rule.ours}.weight"
        if name in held["t5"]:
            llama[f"{rule.theirs[0]}.weight"] = held["t5"][name]
    return {
        "dit": gguf_pieces(held["dit"], mixed, {"config": json.dumps(CONFIGS["dit"])} | STATISTICS),
        "dit_plain": gguf_pieces(held["dit"], lambda name, tensor: "F16", {}),
        "t5": gguf_pieces(llama, mixed, {}),
        "t5_hugging_face": gguf_pieces(held["t5"], mixed, {}),
    }


def _ggufs() -> list[Seed]:
    return [
        Seed(f"gguf_{name}", {"weights.gguf": encoded_gguf(*pieces)}, "weights.gguf", "gguf")
        for name, pieces in ggufs().items()
    ]


# Folders


def _folders() -> list[Seed]:
    held = networks()
    names = sorted(held["dit"])
    shards = {
        f"model-0000{index}-of-00002.safetensors": {name: held["dit"][name] for name in names[index - 1 :: 2]}
        for index in (1, 2)
    }
    index = {"metadata": {"total_size": 1}, "weight_map": {n: file for file, held in shards.items() for n in held}}
    sharded = {file: save(tensors) for file, tensors in shards.items()}
    sharded["model.safetensors.index.json"] = json.dumps(index).encode()
    lora, _ = _loras(held["dit"])["peft"]
    adapter = json.dumps(
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"attn.qkv_x": 2}, "rank_pattern": {}}
    )
    peft = {"adapter_model.safetensors": save(lora), "adapter_config.json": adapter.encode()}
    parts = _diffusers(held)
    pipeline = {
        "transformer/diffusion_pytorch_model.safetensors": save(parts["dit"]),
        "vae/diffusion_pytorch_model.safetensors": save(parts["vae"]),
        "vae/config.json": json.dumps({name: json.loads(value) for name, value in STATISTICS.items()}).encode(),
        "text_encoder/model.safetensors": save(held["t5"]),
    }
    return [
        Seed("shards", sharded, "", "folder"),
        Seed("index", sharded, "model.safetensors.index.json", "folder"),
        Seed("peft_folder", peft, "", "folder"),
        Seed("peft_file", peft, "adapter_model.safetensors", "folder"),
        Seed("pipeline", pipeline, "", "folder"),
    ]


# Torch archives


def _archives() -> list[Seed]:
    held = networks()
    lora, _ = _loras(held["dit"])["genmo"]
    saved = {
        "vae": held["vae"],
        "lora": {"state_dict": lora, "kwargs": KWARGS},
        "t5": {"state_dict": held["t5"]},
    }
    archives = {name: _saved(content) for name, content in saved.items()}
    archives["lora_old"] = _saved(saved["lora"], zipped=False)
    return [Seed(f"archive_{name}", {"weights.pt": data}, "weights.pt", "archive") for name, data in archives.items()]


def _saved(content: Any, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()
