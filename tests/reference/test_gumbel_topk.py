"""The reference `gumbel_topk` draws without replacement, in order, by the law of Plackett and Luce."""

from __future__ import annotations

import itertools
import math

import driftmax
import torch


def test_order_has_the_plackett_luce_law():
    """Chi-square over the 12 ordered pairs of 4 tokens, 50 000 draws, level 6e-7: sees a pair off by 0.01."""
    logits = [0.0, 1.0, -1.0, 0.5]
    weights = [math.exp(v) for v in logits]
    n = 50_000
    drawn = driftmax.gumbel_topk(torch.tensor(logits).expand(n, 4), 2, rng=0, backend="reference")
    seen = torch.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16)
    statistic = 0.0
    for a, b in itertools.permutations(range(4), 2):
        wanted = n * weights[a] / sum(weights) * weights[b] / (sum(weights) - weights[a])
        statistic += (float(seen[4 * a + b]) - wanted) ** 2 / wanted
    assert statistic < 50.0  # chi-square with 11 degrees of freedom: upper 6.5e-7
    assert int(seen[[0, 5, 10, 15]].sum()) == 0


def test_scores_decrease_and_ties_go_to_the_lower_index():
    tokens, scores = driftmax.gumbel_topk(
        torch.randn(20, 300), 300, rng=1, return_scores=True, backend="reference"
    )
    assert bool((scores.diff(dim=1) <= 0).all())
    assert torch.equal(tokens.sort(1).values, torch.arange(300).expand(20, 300))
    tied = torch.tensor([1.0, 2.0, 2.0, 1.0])
    assert driftmax.gumbel_topk(tied, 4, temperature=0, backend="reference").tolist() == [1, 2, 0, 3]
