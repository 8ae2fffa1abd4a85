"""Scheduled sampling: which steps are grounded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gligen_xl.pipelines.schedule import GroundingSchedule


def scales(beta, steps):
    schedule = GroundingSchedule.parse(beta)
    return [schedule.scale(step, steps) for step in range(steps)]


def test_a_share_is_of_the_first_steps():
    assert scales(0.3, 10) == [1.0] * 3 + [0.0] * 7
    assert scales(0, 4) == [0.0] * 4
    assert scales(1, 4) == [1.0] * 4


def test_a_triple_fades():
    assert scales((0.2, 0.4, 0.4), 10) == pytest.approx([1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0])


@given(st.floats(0, 1), st.integers(1, 200))
def test_a_share_on_is_the_triple_without_decay(beta, steps):
    assert scales(beta, steps) == scales((beta, 0.0, 1 - beta), steps)
    assert sum(scales(beta, steps)) == pytest.approx(beta * steps, abs=1)


@pytest.mark.parametrize(
    "beta", [-0.1, 1.5, "0.3", (0.5, 0.5), (0.5, 0.2, 0.2), (1.5, -0.5, 0.0), float("nan"), None, ["a", 0, 1]]
)
def test_anything_else_is_refused(beta):
    with pytest.raises(ValueError, match="gligen_scheduled_sampling_beta"):
        GroundingSchedule.parse(beta)
