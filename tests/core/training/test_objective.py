"""The objective's minimum is the field that the sampler follows (docs/decisions/014)."""

import pytest
import torch

from mochi_core.errors import TrainingError
from mochi_core.latents import LatentStatistics
from mochi_core.sampling.samplers import euler
from mochi_core.sampling.schedule import from_levels, linear_quadratic
from mochi_core.training.objective import NoiseLevels, flow_matching_loss, noised

STATISTICS = LatentStatistics(mean=(1.5, -0.7), std=(0.3, 2.5))
MEAN = torch.tensor([1.6, -0.5], dtype=torch.float64)
# Of the data in VAE space: correlated, and not quite what the statistics say.
ROOT = torch.tensor([[0.35, 0.0], [1.0, 1.6]], dtype=torch.float64)
LEVELS = from_levels([1 - step / 200 for step in range(201)])


def clips(count, seed):
    """Latents in VAE space, `count 2 1 1 1`."""
    drawn = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (MEAN + drawn @ ROOT.T).view(count, 2, 1, 1, 1)


def column(x):
    return x.flatten(1)


def fitted(sigma, mixed, target):
    """The affine map of `mixed` that is nearest to `target`: the minimum of the mean of squares, found by itself."""
    given = torch.cat([column(mixed), torch.ones(len(mixed), 1, dtype=mixed.dtype)], dim=1)
    return torch.linalg.lstsq(given, column(target)).solution


def ours(clean_vae, noise, sigma):
    """What the objective shows a network and wants of it, seen from inside `flow_matching_loss`."""
    shown = {}
    clean = STATISTICS.to_model_space(clean_vae)

    def predict(mixed, level):
        shown["mixed"] = mixed
        return torch.zeros_like(mixed)

    loss = flow_matching_loss(predict, clean, noise, sigma)
    target = clean - noise
    torch.testing.assert_close(loss, target.square().flatten(1).mean(1))
    return shown["mixed"], target


def of_the_reference(clean_vae, noise, sigma):
    """Mixed as the encoder gives them; normalised is the target alone."""
    mixed = noised(clean_vae, noise, sigma)
    return mixed, STATISTICS.to_model_space(clean_vae - noise)


def sampled(trained_on, count=20_000):
    """What our sampler makes of noise with the field that was fitted at each level; in VAE space."""
    fields = {}
    for index, sigma in enumerate(LEVELS.levels[:-1]):
        noise = torch.randn(count, 2, 1, 1, 1, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        mixed, target = trained_on(clips(count, 1000 + index), noise, torch.full((count,), sigma, dtype=torch.float64))
        fields[sigma] = fitted(sigma, mixed, target)

    def direction(latents, sigma, step):
        given = torch.cat([column(latents), torch.ones(len(latents), 1, dtype=latents.dtype)], dim=1)
        return (given @ fields[sigma]).view_as(latents)

    noise = torch.randn(count, 2, 1, 1, 1, generator=torch.Generator().manual_seed(77), dtype=torch.float64)
    return column(STATISTICS.to_vae_space(euler(direction, noise, LEVELS)))


def test_the_minimum_carries_noise_to_the_data():
    made = sampled(ours)
    torch.testing.assert_close(made.mean(0), MEAN, atol=0.05, rtol=0)
    torch.testing.assert_close(torch.cov(made.T), ROOT @ ROOT.T, atol=0.06, rtol=0.03)


def test_the_references_mixing_carries_it_elsewhere():
    made = sampled(of_the_reference)
    assert (made.mean(0) - MEAN).abs().max() > 0.2
    assert (torch.cov(made.T) - ROOT @ ROOT.T).abs().max() > 0.5


def test_exact_field_of_normal_data_is_the_minimiser():
    """For normal data the conditional mean is known: no field has a smaller loss than it, and it is what is fitted."""
    count, sigma = 200_000, 0.6
    clean = STATISTICS.to_model_space(clips(count, 1))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    level = torch.full((count,), sigma, dtype=torch.float64)
    std = torch.tensor(STATISTICS.std, dtype=torch.float64)
    mean = (MEAN - torch.tensor(STATISTICS.mean, dtype=torch.float64)) / std
    covariance = torch.linalg.inv(torch.diag(std)) @ ROOT @ ROOT.T @ torch.linalg.inv(torch.diag(std))
    identity = torch.eye(2, dtype=torch.float64)
    mixed_covariance = (1 - sigma) ** 2 * covariance + sigma**2 * identity
    gain = ((1 - sigma) * covariance - sigma * identity) @ torch.linalg.inv(mixed_covariance)

    def exact(mixed, level, shift=0.0):
        known = mean + (column(mixed) - (1 - sigma) * mean) @ gain.T
        return (known + shift).view_as(mixed)

    best = flow_matching_loss(exact, clean, noise, level).mean()
    fit = fitted(sigma, noised(clean, noise, level), clean - noise)
    torch.testing.assert_close(fit[:2].T, gain, atol=0.02, rtol=0)
    for shift in (0.1, -0.1):
        assert flow_matching_loss(lambda x, s, shift=shift: exact(x, s, shift), clean, noise, level).mean() > best


def test_noised_is_what_a_sampler_step_goes_along():
    """Following the true target from any level arrives at the clean latents, by the sampler's own step."""
    clean, noise = torch.randn(2, 12, 3, 4, 4), torch.randn(2, 12, 3, 4, 4)
    schedule = linear_quadratic(8)
    torch.testing.assert_close(noised(clean, noise, torch.ones(2)), noise)
    end = euler(lambda latents, sigma, step: clean - noise, noise, schedule)
    torch.testing.assert_close(end, clean, atol=1e-5, rtol=1e-5)
    middle = schedule.levels[4]
    held = noise + sum((a - b) for a, b in zip(schedule.levels[:4], schedule.levels[1:5])) * (clean - noise)
    torch.testing.assert_close(noised(clean, noise, torch.full((2,), middle)), held, atol=1e-5, rtol=1e-5)


def test_loss_is_taken_in_float32():
    clean = torch.full((1, 1, 1, 1, 1), 1000.0)
    loss = flow_matching_loss(lambda x, s: torch.zeros_like(x, dtype=torch.bfloat16), clean, clean * 0, torch.ones(1))
    assert loss.dtype == torch.float32 and loss.item() == 1e6


@pytest.mark.parametrize(
    "levels, mean, below_half",
    [
        (NoiseLevels(), 0.5, 0.5),
        (NoiseLevels("logit_normal"), 0.5, 0.5),
        (NoiseLevels("logit_normal", mean=1.0, std=0.5), 0.718, 0.0228),
        (NoiseLevels("shifted", shift=3.0), 0.676, 0.25),
    ],
)
def test_levels_are_drawn_as_said(levels, mean, below_half):
    drawn = levels.draw(50_000, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32 and drawn.min() >= 0 and drawn.max() <= 1
    assert drawn.mean().item() == pytest.approx(mean, abs=0.01)
    assert (drawn < 0.5).float().mean().item() == pytest.approx(below_half, abs=0.01)
    again = levels.draw(50_000, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


def test_stratified_levels_leave_no_part_out():
    drawn = NoiseLevels(stratified=True).draw(16, torch.Generator().manual_seed(1))
    assert sorted((drawn * 16).int().tolist()) == list(range(16))
    assert drawn.tolist() != sorted(drawn.tolist())


@pytest.mark.parametrize("bad", [dict(kind="cosine"), dict(std=0.0), dict(shift=-1.0), dict(mean=float("nan"))])
def test_levels_that_cannot_be(bad):
    with pytest.raises(TrainingError):
        NoiseLevels(**bad)
