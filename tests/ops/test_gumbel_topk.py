"""`gumbel_topk`: the law of ordered draws without replacement, scores to the bit, filters and errors."""

from __future__ import annotations

import itertools
import math

import driftmax
import pytest
import torch
from driftmax import InvalidDistribution, RowStreams, gumbel_topk
from driftmax.reference.categorical import token_gumbels
from driftmax.reference.gumbel_topk import TOKEN
from driftmax.reference.philox import streams as make_streams

from tests import statistics as st

INF = math.inf
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ordered_law(p: torch.Tensor, k: int) -> torch.Tensor:
    """Probability of every ordered k-tuple (Plackett and Luce), zero where a token repeats; indexed in base
    V.
    """
    vocab = len(p)
    law = torch.zeros(vocab**k, dtype=torch.float64)
    for tokens in itertools.permutations(range(vocab), k):
        probability, left = 1.0, 1.0
        for token in tokens:
            probability *= float(p[token]) / left
            left -= float(p[token])
        law[sum(token * vocab ** (k - 1 - i) for i, token in enumerate(tokens))] = probability
    return law


@pytest.mark.parametrize(("temperature", "count"), [(1.0, 1_000_000), (0.5, 300_000), (3.0, 300_000)])
def test_order_has_the_plackett_luce_law(temperature, count):
    """Chi-square over all 60 ordered triples of five tokens, level 1e-9 (tests/statistics.py).

    A million draws see a total variation of 0.007 with probability 0.999.
    """
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, -2.0])
    drawn = gumbel_topk(logits.expand(count, 5), 3, temperature=temperature, rng=0)
    code = drawn @ torch.tensor([25, 5, 1])
    st.assert_law(code, ordered_law(st.softmax(logits, temperature), 3))
    if temperature == 1.0:
        assert st.noncentrality(59) < 1e6 * (2 * 0.007) ** 2
        with pytest.raises(AssertionError):
            st.assert_law(code, ordered_law(st.softmax(logits, 1.05), 3))


def test_first_token_has_the_softmax_law():
    logits = 2 * normal(3000)
    st.assert_law(gumbel_topk(logits.expand(50_000, 3000), 2, rng=1)[:, 0], st.softmax(logits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 5, 1024, 1030, 4000])
def test_scores_are_perturbed_logits_to_the_bit(vocab, dtype, backend):
    """y + G with the contract's float64 Gumbels, sorted; tokens and scores equal a sort of all of them."""
    logits = normal(7, vocab, seed=vocab, dtype=dtype)
    logits[:, 1::3] = -INF
    k = min(vocab, 3) if vocab < 6 else 40
    for temperature in (1.0, 0.37):
        y = logits.double() / temperature
        streams = make_streams(7, 1, 21, None, None, None, 4, None, torch.device("cpu"))
        race = (y + token_gumbels(streams, TOKEN, 0, vocab)).sort(dim=1, descending=True, stable=True)
        k = min(k, int((y > -INF).sum(1).min()))
        tokens, scores = gumbel_topk(
            logits,
            k,
            temperature=temperature,
            rng=RowStreams(21, 7, step=4),
            return_scores=True,
            backend=backend,
        )
        assert scores.dtype == torch.float64
        assert torch.equal(tokens, race.indices[:, :k])
        assert torch.equal(scores, race.values[:, :k])
        assert bool((scores.diff(dim=1) <= 0).all())


def test_all_tokens_are_a_permutation(backend):
    for vocab in (1, 2, 65, 1500):
        tokens, scores = gumbel_topk(normal(6, vocab), vocab, rng=3, return_scores=True, backend=backend)
        assert torch.equal(tokens.sort(1).values, torch.arange(vocab).expand(6, vocab))
        assert bool((scores.diff(dim=1) <= 0).all())


