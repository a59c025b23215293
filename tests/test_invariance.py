"""What a draw depends on: (seed, row, position, step) and nothing else.

Bitwise: batch split, permutation with `RowStreams`, positions, threads, instruction set, strides, dtype,
`out`. Statistically: draws that differ in any of the four are independent (levels of 1e-9,
tests/statistics.py).
"""

from __future__ import annotations

import math
from functools import partial

import driftmax
import pytest
import torch
from driftmax import RowStreams, categorical, gumbel_topk
from driftmax.ops._dispatch import core

from tests import statistics as st

SAMPLERS = {
    "block": lambda x, **k: categorical(x, **k),
    "gumbel": lambda x, **k: categorical(x, method="gumbel", **k),
    "filtered": lambda x, **k: categorical(x, top_k=300, top_p=0.95, temperature=0.8, **k),
    "topk": lambda x, **k: gumbel_topk(x, 3, **k),
    "head": lambda x, **k: driftmax.lm_head_categorical(x[..., :8], head_weight(), **k),
}


def head_weight() -> torch.Tensor:
    """Integers, so that the matrix product is exact however it is blocked."""
    return torch.randint(-3, 4, (2100, 8), generator=torch.Generator().manual_seed(8)).float()


def logits(rows: int = 37, vocab: int = 2100) -> torch.Tensor:
    x = torch.randint(-4, 5, (rows, vocab), generator=torch.Generator().manual_seed(rows)).float()
    x[:, 5::11] = -math.inf
    x[:, :8] = x[:, :8].clamp(min=-4)
    return x


@pytest.fixture(params=SAMPLERS)
def sampler(request):
    return SAMPLERS[request.param]


def test_batch_split(sampler, backend):
    x, streams = logits(), RowStreams(2**63 + 5, 37, step=3)
    whole = sampler(x, rng=streams, backend=backend)
    for pieces in ((1, 36), (10, 17, 10), (36, 1)):
        parts = [
            sampler(a, rng=streams[i], backend=backend)
            for a, i in zip(x.split(pieces), torch.arange(37).split(pieces), strict=True)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_rows_alone(sampler):
    x, streams = logits(), RowStreams(3, 37)
    whole = sampler(x, rng=streams)
    for row in range(37):
        assert torch.equal(sampler(x[row : row + 1], rng=streams[row])[0], whole[row])
    assert torch.equal(sampler(x[0], rng=3), whole[0])


def test_permutation(sampler, backend):
    x, streams = logits(), RowStreams(torch.arange(37) * 2**40 - 5, torch.arange(37) * 10**8 + 7, step=9)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    moved = sampler(x[order], rng=streams[order], backend=backend)
    assert torch.equal(moved, sampler(x, rng=streams, backend=backend)[order])
    kept = order[:5]
    assert torch.equal(sampler(x[kept], rng=streams[kept], backend=backend), moved[:5])


def test_positions(sampler, backend):
    """A sequence of draws, its slices with explicit positions, and one position at a time are the same."""
    x = logits(24).view(4, 6, 2100)
    whole = sampler(x, rng=RowStreams(1, 4), backend=backend)
    assert torch.equal(
        sampler(x.view(4, 2, 3, 2100), rng=RowStreams(1, 4), backend=backend).view_as(whole), whole
    )
    late = RowStreams(1, 4, positions=torch.arange(2, 5).expand(4, 3))
    assert torch.equal(sampler(x[:, 2:5], rng=late, backend=backend), whole[:, 2:5])
    for position in range(6):
        one = RowStreams(1, 4, positions=torch.full((4,), position))
        assert torch.equal(sampler(x[:, position], rng=one, backend=backend), whole[:, position])


def test_threads_and_isa(sampler):
    """Also a single row, and one long enough for threads to share it."""
    batches = [logits(), logits(1), torch.randn(1, 200_000, generator=torch.Generator().manual_seed(1))]
    wanted = [sampler(x, rng=7) for x in batches]
    chosen = core.isa()
    try:
        for isa in core.available_isas():
            core.set_isa(isa)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                for x, tokens in zip(batches, wanted, strict=True):
                    assert torch.equal(sampler(x, rng=7), tokens)
    finally:
        core.set_isa(chosen)


@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.9}, {"top_k": 20, "temperature": 0.5}, {"method": "gumbel"}], ids=str
)
def test_stats_do_not_depend_on_threads_and_isa(options):
    chosen = core.isa()
    x = 3 * torch.randn(5, 70_001, generator=torch.Generator().manual_seed(3))
    wanted = [torch.stack(categorical(part, rng=0, return_stats=True, **options)[1]) for part in (x, x[:1])]
    try:
        for isa in core.available_isas():
            core.set_isa(isa)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                for part, stats in zip((x, x[:1]), wanted, strict=True):
                    assert torch.equal(
                        torch.stack(categorical(part, rng=0, return_stats=True, **options)[1]), stats
                    )
    finally:
        core.set_isa(chosen)


