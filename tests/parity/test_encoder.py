"""The encoder against the reference's outputs."""

import pytest

from mochi_core.vae.encoder import fourier_features

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def case(goldens):
    return goldens.tensors("vae_encoder_cases")


def test_fourier_features(goldens, case, dtype):
    out = fourier_features(case["in/video"][:, :, :1].to(dtype))
    goldens.check(out, case["out_f64/fourier_first_frame"], "enc/fourier_first_frame")


@pytest.mark.parametrize("frames, suffix", [(13, ""), (7, "_first7"), (1, "_first1")])
def test_posterior(goldens, golden_encoder, case, dtype, frames, suffix):
    posterior = golden_encoder(dtype)(case["in/video"][:, :, :frames].to(dtype))
    for name in ("mean", "logvar"):
        goldens.check(getattr(posterior, name), case[f"out_f64/{name}{suffix}"], f"enc/{name}{suffix}")


def test_sample(goldens, golden_encoder, case, dtype):
    posterior = golden_encoder(dtype)(case["in/video"].to(dtype))
    goldens.check(posterior.sample(case["in/sample_noise"].to(dtype)), case["out_f64/sample"], "enc/sample")
