"""`lm_head_categorical`: the unfused draw where the product is exact, its law where it is not, and its
arguments.
"""

from __future__ import annotations

import math

import driftmax
import pytest
import torch
from driftmax import InvalidDistribution, RowStreams, categorical, lm_head_categorical

from tests import statistics as st

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPTIONS = [
    {}, {"method": "gumbel"}, {"temperature": 0.0}, {"temperature": 0.7}, {"top_k": 30}, {"top_p": 0.9},
    {"min_p": 0.02, "temperature": 1.4}, {"top_k": 200, "top_p": 0.95, "method": "gumbel"},
]  # fmt: skip


def integers(
    rows: int, vocab: int, depth: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """Operands whose product is an integer below 2^8: exact in every dtype, however it is summed."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, depth), (vocab, depth), (vocab,))
    return tuple(torch.randint(-2, 3, shape, generator=generator).to(dtype) for shape in shapes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 17), (5, 1024), (300, 1500), (2, 40_000)])
def test_equals_the_unfused_draw_where_the_product_is_exact(rows, vocab, options, dtype, backend):
    """Tokens bitwise and by-products closely, over one tile and several, with and without bias, one row and
    300.
    """
    if backend == "reference" and (vocab > 2000 or rows > 5):
        rows, vocab = 2, 2000  # its cost is not the point
    hidden, weight, bias = integers(rows, vocab, 12, dtype)
    for some_bias in (None, bias):
        logits = hidden.double() @ weight.double().T + (0 if some_bias is None else some_bias.double())
        wide = logits if dtype == torch.float64 else logits.float()
        wanted, theirs = categorical(wide, rng=5, return_stats=True, **options)
        tokens, ours = lm_head_categorical(
            hidden, weight, some_bias, rng=5, return_stats=True, backend=backend, **options
        )
        assert torch.equal(tokens, wanted)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_sequences_streams_and_per_row_temperatures(backend):
    hidden, weight, bias = integers(12, 3000, 8, torch.float32)
    hidden = hidden.view(4, 3, 8)
    streams = RowStreams(
        torch.tensor([5, -1, 2**40, 0]),
        [9, 2**32 - 1, 0, 77],
        step=torch.tensor(6),
        positions=torch.arange(12).view(4, 3),
    )
    temperature = torch.tensor([[1.0], [0.0], [2.5], [0.3]])
    for filters in ({}, {"top_k": torch.tensor([[3, 2000, 50]])}):
        got = lm_head_categorical(
            hidden, weight, bias, temperature=temperature, rng=streams, backend=backend, **filters
        )
        assert torch.equal(
            got, categorical(hidden @ weight.T + bias, temperature=temperature, rng=streams, **filters)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"method": "gumbel"}, {"top_p": 0.9}], ids=str)
def test_batch_split(options, dtype):
    """Rows alone, in fours and together; 300 rows are more than one pass takes."""
    hidden, weight, bias = integers(300, 2100, 6, dtype)
    streams = RowStreams(4, 300)
    whole = lm_head_categorical(hidden, weight, bias, rng=streams, **options)
    for index in (slice(0, 1), slice(1, 5), slice(250, 300), torch.tensor([299, 0, 7])):
        assert torch.equal(
            lm_head_categorical(hidden[index], weight, bias, rng=streams[index], **options), whole[index]
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["block", "gumbel"])
def test_law(method, dtype):
    """Chi-square of 10 000 draws of one hidden state: sees a total variation of 0.06 (statistics.py)."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 16, generator=generator).to(dtype)
    weight = torch.randn(2500, 16, generator=generator).to(dtype)
    logits = hidden.double() @ weight.double().T
    if dtype in (torch.float16, torch.bfloat16):
        logits = (hidden @ weight.T).double()  # a product that its dtype rounds is the law drawn from
    tokens = lm_head_categorical(hidden.expand(10_000, 16), weight, rng=3, method=method)
    st.assert_law(tokens, st.softmax(logits[0]))


def test_rounding_of_the_product_is_all_that_differs():
    """Real-valued operands in float32: of 2000 draws at most a handful differ from those of the float64
    product.
    """
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (
        torch.randn(2000, 64, generator=generator),
        torch.randn(3000, 64, generator=generator) / 8,
    )
    got = lm_head_categorical(hidden, weight, rng=1)
    wanted = categorical(hidden.double() @ weight.double().T, rng=1)
    assert int((got != wanted).sum()) <= 4  # each differs with probability of about 1e-5


def test_threads_and_views():
    hidden, weight, bias = integers(40, 5000, 8, torch.float32)
    wanted = lm_head_categorical(hidden, weight, bias, rng=2)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(lm_head_categorical(hidden, weight, bias, rng=2), wanted)
    strided = (
        hidden.repeat_interleave(2, dim=1)[:, ::2],
        weight.T.contiguous().T,
        bias.repeat_interleave(3)[::3],
    )
    assert torch.equal(lm_head_categorical(*strided, rng=2), wanted)
    out = torch.full((40, 2), -1)
    assert torch.equal(lm_head_categorical(hidden, weight, bias, rng=2, out=out[:, 0]), wanted)
    assert torch.equal(out[:, 0], wanted)
    assert bool((out[:, 1] == -1).all())


def test_empty_batches(backend):
    weight = torch.zeros(7, 3)
    assert lm_head_categorical(torch.zeros(0, 3), weight, rng=0, backend=backend).shape == (0,)
    tokens, stats = lm_head_categorical(
        torch.zeros(2, 0, 3), weight, rng=0, return_stats=True, backend=backend
    )
    assert tokens.shape == stats.log_z.shape == (2, 0)
    assert lm_head_categorical(torch.zeros(3), weight, rng=0, backend=backend).shape == ()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"method": "gumbel"}, {"top_k": 5}, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize(
    ("value", "words"), [(math.nan, "NaN"), (math.inf, r"\+inf"), (-math.inf, "no token")]
)
def test_bad_values_name_the_row(value, words, options, dtype, backend):
    """A bias reaches every row, a hidden state its own."""
    hidden, weight, bias = integers(6, 2100, 4, dtype)
    if words == "no token":
        with pytest.raises(InvalidDistribution, match=f"row 0: .*{words}"):
            lm_head_categorical(
                hidden, weight, torch.full_like(bias, value), rng=0, backend=backend, **options
            )
        return
    bias[2000] = value
    with pytest.raises(InvalidDistribution, match=f"row 0, position 0: .*{words}"):
        lm_head_categorical(hidden.view(3, 2, 4), weight, bias, rng=0, backend=backend, **options)
    if words == "NaN":
        hidden[4, 0] = value
        with pytest.raises(InvalidDistribution, match=r"row 2, position 0: .*NaN"):
            lm_head_categorical(hidden.view(3, 2, 4), weight, rng=0, backend=backend, **options)


