"""Packs the reference vectors that the tests read, small enough to commit.

    python tests/goldens/pack.py /path/to/goldens /path/to/manifests

Kept are the inputs, the weights and the double-precision outputs. Left out are the single-precision outputs, text
features in padding slots (they must not matter, so the tests fill them at will), and two of three columns of the
large decoder outputs.
"""

import json
import lzma
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

HERE = Path(__file__).parent
WEIGHTS = ("dit_weights", "lora", "vae_decoder_weights", "vae_decoder_asym_weights", "vae_encoder_weights")
CASES = (
    "dit_cases",
    "lora_cases",
    "sampler_cases",
    "units",
    "vae_decoder_cases",
    "vae_decoder_asym_cases",
    "vae_decoder_tiled",
    "vae_encoder_cases",
)
MANIFESTS = (
    "genmo_dit",
    "genmo_decoder",
    "genmo_encoder",
    "genmo_lora_rank16",
    "diffusers_transformer",
    "diffusers_vae",
)
# Odd, so that all positions inside the decoder's 8x8 unfolding occur.
COLUMN_STEP = 3
LARGE_OUTPUTS = {"vae_decoder_cases": ("out_f64/raw", -1), "vae_decoder_tiled": ("out_f64/tiled_spatial_frames", -2)}


def slim(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a case file that the tests need."""
    kept = {key: value for key, value in tensors.items() if not key.startswith("out_f32/") and "/packed_" not in key}
    kept = {key: value for key, value in kept.items() if "/merged_" not in key}  # the merged output covers it
    for key in [key for key in kept if key.endswith("y_feat")]:
        features = kept.pop(key)
        kept[f"{key}_valid"] = features[kept[key.replace("y_feat", "y_mask")]]
    for key in [key for key in kept if "/trace/" in key and key.endswith("_y")]:
        kept[key] = kept[key][:, : int(kept["in/b1/y_mask"].sum())]
    if name in LARGE_OUTPUTS:
        key, axis = LARGE_OUTPUTS[name]
        kept[key] = kept[key].index_select(axis, torch.arange(0, kept[key].shape[axis], COLUMN_STEP))
    return {key: value.contiguous() for key, value in kept.items()}


def write(name: str, content: bytes) -> None:
    (HERE / f"{name}.xz").write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))


def as_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def main(goldens: Path, manifests: Path) -> None:
    for name in WEIGHTS:  # as they are, metadata and all
        write(f"{name}.safetensors", (goldens / f"{name}.safetensors").read_bytes())
    for name in CASES:
        write(f"{name}.safetensors", save(slim(name, load_file(goldens / f"{name}.safetensors"))))
    meta = json.loads((goldens / "meta.json").read_text())
    write("meta.json", as_json({key: meta[key] for key in ("seed", "configs", "genmo_f32_vs_f64_max_abs")}))
    write("schedules.json", as_json(json.loads((goldens / "schedules.json").read_text())["tables"]))
    shapes = {}
    for name in MANIFESTS:
        keys = json.loads((manifests / f"{name}.json").read_text())["keys"]
        shapes[name] = {key: shape for key, (shape, _) in keys.items()}
    write("manifests.json", as_json(shapes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
