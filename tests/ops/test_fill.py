"""Fills of noise: known answers, counters, bitwise equality of backends, laws and tails.

The inputs are fixed, so a green run stays green. For a fresh seed each statistical test raises a false alarm
with the probability that its docstring states.
"""

from __future__ import annotations

import math

import driftmax
import numpy as np
import pytest
import torch
from driftmax import RowStreams
from driftmax.ops._dispatch import core
from driftmax.ops.fill import fill
from scipy import stats

KINDS = ("bits", "uniform", "exponential", "gumbel", "normal")
FLOAT_CASES = [(kind, dtype) for kind in KINDS[1:] for dtype in (torch.float32, torch.float64)]
CASES = [("bits", torch.int32), *FLOAT_CASES]
LAWS = {"uniform": stats.uniform, "exponential": stats.expon, "gumbel": stats.gumbel_r, "normal": stats.norm}


@pytest.mark.parametrize(
    ("seed", "row", "position", "step"),
    [(0, 0, 0, 0), (2**64 - 1, 2**32 - 1, 2**32 - 1, 2**24 - 1), (0x0123456789ABCDEF, 77, 5, 123456)],
)
def test_counter_layout(backend, seed, row, position, step):
    """Words are Philox of (element block, position, step and purpose, row) under the seed."""
    streams = RowStreams(seed, [row], step=step, positions=[position])
    words = fill("bits", (1, 41), rng=streams, dtype=torch.int32, backend=backend)[0].tolist()
    key = (seed & 0xFFFFFFFF, seed >> 32)
    for element, word in enumerate(words):
        block = core.philox4x32(element // 4, position, step | 1 << 24, row, *key)
        assert word & 0xFFFFFFFF == block[element % 4]


@pytest.mark.parametrize(("kind", "dtype"), CASES)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1001, 4099])
def test_backends_are_bitwise_equal_for_any_length(kind, dtype, length):
    ours, theirs = (fill(kind, length, rng=length, dtype=dtype, backend=b) for b in ("cpp", "reference"))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_backends_are_bitwise_equal_on_many(kind, dtype):
    """Sees every branch: 2**18 draws meet both logarithms, all quadrants, and exponents down to about -18."""
    ours, theirs = (fill(kind, 1 << 18, rng=3, dtype=dtype, backend=b) for b in ("cpp", "reference"))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_backends_are_bitwise_equal_for_streams(kind, dtype):
    seeds = torch.tensor([0, -1, 2**63 - 1, -(2**63), 99])
    rows = torch.tensor([2**32 - 1, 0, 1, 2**31, 12])
    positions = torch.tensor([0, 2**32 - 1, 5, 2**31, 1])
    streams = RowStreams(seeds, rows, positions=positions, step=torch.tensor(2**24 - 1))
    ours, theirs = (fill(kind, (5, 3, 11), rng=streams, dtype=dtype, backend=b) for b in ("cpp", "reference"))
    assert torch.equal(ours, theirs)
    for row in range(5):
        alone = fill(kind, (1, 3, 11), rng=streams[row], dtype=dtype)
        assert torch.equal(alone[0], ours[row])


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_same_bits_for_any_split_thread_count_and_isa(kind, dtype):
    wanted = fill(kind, (6, 5001), rng=RowStreams(4, 6), dtype=dtype)
    flat = fill(kind, 200_003, rng=4, dtype=dtype)
    assert torch.equal(fill(kind, 100_001, rng=4, dtype=dtype), flat[:100_001])
    try:
        for isa in core.available_isas():
            core.set_isa(isa)
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                assert torch.equal(fill(kind, (6, 5001), rng=RowStreams(4, 6), dtype=dtype), wanted)
                assert torch.equal(fill(kind, 200_003, rng=4, dtype=dtype), flat)
                parts = [
                    fill(kind, (2, 5001), rng=RowStreams(4, 6)[i : i + 2], dtype=dtype) for i in (0, 2, 4)
                ]
                assert torch.equal(torch.cat(parts), wanted)
    finally:
        core.set_isa(core.available_isas()[0])


@pytest.mark.parametrize(("kind", "dtype"), FLOAT_CASES)
def test_law(kind, dtype):
    """Kolmogorov–Smirnov on 2**20 draws at level 1e-6: sees a distribution function off by 0.004."""
    draws = fill(kind, 1 << 20, rng=2024, dtype=dtype).double().numpy()
    assert stats.kstest(draws, LAWS[kind].cdf).pvalue > 1e-6


