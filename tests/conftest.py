"""What several tests share: the reference vectors, the networks they belong to, the embedded checkpoint, the peers."""

import functools
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from mochi_core.config import DiTConfig, StagesConfig, VAEConfig
from mochi_core.dit import AsymmDiT
from mochi_core.pipeline import MochiPipeline
from mochi_core.vae import Decoder, Encoder
from scripts import comfyui

GOLDENS = Path(__file__).parent / "goldens"
NO_ATTENTION = (False,) * 5

# How many times the reference's own float32 error ours may be.
ALLOWED_ERRORS = 3
FLOAT64_TOLERANCE = 1e-10

Tensors = dict[str, torch.Tensor]


@functools.cache
def unpacked(name: str) -> bytes:
    return lzma.decompress((GOLDENS / f"{name}.xz").read_bytes())


class Goldens:
    """The committed reference vectors; see goldens/README.md."""

    def tensors(self, name: str) -> Tensors:
        return load(unpacked(f"{name}.safetensors"))

    def file(self, name: str) -> bytes:
        """A whole file, metadata and all."""
        return unpacked(name)

    def json(self, name: str) -> Any:
        return json.loads(unpacked(f"{name}.json"))

    def check(self, actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
        """Fails unless `actual` is as near to the float64 `expected` as its dtype lets the reference be."""
        reference_error = self.json("meta")["genmo_f32_vs_f64_max_abs"][name]
        allowed = FLOAT64_TOLERANCE if actual.dtype == torch.float64 else ALLOWED_ERRORS * reference_error
        assert actual.shape == expected.shape
        error = (actual.double() - expected).abs().max().item()
        assert error <= allowed, f"{name} is off by {error:.2e}, allowed is {allowed:.2e}"

    def text(self, tensors: Tensors, prefix: str, dtype: torch.dtype, padding: float | None = None) -> tuple:
        """Features and mask of a case; padding slots hold `padding`, or random values that must not matter."""
        mask, valid = tensors[f"{prefix}y_mask"], tensors[f"{prefix}y_feat_valid"].to(dtype)
        features = torch.randn(*mask.shape, valid.shape[-1], generator=torch.Generator().manual_seed(0)).to(dtype)
        if padding is not None:
            features.fill_(padding)
        features[mask] = valid
        return features, mask


def filled(network: torch.nn.Module, weights: Tensors) -> torch.nn.Module:
    network.load_state_dict(weights)  # casts by itself
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def goldens() -> Goldens:
    return Goldens()


@pytest.fixture(params=(torch.float32, torch.float64), ids=("float32", "float64"))
def dtype(request):
    """The two precisions that are measured against the reference vectors."""
    return request.param


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def golden_dit(goldens):
    """`golden_dit(dtype)`: the reference's small DiT. Shared: do not change it."""
    config = DiTConfig(depth=3, heads=4, visual_dim=96, text_dim=48, text_feature_dim=64)
    return functools.cache(lambda dtype: filled(AsymmDiT(config, dtype=dtype), goldens.tensors("dit_weights")))


@pytest.fixture(scope="session")
def golden_decoder(goldens):
    """`golden_decoder(dtype)`: the reference's small decoder. Shared: do not change it."""
    config = VAEConfig(decoder=StagesConfig(32, (1, 2, 2, 2), (1, 1, 1, 1, 1), NO_ATTENTION))
    return functools.cache(lambda dtype: filled(Decoder(config, dtype=dtype), goldens.tensors("vae_decoder_weights")))


@pytest.fixture(scope="session")
def golden_encoder(goldens):
    """`golden_encoder(dtype)`: the reference's small encoder. Shared: do not change it."""
    attention = (False, True, True, True, True)
    config = VAEConfig(encoder=StagesConfig(32, (1, 2, 1, 2), (1, 1, 1, 1, 1), attention))
    return functools.cache(lambda dtype: filled(Encoder(config, dtype=dtype), goldens.tensors("vae_encoder_weights")))


@pytest.fixture(scope="session")
def tiny() -> MochiPipeline:
    """The embedded checkpoint in float32. Shared: do not change it."""
    return MochiPipeline.tiny()


def missing_peer(reason: str) -> None:
    """Skips the test, or under CI fails it: there every peer must be installed."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """A ComfyUI checkout: `COMFYUI_PATH`, or the one that `make setup` puts into `.cache`."""
    path = comfyui.path()
    if not (path / "comfy" / "ldm" / "genmo").is_dir():
        missing_peer(f"no ComfyUI checkout at {path}: run `make setup`, or set COMFYUI_PATH")
    return path


@pytest.fixture(scope="session")
def diffusers():
    try:
        import diffusers
    except ImportError as error:
        missing_peer(f"diffusers cannot be imported: {error}")
    return diffusers
