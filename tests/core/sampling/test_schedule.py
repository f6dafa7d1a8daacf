import math

import pytest

from mochi_core.errors import ScheduleError
from mochi_core.sampling.schedule import SigmaSchedule, from_levels, last_part, linear_quadratic


@pytest.mark.parametrize("steps", (2, 3, 8, 64, 1000))
def test_linear_quadratic_falls_from_noise_to_clean(steps):
    schedule = linear_quadratic(steps)
    assert schedule.steps == steps and len(schedule.levels) == steps + 1
    assert (schedule.levels[0], schedule.levels[-1]) == (1.0, 0.0)


def test_the_first_half_removes_only_the_threshold():
    levels = linear_quadratic(8, threshold=0.1).levels
    assert levels[:5] == pytest.approx((1.0, 0.975, 0.95, 0.925, 0.9))


@pytest.mark.parametrize("steps", (1, 0, -3))
def test_too_few_steps(steps):
    with pytest.raises(ScheduleError, match=rf"^steps is {steps}: this schedule needs at least 2\. Use 2 or more"):
        linear_quadratic(steps)


@pytest.mark.parametrize("linear_steps", (0, 6, 7, -1))
def test_both_parts_need_a_step(linear_steps):
    message = rf"^linear_steps is {linear_steps} of 6 steps: it must be from 1 to 5\. Use half of the steps"
    with pytest.raises(ScheduleError, match=message):
        linear_quadratic(6, linear_steps=linear_steps)


@pytest.mark.parametrize("threshold", (0, 1, -0.1, 2, math.nan))
def test_threshold(threshold):
    with pytest.raises(
        ScheduleError, match=rf"^threshold_noise is {threshold}: it must be between 0 and 1\. Use 0.025"
    ):
        linear_quadratic(8, threshold=threshold)


def test_a_threshold_that_leaves_the_range():
    with pytest.raises(ScheduleError):
        linear_quadratic(10, threshold=0.9, linear_steps=1)


@pytest.mark.parametrize("levels", [(1.0, 0.0), (1, 0.5, 0), (0.7, 0.2), (1.0, 0.999, 0.5)])
def test_custom_levels(levels):
    assert from_levels(list(levels)).levels == levels


@pytest.mark.parametrize(
    "levels, message",
    [
        ([], r"The schedule has 0 levels: it takes two to make a step\. Give steps \+ 1 levels"),
        ([1.0], r"The schedule has 1 levels"),
        (
            [1.0, 0.5, 0.5],
            r"Level 2 of the schedule is 0.5, after 0.5: noise levels must fall at every step\. Sort them",
        ),
        ([0.5, 0.7, 0.0], r"Level 1 of the schedule is 0.7, after 0.5"),
        ([1.0, math.nan, 0.0], r"Level 1 of the schedule is nan: noise levels lie between 1 .* and 0 .*\. Give levels"),
        ([math.inf, 0.5], r"Level 0 of the schedule is inf"),
        ([1.5, 0.0], r"Level 0 of the schedule is 1.5"),
        ([1.0, -0.1], r"Level 1 of the schedule is -0.1"),
        ([1000.0, 500.0, 0.0], r"Level 0 of the schedule is 1000.0"),
    ],
)
def test_levels_no_sampler_can_follow(levels, message):
    with pytest.raises(ScheduleError, match=f"^{message}"):
        from_levels(levels)


def test_a_schedule_cannot_be_changed():
    with pytest.raises(AttributeError):
        SigmaSchedule((1.0, 0.0)).levels = (1.0, 0.5)


@pytest.mark.parametrize("steps", (1, 3, 8))
def test_last_part(steps):
    schedule = linear_quadratic(8)
    part = last_part(schedule, steps)
    assert part.steps == steps and part.levels == schedule.levels[8 - steps :]


@pytest.mark.parametrize("steps", (0, 9, -1))
def test_a_part_longer_than_the_whole(steps):
    with pytest.raises(ScheduleError, match=rf"^steps is {steps}: it must be from 1 to 8\. Use a value in that range"):
        last_part(linear_quadratic(8), steps)