@pytest.mark.parametrize(("kind", "dtype"), FLOAT_CASES)
def test_moments(kind, dtype):
    """Mean and variance of 4e6 draws within 5 sigma (false alarm 6e-7): sees a mean off by 0.5 % of sigma."""
    n = 4_000_000
    draws = fill(kind, n, rng=7, dtype=dtype).double()
    mean, variance, _, kurtosis = (float(m) for m in LAWS[kind].stats(moments="mvsk"))
    assert abs(float(draws.mean()) - mean) < 5 * math.sqrt(variance / n)
    assert abs(float(draws.var()) - variance) < 5 * variance * math.sqrt((kurtosis + 2) / n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_pairs_are_independent(dtype):
    """Correlations of a Box–Muller pair, its squares, and neighbours: 5 sigma each (false alarm 6e-7)."""
    n = 2_000_000
    even, odd = fill("normal", (n, 2), rng=5, dtype=dtype).double().unbind(1)
    square = (even**2 - 1) / math.sqrt(2), (odd**2 - 1) / math.sqrt(2)
    for a, b in [(even, odd), square, (even[1:], odd[:-1]), (even, square[1]), (square[0], odd)]:
        assert abs(float((a * b).mean())) < 5 / math.sqrt(n)
    angle = np.arctan2(odd.numpy(), even.numpy()) / (2 * np.pi) + 0.5
    assert stats.kstest(angle, stats.uniform.cdf).pvalue > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kind", "threshold"),
    [("exponential", 12.0), ("exponential", 1e-5), ("gumbel", 12.0), ("normal", 4.5), ("normal", -4.5)],
)
def test_tail_counts(kind, threshold, dtype):
    """Draws beyond the threshold among 2e7, Poisson at level 1e-6: sees a tail that is twice too heavy."""
    n = 20_000_000
    draws = fill(kind, n, rng=31, dtype=dtype)
    law = LAWS[kind]
    lower = law.cdf(threshold) < 0.5
    expected = n * float(law.cdf(threshold) if lower else law.sf(threshold))
    seen = int(((draws < threshold) if lower else (draws > threshold)).sum())
    assert stats.poisson.cdf(seen, expected) > 1e-6
    assert stats.poisson.sf(seen - 1, expected) > 1e-6


def test_streams_are_independent(backend):
    """Correlations of 96 streams that differ in one counter word or seed bit: Bonferroni level 1e-6."""
    n = 4096
    streams = [RowStreams(0, 32), RowStreams(0, 16, positions=torch.arange(16) + 1)]
    streams += [RowStreams(0, [0], step=step) for step in range(1, 17)]
    streams += [RowStreams(1 << bit, 1) for bit in range(0, 64, 2)]
    parts = [fill("uniform", (len(s), n), rng=s, dtype=torch.float64, backend=backend) for s in streams]
    table = (torch.cat(parts) - 0.5) * math.sqrt(12)
    assert table.shape[0] == 96
    correlation = (table @ table.T / n).fill_diagonal_(0)
    pairs = 96 * 95 / 2
    assert float(correlation.abs().max()) < stats.norm.isf(1e-6 / pairs / 2) / math.sqrt(n)


def test_kinds_share_no_words():
    """Uniforms of one purpose do not show in another: purposes are counter words of their own."""
    bits = fill("bits", 1000, rng=0, dtype=torch.int32).long() & 0xFFFFFFFF
    uniform = fill("uniform", 1000, rng=0)
    assert not torch.equal(((bits >> 9).float() + 0.5) * 2.0**-23, uniform)


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_out(kind, dtype, backend):
    wanted = fill(kind, (4, 6), rng=1, dtype=dtype, backend=backend)
    out = torch.zeros(4, 6, dtype=dtype)
    assert fill(kind, (4, 6), rng=1, dtype=dtype, out=out, backend=backend) is out
    assert torch.equal(out, wanted)
    strided = torch.zeros(6, 4, dtype=dtype).T
    assert fill(kind, (4, 6), rng=1, dtype=dtype, out=strided, backend=backend) is strided
    assert torch.equal(strided, wanted)
    guarded = torch.zeros(6, 6, dtype=dtype)
    fill(kind, (4, 6), rng=1, dtype=dtype, out=guarded[1:5], backend=backend)
    assert torch.equal(guarded[1:5], wanted)
    assert not guarded[[0, 5]].any()


def test_empty_and_scalar_shapes(backend):
    assert fill("normal", 0, rng=0, backend=backend).shape == (0,)
    assert fill("normal", (0, 3), rng=RowStreams(0, 0), backend=backend).shape == (0, 3)
    assert fill("normal", (2, 0), rng=RowStreams(0, 2), backend=backend).shape == (2, 0)
    scalar = fill("normal", (), rng=9, backend=backend)
    assert scalar.shape == ()
    assert float(scalar) == float(fill("normal", 2, rng=9, backend=backend)[0])


def test_public_functions_are_the_fills():
    for kind in KINDS:
        dtype = torch.int32 if kind == "bits" else torch.float32
        public = getattr(driftmax.random, kind)
        assert torch.equal(public((3, 4), rng=5), fill(kind, (3, 4), rng=5, dtype=dtype))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"dtype": torch.float16}, TypeError, "float32 or torch.float64"),
        ({"shape": (-1, 2)}, ValueError, "negative"),
        ({"rng": RowStreams(0, 3)}, ValueError, "begin with 3"),
        ({"shape": (), "rng": RowStreams(0, 1)}, ValueError, "begin with 1"),
        ({"rng": RowStreams(0, 4, positions=torch.zeros(4, 2).long())}, ValueError, "positions"),
        ({"out": torch.zeros(4, 5)}, ValueError, "shape"),
        ({"out": torch.zeros(4, 6).double()}, TypeError, "float32"),
        ({"out": torch.zeros(4, 6), "device": "meta"}, ValueError, "on"),
        ({"out": [0.0]}, (TypeError, AttributeError), None),
    ],
)
def test_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        driftmax.random.normal(**{"shape": (4, 6), "rng": 0, **arguments})