def lane(vocab: int) -> torch.Tensor:
    return torch.arange(vocab).expand(3, vocab)


SPANS = {
    "above zero": lambda n: 3.0 * (lane(n.shape[1]) % 3 + 1),
    "below zero": lambda n: -2 - n.abs(),
    "both": lambda n: torch.where(lane(n.shape[1]) % 96 == 7, 1.0, -4 * n.abs()),
    "deep tokens": lambda n: n - 95 * (lane(n.shape[1]) % 700 == 2),
    "deep stretches": lambda n: n - 95 * (lane(n.shape[1]) // 700 % 2),
    "banned": lambda n: torch.where(lane(n.shape[1]) // 2000 == 1, -3e4, n),
    "banned unevenly": lambda n: torch.where(lane(n.shape[1]) // 2000 == 1, -1e13 * (1 + n.abs()), n),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SPANS)
def test_every_isa_sums_what_logits_may_span(kind, dtype):
    """By-products of rows whose values lie on one side of zero, or too deep for an exponential."""
    chosen = core.isa()
    normals = torch.randn(3, 9000, generator=torch.Generator().manual_seed(4))
    x = SPANS[kind](normals).to(dtype)
    try:
        for temperature in (1.0, 0.01):
            core.set_isa(chosen)
            tokens, stats = categorical(x, temperature=temperature, rng=0, return_stats=True)
            y = x.double() / temperature
            error = (stats.log_z.double() - y.logsumexp(1)).abs() / y.logsumexp(1).abs().clamp(min=1.0)
            assert float(error.max()) < 1e-5
            for isa in core.available_isas():
                core.set_isa(isa)
                again, other = categorical(x, temperature=temperature, rng=0, return_stats=True)
                assert torch.equal(again, tokens)
                assert torch.equal(torch.stack(other), torch.stack(stats))
    finally:
        core.set_isa(chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_strides(sampler, dtype, backend):
    """Slices, transposed and expanded tensors, misaligned starts and a last stride of two give what a copy
    gives.
    """
    if sampler is SAMPLERS["head"] and dtype != torch.float32:
        return  # its weight is float32 here; test_lm_head_categorical.py has the other dtypes
    if backend == "reference" and dtype != torch.float32:
        return  # converts to float64 first; one dtype shows it
    base = logits(16).to(dtype)
    views = [base[::2], base[:, 1:2090], base.expand(3, 16, 2100)[1:], base.view(4, 4, 2100).transpose(0, 1)]
    views += [
        base.repeat_interleave(2, dim=1)[:, ::2],
        base.T.contiguous().T,
        base[3:4].expand(9, 2100),
        base[:, None],
    ]
    for view in views:
        wanted = sampler(view.contiguous().clone(), rng=4, backend=backend)
        assert torch.equal(sampler(view, rng=4, backend=backend), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gumbel", "filtered", "topk", "block"])
def test_halves_are_their_float32_and_float64_copies(name, dtype, backend):
    x = (3 * torch.randn(37, 3000, generator=torch.Generator().manual_seed(2))).to(dtype)
    tokens = SAMPLERS[name](x, rng=6, backend=backend)
    assert torch.equal(tokens, SAMPLERS[name](x.float(), rng=6, backend=backend))
    if name != "block":  # its sums round differently in float64
        assert torch.equal(tokens, SAMPLERS[name](x.double(), rng=6, backend=backend))


def test_out(sampler, backend):
    x = logits()
    wanted = sampler(x, rng=2, backend=backend)
    out = torch.full_like(wanted, -7)
    assert sampler(x, rng=2, out=out, backend=backend) is out
    assert torch.equal(out, wanted)
    wide = torch.full((*wanted.shape, 3), -7)
    assert torch.equal(sampler(x, rng=2, out=wide[..., 1], backend=backend), wanted)
    assert torch.equal(wide[..., 1], wanted)
    assert bool((wide[..., [0, 2]] == -7).all())


# ---- agreement with the reference


def test_races_are_the_references(backend):
    """Token races (gumbel, filtered, V <= 1024) give the reference's tokens, always."""
    if backend == "reference":
        return
    for seed, (rows, vocab) in enumerate(
        [(300, 1), (300, 2), (500, 500), (500, 1024), (60, 5000), (4, 50_257)]
    ):
        x = 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab))
        samplers = ["gumbel", "topk"] if vocab > 2 else ["gumbel"]
        for name in samplers + (["block"] if vocab <= 1024 else []):
            wanted = SAMPLERS[name](x, rng=seed, backend="reference")
            assert torch.equal(SAMPLERS[name](x, rng=seed, backend=backend), wanted)


def block_gap(row: torch.Tensor, seed: int, draw: int) -> float:
    return st.race_gap(row, 1.0, (seed, draw, 0, 0))


def test_block_race_is_the_references_but_for_near_ties():
    """Of 4000 draws, 2^-17 each may differ, and only where the best blocks lie within 2^-18: at most 3
    (Poisson 4e-8).
    """
    x = 2 * torch.randn(4, 5000, generator=torch.Generator().manual_seed(0))
    differ = 0
    for row in range(4):
        batch = x[row].expand(1000, 5000)
        got, wanted = categorical(batch, rng=row), categorical(batch, rng=row, backend="reference")
        gaps = partial(block_gap, x[row], row)
        differ += st.assert_same_tokens(got, wanted, gaps)
    assert differ <= 3


def test_the_agreement_rule_refuses_other_tokens():
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    tokens = categorical(x[None], rng=0)
    with pytest.raises(AssertionError, match="apart"):
        st.assert_same_tokens((tokens + 1) % 3000, tokens, partial(block_gap, x, 0))


# ---- independence

CELLS = 6


def cells(streams: RowStreams, count: int, method: str) -> torch.Tensor:
    """`count` draws of `len(streams)` rows in six cells of equal probability: 2052 equal tokens, cut in runs
    of 342.
    """
    flat = torch.zeros(1, 1, 2052).expand(len(streams), count, 2052)
    return categorical(flat, rng=streams, method=method) // 342


@pytest.mark.parametrize("method", ["block", "gumbel"])
def test_independence(method):
    """Pairs that differ in one coordinate of the stream: neighbours, single bits, lags. 40 000 pairs each.

    Sees a correlation of the cells of 0.06 (25 degrees, noncentrality 137 at power 0.999).
    """
    count = 40_000
    base = cells(RowStreams(0, [0]), count, method)[0]
    others = {f"row {row}": RowStreams(0, [row]) for row in (1, 2, 2**16, 2**31, 2**32 - 1)}
    others |= {f"step {step}": RowStreams(0, [0], step=step) for step in (1, 2, 2**23)}
    others |= {f"seed {seed}": RowStreams(seed, [0]) for seed in (1, 2, 2**32, 2**63)}
    for name, streams in others.items():
        other = cells(streams, count, method)[0]
        assert float((base == other).float().mean()) < 0.2, name
        st.assert_independent(base, other, CELLS)
    for lag in (1, 2, 3, 4, 7, 1024):
        st.assert_independent(base[lag:], base[:-lag], CELLS)
    st.assert_law(base, torch.full((CELLS,), 1 / CELLS))


def test_independence_of_rows_in_a_batch():
    """Row i + 1 given row i over 2^16 rows of the same seed, and a seed per row with the same row id."""
    drawn = cells(RowStreams(11, 2**16), 1, "block")[:, 0]
    st.assert_independent(drawn[1:], drawn[:-1], CELLS)
    seeds = cells(RowStreams(torch.arange(2**16), torch.zeros(2**16, dtype=torch.int64)), 1, "block")[:, 0]
    st.assert_independent(seeds[1:], seeds[:-1], CELLS)
    st.assert_independent(drawn[1:], seeds[1:], CELLS)


def test_the_independence_assertion_can_fail():
    drawn = cells(RowStreams(11, 40_000), 1, "block")[:, 0]
    copied = torch.where(torch.arange(40_000) % 16 == 0, drawn, drawn.roll(1))
    with pytest.raises(AssertionError, match="dependent"):
        st.assert_independent(drawn, copied, CELLS)


def test_block_and_token_noise_are_independent():
    """The winning block says nothing about the place in it: 100 000 draws, 6 blocks by 6 runs of places."""
    tokens = categorical(torch.zeros(1, 6144).expand(100_000, 6144), rng=1)
    st.assert_independent(tokens // 1024, tokens % 1024 * 6 // 1024, CELLS)
