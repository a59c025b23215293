"""Schedules: inverses, derivatives by finite differences, identities, and precision near t = 0."""

from __future__ import annotations

import math

import pytest
import torch
from driftmax.discrete import Cosine, Geometric, Linear, LogLinear, Polynomial

SCHEDULES = [Linear(), LogLinear(), LogLinear(0.1), Cosine(), Geometric(), Polynomial(), Polynomial(0.5)]
TIMES = torch.linspace(0.001, 0.999, 997, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
class TestEverySchedule:
    def test_alpha_falls_from_almost_one(self, schedule):
        alpha = schedule.alpha(torch.linspace(0, 1, 101, dtype=torch.float64))
        assert alpha.dtype == torch.float64
        assert bool((alpha.diff() < 0).all())
        assert 1 - 1.1e-4 <= float(alpha[0]) <= 1
        assert 0 <= float(alpha[-1]) <= 0.11

    def test_derivative(self, schedule):
        h = 1e-6
        slope = (schedule.alpha(TIMES + h / 2) - schedule.alpha(TIMES - h / 2)) / h
        torch.testing.assert_close(schedule.alpha_prime(TIMES), slope, rtol=1e-6, atol=1e-7)

    def test_sigma_is_the_rate_of_the_total_noise(self, schedule):
        h = 1e-6
        slope = (schedule.sigma_bar(TIMES + h / 2) - schedule.sigma_bar(TIMES - h / 2)) / h
        torch.testing.assert_close(schedule.sigma(TIMES), slope, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(
            schedule.sigma_bar(TIMES), -schedule.alpha(TIMES).log(), rtol=1e-9, atol=1e-15
        )

    def test_inverse(self, schedule):
        torch.testing.assert_close(schedule.inverse(schedule.alpha(TIMES)), TIMES, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            schedule.time_of_masked(schedule.masked(TIMES)), TIMES, rtol=1e-9, atol=1e-9
        )

    def test_unmask_probability(self, schedule):
        s, t = TIMES[:-1], TIMES[1:]
        wanted = (schedule.alpha(s) - schedule.alpha(t)) / (1 - schedule.alpha(t))
        torch.testing.assert_close(schedule.unmask_probability(s, t), wanted, rtol=1e-8, atol=1e-12)

    def test_steps_multiply(self, schedule):
        """Staying masked from 1 to 0.25 is staying masked to 0.5 and from there."""
        stay = [
            1 - float(schedule.unmask_probability(s, t)) for s, t in ((0.25, 1.0), (0.5, 1.0), (0.25, 0.5))
        ]
        assert math.isclose(stay[0], stay[1] * stay[2], rel_tol=1e-12)

    def test_shapes_and_floats(self, schedule):
        assert schedule.alpha(0.5).shape == ()
        assert schedule.alpha(torch.full((2, 3), 0.5)).shape == (2, 3)

    def test_times_out_of_range(self, schedule):
        with pytest.raises(ValueError, match="in \\[0, 1\\]"):
            schedule.alpha(1.5)


def test_small_times_keep_their_precision():
    """1 - alpha by subtraction would be 0 or wrong in every digit here."""
    assert float(Cosine().masked(1e-20)) == pytest.approx(math.pi / 2 * 1e-20, rel=1e-12)
    assert float(Geometric(1e-18, 1.0).masked(0.0)) == pytest.approx(1e-18, rel=1e-12)


def test_closed_forms():
    assert float(Linear().alpha(0.3)) == pytest.approx(0.7)
    assert float(LogLinear().sigma_bar(0.5)) == pytest.approx(-math.log1p(-0.999 * 0.5))
    assert float(Cosine().alpha(0.5)) == pytest.approx(1 - math.cos(math.pi / 4))
    assert float(Polynomial(3).alpha(0.5)) == pytest.approx(0.875)
    assert float(Geometric(1e-3, 10).sigma_bar(1.0)) == pytest.approx(10)


@pytest.mark.parametrize(
    "make",
    [lambda: LogLinear(1.0), lambda: Polynomial(0.0), lambda: Geometric(2.0, 1.0), lambda: Linear().grid(0)],
)
def test_bad_settings(make):
    with pytest.raises(ValueError, match=r"must|need"):
        make()
