"""Guided Euler sampling against the reference's trajectories."""

import pytest
import torch

from mochi_core.latents import MOCHI_1_STATISTICS
from mochi_core.sampling.guidance import Guidance
from mochi_core.sampling.samplers import euler
from mochi_core.sampling.schedule import from_levels, linear_quadratic
from mochi_core.text.conditioning import TextConditioning

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def case(goldens):
    return goldens.tensors("sampler_cases")


@pytest.fixture
def sample(goldens, golden_dit, case, dtype):
    """`sample(steps, batched)`: the reference's run, and the latents before each of its steps."""

    def run(steps, batched):
        dit, before = golden_dit(dtype), []

        def predict(latents, sigma, text):
            return dit(latents, sigma, text.features, text.mask)

        def direction(latents, sigma, step):
            before.append(latents)
            return guidance(latents, sigma, step)

        positive, negative = (TextConditioning(*goldens.text(case, f"in/{k}_", dtype)) for k in ("cond", "null"))
        scales = tuple(case[f"in/steps{steps}/cfg_schedule"].tolist())
        guidance = Guidance(predict, positive, negative, scales, batched)
        schedule = from_levels(case[f"in/steps{steps}/sigma_schedule"].tolist())
        return euler(direction, case["in/noise"].to(dtype), schedule), before

    return run


@pytest.mark.parametrize("steps", (4, 8))
@pytest.mark.parametrize("way", ("sequential", "batched"))
def test_latents(goldens, case, sample, steps, way):
    latents, _ = sample(steps, way == "batched")
    name = f"steps{steps}/{way}"
    goldens.check(latents, case[f"out_f64/{name}/dit_latents"], f"sampler/{name}/dit_latents")
    in_vae_space = MOCHI_1_STATISTICS.to_vae_space(latents)
    goldens.check(in_vae_space, case[f"out_f64/{name}/vae_latents"], f"sampler/{name}/vae_latents")


def test_every_step(goldens, case, sample):
    _, before = sample(4, batched=False)
    name = "steps4/sequential/z_before_each_step"
    goldens.check(torch.cat(before), case[f"out_f64/{name}"], f"sampler/{name}")


@pytest.mark.parametrize("steps", (4, 8))
def test_the_reference_followed_our_default_schedule(case, steps):
    assert case[f"in/steps{steps}/sigma_schedule"].tolist() == pytest.approx(linear_quadratic(steps).levels, abs=1e-12)
