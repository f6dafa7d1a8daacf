import math

import pytest
import torch

from mochi_core.errors import LatentsError
from mochi_core.sampling.samplers import draw_noise, euler
from mochi_core.sampling.schedule import from_levels, linear_quadratic
from mochi_core.shapes import LatentSize

SIZE = LatentSize(2, 3, 4)
CLEAN = torch.randn(1, 12, 2, 3, 4, generator=torch.Generator().manual_seed(9))


def straight_to_clean(noise):
    """The direction of a model that knows the answer: clean minus noise, at every level."""
    return lambda latents, sigma, step: (CLEAN - noise).to(latents)


class TestNoise:
    def test_shape_and_distribution(self):
        noise = draw_noise(LatentSize(4, 30, 40), 12, 0, batch=2)
        assert noise.shape == (2, 12, 4, 30, 40) and noise.dtype == torch.float32
        assert abs(noise.mean().item()) < 0.01 and noise.std().item() == pytest.approx(1, abs=0.01)

    def test_the_seed_decides(self):
        assert torch.equal(draw_noise(SIZE, 12, 7), draw_noise(SIZE, 12, 7))
        assert not torch.equal(draw_noise(SIZE, 12, 7), draw_noise(SIZE, 12, 8))

    def test_it_is_that_of_torchs_generator(self):
        expected = torch.randn(1, 12, 2, 3, 4, generator=torch.Generator().manual_seed(7))
        assert torch.equal(draw_noise(SIZE, 12, 7), expected)

    def test_the_global_generator_is_left_alone(self):
        state = torch.random.get_rng_state()
        draw_noise(SIZE, 12, 7)
        assert torch.equal(torch.random.get_rng_state(), state)

    @pytest.mark.parametrize("seed", (0, 2**32, 2**63, 2**64 - 1))
    def test_any_64_bit_seed(self, seed):
        assert draw_noise(SIZE, 12, seed).isfinite().all()


class TestEuler:
    @pytest.mark.parametrize("steps", (2, 5, 64))
    def test_a_straight_path_arrives(self, steps):
        noise = draw_noise(SIZE, 12, 0)
        out = euler(straight_to_clean(noise), noise, linear_quadratic(steps))
        torch.testing.assert_close(out, CLEAN, rtol=0, atol=1e-5)

    def test_starting_and_stopping_midway(self):
        noise = draw_noise(SIZE, 12, 0)
        mix = 0.25 * CLEAN + 0.75 * noise
        out = euler(straight_to_clean(noise), mix, from_levels([0.75, 0.5]))
        torch.testing.assert_close(out, 0.5 * CLEAN + 0.5 * noise, rtol=0, atol=1e-5)

    def test_each_step_is_told_its_level_and_number(self):
        seen = []

        def direction(latents, sigma, step):
            seen.append((sigma, step))
            return torch.zeros_like(latents)

        euler(direction, CLEAN, from_levels([1.0, 0.5, 0.25]))
        assert seen == [(1.0, 0), (0.5, 1)]

    def test_it_works_in_float32_at_least(self):
        def direction(latents, sigma, step):
            assert latents.dtype == torch.float32
            return torch.zeros_like(latents)

        assert euler(direction, CLEAN.bfloat16(), from_levels([1.0, 0.0])).dtype == torch.float32
        out = euler(straight_to_clean(CLEAN), CLEAN.double(), from_levels([1.0, 0.0]))
        assert out.dtype == torch.float64

    def test_the_noise_is_left_alone(self):
        noise = draw_noise(SIZE, 12, 0)
        euler(straight_to_clean(noise), noise, linear_quadratic(4))
        assert torch.equal(noise, draw_noise(SIZE, 12, 0))

    def test_progress_sees_the_clean_video_expected_so_far(self):
        noise, reports = draw_noise(SIZE, 12, 0), []
        euler(straight_to_clean(noise), noise, linear_quadratic(3), lambda *report: reports.append(report))
        assert [(step, total) for step, total, _ in reports] == [(1, 3), (2, 3), (3, 3)]
        for *_, preview in reports:
            torch.testing.assert_close(preview, CLEAN, rtol=0, atol=1e-5)

    def test_progress_cancels_by_raising(self):
        steps = []

        def direction(latents, sigma, step):
            steps.append(step)
            return latents

        def cancel(step, total, preview):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            euler(direction, CLEAN, linear_quadratic(8), cancel)
        assert steps == [0]

    @pytest.mark.parametrize("bad", (math.nan, math.inf))
    def test_latents_that_are_no_numbers(self, bad):
        def direction(*_):
            raise AssertionError("the model ran")

        latents = CLEAN.clone()
        latents[0, 0, 0, 0, :2] = bad
        with pytest.raises(LatentsError, match=r"^The latents to start from: 2 of 288 values are NaN or infinite: "):
            euler(direction, latents, linear_quadratic(4))

    def test_a_model_that_overflows(self):
        with pytest.raises(LatentsError, match=r"^The sampled latents: 288 of 288 values are NaN or infinite"):
            euler(lambda latents, *_: latents * math.nan, CLEAN, linear_quadratic(2))