@pytest.mark.parametrize("options", [{}, {"method": "gumbel"}, {"top_p": 0.9}], ids=str)
def test_impossible_tokens(options, backend):
    """A bias of -inf bans a token, or all but one."""
    hidden, weight, bias = integers(50, 2500, 4, torch.float32)
    bias[: 2500 // 2] = -math.inf
    assert int(lm_head_categorical(hidden, weight, bias, rng=1, backend=backend, **options).min()) >= 1250
    bias[:] = -math.inf
    bias[2222] = -5.0
    tokens, stats = lm_head_categorical(
        hidden, weight, bias, rng=1, return_stats=True, backend=backend, **options
    )
    assert bool((tokens == 2222).all())
    assert stats.margin.tolist() == [1.0] * 50


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"weight": torch.zeros(5, 4)}, ValueError, "weight must have shape"),
        ({"weight": torch.zeros(5)}, ValueError, "weight must have shape"),
        ({"weight": torch.zeros(0, 3)}, ValueError, "no token"),
        ({"weight": torch.zeros(5, 3).double()}, ValueError, "weight is"),
        ({"weight": torch.zeros(5, 3, device="meta")}, ValueError, "weight is"),
        ({"weight": torch.zeros(5, 3).int()}, TypeError, "weight"),
        ({"hidden": torch.zeros(2, 3).long()}, TypeError, "hidden"),
        ({"hidden": torch.zeros(())}, ValueError, "dimension"),
        ({"bias": torch.zeros(4)}, ValueError, "bias must have shape"),
        ({"bias": torch.zeros(5).half()}, ValueError, "bias is"),
        ({"temperature": -0.1}, ValueError, "temperature"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"out": torch.zeros(3, dtype=torch.int64)}, ValueError, "shape"),
    ],
)
def test_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        driftmax.lm_head_categorical(
            **{"hidden": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "rng": 0, **arguments}
        )
