"""Correctness gates: what a sampler has to show before its time is taken.

The chi-square gates have a false-alarm rate of 1e-9 each and, with 4096 draws in up to 32 groups, see a law
that is off by a total variation of 0.1 with probability above 0.999 (with the 1024 draws of a quick run: of
0.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .harness import GateFailed

FALSE_ALARM_SIGMA = 6.0  # one-sided normal quantile of 1e-9
GROUPS = 32


def chi_square_excess(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Wilson-Hilferty normal score of Pearson's statistic (about standard normal when the law is right).

    Parameters
    ----------
    counts, expected : tensors of float64, shape [groups]
        Observed and expected counts; every expected count should be at least about 10.
    """
    freedom = counts.numel() - 1
    if freedom < 1:
        return 0.0
    statistic = float(((counts - expected) ** 2 / expected).sum())
    spread = 2.0 / (9.0 * freedom)
    return float(((statistic / freedom) ** (1.0 / 3.0) - (1.0 - spread)) / math.sqrt(spread))


def _groups(probability: torch.Tensor, groups: int) -> torch.Tensor:
    """Group index per token: tokens in decreasing probability, cut into runs of about equal mass."""
    order = torch.argsort(probability, descending=True, stable=True)
    before = torch.cumsum(probability[order], 0) - probability[order]
    index = torch.clamp((before * groups).long(), max=groups - 1)
    index = torch.unique_consecutive(index, return_inverse=True)[1]  # a heavy token may swallow several runs
    result = torch.empty_like(index)
    result[order] = index
    return result


def check_law(tokens: torch.Tensor, probability: torch.Tensor, what: str) -> None:
    """Refuse draws that do not follow ``probability``.

    Parameters
    ----------
    tokens : int64 tensor
        Independent draws.
    probability : float64 tensor, shape [V]
        The law they should follow.
    what : str
        Named in the error.

    Raises
    ------
    GateFailed
        For a token out of range, a token of probability zero, or a chi-square score beyond six sigma.
    """
    tokens = tokens.reshape(-1).cpu()
    probability = probability.double().cpu()
    if tokens.numel() and not (int(tokens.min()) >= 0 and int(tokens.max()) < probability.numel()):
        raise GateFailed(f"{what}: token out of range")
    if bool((probability[tokens] == 0).any()):
        raise GateFailed(f"{what}: drew a token of probability zero")
    groups = _groups(probability, min(GROUPS, max(1, tokens.numel() // 32)))
    count = int(groups.max()) + 1
    expected = torch.zeros(count, dtype=torch.float64).index_add_(0, groups, probability) * tokens.numel()
    observed = torch.bincount(groups[tokens], minlength=count).double()
    merged = expected >= 5  # groups too thin for a chi-square are pooled into one
    if not bool(merged.all()):
        pool = ~merged
        observed = torch.cat([observed[merged], observed[pool].sum()[None]])
        expected = torch.cat([expected[merged], expected[pool].sum().clamp(min=1e-300)[None]])
        if float(expected[-1]) < 5:
            observed = torch.cat([observed[:-2], observed[-2:].sum()[None]])
            expected = torch.cat([expected[:-2], expected[-2:].sum()[None]])
    score = chi_square_excess(observed, expected)
    if not score < FALSE_ALARM_SIGMA:
        raise GateFailed(f"{what}: the draws do not follow the law (chi-square score {score:.1f} sigma)")


def check_equal_tokens(got: torch.Tensor, wanted: torch.Tensor, allowed: int, what: str) -> None:
    """Refuse more than ``allowed`` tokens that differ from the reference backend's.

    Raises
    ------
    GateFailed
        With the count of differing tokens.
    """
    if got.shape != wanted.shape:
        raise GateFailed(f"{what}: shape {tuple(got.shape)}, the reference has {tuple(wanted.shape)}")
    different = int((got.cpu() != wanted.cpu()).sum())
    if different > allowed:
        raise GateFailed(f"{what}: {different} of {got.numel()} tokens differ from the reference")


def check_close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float, what: str) -> None:
    """Refuse numbers further than ``tolerance * (1 + |wanted|)`` from ``wanted``, and NaN.

    Raises
    ------
    GateFailed
        With the largest difference.
    """
    wanted = wanted.double().cpu()
    error = (got.double().cpu() - wanted).abs() / (1.0 + wanted.abs())
    if not bool((error <= tolerance).all()):
        raise GateFailed(f"{what}: off by {float(error.max()):.3g}, allowed {tolerance:.3g}")


def check_moments(draws: torch.Tensor, mean: float, variance: float, kurtosis: float, what: str) -> None:
    """Refuse a fill whose mean or variance is more than six standard errors off.

    Parameters
    ----------
    draws : tensor
        The fill.
    mean, variance, kurtosis : float
        Of the named distribution; ``kurtosis`` is the fourth central moment over the squared variance.
    """
    count = draws.numel()
    values = draws.double()
    mean_error = abs(float(values.mean()) - mean) / math.sqrt(variance / count)
    variance_error = abs(float(values.var()) - variance) / (variance * math.sqrt((kurtosis - 1.0) / count))
    if not (mean_error < FALSE_ALARM_SIGMA and variance_error < FALSE_ALARM_SIGMA):
        raise GateFailed(
            f"{what}: mean {mean_error:.1f} and variance {variance_error:.1f} standard errors off"
        )


def law_gate(
    draw: Callable[[torch.Tensor], torch.Tensor],
    logits_row: torch.Tensor,
    probability: torch.Tensor,
    what: str,
    draws: int,
) -> None:
    """Draw many times from one row (expanded without a copy) and hold the tokens to ``probability``."""
    check_law(draw(logits_row.expand(draws, -1)), probability, what)
