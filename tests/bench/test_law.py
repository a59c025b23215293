"""The fault figure's analytic law, against known numbers, exact enumeration, and the samplers themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from driftmax.bench.cases import law
from driftmax.bench.harness import Settings

law_zipf = law.zipf  # the tests below shrink the module's own


def test_the_known_table() -> None:
    """Zipf(1), K = 50257, N = 1024: entropy 5.63 in float32 instead of 7.566, TV 0.256; float64 is exact."""
    pi = law.zipf()
    assert law.entropy(pi) == pytest.approx(7.566, abs=5e-4)
    single = law.mask_inside(pi, 1 / 1024, law.EPS_FLOAT32)
    assert law.entropy(single) == pytest.approx(5.63, abs=5e-3)
    assert law.total_variation(single, pi) == pytest.approx(0.256, abs=6e-4)
    double = law.mask_inside(pi, 1 / 1024, law.EPS_FLOAT64)
    assert law.total_variation(double, pi) < 1e-8
    ours = law.mask_inside(pi, 1 / 1024, law.EPS_DRIFTMAX)
    assert law.total_variation(ours, pi) < 1e-11


def test_keeping_the_mask_out_heals_float32() -> None:
    pi = law.zipf()
    assert law.total_variation(law.mask_outside(pi, law.EPS_FLOAT32), pi) < 0.002


def _enumerate(pi: np.ndarray, delta: float, levels: int) -> np.ndarray:
    """The race by brute force over every pair of grid points; ties are shared.

    Uniforms are 1 - i/levels, i = 1..levels, equally likely; exponentials their negative logarithms.
    """
    weight = np.append(pi * delta, 1.0 - delta)
    wins = np.zeros(weight.size)
    u = 1.0 - np.arange(1, levels + 1) / levels
    noise = -np.log(np.maximum(u, 1e-300))
    for token in range(weight.size):
        beaten = np.ones(levels)
        for other in range(weight.size):
            if other != token:
                score = noise[:, None] / weight[token]
                rival = noise[None, :] / weight[other]
                beaten *= (rival > score).mean(1) + 0.5 * (rival == score).mean(1)
        wins[token] = beaten.mean()
    return wins[:-1] / wins[:-1].sum()


@pytest.mark.parametrize("levels", [2**9, 2**11])
def test_against_enumeration(levels: int) -> None:
    """Three tokens and a mask: the closed form is right to first order in delta, and far from pi."""
    pi, delta = np.array([0.9, 0.09, 0.01]), 1 / 64
    exact = _enumerate(pi, delta, levels)
    closed = law.mask_inside(pi, delta, 1.0 / levels)
    assert law.total_variation(exact, closed) < 0.01
    assert law.total_variation(exact, pi) > 0.015


def test_the_entropy_estimate_is_right_for_both_laws() -> None:
    """With all the mass counted (no chance involved) the bins cost under 0.02 nats."""
    pi = law.zipf()
    for drawn in (pi, law.mask_inside(pi, 1 / 1024, law.EPS_FLOAT32)):
        draws = np.repeat(np.arange(pi.size), np.round(drawn * 4e6).astype(int))
        assert law.measured_entropy(draws, pi).value == pytest.approx(law.entropy(drawn), abs=0.02)


def test_the_variation_estimate_sees_the_fault_and_only_the_fault() -> None:
    """4000 draws: 0.256 is 30 standard errors; an exact law stays within six (false alarm 2e-9)."""
    pi = law.zipf()
    faulty = law.mask_inside(pi, 1 / 1024, law.EPS_FLOAT32)
    generator = np.random.default_rng(0)
    for drawn, wanted in ((pi, 0.0), (faulty, law.total_variation(faulty, pi))):
        ranks = generator.choice(pi.size, 4000, p=drawn)
        estimate = law.measured_variation(ranks, pi, faulty > pi)
        assert abs(estimate.value - wanted) < 6 * estimate.error
        assert estimate.error < 0.01


HALF_TAIL = np.append(0.5, np.full(50_000, 0.5 / 50_000))  # one heavy token, and half the mass in a flat tail


def test_exact_samplers_draw_the_tail() -> None:
    """driftmax and torch in float64 at N = 16 stay within six standard errors (false alarm 2e-9).

    A law that loses a fifth of the tail, as float32's does at N = 256, would be eleven standard errors off at
    the thousand draws that driftmax gets here.
    """
    head = np.arange(HALF_TAIL.size) == 0
    for found in (
        law.driftmax_draws(HALF_TAIL, 16_384, 0, (16,)),
        law.torch_gumbel(HALF_TAIL, 1024, torch.float64, 0, (16,)),
    ):
        draws = found[16]
        assert draws.ranks.size == pytest.approx(draws.rows / 16, rel=0.5)
        estimate = law.measured_variation(draws.ranks, HALF_TAIL, head)
        assert abs(estimate.value) < 6 * estimate.error


@pytest.mark.slow
def test_float32_loses_the_tail_as_the_formula_says() -> None:
    """65536 rows of torch's float32 Gumbel-argmax at N = 256: about 180 tokens, a fifth of them wrong."""
    predicted = law.mask_inside(HALF_TAIL, 1 / 256, law.EPS_FLOAT32)
    draws = law.torch_gumbel(HALF_TAIL, 65_536, torch.float32, 0, (256,))[256]
    estimate = law.measured_variation(draws.ranks, HALF_TAIL, predicted > HALF_TAIL)
    assert estimate.value > 3 * estimate.error
    assert abs(estimate.value - law.total_variation(predicted, HALF_TAIL)) < 4 * estimate.error


def test_report_has_lines_dots_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(law, "VOCABULARY", 500)
    monkeypatch.setattr(law, "zipf", lambda: law_zipf(500))
    finding = law.report(Settings(quick=True, seed=1))
    assert finding.failure is None
    kinds = {(row["kind"], row["sampler"]) for row in finding.rows}
    assert kinds == {(kind, s) for kind in ("analytic", "measured") for s in ("fp32", "fp64", "driftmax")}
    assert "mask outside the categorical" in finding.text


def test_report_fails_on_a_wrong_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """driftmax replaced by a sampler that never draws the rarer half: more than six standard errors off."""
    monkeypatch.setattr(law, "zipf", lambda: law_zipf(500))

    def greedy(pi: np.ndarray, rows: int, seed: int, steps: tuple[int, ...]) -> dict[int, law.Draws]:
        return {n: law.Draws(np.zeros(2000, dtype=np.int64), rows) for n in steps}

    monkeypatch.setattr(law, "driftmax_draws", greedy)
    failure = law.report(Settings(quick=True)).failure
    assert failure is not None
    assert "driftmax" in failure
