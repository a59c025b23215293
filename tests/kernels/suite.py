"""Triton against the reference. Run by test_kernels.py in a process of its own: whether kernels are
interpreted is settled when they are imported. By hand: ``TRITON_INTERPRET=1 python -m pytest
tests/kernels/suite.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from driftmax import (
    InvalidDistribution,
    RowStreams,
    categorical,
    check_status,
    gumbel_topk,
    lm_head_categorical,
    random,
)
from driftmax.kernels import race
from driftmax.kernels.categorical import Batch
from driftmax.kernels.categorical import summed as block_sums
from driftmax.reference import categorical as oracle
from driftmax.reference import fill as reference_noise
from driftmax.reference.philox import streams, words64

# The screens and clamps of the kernels make NaN on purpose; numpy, which interprets them, remarks on it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FILLS = [random.uniform, random.exponential, random.gumbel, random.normal]


def streams_of(rows: int, device: torch.device) -> RowStreams:
    """Streams in which every field matters: seeds and rows over their whole range, a step on the device."""
    seeds = torch.arange(rows, device=device) * 0x1234567890ABCDE - 5
    ids = (torch.arange(rows, device=device) * 0x3FFFFFFF + 7) % 2**32
    return RowStreams(seeds, ids, step=torch.tensor([2**24 - 1], device=device))


def logits_of(
    rows: int, vocab: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Gaussian logits with ties and impossible tokens."""
    generator = torch.Generator().manual_seed(vocab)
    values = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * 3
    values[:, 1::7] = values[:, 1::7].round()
    if vocab > 3:
        values[:, 2::5] = -torch.inf
    return values.to(device, dtype)


