"""The reference `categorical` against definitions written out in plain Python on small rows."""

from __future__ import annotations

import itertools
import math

import driftmax
import pytest
import torch
from driftmax.reference.categorical import Filters, kept, statistics

INF = float("inf")
ROWS = [
    [0.0, 1.0, 2.0, 3.0],
    [1.0, 1.0, 1.0, 1.0],
    [0.5, -INF, 0.5, -INF, -1.0],
    [5.0],
    [-INF, -2.0],
    [3.0, 3.0, 1.0, 0.0, 0.0, -4.0],
]
OPTIONS = list(itertools.product([0, 1, 2, 3, 100], [0.05, 0.5, 0.75, 0.999, 1.0], [0.0, 0.2, 0.5, 1.0]))


def kept_by_definition(row: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    order = sorted((v for v in range(len(row)) if row[v] > -INF), key=lambda v: (-row[v], v))
    if top_k:
        order = order[:top_k]
    total = sum(math.exp(row[v]) for v in order)
    if top_p < 1:
        mass, prefix = 0.0, []
        for v in order:
            prefix.append(v)
            mass += math.exp(row[v]) / total
            if mass >= top_p:
                break
        order = prefix
    return {v for v in order if math.exp(row[v] - max(row)) >= min_p}


@pytest.mark.parametrize("row", ROWS)
def test_filters_follow_their_definition(row):
    for top_k, top_p, min_p in OPTIONS:
        filters = Filters(
            torch.tensor([top_k]), torch.tensor([top_p]).double(), torch.tensor([min_p]).double()
        )
        mask = kept(torch.tensor([row]).double(), filters)[0]
        assert set(mask.nonzero().flatten().tolist()) == kept_by_definition(row, top_k, top_p, min_p)


@pytest.mark.parametrize("row", ROWS)
def test_statistics_follow_their_definition(row):
    weights = [math.exp(v) for v in row]
    p = [w / sum(weights) for w in weights]
    best = sorted(p, reverse=True)
    for token in (v for v in range(len(row)) if p[v] > 0):
        got = statistics(torch.tensor([row]).double(), torch.tensor([token]))[:, 0].tolist()
        entropy = -sum(q * math.log(q) for q in p if q > 0)
        wanted = [
            math.log(p[token]),
            math.log(sum(weights)),
            entropy,
            best[0] - best[1] if len(row) > 1 else 1.0,
        ]
        assert got == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("method", ["block", "gumbel"])
@pytest.mark.parametrize(("vocab", "draws"), [(5, 20_000), (1025, 1000)])
def test_law(method, vocab, draws):
    """Chi-square over 5 groups at level 1e-6: sees a group off by 0.03 (small rows) or 0.13."""
    logits = torch.linspace(-2, 2, vocab)
    drawn = driftmax.categorical(logits.expand(draws, vocab), rng=3, method=method, backend="reference")
    group = torch.arange(vocab) * 5 // vocab
    wanted = torch.zeros(5).double().scatter_add(0, group, logits.double().softmax(0)) * draws
    seen = torch.bincount(group[drawn], minlength=5)
    statistic = float(((seen - wanted) ** 2 / wanted).sum())
    assert statistic < 35.0  # chi-square with 4 degrees of freedom: upper 4.6e-7


def test_large_vocabulary_in_chunks_of_rows():
    """2**21 + 3 tokens are more than a chunk; rows do not depend on the chunking."""
    logits = torch.zeros(2, (1 << 21) + 3)
    both = driftmax.categorical(logits, rng=1, backend="reference")
    second = driftmax.categorical(logits[1:], rng=driftmax.RowStreams(1, [1]), backend="reference")
    assert int(both[1]) == int(second[0])
    assert torch.equal(both, driftmax.categorical(logits, rng=1, backend="cpp"))
