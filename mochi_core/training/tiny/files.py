"""The four files of the tiny checkpoint: their names, their metadata, and writing them in bfloat16."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from ...config import DiTConfig, ModelConfig
from ...latents import LatentStatistics
from ...weights import build
from ...weights.files import TYPE_NAMES
from ...weights.writer import Output, write_safetensors

LICENSE = "Apache-2.0"


@dataclass(frozen=True)
class ModelFiles:
    """Where the checkpoint's parts are in a folder."""

    folder: Path

    @property
    def dit(self) -> Path:
        return self.folder / build.TINY_DIT.name

    @property
    def vae(self) -> Path:
        return self.folder / build.TINY_VAE.name

    @property
    def t5(self) -> Path:
        return self.folder / build.TINY_T5.name

    @property
    def tokenizer(self) -> Path:
        return self.folder / build.TINY_TOKENIZER.name

    @property
    def card(self) -> Path:
        return self.folder / "README.md"

    @property
    def megabytes(self) -> float:
        return sum(path.stat().st_size for path in (self.dit, self.vae, self.t5, self.tokenizer)) / 1e6


def metadata(config: object, statistics: LatentStatistics | None = None) -> dict[str, str]:
    """What a file says of itself. The DiT's numbers go by the reference's names."""
    names = {ours: theirs for theirs, ours in DiTConfig.METADATA_NAMES.items()} if isinstance(config, DiTConfig) else {}
    values = {names.get(name, name): value for name, value in asdict(config).items()}  # pyright: ignore
    said = {"format": "pt", "model": build.TINY_NAME, "license": LICENSE, "config": json.dumps(values)}
    if statistics is not None:
        said |= {f"latents_{name}": json.dumps(getattr(statistics, name)) for name in ("mean", "std")}
    return said


def rewritten(source: Path, target: Path, said: Mapping[str, str]) -> None:
    """The tensors of one file in another, in bfloat16 and with this metadata."""
    write_safetensors(target, bfloat16_outputs(load_file(source)), said)


def write_model(
    files: ModelFiles, config: ModelConfig, parts: Mapping[str, Path], statistics: LatentStatistics
) -> None:
    """`dit`, `vae` and `t5` of `parts` as users have them."""
    rewritten(parts["dit"], files.dit, metadata(config.dit, statistics))
    rewritten(parts["vae"], files.vae, metadata(config.vae, statistics))
    rewritten(parts["t5"], files.t5, metadata(config.text))


def bfloat16_outputs(weights: Mapping[str, torch.Tensor]) -> list[Output]:
    """What writes these weights in bfloat16."""
    kind = TYPE_NAMES[torch.bfloat16]
    return [Output(name, kind, tuple(weight.shape), partial(_rounded, weight)) for name, weight in weights.items()]


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().to("cpu", torch.bfloat16)