def same(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call with both backends; assert equal results bit for bit, and return the Triton one."""
    found = function(*arguments, **options, backend="triton")
    wanted = function(*arguments, **options, backend="reference")
    check_status()
    for ours, theirs in zip(
        found if isinstance(found, tuple) else (found,),
        wanted if isinstance(wanted, tuple) else (wanted,),
        strict=True,
    ):
        if isinstance(ours, tuple):  # stats are within a bound, not bitwise
            for name, a, b in zip(ours._fields, ours, theirs, strict=True):
                torch.testing.assert_close(
                    a, b, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
                )
        else:
            assert torch.equal(ours, theirs), f"{(ours != theirs).sum()} of {ours.numel()} differ"
    return found


def near_ties(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """Draws whose block race is within the 2**-18 that docs/numerics.md leaves to backends."""
    rows, vocab = logits.shape
    stream = streams(rows, 1, seed, None, None, None, 0, None, logits.device)
    padded = torch.nn.functional.pad(logits.double(), (0, -vocab % 1024), value=-torch.inf).view(
        rows, -1, 1024
    )
    mass = (padded - logits.double().amax(1)[:, None, None]).exp().sum(2)
    clock = reference_noise.exponential(*words64(stream, oracle.BLOCK_NOISE, 0, mass.shape[1])) / mass
    first, second = clock.sort(1).values[:, :2].unbind(1)
    return second <= first * (1 + 2.0**-18)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fill", FILLS, ids=lambda f: f.__name__)
def test_fills_are_the_references_bits(
    fill: Callable[..., torch.Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    same(fill, 20_001, rng=-3, dtype=dtype, device=device)
    same(fill, (3, 1001), rng=streams_of(3, device), dtype=dtype, device=device)


def test_bits_and_a_different_seed(device: torch.device) -> None:
    words = same(random.bits, 5003, rng=2**63, device=device)
    # The comparison sees a wrong key: about 4999 words differ under another seed.
    assert (words != random.bits(5003, rng=2**63 + 1, device=device, backend="reference")).sum() > 4900


@triton.jit
def near_gumbels(words, gumbels, sure, N: tl.constexpr):
    """`race.near_gumbel` of N words."""
    index = tl.arange(0, N)
    gumbel, middle = race.near_gumbel(tl.load(words + index).to(tl.uint32))
    tl.store(gumbels + index, gumbel)
    tl.store(sure + index, middle)


def test_the_screen_of_the_token_race_is_within_its_bound(device: torch.device) -> None:
    """Words at every power of two and between, and the last ones; the exact Gumbel for any low word."""
    half = [k for j in range(32) for k in (2**j - 1, 2**j, 2**j + 1, int(2**j * 1.37))] + list(
        range(4090, 4102)
    )
    words = torch.tensor(half + [2**32 - 1 - k for k in half], dtype=torch.int64)
    words = torch.cat((words, torch.arange(512 - len(words) % 512) * 2**22 + 12_345))
    gumbels = torch.empty(len(words), device=device)
    sure = torch.empty(len(words), dtype=torch.bool, device=device)
    near_gumbels[(1,)](words.to(device), gumbels, sure, N=len(words))
    exact = torch.stack(
        [reference_noise.gumbel(words, torch.full_like(words, low)) for low in (0, 2**31, 2**32 - 1)]
    )
    assert torch.equal(sure.cpu(), (words >= 4096) & (words < 2**32 - 4096))
    error = (gumbels.cpu().double() - exact).abs().amax(0)
    assert error[sure.cpu()].max() < 2.0**-11
    assert error[~sure.cpu()].max() > 2.0**-11  # the test would see a word that the bound does not hold for


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("method", ["block", "gumbel"])
def test_rows_of_one_block_are_a_token_race(method: str, dtype: torch.dtype, device: torch.device) -> None:
    for vocab in (1, 200, 1024):
        logits = logits_of(3, vocab, device, dtype)
        temperature = torch.tensor([1.0, 0.0, 0.7], dtype=torch.float64, device=device)
        same(
            categorical,
            logits,
            temperature=temperature,
            method=method,
            rng=streams_of(3, device),
            return_stats=True,
        )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gumbel_method_is_bitwise_on_long_rows(dtype: torch.dtype, device: torch.device) -> None:
    logits = logits_of(4, 5001, device, dtype)
    temperature = torch.tensor([1.0, 0.0, 0.3, 4.0], dtype=torch.float64, device=device)
    same(
        categorical,
        logits,
        temperature=temperature,
        method="gumbel",
        rng=streams_of(4, device),
        return_stats=True,
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_block_race_agrees_within_its_bound(dtype: torch.dtype, device: torch.device) -> None:
    logits = logits_of(8, 5001, device, dtype)
    found, stats = categorical(logits, rng=11, return_stats=True, backend="triton")
    wanted, expected = categorical(logits, rng=11, return_stats=True, backend="reference")
    differ = found != wanted
    assert not (differ & ~near_ties(logits, 11)).any()
    torch.testing.assert_close(stats.log_z, expected.log_z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.entropy, expected.entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.margin, expected.margin, rtol=1e-5, atol=1e-5)
    greedy = categorical(logits, temperature=0, rng=11, backend="triton")
    assert torch.equal(greedy, logits.argmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block_sums_at_any_temperature(dtype: torch.dtype, device: torch.device) -> None:
    """Rows that spread over a few nats up to a float32's limits; a uniform and a greedy one beyond."""
    scale = torch.tensor([1.0, 1e-30, 1e15, 1e22, 1e36, 1e36, 1.0], device=device)
    temperatures = [0.7, 1e-30, 1e15, 1e22, 1e36, 1e300, 1e-300]
    temperature = torch.tensor(temperatures, dtype=torch.float64, device=device)
    logits = (logits_of(7, 1500, device) * scale[:, None]).to(dtype)
    top, mass, moment = block_sums(Batch(logits, 1.0, temperature)).double()
    rows = torch.nn.functional.pad(logits.double(), (0, 548), value=-torch.inf).view(7, 2, 1024)
    assert torch.equal(top, rows.amax(2))
    y = (rows - rows.amax(2, keepdim=True)) / temperature[:, None, None]
    share = y.exp()
    torch.testing.assert_close(mass, share.sum(2), rtol=2e-6, atol=0)
    wanted = torch.where(share > 0, y * share, 0.0).sum(2)
    torch.testing.assert_close(moment * math.log(2), wanted, rtol=2e-6, atol=1e-7)
    assert (mass[:5] > 1.5).all()
    assert (mass[5] > 300).all()
    assert (mass[6] < 20).all()


def test_a_row_of_more_blocks_than_a_tile(device: torch.device) -> None:
    logits = logits_of(1, 300_000, device).expand(3, -1)
    found, stats = categorical(logits, rng=7, return_stats=True, backend="triton")
    wanted, expected = categorical(logits, rng=7, return_stats=True, backend="reference")
    assert not near_ties(logits, 7).any()
    assert torch.equal(found, wanted)
    for name in ("log_z", "entropy", "margin"):
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name), rtol=1e-5, atol=1e-5)


def test_blocks_of_very_different_height(device: torch.device) -> None:
    logits = logits_of(3, 2100, device)
    logits[:, :1024] -= 1000
    logits[0, 2048:] += 3e38  # its distance from the others overflows float32
    logits[1, :2048] = -torch.inf
    found = categorical(logits, rng=4, backend="triton")
    check_status()
    assert torch.equal(found, categorical(logits, rng=4, backend="reference"))


