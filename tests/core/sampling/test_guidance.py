import math
from dataclasses import dataclass

import pytest
import torch

from mochi_core.errors import ScheduleError
from mochi_core.sampling.guidance import Guidance, checked, constant, parse_schedule


@dataclass(frozen=True)
class Number:
    """The least that can condition a prediction."""

    values: torch.Tensor

    def repeated(self, batch):
        return Number(self.values.expand(batch))

    def joined(self, other):
        return Number(torch.cat([self.values, other.values]))


POSITIVE, NEGATIVE = Number(torch.tensor([3.0])), Number(torch.tensor([1.0]))


class Model:
    """Predicts the conditioning's number times the latents, and remembers what it was asked."""

    def __init__(self, precision=torch.float32):
        self.precision, self.calls = precision, []

    def __call__(self, latents, sigma, conditioning):
        self.calls.append((len(latents), sigma.tolist(), conditioning.values.tolist()))
        return (latents * conditioning.values.view(-1, 1, 1, 1, 1)).to(self.precision)


def latents(batch=1):
    return torch.ones(batch, 2, 1, 2, 2)


@pytest.mark.parametrize("batched", (False, True))
@pytest.mark.parametrize("scale, expected", [(4.5, 1 + 4.5 * 2), (0.0, 1.0), (1.0, 3.0), (-1.0, -1.0)])
def test_steers_away_from_the_negative(batched, scale, expected):
    out = Guidance(Model(), POSITIVE, NEGATIVE, (scale,), batched)(latents(2), 0.5, 0)
    assert torch.equal(out, latents(2) * expected)


def test_one_after_the_other_or_both_at_once():
    one_by_one, batched = Model(), Model()
    Guidance(one_by_one, POSITIVE, NEGATIVE, (2.0,))(latents(2), 0.5, 0)
    Guidance(batched, POSITIVE, NEGATIVE, (2.0,), batched=True)(latents(2), 0.5, 0)
    assert one_by_one.calls == [(2, [0.5] * 2, [3.0, 3.0]), (2, [0.5] * 2, [1.0, 1.0])]
    assert batched.calls == [(4, [0.5] * 4, [3.0, 3.0, 1.0, 1.0])]


@pytest.mark.parametrize("batched", (False, True))
def test_a_scale_of_one_asks_once(batched):
    model = Model()
    Guidance(model, POSITIVE, NEGATIVE, (1.0,), batched)(latents(), 0.5, 0)
    assert model.calls == [(1, [0.5], [3.0])]


def test_each_step_has_its_scale():
    guidance = Guidance(Model(), POSITIVE, NEGATIVE, (1.0, 2.0, 0.0))
    assert [guidance(latents(), 0.5, step)[0, 0, 0, 0, 0].item() for step in range(3)] == [3.0, 5.0, 1.0]


def test_half_precision_predictions_are_combined_in_float32():
    positive, negative = Number(torch.tensor([1.0])), Number(torch.tensor([1 - 2**-8]))
    out = Guidance(Model(torch.bfloat16), positive, negative, (6.0,))(latents(), 0.5, 0)
    assert out.dtype == torch.float32
    assert torch.equal(out, latents() * (1 - 2**-8 + 6 * 2**-8))


def test_float64_stays():
    out = Guidance(Model(torch.float64), POSITIVE, NEGATIVE, (6.0,))(latents().double(), 0.1, 0)
    assert out.dtype == torch.float64


@pytest.mark.parametrize(
    "text, steps, scales",
    [
        ("6.0*2, 4.5*1", 3, (6.0, 6.0, 4.5)),
        ("6", 1, (6.0,)),
        ("6, 5\n4", 3, (6.0, 5.0, 4.0)),
        (" 1.5 * 2 ,\n\n .5x1, ", 3, (1.5, 1.5, 0.5)),
        ("-1, +2, 1e1, 2.", 4, (-1.0, 2.0, 10.0, 2.0)),
    ],
)
def test_schedule_as_text(text, steps, scales):
    assert parse_schedule(text, steps) == scales


@pytest.mark.parametrize("item", ("six", "6.0**3", "6*2.5", "6*", "*3", "nan", "inf", "1_0", "6;5", "6*-1", "6 5"))
def test_text_that_cannot_be_read(item):
    with pytest.raises(
        ScheduleError, match=r"^cfg_schedule has '.*': each item is a scale, or .*\. Write it as in 6\.0\*32"
    ):
        parse_schedule(f"6.0*2, {item}", 3)


@pytest.mark.parametrize("text, covered", [("6*3", 3), ("6*5", 5), ("", 0), ("6*0", 0), ("6*3, 5*2", 5)])
def test_text_for_another_number_of_steps(text, covered):
    message = (
        rf"^The CFG schedule covers {covered} steps: the noise schedule has 4, .*\. Make the counts add up to 4\.$"
    )
    with pytest.raises(ScheduleError, match=message):
        parse_schedule(text, 4)


def test_an_absurd_count_is_refused_before_it_fills_the_memory():
    with pytest.raises(ScheduleError, match="cfg_schedule has"):
        parse_schedule("6*99999999999", 4)


@pytest.mark.parametrize("scale", (math.nan, math.inf, -math.inf))
def test_scales_must_be_finite(scale):
    with pytest.raises(ScheduleError, match=rf"^The CFG scale of step 1 is {scale}: it must be a finite number\. Use"):
        checked([6.0, scale], 2)
    with pytest.raises(ScheduleError, match="The CFG scale of step 0"):
        constant(scale, 2)


def test_a_number_too_large_to_be_one():
    with pytest.raises(ScheduleError, match="The CFG scale of step 0 is inf"):
        parse_schedule("1e999", 1)


def test_constant():
    assert constant(4, 3) == (4.0, 4.0, 4.0)
