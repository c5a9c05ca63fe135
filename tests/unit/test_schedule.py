"""The learning rate's course against values worked out by hand."""

import pytest

from raysd.config.training import OptimSpec
from raysd.train.schedule import factor


def course(total: int, **fields: object) -> list[float]:
    spec = OptimSpec(steps=total, **fields)
    return [factor(step, total, spec) for step in range(total)]


def test_constant():
    assert course(3) == [1.0, 1.0, 1.0]


def test_warmup_rises_evenly_and_wastes_no_step():
    assert course(5, warmup=3) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_linear_falls_to_zero_one_step_after_the_last():
    assert course(4, schedule="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert course(5, schedule="linear", warmup=1) == pytest.approx([0.5, 1.0, 0.75, 0.5, 0.25])


def test_cosine():
    half = 0.5**0.5
    assert course(4, schedule="cosine") == pytest.approx([1.0, (1 + half) / 2, 0.5, (1 - half) / 2])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_every_step_moves_the_weights(schedule: str):
    for warmup in (0, 1, 7, 20):
        assert all(0 < value <= 1 for value in course(12, schedule=schedule, warmup=warmup))


def test_beyond_the_last_step_nothing_turns_round():
    spec = OptimSpec(steps=10, schedule="cosine")
    assert factor(10, 10, spec) == factor(15, 10, spec) == pytest.approx(0.0)
