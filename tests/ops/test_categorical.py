"""`categorical`: the law it draws, exactly and by statistics; filters, by-products, special rows and errors.

Statistical assertions are those of tests/statistics.py: level 1e-9 each, fixed seeds. A chi-square test over
23 runs of equal mass with a million draws sees any law whose runs differ by a total variation of 0.006 with
probability 0.999 (`test_power` computes it).
"""

from __future__ import annotations

import itertools
import math

import driftmax
import pytest
import torch
from driftmax import InvalidDistribution, RowStreams, categorical
from driftmax.reference.categorical import BLOCK_NOISE, TOKEN, Filters, kept, token_gumbels
from driftmax.reference.fill import exponential
from driftmax.reference.philox import Streams, words64

from tests import statistics as st

INF = math.inf
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
METHODS = ["block", "gumbel"]
LAW_BACKENDS = ["cpp", *(["triton"] if torch.cuda.is_available() else [])]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draws_of(row: torch.Tensor, count: int, *, backend: str = "cpp", **options: object) -> torch.Tensor:
    """`count` independent draws from one row, expanded without a copy."""
    row = row.cuda() if backend == "triton" else row
    return categorical(row.expand(count, len(row)), backend=backend, **options).cpu()


# ---- the implemented law, computed exactly


def block_rows(kind: str, dtype: torch.dtype) -> torch.Tensor:
    """Sixteen blocks of 1024 logits."""
    x = normal(16, 1024, seed=5, dtype=torch.float64)
    if kind == "wide":
        x *= 8
    elif kind == "heavy tail":
        x = x.sign() * (x.abs().exp() - 1).clamp(max=25)
    elif kind == "flat":
        x *= 1e-3
    elif kind == "far apart":  # maxima up to 200 octaves apart
        x += torch.linspace(-140, 0, 16, dtype=torch.float64)[:, None]
    elif kind == "shifted":
        x += 1e4 if dtype != torch.bfloat16 else 100
    return x.to(dtype)


def block_masses(rows: torch.Tensor, temperature: float) -> torch.Tensor:
    """log S_b of every row, from the by-products of a draw: y of the token minus its log-probability.

    `log_prob` is small where a token holds much of its block, so its own rounding stays below 2^-22 whatever
    the offset.
    """
    tokens, stats = categorical(rows, temperature=temperature, rng=1, return_stats=True)
    chosen = rows.gather(1, tokens[:, None])[:, 0].double() / temperature
    return chosen - stats.log_prob.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("kind", ["plain", "wide", "heavy tail", "flat", "far apart", "shifted"])
def test_block_masses_give_the_law_within_its_bound(kind, temperature, dtype):
    """P(block) = S_b / sum S from the core's own sums against the exact one: total variation within the
    docstring's bound.
    """
    rows = block_rows(kind, dtype)
    y = rows.double() / temperature
    got = block_masses(rows, temperature).softmax(0)
    exact = y.logsumexp(1).softmax(0)
    spread = float(y.max() - y.min().clamp(min=float(y.max()) - 45))  # what lies deeper is never drawn
    assert st.total_variation(got, exact) <= 2.0**-20 * (1 + spread / 16)


@pytest.mark.parametrize("octaves", [-59, -30, 30, 59, 61, -61, 200, -200])
def test_block_masses_do_not_depend_on_the_rows_reference(octaves):
    """The first token sets the reference that all blocks are summed against; here S_b is read off with it far
    away.

    float64 by-products: log S_b = log(exp(log_z) - exp(y_0)), which the float32 sums have to 2^-20.
    """
    row = normal(2048, seed=2, dtype=torch.float64)
    row[:1024] = -INF
    row[:16] = octaves * math.log(2)
    alone = row[1024:].logsumexp(0)
    _, stats = categorical(row[None], rng=0, return_stats=True)
    if octaves < 20:
        rest = stats.log_z[0] + torch.log1p(-(row[:16].logsumexp(0) - stats.log_z[0]).exp())
        assert abs(float(rest - alone)) < 2.0**-20 * (1 + max(-octaves, 0) * math.log(2) / 16) + 1e-12
    else:
        assert float(stats.log_z[0]) == pytest.approx(float(row.logsumexp(0)), rel=2.0**-20)


