"""Noise levels: 1.0 is pure noise, 0.0 is clean."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ScheduleError

RELEASED_STEPS = 64
RELEASED_THRESHOLD = 0.025


@dataclass(frozen=True)
class SigmaSchedule:
    """The levels that a sampler visits, one more than it takes steps.

    Raises `ScheduleError` unless they are finite, between 0 and 1, and fall at every step.
    """

    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.levels) < 2:
            raise ScheduleError(
                f"The schedule has {len(self.levels)} levels", "it takes two to make a step", "Give steps + 1 levels"
            )
        for index, level in enumerate(self.levels):
            if not (math.isfinite(level) and 0 <= level <= 1):
                raise ScheduleError(
                    f"Level {index} of the schedule is {level}",
                    "noise levels lie between 1 (pure noise) and 0 (clean)",
                    "Give levels in that range",
                )
            if index and level >= self.levels[index - 1]:
                raise ScheduleError(
                    f"Level {index} of the schedule is {level}, after {self.levels[index - 1]}",
                    "noise levels must fall at every step",
                    "Sort them from high to low, without repeats",
                )

    @property
    def steps(self) -> int:
        return len(self.levels) - 1


def linear_quadratic(
    steps: int, *, threshold: float = RELEASED_THRESHOLD, linear_steps: int | None = None
) -> SigmaSchedule:
    """Noise levels that creep, then fall: the schedule Mochi 1 was released with.

    The first `linear_steps` (half of the steps unless given) remove only `threshold` of the noise; the rest follow the
    quadratic whose slope matches at the join.

    Returns `steps + 1` levels from 1.0 (pure noise) to 0.0 (clean). Raises `ScheduleError` when `steps` is below 2,
    `linear_steps` is not from 1 to `steps - 1`, or `threshold` is not between 0 and 1.
    """
    if steps < 2:
        raise ScheduleError(f"steps is {steps}", "this schedule needs at least 2", "Use 2 or more; 64 as released")
    linear_steps = steps // 2 if linear_steps is None else linear_steps
    if not 1 <= linear_steps < steps:
        raise ScheduleError(
            f"linear_steps is {linear_steps} of {steps} steps",
            f"it must be from 1 to {steps - 1}",
            "Use half of the steps, as released",
        )
    if not 0 < threshold < 1:
        raise ScheduleError(f"threshold_noise is {threshold}", "it must be between 0 and 1", "Use 0.025, as released")
    slope = threshold / linear_steps
    quadratic_steps = steps - linear_steps
    curvature = (1 - threshold - slope * quadratic_steps) / quadratic_steps**2
    cleared = [slope * step for step in range(linear_steps)]
    cleared += [threshold + slope * step + curvature * step**2 for step in range(quadratic_steps)]
    return SigmaSchedule((*(1.0 - c for c in cleared), 0.0))


def last_part(schedule: SigmaSchedule, steps: int) -> SigmaSchedule:
    """The last `steps` steps: for starting from a video instead of from noise."""
    if not 1 <= steps <= schedule.steps:
        raise ScheduleError(f"steps is {steps}", f"it must be from 1 to {schedule.steps}", "Use a value in that range")
    return SigmaSchedule(schedule.levels[-steps - 1 :])


def from_levels(levels: Sequence[float]) -> SigmaSchedule:
    """A custom schedule. Raises `ScheduleError` as `SigmaSchedule` does."""
    return SigmaSchedule(tuple(map(float, levels)))
