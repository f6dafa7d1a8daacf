"""The decoder, and decoding in tiles, against the reference's outputs."""

import pytest
import torch

from mochi_core.config import StagesConfig, VAEConfig
from mochi_core.vae import Decoder
from mochi_core.vae.decoder import to_frames
from mochi_core.vae.tiling import decode_tiled

pytestmark = pytest.mark.usefixtures("no_gradients")
# goldens/pack.py keeps every third column of the large outputs.
COLUMNS = slice(None, None, 3)


def test_whole_clip(goldens, golden_decoder, dtype):
    case = goldens.tensors("vae_decoder_cases")
    out = golden_decoder(dtype)(case["in/z"].to(dtype))
    assert out.shape == (1, 3, 19, 48, 48)
    goldens.check(out[..., COLUMNS], case["out_f64/raw"], "dec/raw")


def test_streaming(goldens, golden_decoder, dtype):
    case = goldens.tensors("vae_decoder_cases")
    pieces = list(golden_decoder(dtype).stream(case["in/z"].to(dtype)))
    goldens.check(torch.cat(pieces, dim=2)[..., COLUMNS], case["out_f64/raw"], "dec/raw")


def test_one_latent(goldens, golden_decoder, dtype):
    case = goldens.tensors("vae_decoder_cases")
    goldens.check(golden_decoder(dtype)(case["in/z_t1"].to(dtype)), case["out_f64/raw_t1"], "dec/raw_t1")


def test_stages_of_different_depth(goldens, dtype):
    """Catches stages that are built in the wrong order, which equal depths would hide."""
    stages = StagesConfig(32, (1, 1, 1, 1), (1, 2, 1, 2, 1), (False,) * 5)
    decoder = Decoder(VAEConfig(decoder=stages), dtype=dtype)
    decoder.load_state_dict(goldens.tensors("vae_decoder_asym_weights"))
    case = goldens.tensors("vae_decoder_asym_cases")
    goldens.check(decoder(case["in/z"].to(dtype)), case["out_f64/raw"], "dec_asym/raw")


def test_tiles(goldens, golden_decoder, dtype):
    latents = goldens.tensors("vae_decoder_cases")["in/z"].to(dtype)
    tiles = goldens.json("meta")["configs"]["tiled_spatial"]
    raw = decode_tiled(golden_decoder(dtype), latents, tiles["num_tiles_h"], tiles["num_tiles_w"], tiles["overlap"])
    expected = goldens.tensors("vae_decoder_tiled")["out_f64/tiled_spatial_frames"]
    goldens.check(to_frames(raw)[..., COLUMNS, :], expected, "dec/tiled_spatial_frames")