# ---- the law by statistics


def test_power():
    """The chi-square over 24 runs, a million draws: noncentrality n sum d^2 / p >= n (2 tv)^2 suffices for tv
    = 0.006.
    """
    assert st.noncentrality(23) < 1e6 * (2 * 0.006) ** 2


VARIANTS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "filters": {"temperature": 1.3, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
}


def filtered_law(
    row: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    y = row.double()[None] / temperature
    one = Filters(torch.tensor([top_k]), torch.tensor([top_p]).double(), torch.tensor([min_p]).double())
    return y.masked_fill(~kept(y, one), -INF).softmax(1)[0]


@pytest.mark.parametrize("backend", LAW_BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("vocab", [7, 50, 1000, 1024, 1025, 5000])
def test_law(vocab, variant, method, backend):
    """Chi-square of a million draws; of 1e5 where they are dear (the slow suite has the millions for those
    too).
    """
    dear = vocab >= 1000 and (variant != "plain" or (method == "gumbel" and vocab == 5000))
    row = 2 * normal(vocab, seed=vocab)
    tokens = draws_of(
        row, 100_000 if dear else 1_000_000, backend=backend, method=method, rng=vocab, **VARIANTS[variant]
    )
    st.assert_law(tokens, filtered_law(row, **VARIANTS[variant]))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("vocab", [1000, 1024, 1025, 5000])
def test_law_with_ten_million_draws(vocab, variant, method):
    row = 2 * normal(vocab, seed=vocab)
    count = 10_000_000 if variant != "filters" and vocab < 5000 else 2_000_000
    st.assert_law(
        draws_of(row, count, method=method, rng=3, **VARIANTS[variant]),
        filtered_law(row, **VARIANTS[variant]),
    )


def test_the_assertion_sees_faulty_laws():
    """A dropped token, a block off by one and a wrong temperature all fail what the samplers pass."""
    row = 2 * normal(5000, seed=1)
    tokens = draws_of(row, 300_000, rng=1)
    for wrong in (row.masked_fill(torch.arange(5000) == int(row.argmax()), -INF), row.roll(1), row * 1.05):
        with pytest.raises(AssertionError):
            st.assert_law(tokens, st.softmax(wrong))


@pytest.mark.parametrize(("method", "count"), [("block", 40_000), ("gumbel", 20_000)])
def test_heavy_tail(method, count):
    """One token against 199 999 of them 18 nats below, which hold 0.3 % of the mass; fp32 noise draws next to
    none.

    With 20 000 draws 61 tail tokens are expected and fp32 noise gives about 4, which the assertion refuses.
    """
    vocab, gap = 200_000, 18.0
    row = torch.full((vocab,), -gap)
    row[77_777] = 0.0
    tail = (vocab - 1) * math.exp(-gap)
    tail /= 1 + tail
    hits = draws_of(row, count, method=method, rng=18) != 77_777
    st.assert_mass(int(hits.sum()), count, tail)
    with pytest.raises(AssertionError):
        st.assert_mass(st.fp32_tail_hits(vocab - 1, gap, 20_000, seed=1), 20_000, tail)


def test_the_fast_model_of_fp32_noise_is_the_sampler():
    """`fp32_tail_hits` against the usual sampler written out, where both can be counted: two-sample test at
    1e-9.
    """
    row = torch.full((501,), -6.5)
    row[0] = 0.0
    direct = int((st.fp32_gumbel_argmax(row, 20_000, seed=0) != 0).sum())
    modelled = st.fp32_tail_hits(500, 6.5, 20_000, seed=0)
    assert abs(direct - modelled) < 6 * math.sqrt(direct + modelled)


@pytest.mark.slow
def test_fp32_sampler_fails():
    """The usual sampler itself at V = 200 000 (4e9 uniforms) fails the assertion that ours passes above."""
    row = torch.full((200_000,), -18.0)
    row[0] = 0.0
    tail = 199_999 * math.exp(-18.0)
    faulty = st.fp32_gumbel_argmax(row, 20_000, seed=0)
    with pytest.raises(AssertionError):
        st.assert_mass(int((faulty != 0).sum()), 20_000, tail / (1 + tail))


@pytest.mark.slow
def test_heavy_tail_with_millions_of_draws():
    """Two million draws: sees a tail mass off by 8 % (6000 expected, 6 sigma)."""
    row = torch.full((200_000,), -18.0)
    row[0] = 0.0
    tail = 199_999 * math.exp(-18.0)
    hits = sum(int((draws_of(row, 500_000, rng=seed) != 0).sum()) for seed in range(4))
    st.assert_mass(hits, 2_000_000, tail / (1 + tail))


# (row, element) found by searching 1e10 Philox words of seed 1: noise beyond what 32-bit uniforms resolve.
RARE_TOKENS = [(1135496, 646), (6113372, 476), (6198819, 448), (7893997, 841)]  # high word 0: Gumbel above 22
RARE_BLOCKS = [(144962625, 12), (145086131, 15), (278785049, 7), (195393178, 1)]  # high word below 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("row", "token"), RARE_TOKENS)
def test_rare_token_wins_exactly_where_it_should(row, token, method, backend):
    """A token some 22 nats below the top wins up to 1e-9 of its Gumbel's reach, though it is screened."""
    streams = Streams(*(torch.tensor([field]) for field in (1, row, 0, 0)))
    g = token_gumbels(streams, TOKEN, 0, 1024)[0]
    reach = float(g[token] - g[0])
    assert reach > 18
    for gap, winner in ((reach - 1e-9, token), (reach + 1e-9, 0)):
        logits = torch.full((1, 1024), -INF, dtype=torch.float64)
        logits[0, 0], logits[0, token] = 0.0, -gap
        assert int(categorical(logits, method=method, rng=RowStreams(1, [row]), backend=backend)) == winner


@pytest.mark.parametrize(("row", "block"), RARE_BLOCKS)
def test_rare_block_wins_exactly_where_it_should(row, block, backend):
    """The same for a block: one token a block, its clock E_b near 2^-32."""
    streams = Streams(*(torch.tensor([field]) for field in (1, row, 0, 0)))
    clock = exponential(*words64(streams, BLOCK_NOISE, 0, 16))[0]
    others = clock.clone()
    others[block] = INF
    reach = math.log(float(others.min() / clock[block]))
    assert reach > 16
    for gap, winner in ((reach - 1e-5, block), (reach + 1e-5, int(others.argmin()))):
        logits = torch.full((1, 16 * 1024), -INF)
        logits[0, ::1024] = 0.0
        logits[0, block * 1024] = -gap
        assert int(categorical(logits, rng=RowStreams(1, [row]), backend=backend)) == winner * 1024


# ---- what must never be drawn


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9999}, {"method": "gumbel"}], ids=str)
def test_impossible_tokens_are_never_drawn(options):
    """A hundred million places of probability zero compete (ten million with a filter), among 25 000 possible
    tokens.
    """
    row = torch.zeros(50_000)
    row[torch.randperm(50_000, generator=torch.Generator().manual_seed(0))[:25_000]] = -INF
    count = 400 if "top_p" in options else 4000
    drawn = draws_of(row, count, rng=4, **options)
    assert bool((row[drawn] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 17, 1024, 1025, 4096, 5001])
