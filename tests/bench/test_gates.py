"""The gates let right samplers pass and refuse wrong ones.

A chi-square gate alarms falsely once in 1e9; the tests below use fixed seeds, so they never do. Power: each
faulty sampler here is one that benchmarks have been won with.
"""

from __future__ import annotations

import pytest
import torch
from driftmax.bench import gates
from driftmax.bench.harness import GateFailed

ZIPF = torch.arange(1, 2001).double().reciprocal()
LAW = ZIPF / ZIPF.sum()


def _multinomial(law: torch.Tensor, draws: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(law, draws, replacement=True, generator=generator)


@pytest.mark.parametrize("seed", range(5))
def test_exact_draws_pass(seed: int) -> None:
    gates.check_law(_multinomial(LAW, 4096, seed), LAW, "exact")


def test_small_vocabularies_and_single_tokens_pass() -> None:
    gates.check_law(torch.zeros(50, dtype=torch.int64), torch.tensor([1.0, 0.0]).double(), "certain")
    law = torch.tensor([0.5, 0.25, 0.25]).double()
    gates.check_law(_multinomial(law, 1000), law, "three tokens")


@pytest.mark.parametrize("temperature", [0.8, 1.25])
def test_a_wrong_temperature_is_refused(temperature: float) -> None:
    wrong = torch.softmax(LAW.log() / temperature, 0)
    with pytest.raises(GateFailed, match="do not follow"):
        gates.check_law(_multinomial(wrong, 4096), LAW, "temperature")


def test_a_dropped_tail_is_refused() -> None:
    cut = LAW.clone()
    cut[500:] = 0.0  # 17 % of the mass
    with pytest.raises(GateFailed, match="do not follow"):
        gates.check_law(_multinomial(cut / cut.sum(), 4096), LAW, "tail")


def test_greedy_choice_is_refused() -> None:
    with pytest.raises(GateFailed, match="do not follow"):
        gates.check_law(torch.zeros(4096, dtype=torch.int64), LAW, "greedy")


def test_impossible_and_out_of_range_tokens_are_refused() -> None:
    law = torch.tensor([0.5, 0.5, 0.0]).double()
    with pytest.raises(GateFailed, match="probability zero"):
        gates.check_law(torch.tensor([0, 1, 2]), law, "zero")
    with pytest.raises(GateFailed, match="out of range"):
        gates.check_law(torch.tensor([0, 3]), law, "range")


def test_chi_square_score_is_about_standard_normal() -> None:
    """Mean and spread over 400 exact experiments: within five standard errors of 0 and 1."""
    law = torch.full((20,), 0.05, dtype=torch.float64)
    scores = torch.tensor(
        [
            gates.chi_square_excess(
                torch.bincount(_multinomial(law, 2000, seed), minlength=20).double(), law * 2000
            )
            for seed in range(400)
        ]
    )
    assert abs(float(scores.mean())) < 0.25
    assert abs(float(scores.std()) - 1.0) < 0.18


def test_differing_tokens_are_counted() -> None:
    one, other = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4])
    gates.check_equal_tokens(one, other, 1, "tokens")
    with pytest.raises(GateFailed, match="1 of 3"):
        gates.check_equal_tokens(one, other, 0, "tokens")


def test_numbers_off_and_nan_are_refused() -> None:
    gates.check_close(torch.tensor([1.0]), torch.tensor([1.0 + 1e-6]), 1e-5, "close")
    for wrong in (1.1, float("nan")):
        with pytest.raises(GateFailed, match="off by"):
            gates.check_close(torch.tensor([wrong]), torch.tensor([1.0]), 1e-5, "off")


def test_moments_of_the_right_and_the_wrong_distribution() -> None:
    draws = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    gates.check_moments(draws, 0.0, 1.0, 3.0, "normal")
    for wrong in (draws + 0.05, draws * 1.05):
        with pytest.raises(GateFailed, match="standard errors"):
            gates.check_moments(wrong, 0.0, 1.0, 3.0, "normal")
