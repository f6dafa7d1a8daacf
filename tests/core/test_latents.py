import json

import pytest
import torch

from mochi_core.errors import LatentsError, WeightsError
from mochi_core.latents import MOCHI_1_STATISTICS, LatentStatistics, require_finite


@pytest.mark.parametrize(
    "convert, name",
    [
        (MOCHI_1_STATISTICS.to_vae_space, "dit_latents_to_vae_latents"),
        (MOCHI_1_STATISTICS.to_model_space, "vae_latents_to_dit_latents"),
    ],
)
def test_conversion(goldens, dtype, convert, name):
    units = goldens.tensors("units")
    goldens.check(convert(units["in/lat"].to(dtype)), units[f"out_f64/{name}"], f"unit/{name}")


@pytest.mark.parametrize("precision", (torch.float64, torch.float32, torch.bfloat16))
def test_there_and_back_in_the_same_dtype(precision):
    latents = torch.randn(2, 12, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(precision)
    back = MOCHI_1_STATISTICS.to_vae_space(MOCHI_1_STATISTICS.to_model_space(latents))
    assert back.dtype == precision
    torch.testing.assert_close(back, latents, rtol=2e-2 if precision == torch.bfloat16 else 1e-6, atol=1e-2)


@pytest.mark.parametrize("shape", [(1, 16, 1, 2, 2), (1, 11, 1, 2, 2), (12, 1, 2, 2), (1, 1, 12, 1, 2, 2)])
def test_latents_of_another_model(shape):
    with pytest.raises(LatentsError, match=r"have shape .*: they must be B x 12 x T x H x W\. Use latents"):
        MOCHI_1_STATISTICS.to_model_space(torch.zeros(shape))


def metadata(mean, std):
    return {"latents_mean": mean, "latents_std": std}


def test_a_file_without_statistics_has_the_released_ones():
    assert LatentStatistics.from_metadata({"format": "pt"}) == MOCHI_1_STATISTICS


def test_statistics_of_a_file():
    assert LatentStatistics.from_metadata(metadata("[0, 0.5]", "[1, 2]")) == LatentStatistics((0, 0.5), (1, 2))


@pytest.mark.parametrize(
    "given",
    [
        {"latents_mean": "[0]"},
        {"latents_std": "[1]"},
        metadata("not json", "[1]"),
        metadata("5", "[1]"),
        metadata("null", "[1]"),
        metadata('["a"]', "[1]"),
        metadata("{", "{"),
        metadata("9" * 400, "[1]"),
        metadata(f"[{'9' * 400}]", "[1]"),
        metadata("[" * 100_000, "[1]"),
    ],
    ids=lambda given: json.dumps(given)[:60],
)
def test_statistics_that_cannot_be_read(given):
    with pytest.raises(WeightsError, match=r"cannot be read .*: latents_mean and latents_std must both be JSON lists"):
        LatentStatistics.from_metadata(given)


@pytest.mark.parametrize("mean, std", [("[0]", "[1, 1]"), ("[0, 0]", "[1, 0]"), ("[0]", "[-1]"), ("[0]", "[NaN]")])
def test_statistics_that_cannot_be(mean, std):
    with pytest.raises(WeightsError, match="as many of each, all finite, and every deviation above zero"):
        LatentStatistics.from_metadata(metadata(mean, std))


@pytest.mark.parametrize("mean, std", [("[NaN]", "[1]"), ("[0]", "[Infinity]"), ("[Infinity]", "[1]")])
def test_statistics_must_be_finite(mean, std):
    with pytest.raises(WeightsError):
        LatentStatistics.from_metadata(metadata(mean, std))


def test_finite_latents_pass():
    require_finite(torch.zeros(2, 3), "These")


def test_nan_and_infinity_are_counted():
    latents = torch.zeros(10)
    latents[:2], latents[4] = float("nan"), float("-inf")
    with pytest.raises(LatentsError, match=r"^The latents: 3 of 10 values are NaN or infinite: .*Find the step"):
        require_finite(latents, "The latents")