def test_fewer_is_a_prefix_of_more(backend):
    logits = normal(5, 2000)
    many = gumbel_topk(logits, 100, rng=8, backend=backend)
    for k in (1, 2, 33):
        assert torch.equal(gumbel_topk(logits, k, rng=8, backend=backend), many[:, :k])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperature_zero_sorts(dtype, backend):
    logits = (2 * normal(9, 1500)).round().to(dtype)
    logits[:, ::5] = -INF
    tokens, scores = gumbel_topk(
        logits, 60, temperature=0.0, top_k=3, rng=0, return_scores=True, backend=backend
    )
    ranked = logits.double().sort(dim=1, descending=True, stable=True)
    assert torch.equal(tokens, ranked.indices[:, :60])
    assert torch.equal(scores, ranked.values[:, :60])


@pytest.mark.parametrize(
    "options",
    [{"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.03}, {"top_k": 100, "top_p": 0.95, "temperature": 0.8}],
    ids=str,
)
def test_filters(options):
    """Draws come from the kept set and equal the reference's; with as many draws as it has tokens, they are
    all of it.
    """
    logits = 2 * normal(10, 3000)
    ours = gumbel_topk(logits, 4, rng=5, return_scores=True, **options)
    theirs = gumbel_topk(logits, 4, rng=5, return_scores=True, backend="reference", **options)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    if options == {"top_k": 50}:
        everything = gumbel_topk(logits, 50, rng=5, top_k=50)
        assert torch.equal(everything.sort(1).values, logits.topk(50, 1).indices.sort(1).values)


def test_impossible_tokens_are_never_drawn():
    """Ten million places of probability zero."""
    row = torch.zeros(20_000)
    row[:10_000] = -INF
    drawn = gumbel_topk(row.expand(1000, 20_000), 8, rng=2)
    assert int(drawn.min()) >= 10_000
    assert all(len(set(some.tolist())) == 8 for some in drawn[:50])


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 2}], ids=str)
def test_too_few_tokens_name_the_row(options, backend):
    logits = torch.zeros(4, 2, 10)
    logits[2, 1, 2:] = -INF
    if "top_k" not in options:
        assert sorted(gumbel_topk(logits, 2, rng=0, backend=backend, **options)[2, 1].tolist()) == [0, 1]
        with pytest.raises(InvalidDistribution, match="row 2, position 1: fewer than k"):
            gumbel_topk(logits, 3, rng=0, backend=backend, **options)
    else:
        with pytest.raises(InvalidDistribution, match="row 0, position 0: fewer than k"):
            gumbel_topk(logits, 3, rng=0, backend=backend, **options)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_p": 0.5}], ids=str)
@pytest.mark.parametrize(("value", "words"), [(math.nan, "NaN"), (INF, r"\+inf"), (-INF, "no token")])
def test_bad_values_name_the_row(value, words, options, backend):
    logits = normal(5, 1300)
    logits[3, 7:9] = value
    if value == -INF:
        logits[3] = value
    with pytest.raises(InvalidDistribution, match=f"row 3: .*{words}"):
        gumbel_topk(logits, 2, rng=0, backend=backend, **options)


def test_empty_batches(backend):
    assert gumbel_topk(torch.zeros(0, 5), 2, rng=0, backend=backend).shape == (0, 2)
    tokens, scores = gumbel_topk(torch.zeros(2, 0, 5), 2, rng=0, return_scores=True, backend=backend)
    assert tokens.shape == scores.shape == (2, 0, 2)
    assert gumbel_topk(torch.zeros(5), 2, rng=0, backend=backend).shape == (2,)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"k": 0}, ValueError, "between 1 and the 6"),
        ({"k": 7}, ValueError, "between 1 and the 6"),
        ({"k": 1.5}, TypeError, "k must be an int"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"logits": torch.zeros(2, 6).int()}, TypeError, "logits"),
        ({"out": torch.zeros(2, dtype=torch.int64)}, ValueError, "shape"),
        ({"out": torch.zeros(2, 2)}, TypeError, "int64"),
    ],
)
def test_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        driftmax.gumbel_topk(**{"logits": torch.zeros(2, 6), "k": 2, "rng": 0, **arguments})