def test_rows_with_one_possible_token(vocab, dtype, backend):
    """Wherever it stands, also behind whole blocks of -inf, and whatever its value."""
    places = sorted({0, vocab // 2, vocab - 1, max(vocab - 17, 0)})
    logits = torch.full((len(places), vocab), -INF, dtype=dtype)
    for i, place in enumerate(places):
        logits[i, place] = (-300.0, 0.0, 55.0, 1e4)[i % 4]
    for options in (
        {},
        {"method": "gumbel"},
        {"temperature": 0},
        {"top_p": 0.01},
        {"top_k": 1},
        {"min_p": 1.0},
    ):
        tokens, stats = categorical(logits, rng=1, return_stats=True, backend=backend, **options)
        assert isinstance(stats, driftmax.CategoricalStats)
        assert tokens.tolist() == places
        assert stats.margin.tolist() == [1.0] * len(places)
        assert stats.log_prob.abs().max() < 1e-6
        assert stats.entropy.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperature_zero(dtype, backend):
    """The largest logit, the lowest index on ties, whatever the filters; by-products are those at temperature
    1.
    """
    logits = (normal(8, 1500, seed=1) * 2).round().to(dtype)
    logits[:, ::7] = -INF
    wanted = torch.tensor([int((row == row.max()).nonzero()[0, 0]) for row in logits])
    for options in ({}, {"top_k": 5}, {"top_p": 0.3}, {"method": "gumbel"}):
        tokens, stats = categorical(
            logits, temperature=0, rng=1, return_stats=True, backend=backend, **options
        )
        assert torch.equal(tokens, wanted)
        at_one = categorical(logits, rng=1, return_stats=True, backend=backend)[1]
        assert torch.equal(torch.stack(stats[1:]), torch.stack(at_one[1:]))
        best = logits.double().log_softmax(1).amax(1)
        assert torch.allclose(stats.log_prob.double(), best, atol=1e-5)


# ---- filters

# V = 1 .. several blocks; heavy ties; halves; a maximum that comes late, after low values set the reference.
FILTERS = [
    {"top_k": 1}, {"top_k": 7}, {"top_k": 1500}, {"top_k": 10**9}, {"top_p": 1e-9}, {"top_p": 0.5},
    {"top_p": 0.97}, {"top_p": 0.9999}, {"min_p": 1.0}, {"min_p": 0.0313}, {"min_p": 1e-12},
    {"top_k": 50, "top_p": 0.8}, {"top_k": 300, "min_p": 0.013},
    {"top_k": 2000, "top_p": 0.93, "min_p": 0.0021},
]  # fmt: skip


def filter_rows(kind: str, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    x = normal(6, vocab, seed=vocab, dtype=torch.float64)
    if kind == "ties":
        x = (2 * x).round()
    elif kind == "sharp":
        x *= 8
    elif kind == "sparse":
        x[x < 0.5] = -INF
        x[:, vocab // 2] = 1.0
    elif kind.startswith("masked"):  # tokens banned by a low finite number, as models do
        x[:, : (vocab + 1) // 2] = float(kind.split()[1])
        x[:, vocab - 1] = 0.0
    return x.to(dtype)


def oracle(
    logits: torch.Tensor, temperature: float, options: dict[str, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sorting oracle's kept sets, and which rows lie within rounding of a boundary (2^-19 of top_p or
    min_p).
    """
    y = logits.double() / temperature
    n = len(y)
    k, p, m = options.get("top_k", 0), options.get("top_p", 1.0), options.get("min_p", 0.0)
    p_column, m_column = (torch.full((n,), value, dtype=torch.float64) for value in (p, m))
    mask = kept(y, Filters(torch.full((n,), k), p_column, m_column))
    ranked = y.sort(1, descending=True).values
    ranked = ranked.masked_fill(torch.arange(y.shape[1]) >= (k or y.shape[1]), -INF)
    spread = (ranked[:, 0] - ranked.masked_fill(ranked == -INF, INF).amin(1)).clamp(max=45)
    allowance = 2.0**-19 * (1 + spread / 16)
    close = torch.zeros(n, dtype=torch.bool)
    if p < 1:
        close |= (ranked.softmax(1).cumsum(1) - p).abs().amin(1) < allowance
    if m > 0:
        close |= (((ranked - ranked[:, :1]).exp() / m - 1).abs() < 1e-12).any(1) & (m < 1)
    return mask, close


def kept_by(
    logits: torch.Tensor, temperature: float, backend: str, options: dict[str, float], count: int
) -> set[int]:
    """The kept set of one row, as a draw of all of it without replacement; one draw more must be refused."""
    if count < len(logits):
        with pytest.raises(InvalidDistribution, match="fewer than k"):
            driftmax.gumbel_topk(logits, count + 1, temperature=temperature, backend=backend, **options)
    return set(
        driftmax.gumbel_topk(logits, count, temperature=temperature, backend=backend, **options).tolist()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "ties", "sharp", "sparse", "masked -1000", "masked -60000"])
@pytest.mark.parametrize("vocab", [9, 1025, 3000])
def test_kept_sets_are_the_sorting_oracles(vocab, kind, dtype):
    """Token for token, but for rows within 2^-19 of a boundary, which are counted: at most one in eight."""
    excluded = total = 0
    logits = filter_rows(kind, vocab, dtype)
    for temperature, options in zip([1.0, 0.6] * len(FILTERS), FILTERS, strict=False):
        mask, close = oracle(logits, temperature, options)
        total += len(logits)
        excluded += int(close.sum())
        for row in (~close).nonzero().flatten().tolist()[:3]:
            wanted = set(mask[row].nonzero().flatten().tolist())
            assert kept_by(logits[row], temperature, "cpp", options, len(wanted)) == wanted, (row, options)
    assert excluded <= total / 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "ties", "sharp", "sparse", "masked -1000"])
@pytest.mark.parametrize("vocab", [9, 1025, 3000])
def test_filtered_draws_and_stats_are_the_oracles(vocab, kind, dtype):
    """Tokens of both methods equal the reference's, so do log_prob, log_z, entropy and margin of the kept
    law.
    """
    logits = filter_rows(kind, vocab, dtype)
    tolerance = {"atol": 2e-5, "rtol": 2e-5}
    for options in FILTERS:
        _, close = oracle(logits, 1.0, options)
        wanted, theirs = categorical(logits, rng=9, return_stats=True, backend="reference", **options)
        for method in METHODS:
            tokens, ours = categorical(
                logits, rng=9, return_stats=True, method=method, backend="cpp", **options
            )
            assert torch.equal(tokens[~close], wanted[~close]), options
            for a, b, name in zip(ours, theirs, ours._fields, strict=True):
                torch.testing.assert_close(
                    a[~close], b[~close], **tolerance, msg=lambda m, o=options, n=name: f"{n} {o}: {m}"
                )


def test_filters_per_row(backend):
    """One value per row gives what scalars give row by row."""
    logits = 3 * normal(6, 2, 2100, seed=3)
    ks, ps = torch.tensor([[1], [5], [50], [500], [2100], [9999]]), torch.tensor([[0.9, 0.5]])
    ms, ts = torch.tensor([[0.0, 0.01]]), torch.tensor([[1.0], [0.5], [0.0], [2.0], [1.0], [0.1]])
    both = categorical(logits, temperature=ts, top_k=ks, top_p=ps, min_p=ms, rng=5, backend=backend)
    for row in range(6):
        for position in range(2):
            one = RowStreams(5, [row], positions=[[position]])
            p, m = float(ps[0, position].double()), float(ms[0, position].double())
            alone = categorical(
                logits[row : row + 1, position : position + 1], temperature=float(ts[row].double()),
                top_k=int(ks[row]), top_p=p, min_p=m, rng=one, backend=backend,
            )  # fmt: skip
            assert int(alone) == int(both[row, position])


# ---- by-products


def exact_stats(logits: torch.Tensor, temperature: float, tokens: torch.Tensor) -> list[torch.Tensor]:
    y = logits.double() / (temperature or 1.0)
    log_p = y.log_softmax(1)
    p = log_p.exp()
    entropy = -(p * log_p).masked_fill(p == 0, 0.0).sum(1)
    best = torch.nn.functional.pad(y, (0, 1), value=-INF).topk(2, 1).values
    top = log_p.amax(1)
    margin = top.exp() * -torch.expm1(best[:, 1] - best[:, 0])
    return [log_p.gather(1, tokens[:, None])[:, 0], y.logsumexp(1), entropy, margin]


STAT_ROWS = {
    "plain": lambda v: 2 * normal(8, v, seed=v, dtype=torch.float64),
    "offset": lambda v: normal(8, v, seed=v, dtype=torch.float64) + 1e4,
    "spread": lambda v: (torch.rand(8, v, generator=torch.Generator().manual_seed(v)).double() - 0.5) * 160,
    "ties": lambda v: (normal(8, v, seed=v, dtype=torch.float64)).round(),
    "equal": lambda v: torch.full((8, v), 3.0, dtype=torch.float64),
    "level": lambda v: torch.linspace(-11.3, 11.3, 8)[:, None] + 0.1 * (torch.arange(v) % 3).double(),
    "spread, level": lambda v: torch.linspace(-11.3, 11.3, 8)[:, None] + 0.3 * normal(8, v, seed=v).double(),
    "late maximum": lambda v: normal(8, v, seed=v, dtype=torch.float64) - 500 * (torch.arange(v) < v - 2),
    # no lane of a block has a value from zero up; some have; values deep below, in some blocks or in all
    "below zero": lambda v: -30 - 6 * normal(8, v, seed=v, dtype=torch.float64).abs(),
    "mostly below zero": lambda v: torch.where(
        torch.arange(v) % 96 == 7, 1.0, -5 * normal(8, v, seed=v, dtype=torch.float64).abs()
    ),
    "deep stretches": lambda v: normal(8, v, seed=v, dtype=torch.float64) - 95 * (torch.arange(v) // 700 % 2),
    "deep tokens": lambda v: normal(8, v, seed=v, dtype=torch.float64) - 95 * (torch.arange(v) % 700 == 2),
    "banned": lambda v: torch.where(
        torch.arange(v) // 1024 == 1, -1e9 * (1 + torch.arange(v) % 3), normal(8, v, seed=v)
    ).double(),
    "banned at random": lambda v: torch.where(
        torch.arange(v) // 1024 == 1, -1e13 * normal(8, v, seed=v).abs(), normal(8, v, seed=v)
    ).double(),
    "low start": lambda v: normal(8, v, seed=v, dtype=torch.float64) - 1e5 * (torch.arange(v) < 16),
    "impossible": lambda v: torch.where(
        torch.arange(v) % 3 == 0, 0.5 * normal(8, v, seed=v, dtype=torch.float64), -INF
    ),
    "huge": lambda v: normal(8, v, seed=v, dtype=torch.float64) * 1e33,
    "lowest": lambda v: torch.where(torch.arange(v) % 2 == 0, -3.38e38, -3e38).expand(8, v).double(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", STAT_ROWS)
@pytest.mark.parametrize("temperature", [1.0, 0.001, 0.7, 1000.0, 0.0])
def test_stats(temperature, kind, dtype):
    """Against float64: 1e-5 absolute or relative."""
    backend = "cpp"
    for vocab in (1, 5, 1024, 3003):
        logits = STAT_ROWS[kind](vocab).to(dtype)
        if bool(logits.isinf().any()) and kind != "impossible":
            continue  # beyond float16
        if kind == "lowest" and 0 < temperature < 1 and dtype != torch.float64:
            continue  # log_z is beyond float32
        tokens, stats = categorical(
            logits, temperature=temperature, rng=6, return_stats=True, backend=backend
        )
        assert stats.log_z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert bool((logits.gather(1, tokens[:, None]) > -INF).all())
        for got, wanted, name in zip(
            stats, exact_stats(logits, temperature, tokens), stats._fields, strict=True
        ):
            error = (got.double() - wanted).abs() / wanted.abs().clamp(min=1.0)
            assert float(error.max()) <= 1e-5, (name, vocab, got, wanted)


# ---- large vocabularies, edges, errors


@pytest.mark.parametrize("method", METHODS)
def test_more_than_two_to_the_24_tokens(method):
    """torch.multinomial stops at 2^24 categories; the mass here lies beyond, on the last five tokens."""
    vocab = 2**24 + 5
    row = torch.full((1, vocab), -60.0)
    row[0, -5:] = torch.tensor([0.0, 1.0, -INF, 0.5, 0.0])
    tokens, stats = categorical(row, method=method, rng=3, return_stats=True)
    near = row[:, -5:].double()
    assert int(tokens) in {vocab - 5, vocab - 4, vocab - 2, vocab - 1}
    assert float(stats.log_z) == pytest.approx(float(near.logsumexp(1)), abs=1e-5)
    assert int(categorical(row, temperature=0)) == vocab - 4
    tail = torch.zeros(1, vocab)
    assert 0 <= int(categorical(tail, method=method, rng=5)) < vocab


def test_empty_batches(backend):
    assert categorical(torch.zeros(0, 5), rng=0, backend=backend).shape == (0,)
    assert categorical(torch.zeros(3, 0, 5), rng=RowStreams(0, 3), backend=backend).shape == (3, 0)
    tokens, stats = categorical(torch.zeros(0, 2, 5), rng=0, return_stats=True, backend=backend)
    assert tokens.shape == stats.entropy.shape == (0, 2)
    assert categorical(torch.zeros(5), rng=0, backend=backend).shape == ()


@pytest.mark.parametrize("options", [{}, {"return_stats": True}, {"top_k": 5}, {"top_p": 0.9}])
@pytest.mark.parametrize("uneven", [0.0, 1e13])
def test_nan_among_banned_tokens_is_found(uneven, options, backend):
    """Blocks far below the rest are left out of the sums, but not unless they hold numbers."""
    x = -1e9 - uneven * (1 + torch.arange(5000)[None] % 7)
    x[0, :100] = torch.randn(100)
    categorical(x, rng=0, backend=backend, **options)
    x[0, 3333] = math.nan
    with pytest.raises(InvalidDistribution, match="NaN"):
        categorical(x, rng=0, backend=backend, **options)


@pytest.mark.parametrize("value", ["nan", "inf", "empty"])
@pytest.mark.parametrize(
    "options",
    [{}, {"method": "gumbel"}, {"temperature": 0}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("vocab", [1, 20, 1024, 3000])
def test_bad_values_name_the_row(vocab, options, value, backend):
    for dtype, place in itertools.product(DTYPES, {0, vocab - 1}):
        logits = normal(6, vocab, dtype=dtype)
        bad = logits.clone()
        for row in (3, 5):
            bad[row, place] = {"nan": math.nan, "inf": INF, "empty": -INF}[value]
        if value == "empty":
            bad[3], bad[5] = -INF, -INF
        words = {"nan": "NaN", "inf": r"\+inf", "empty": "no token"}[value]
        with pytest.raises(InvalidDistribution, match=f"row 3: .*{words}") as caught:
            categorical(bad, rng=0, backend=backend, **options)
        assert caught.value.draw == 3
        with pytest.raises(InvalidDistribution, match=f"row 1, position 1: .*{words}"):
            categorical(bad.view(3, 2, vocab), rng=0, backend=backend, **options)


ROW = torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"temperature": math.nan}, ValueError, "temperature"),
        ({"temperature": INF}, ValueError, "temperature"),
        ({"temperature": torch.tensor([1.0, -0.5])}, ValueError, "temperature"),
        ({"temperature": torch.ones(3)}, ValueError, "broadcast"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_k": -1}, ValueError, "top_k"),
        ({"top_k": torch.tensor([1.0, 2.0])}, TypeError, "top_k"),
        ({"top_k": 2.5}, (TypeError, ValueError), None),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"top_p": 1.5}, ValueError, "top_p"),
        ({"top_p": math.nan}, ValueError, "top_p"),
        ({"top_p": [0.5, 0.0]}, ValueError, "top_p"),
        ({"min_p": -0.1}, ValueError, "min_p"),
        ({"min_p": 1.1}, ValueError, "min_p"),
        ({"method": "greedy"}, ValueError, "method"),
        ({"backend": "fortran"}, ValueError, "backend"),
        ({"rng": "seed"}, TypeError, "rng"),
        ({"rng": RowStreams(0, 3)}, ValueError, "3 rows"),
        ({"rng": 2**64}, ValueError, "64 bits"),
        ({"out": torch.zeros(3, dtype=torch.int64)}, ValueError, "shape"),
        ({"out": torch.zeros(2)}, TypeError, "int64"),
        ({"out": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "on"),
        ({"out": [0, 0]}, TypeError, "Tensor"),
        ({"logits": ROW.long()}, TypeError, "float"),
        ({"logits": ROW.tolist()}, TypeError, "Tensor"),
        ({"logits": torch.zeros(())}, ValueError, "dimension"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "no token"),
    ],
    ids=str,
)  # fmt: skip
def test_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        categorical(**{"logits": ROW, "rng": 0, **arguments})
