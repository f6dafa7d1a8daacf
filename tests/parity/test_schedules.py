"""The linear-quadratic schedule against the reference's tables."""

import pytest

from mochi_core.errors import ScheduleError
from mochi_core.sampling.schedule import linear_quadratic


def test_every_table_of_the_reference(goldens):
    tables = [table for table in goldens.json("schedules") if "sigmas" in table]
    assert len(tables) == 15
    for table in tables:
        schedule = linear_quadratic(
            table["num_steps"], threshold=table["threshold_noise"], linear_steps=table["linear_steps"]
        )
        assert schedule.levels == pytest.approx(table["sigmas"], abs=1e-12)
        assert schedule.levels[-1] == 0


def test_where_the_reference_divides_by_zero_ours_explains(goldens):
    tables = [table for table in goldens.json("schedules") if "error" in table]
    assert len(tables) == 2
    for table in tables:
        with pytest.raises(ScheduleError):
            linear_quadratic(table["num_steps"], threshold=table["threshold_noise"], linear_steps=table["linear_steps"])