def test_strides_and_positions(device: torch.device) -> None:
    logits = logits_of(4, 2500, device).view(2, 2, 2500)[:, :, :2100]
    rng = streams_of(2, device).at(positions=torch.tensor([[0, 2**32 - 1], [5, 6]], device=device))
    same(categorical, logits, method="gumbel", rng=rng)


def test_a_draw_does_not_depend_on_its_batch(device: torch.device) -> None:
    logits = logits_of(5, 3000, device)
    rng = streams_of(5, device)
    whole = categorical(logits, rng=rng, backend="triton")
    some = torch.tensor([3, 0], device=device)
    assert torch.equal(whole[some], categorical(logits[some], rng=rng[some], backend="triton"))


FILTERS: list[dict[str, Any]] = [
    {"top_k": 50},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": [1, 40, 3000, 7], "top_p": [0.5, 0.9, 0.999, 1.0], "min_p": [0.0, 0.0, 0.1, 0.3]},
]


@pytest.mark.parametrize("law", FILTERS, ids=str)
def test_filters_keep_the_references_set(law: dict[str, Any], device: torch.device) -> None:
    logits = logits_of(4, 3001, device)
    same(categorical, logits, rng=streams_of(4, device), return_stats=True, **law)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_filters_cut_ties_by_index(dtype: torch.dtype, device: torch.device) -> None:
    logits = logits_of(3, 1500, device, dtype).round()
    same(categorical, logits, top_k=[100, 3, 400], top_p=[1.0, 0.9, 0.7], rng=3, return_stats=True)


def test_filter_wider_than_the_list(device: torch.device) -> None:
    logits = torch.zeros(1, 20_000, device=device)
    same(categorical, logits, top_k=18_000, rng=3, return_stats=True)


def test_filters_by_what_their_list_holds(device: torch.device) -> None:
    """A long row for each way: border of many tiles, border alone, more than the list, k above the blocks."""
    logits = logits_of(6, 20_000, device)
    logits[0] = logits[0].clamp(min=-40) / 8  # flat: top-p keeps most of the row
    logits[1] = -5.0
    logits[1, 3:16_387] = 0.0  # as many ties as the list holds
    logits[2] = -5.0
    logits[2, 3:16_388] = 0.0  # one more
    logits[3] = logits[3].round()  # ties at the cut in most blocks
    logits[4, 30:] = -torch.inf  # fewer tokens than k
    law: dict[str, Any] = {
        "top_k": [20_000, 9000, 9000, 900, 50, 3000],
        "top_p": [0.9, 1.0, 1.0, 1.0, 1.0, 0.99],
    }
    same(categorical, logits, rng=streams_of(6, device), return_stats=True, **law)


def test_rows_of_a_batch_have_filters_of_their_own(device: torch.device) -> None:
    logits = logits_of(6, 5000, device)
    law: dict[str, torch.Tensor] = {
        "temperature": torch.tensor([1.0, 0.0, 0.2, 5.0, 1.0, 1.0], dtype=torch.float64, device=device),
        "top_k": torch.tensor([5000, 5, 9999, 60, 4, 5000], device=device),
        "top_p": torch.tensor([1.0, 0.5, 0.9, 0.8, 1.0, 0.999], dtype=torch.float64, device=device),
        "min_p": torch.tensor([0.0, 0.1, 0.0, 0.0, 0.3, 0.01], dtype=torch.float64, device=device),
    }
    rng = streams_of(6, device)
    whole, stats = same(categorical, logits, rng=rng, return_stats=True, **law)
    for row in (2, 5):  # the same bits alone
        own = {name: values[row : row + 1] for name, values in law.items()}
        token, alone = categorical(
            logits[row : row + 1], rng=rng[row : row + 1], return_stats=True, backend="triton", **own
        )
        assert torch.equal(token, whole[row : row + 1])
        assert all(torch.equal(a, b[row : row + 1]) for a, b in zip(alone, stats, strict=True))


@pytest.mark.parametrize("k", [16, 100])
def test_gumbel_topk_of_long_rows(k: int, device: torch.device) -> None:
    """k below and above the number of groups whose bounds screen a row; ties at temperature 0."""
    temperature = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64, device=device)
    logits = logits_of(3, 6000, device)
    logits[1] = logits[1].round().clamp(max=2)
    same(gumbel_topk, logits, k, temperature=temperature, rng=streams_of(3, device), return_scores=True)


