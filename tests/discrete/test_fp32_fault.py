"""The fp32 fault through whole runs of a sampler: what n steps of float32 Gumbel noise do to the tokens.

The law at every position is one frequent token, which has half of the mass, and many rare ones, which share
the other half evenly. A plain ancestral loop races tokens and mask in one categorical; where its uniforms lie
on a grid of 2**-24 the rare tokens lose races that they should win, and come out less often (Zheng et al.,
2024). driftmax draws the same runs with the share they should have.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from driftmax.bench.cases.law import EPS_FLOAT32, EPS_FLOAT64, mask_inside
from driftmax.discrete import Ancestral, FirstHitting, Linear, Plan, sample

RARE = 50256
SIGMAS = 5.0  # false alarm 6e-7 each


def law(rare: int) -> np.ndarray:
    return np.append(0.5, np.full(rare, 0.5 / rare))


def predicted_share(rare: int, steps: int, eps: float) -> float:
    """Share of rare tokens after a whole run: the law of each step's race, weighted by what it unmasks.

    The law is `mask_inside` of the bench, of which all rare tokens have the same share.
    """
    pi, many = law(rare)[:2], np.array([1.0, rare])
    masked, share = 1.0, 0.0
    for k in range(steps - 1):
        delta = 1.0 / (steps - k)
        a = eps * (1.0 - delta) / (pi * delta)
        unmasked = masked * delta * many * pi * a / np.expm1(a)
        share += unmasked[1]
        masked -= unmasked.sum()
    return float(share + masked * 0.5)  # the last step has no mask in the race


def gumbel(uniform: np.ndarray, dtype: type) -> np.ndarray:
    """As samplers write it."""
    with np.errstate(divide="ignore"):
        return -np.log(-np.log(uniform.astype(dtype)))


def plain_loop_share(rare: int, steps: int, positions: int, bits: int, seed: int) -> float:
    """Share of rare tokens when the plain loop runs on uniforms of so many bits.

    The rare tokens have one logit, so the best of them has the largest of their uniforms: `rare` draws of the
    grid have the largest floor(2**bits U**(1 / rare)) / 2**bits, which is one draw instead of 50256.
    """
    generator = np.random.default_rng(seed)
    dtype = np.float32 if bits == 24 else np.float64
    log_pi = np.log(law(rare)[:2]).astype(dtype)
    seen = np.zeros(2)
    for k in range(steps):
        count = positions - int(seen.sum())
        if count == 0:
            break
        delta = 1.0 / (steps - k)
        u = generator.random((3, count))
        u[1] **= 1.0 / rare
        if bits < 53:
            u = np.floor(u * 2.0**bits) / 2.0**bits
        frequent, best_rare, mask = gumbel(u, dtype)
        tokens = np.maximum(frequent + log_pi[0], best_rare + log_pi[1])
        if delta < 1.0:
            out = tokens > mask + dtype(math.log((1.0 - delta) / delta))
        else:
            out = np.ones(count, dtype=bool)
        is_rare = (best_rare + log_pi[1] > frequent + log_pi[0])[out]
        seen += [np.count_nonzero(~is_rare), np.count_nonzero(is_rare)]
    return float(seen[1] / positions)


def bound(positions: int) -> float:
    return SIGMAS * 0.5 / math.sqrt(positions)


class TestPlainLoop:
    positions = 40_000

    @pytest.mark.parametrize("steps", [64, 256, 1024])
    def test_float32_loses_rare_tokens_as_predicted(self, steps):
        share = plain_loop_share(RARE, steps, self.positions, 24, seed=steps)
        assert share == pytest.approx(predicted_share(RARE, steps, EPS_FLOAT32), abs=bound(self.positions))
        assert share < 0.5 - bound(self.positions)

    def test_more_steps_lose_more(self):
        shares = [predicted_share(RARE, steps, EPS_FLOAT32) for steps in (64, 256, 1024, 4096)]
        assert all(late < early - 0.02 for early, late in pairwise(shares))

    def test_the_prediction_is_the_benchs_law(self):
        """Two steps, of which the first races at delta = 1/2."""
        pi, eps = law(100), 1e-4
        a = eps / pi
        unmasked = 0.5 * float((pi * a / np.expm1(a)).sum())
        share = unmasked * float(mask_inside(pi, 0.5, eps)[1:].sum()) + (1 - unmasked) * 0.5
        assert predicted_share(100, 2, eps) == pytest.approx(share, rel=1e-9)

    def test_float64_does_not(self):
        share = plain_loop_share(RARE, 256, self.positions, 53, seed=1)
        assert share == pytest.approx(0.5, abs=bound(self.positions))
        assert predicted_share(RARE, 4096, EPS_FLOAT64) == pytest.approx(0.5, abs=1e-6)

    @pytest.mark.slow
    def test_torch_as_usually_written(self):
        """The literal loop, every token with its noise."""
        rare, steps, positions = RARE, 1024, 128
        logits = torch.from_numpy(np.log(law(rare))).float()
        generator = torch.Generator().manual_seed(0)
        tokens = torch.full((positions,), rare + 1)
        for k in range(steps):
            (where,) = (tokens == rare + 1).nonzero(as_tuple=True)
            delta = 1.0 / (steps - k)
            u = torch.rand(len(where), rare + 2, generator=generator)
            race = u.log_().neg_().log_().neg_()
            race[:, :-1] += logits
            race[:, -1] += math.log((1.0 - delta) / delta) if delta < 1.0 else -torch.inf
            tokens[where] = race.argmax(-1)
        share = float((tokens > 0).double().mean())
        predicted = predicted_share(rare, steps, EPS_FLOAT32)
        assert predicted < 0.5 - bound(positions)
        assert share == pytest.approx(predicted, abs=bound(positions))


class Independent:
    """The law of this file at every position."""

    time_independent = True

    def __init__(self) -> None:
        self.logits = torch.from_numpy(np.log(law(RARE))).float()

    def __call__(self, tokens, t=None):
        return self.logits.expand(*tokens.shape, -1)


@pytest.mark.parametrize(
    ("sampler", "steps", "cache"),
    [(Plan(), 1024, True), (FirstHitting(), None, True), (Ancestral(), 1024, True), (Ancestral(), 32, False)],
    ids=str,
)
def test_driftmax_keeps_rare_tokens(sampler, steps, cache):
    shape = (4, 64) if not cache else (16, 256)
    result = sample(
        Independent(),
        shape,
        mask_id=RARE + 1,
        sampler=sampler,
        schedule=Linear(),
        steps=steps,
        cache=cache,
        rng=7,
    )
    positions = shape[0] * shape[1]
    share = float((result.tokens > 0).double().mean())
    assert share == pytest.approx(0.5, abs=bound(positions))
    if steps == 1024:  # far enough from what float32 noise would give
        assert predicted_share(RARE, steps, EPS_FLOAT32) < 0.5 - 2 * bound(positions)
