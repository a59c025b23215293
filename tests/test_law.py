"""The law of the noise and of the races made of it, computed from the words instead of sampled.

Backends have the reference's noise to the bit (tests/ops/test_fill.py, tests/ops/test_gumbel_topk.py).
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from driftmax.reference.fill import exponential, gumbel

INF = math.inf


def test_exponential_follows_its_law_in_both_tails():
    """E(U) = -log(1 - U) at U = (word + 1/2) / 2^64 to 1e-14 relative, for words over the whole range and at
    its ends.
    """
    near = [0, 1, 2, 3, 10, 1000]
    branch = 0x4AFB0CCC
    hi = [*near, *range(5, 2**32, 2**32 // 300), *(2**k for k in range(32)), *(2**32 - 1 - k for k in near)]
    hi += [branch - 1, branch, branch + 1, 2**32 - 2**20, 2**31]
    pairs = [(h, lo) for h in hi for lo in (0, 1, 2**31, 2**32 - 1)]
    got = exponential(*torch.tensor(pairs).unbind(1)).tolist()
    with decimal.localcontext(prec=40):
        for (h, lo), value in zip(pairs, got, strict=True):
            u = (decimal.Decimal(h * 2**32 + lo) + decimal.Decimal("0.5")) / 2**64
            # log1p by its series where 1 - u cannot be written with 40 digits' worth of u
            exact = -(1 - u).ln() if u > decimal.Decimal(10) ** -15 else u + u * u / 2 + u * u * u / 3
            assert abs(decimal.Decimal(value) - exact) <= decimal.Decimal("1e-14") * exact


def test_noise_ceiling():
    """The largest Gumbel is above 44 (24-bit uniforms end at 16.64) and the smallest has E near 45."""
    low, top = torch.tensor([0]), torch.tensor([2**32 - 1])
    assert 44 < float(gumbel(low, low)) < 45.1
    assert 44 < float(exponential(top, top)) < 45.1


def race_law(logits: list[float], quantile: Callable[..., torch.Tensor]) -> list[float]:
    """P(argmax = v) of a race with E = `quantile(word)`, by integrating over 64-bit words with second order.

    Nodes lie evenly in log E, so that every probability comes out with a small *relative* error, however rare
    the token.
    """
    g = np.linspace(-3.7, 44.3, 24001)
    words = sorted({int(2.0**64 * -math.expm1(-math.exp(-x))) if x > -3.7 else 2**64 - 1 for x in g})
    words = [w for w in words if w < 2**64]
    pairs = torch.tensor([[w >> 32, w & 0xFFFFFFFF] for w in words])
    log_e = np.log(quantile(*pairs.unbind(1)).numpy())
    log_below = np.array([math.log((w + 1) / 2**64) for w in words])  # log P(E <= e), exact
    law = []
    for v, y in enumerate(logits):
        survival = np.ones(len(words))
        for w, other in enumerate(logits):
            if w != v:
                below = np.interp(log_e + other - y, log_e, log_below, left=-INF, right=0.0)
                survival *= -np.expm1(below)
        mass = np.diff(np.exp(log_below), prepend=0.0)
        middle = np.concatenate((survival[:1], (survival[1:] + survival[:-1]) / 2))
        law.append(float((mass * middle).sum()))
    return law


def quantile_of_fp32(hi: torch.Tensor, lo: torch.Tensor) -> torch.Tensor:
    """E of the faulty sampler: U on the 24-bit grid."""
    u = (1.0 - (hi >> 8).double() * 2.0**-24).clamp(max=1 - 2.0**-24)
    return -u.log()


@pytest.mark.parametrize(
    "logits", [[0.0, 0.0], [0.0, -5.0], [0.0, -20.0, -33.0], [0.0, -1.0, -2.0, -36.0], [3.0, 3.0, -25.0]]
)
def test_reference_race_has_the_softmax_law(logits):
    """Every probability to 1e-3 of itself, down to e^-36; with fp32 noise the rare tokens are off by far
    more.
    """
    exact = np.exp(logits) / np.exp(logits).sum()
    assert race_law(logits, exponential) == pytest.approx(exact.tolist(), rel=1e-3)
    if min(logits) <= -20:
        faulty = race_law(logits, quantile_of_fp32)
        assert abs(faulty[-1] / exact[-1] - 1) > 0.3
