"""Random shapes, strides, dtypes, values and options against the reference: equal tokens by the contract,
never an impossible one.

200 examples with a fixed seed each by default, 3000 under `slow`.
"""

from __future__ import annotations

import math

import pytest
import torch
from driftmax import InvalidDistribution, RowStreams, categorical, gumbel_topk, lm_head_categorical
from driftmax.reference.categorical import Filters, kept
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.statistics import assert_same_tokens, race_gap

INF = math.inf
FAST = settings(
    max_examples=200, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
LONG = settings(FAST, max_examples=3000, derandomize=False)

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
VOCABS = st.one_of(
    st.integers(1, 20),
    st.integers(1, 300),
    st.sampled_from([1023, 1024, 1025, 2047, 2048, 2049, 3072]),
    st.integers(1025, 6000),
)
FLAVOURS = st.sampled_from(
    [
        "mild",
        "wide",
        "constant",
        "ties",
        "sparse",
        "denormal",
        "huge",
        "single",
        "late",
        "banned",
        "heavy",
        "offset",
        "staircase",
    ]
)


@st.composite
def batches(draw: st.DrawFn) -> torch.Tensor:
    """Logits [..., V] with at least one possible token a row; contiguous or not."""
    dtype, vocab = draw(DTYPES), draw(VOCABS)
    lead = draw(st.sampled_from([(), (1,), (3,), (2, 2), (2, 1, 2)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = values(draw(FLAVOURS), (*lead, vocab), generator)
    limit = torch.finfo(dtype).max
    x = torch.where(x == -INF, x, x.clamp(-limit, limit)).to(dtype)
    # rounding to the dtype may have reached infinity
    x = torch.where(x == INF, torch.tensor(limit, dtype=dtype), x)
    x[..., draw(st.integers(0, vocab - 1))] = draw(st.sampled_from([0.0, -3.0, 1.5]))
    layout = draw(st.sampled_from(["plain", "padded", "offset", "strided", "transposed", "expanded"]))
    if layout == "padded":
        x = torch.nn.functional.pad(x, (0, 3))[..., :vocab]
    elif layout == "offset":
        x = torch.nn.functional.pad(x, (1, 0))[..., 1:]
    elif layout == "strided":
        x = x.repeat_interleave(2, dim=-1)[..., ::2]
    elif layout == "transposed" and len(lead) > 1:
        x = x.transpose(0, 1)
    elif layout == "expanded":
        x = x.expand(2, *x.shape)
    return x


def values(flavour: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    at = torch.arange(shape[-1])
    if flavour == "wide":
        return 40 * x
    if flavour == "constant":
        return torch.full_like(x, 2.5)
    if flavour == "ties":
        return x.round()
    if flavour == "sparse":
        return x.masked_fill(x < 1.0, -INF)
    if flavour == "denormal":
        return x * 1e-40
    if flavour == "huge":
        return x * 1e30
    if flavour == "single":
        return torch.full_like(x, -INF)
    if flavour == "late":
        return x - 150.0 * (at < shape[-1] - 3)
    if flavour == "banned":  # low finite numbers instead of -inf, from the first token on
        return torch.where((at < 40) | (at % 5 == 1), -1e9, x)
    if flavour == "heavy":
        return torch.where(at == shape[-1] // 2, 12.0, x)
    if flavour == "offset":
        return x + 1e4
    if flavour == "staircase":
        return x - 70.0 * (at // 1024)
    return x


@st.composite
def laws(draw: st.DrawFn) -> dict[str, float]:
    """Temperature and filters, some of them off."""
    law: dict[str, float] = {"temperature": draw(st.sampled_from([1.0, 0.0, 0.1, 0.7, 1.9, 1e-3, 50.0]))}
    if draw(st.booleans()):
        law["top_k"] = draw(st.sampled_from([1, 2, 7, 40, 1000, 5000, 2**40]))
    if draw(st.booleans()):
        law["top_p"] = draw(st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.99, 1.0]))
    if draw(st.booleans()):
        law["min_p"] = draw(st.sampled_from([0.0, 1e-9, 0.013, 0.37, 1.0]))
    return law


def near_boundary(rows: torch.Tensor, law: dict[str, float]) -> torch.Tensor:
    """Rows whose kept set rounding may change: the mass comes close to top_p, or a ratio to min_p."""
    temperature, p, m = law["temperature"] or 1.0, law.get("top_p", 1.0), law.get("min_p", 0.0)
    ranked = (rows.double() / temperature).sort(1, descending=True).values
    k = law.get("top_k", ranked.shape[1])
    ranked = ranked.masked_fill(torch.arange(ranked.shape[1]) >= k, -INF)
    close = torch.zeros(len(rows), dtype=torch.bool)
    if p < 1:
        close |= (ranked.softmax(1).cumsum(1) - p).abs().amin(1) < 2.0**-17
    if m > 0:  # exact ties with the best are kept by both whatever min_p is
        ratio = (ranked - ranked[:, :1]).exp()
        close |= (((ratio / m - 1).abs() < 1e-9) & (ranked < ranked[:, :1])).any(1)
    return close


def possible(rows: torch.Tensor, law: dict[str, float]) -> torch.Tensor:
    """Tokens that may be drawn."""
    if law["temperature"] == 0:
        return rows == rows.amax(1, keepdim=True)
    n = len(rows)
    top_k = torch.full((n,), int(law.get("top_k", 0)))
    top_p, min_p = (
        torch.full((n,), law.get(name, off), dtype=torch.float64)
        for name, off in (("top_p", 1.0), ("min_p", 0.0))
    )
    return kept(rows.double() / law["temperature"], Filters(top_k, top_p, min_p))


def check_categorical(logits: torch.Tensor, law: dict[str, float], method: str, seed: int) -> None:
    vocab = logits.shape[-1]
    rows = logits.reshape(-1, vocab)
    got, ours = categorical(logits, method=method, rng=seed, return_stats=True, backend="cpp", **law)
    wanted, theirs = categorical(
        logits, method=method, rng=seed, return_stats=True, backend="reference", **law
    )
    assert got.shape == logits.shape[:-1]
    assert torch.equal(categorical(logits, method=method, rng=seed, backend="cpp", **law), got)
    flat = got.flatten()
    assert bool(((flat >= 0) & (flat < vocab)).all())
    exact = ~near_boundary(rows, law)
    assert bool((rows.gather(1, flat[:, None]) > -INF).all())
    assert bool(possible(rows, law).gather(1, flat[:, None])[exact].all())
    unfiltered = law.get("top_k", 0) == 0 and law.get("top_p", 1.0) == 1 and law.get("min_p", 0.0) == 0
    raced = method == "block" and unfiltered and vocab > 1024 and law["temperature"] > 0
    n1 = math.prod(logits.shape[1:-1])

    def gap(draw: int) -> float:
        stream = (seed, draw // n1, draw % n1, 0) if logits.dim() > 1 else (seed, 0, 0, 0)
        return race_gap(rows[draw], law["temperature"], stream) if raced else INF

    assert_same_tokens(flat[exact], wanted.flatten()[exact], lambda i: gap(int(exact.nonzero().flatten()[i])))
    same = exact & (flat == wanted.flatten())
    for a, b, name in zip(ours, theirs, ours._fields, strict=True):
        a, b = a.flatten()[same].double(), b.flatten()[same].double()
        error = (a - b).abs() / b.abs().clamp(min=1.0)
        assert bool(((error <= 2e-5) | (a == b)).all()), (name, a, b)


METHOD = st.sampled_from(["block", "gumbel"])


@FAST
@given(batches(), laws(), METHOD, st.integers(-(2**63), 2**63 - 1))
def test_categorical(logits, law, method, seed):
    check_categorical(logits, law, method, seed)


@FAST
@given(batches(), st.sampled_from([0.3, 1.0, 5.0]), METHOD, st.integers(0, 2**40))
def test_categorical_without_filters(logits, temperature, method, seed):
    check_categorical(logits, {"temperature": temperature}, method, seed)


@pytest.mark.slow
@LONG
@given(batches(), laws(), METHOD, st.integers(-(2**63), 2**63 - 1))
def test_categorical_for_long(logits, law, method, seed):
    check_categorical(logits, law, method, seed)


def check_topk(logits: torch.Tensor, law: dict[str, float], seed: int, share: float) -> None:
    vocab = logits.shape[-1]
    rows = logits.reshape(-1, vocab)
    if bool(near_boundary(rows, law).any()):
        return
    most = int((possible(rows, law) if law["temperature"] > 0 else rows > -INF).sum(1).min())
    k = max(1, int(most * share))
    got = gumbel_topk(logits, k, rng=seed, return_scores=True, backend="cpp", **law)
    wanted = gumbel_topk(logits, k, rng=seed, return_scores=True, backend="reference", **law)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])
    if most < vocab:
        for backend in ("cpp", "reference"):
            with pytest.raises(InvalidDistribution, match="fewer than k"):
                gumbel_topk(logits, most + 1, rng=seed, backend=backend, **law)


@FAST
@given(batches(), laws(), st.integers(0, 2**40), st.sampled_from([0.0, 0.1, 1.0]))
def test_gumbel_topk(logits, law, seed, share):
    check_topk(logits, law, seed, share)


@pytest.mark.slow
@LONG
@given(batches(), laws(), st.integers(0, 2**40), st.sampled_from([0.0, 0.1, 1.0]))
def test_gumbel_topk_for_long(logits, law, seed, share):
    check_topk(logits, law, seed, share)


@settings(FAST, max_examples=60)
@given(DTYPES, VOCABS, st.integers(1, 9), laws(), METHOD, st.booleans(), st.integers(0, 2**32))
def test_lm_head_categorical(dtype, vocab, rows, law, method, with_bias, seed):
    """Integer operands, so that the product is exact."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, 5), (vocab, 5), (vocab,))
    hidden, weight, bias = (torch.randint(-2, 3, shape, generator=generator).to(dtype) for shape in shapes)
    bias = bias if with_bias else None
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    exact = ~near_boundary(logits, law)
    got = lm_head_categorical(hidden, weight, bias, method=method, rng=seed, backend="cpp", **law)
    narrow = logits if dtype == torch.float64 else logits.float()
    assert torch.equal(got[exact], categorical(narrow, method=method, rng=seed, backend="cpp", **law)[exact])


@FAST
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=40),
    DTYPES,
    st.sampled_from(
        [{}, {"method": "gumbel"}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.1}, {"temperature": 0.0}]
    ),
    st.sampled_from([0, 1100]),
)
def test_any_floats(row, dtype, options, padding):
    """NaN, infinities, denormals, extremes: both backends draw the same, or refuse for the same reason."""
    logits = torch.tensor([row], dtype=torch.float64).to(dtype)
    logits = torch.nn.functional.pad(logits, (padding, 0), value=-INF)
    outcomes = []
    for backend in ("cpp", "reference"):
        try:
            outcomes.append(categorical(logits, rng=RowStreams(3, 1), backend=backend, **options).tolist())
        except InvalidDistribution as error:
            outcomes.append(str(error))
    if outcomes[0] != outcomes[1]:
        assert isinstance(outcomes[0], list)
        assert bool(near_boundary(logits, {"temperature": 1.0, **options})[0]), outcomes