@pytest.mark.parametrize("k", [1, 40, 300])
def test_gumbel_topk_is_bitwise(k: int, device: torch.device) -> None:
    temperature = torch.tensor([0.0, 0.7], dtype=torch.float64, device=device)
    same(gumbel_topk, logits_of(2, 400, device), k, temperature=temperature, rng=9, return_scores=True)
    same(
        gumbel_topk,
        logits_of(2, 2500, device, torch.bfloat16),
        k,
        rng=streams_of(2, device),
        return_scores=True,
    )


def test_gumbel_topk_with_filters(device: torch.device) -> None:
    same(
        gumbel_topk,
        logits_of(2, 2500, device),
        10,
        top_k=[100, 40],
        top_p=[0.95, 1.0],
        rng=9,
        return_scores=True,
    )


HEADS: list[dict[str, Any]] = [
    {},
    {"method": "gumbel"},
    {"temperature": [0.0, 0.5, 1.0, 2.0, 0.0]},
    {"top_k": 50},
]


@pytest.mark.parametrize(
    ("law", "dtype"),
    [*((law, torch.bfloat16) for law in HEADS), *(({}, dtype) for dtype in FLOATS[:2])],
    ids=str,
)
def test_fused_head(law: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    # The product rounds differently, so tokens are equal unless scores tie within it: 5 draws at 1e-5 each.
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(5, 70, generator=generator).to(device, dtype)
    weight = (torch.randn(2300, 70, generator=generator) * 0.3).to(device, dtype)
    bias = torch.randn(2300, generator=generator).to(device, dtype)
    same(lm_head_categorical, hidden, weight, bias, rng=2, return_stats=True, **law)


@pytest.mark.parametrize("draws", [20, 130])
def test_fused_head_in_tiles_of_many_draws(draws: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(draws)
    hidden = torch.randn(draws, 40, generator=generator).to(device, torch.bfloat16)
    weight = (torch.randn(1300, 40, generator=generator) * 0.3).to(device, torch.bfloat16)
    temperature = torch.linspace(0, 1.5, draws, dtype=torch.float64, device=device)
    rng = streams_of(draws, device)
    same(lm_head_categorical, hidden, weight, temperature=temperature, rng=rng, return_stats=True)


def test_fused_head_does_not_depend_on_the_batch(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(67, 40, generator=generator).to(device)
    weight = torch.randn(1200, 40, generator=generator).to(device)
    rng = streams_of(67, device)
    whole, stats = lm_head_categorical(hidden, weight, rng=rng, return_stats=True, backend="triton")
    part, own = lm_head_categorical(hidden[60:], weight, rng=rng[60:], return_stats=True, backend="triton")
    assert torch.equal(whole[60:], part)
    if device.type == "cuda":  # numpy's matrix product, which the interpreter uses, does depend on the shape
        assert torch.equal(stats.log_z[60:], own.log_z)


BAD = [(float("nan"), "NaN"), (float("inf"), r"\+inf")]


@pytest.mark.parametrize("vocab", [100, 3000])
@pytest.mark.parametrize(("value", "reason"), BAD, ids=["nan", "inf"])
@pytest.mark.parametrize("options", [{}, {"method": "gumbel"}, {"top_k": 5}], ids=str)
def test_bad_values_are_reported_and_draws_stay_in_range(
    options: dict[str, Any], value: float, reason: str, vocab: int, device: torch.device
) -> None:
    logits = logits_of(2, vocab, device)
    logits[1, vocab // 2] = value
    tokens = categorical(logits, rng=1, backend="triton", **options)
    assert bool(((tokens >= 0) & (tokens < vocab)).all())
    with pytest.raises(InvalidDistribution, match=f"row 1: .*{reason}"):
        check_status()


@pytest.mark.parametrize("vocab", [100, 3000])
@pytest.mark.parametrize("options", [{}, {"method": "gumbel"}, {"top_p": 0.5}], ids=str)
def test_rows_without_a_token_are_reported(options: dict[str, Any], vocab: int, device: torch.device) -> None:
    logits = torch.full((2, vocab), -torch.inf, device=device)
    logits[0, 3] = 0
    assert categorical(logits, rng=1, backend="triton", **options).tolist() == [3, 0]
    with pytest.raises(InvalidDistribution, match="row 1: no token"):
        check_status()


def test_too_few_tokens_for_topk_are_reported(device: torch.device) -> None:
    tokens = gumbel_topk(logits_of(1, 100, device), 10, top_k=5, rng=1, backend="triton")
    assert bool(((tokens >= 0) & (tokens < 100)).all())
    with pytest.raises(InvalidDistribution, match="fewer than k"):
        check_status()
