"""`gumbel_topk`: the exact scores of the few tokens that may be among the k largest, then their ranks.

``screen`` reads the logits once and bounds the best score of each group of tokens from both sides, in float32
and without low words. ``bound`` takes the k-th largest lower bound: k scores reach it. ``pick`` makes the
exact scores (float64) of the tiles that may reach it, and lists the tokens that do, in any order. ``select``
bisects the k-th of the list where it is long. Nothing is sorted: ``rank`` counts, for each, the better ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from driftmax.errors import status_word
from driftmax.kernels.categorical import FLOATS, Batch, summed
from driftmax.kernels.filters import above_min_p, find_kept, search, search_sizes, source_tile, within
from driftmax.kernels.launch import BLOCK, Stream, halves, launch, splits, stream
from driftmax.kernels.narrow import BAD, LIST, kth_largest, law_of, narrowed, ordered
from driftmax.kernels.philox import element_words, stream_words
from driftmax.kernels.race import (
    exact_scores,
    largest,
    load_tile,
    per_draw,
    report,
    row_of,
    scale_of,
    status_of,
    tile_index,
)
from torch import Tensor

TOKEN = tl.constexpr(18)
GROUP = 64  # tokens that share a bound: up to V / 64 draws without replacement are screened
DIRECT = tl.constexpr(1024)  # a list this short is ranked as it is
_PLACES = 1 << 24  # places of lists at a time: 192 MB, of which little is touched


@triton.jit(do_not_specialize=["t_lo", "t_hi", "n1", "draws", "k", "p_lo", "p_hi", "m_lo", "m_hi"])
def kept_sets(
    logits, n1, s0, s1, vocab, draws, t_lo, t_hi, temperatures, k, ks, p_lo, p_hi, ps, m_lo, m_hi, ms,
    levels, sizes, listed, held, kept, LIST: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """`kept` [2, draws]: threshold key and last index of each draw's kept set; a bad row keeps everything."""
    draw = tl.program_id(0).to(tl.int64)
    scale, greedy = scale_of(per_draw(draw, t_lo, t_hi, temperatures))
    row = row_of(logits, draw, n1, s0, s1)
    most, p, _ = law_of(draw, vocab, greedy, k, ks, p_lo, p_hi, ps, m_lo, m_hi, ms)
    threshold = tl.full((), -(1 << 63), tl.int64)
    last = tl.full((), 1 << 62, tl.int64)
    if tl.load(sizes + draw) != BAD:
        kind: tl.constexpr = held.dtype.element_ty
        threshold, last = search(
            row, listed + draw * LIST, held + draw * LIST, levels, sizes, draws, draw, vocab, most, p, scale,
            kind, Q,
        )  # fmt: skip
    tl.store(kept + draw, threshold)
    tl.store(kept + draws + draw, last)


@triton.jit
def kept_tile(row, first, vocab, draw, draws, scale, greedy, m_lo, m_hi, ms, levels, kept, Q: tl.constexpr):
    """(logits of a tile, -inf where a token is not kept; status code). `kept` is None without filters."""
    values = load_tile(row, first, vocab, Q)
    code = status_of(values)
    if kept is not None:
        inside = within(values, tile_index(first, Q), tl.load(kept + draw), tl.load(kept + draws + draw))
        m = tl.where(greedy, 0.0, per_draw(draw, m_lo, m_hi, ms))
        if m > 0.0:
            inside = inside & above_min_p(values, tl.load(levels + draw), scale, m)
        values = tl.where(inside, values, float("-inf"))
    return values, code


@triton.jit
def gumbel_bounds(hi):
    """(lower, upper) bounds of -log E, float32, from the high word alone; true but for a few roundings.

    E = -log(1 - U) with hi < 2**32 U < hi + 1, and U (1 + U/2) <= E <= U (1 - U/2) / (1 - U): close where U
    is small, that is for the tokens that can win.
    """
    least = hi.to(tl.float32) * 2.3283064365386963e-10
    most = (hi.to(tl.float32) + 1.0) * 2.3283064365386963e-10
    rest = (hi ^ 0xFFFFFFFF).to(tl.float32) * 2.3283064365386963e-10  # 1 - most, no cancellation
    lower = tl.log2(most * (1.0 - 0.5 * most) / rest) * -0.6931471805599453
    upper = tl.log2(least * (1.0 + 0.5 * least)) * -0.6931471805599453
    return lower, upper


@triton.jit
def score_bounds(values, scale, greedy, hi):
    """(lower, upper) bounds, float32, of the exact scores of a tile; what cannot be judged in float32 has
    -inf and +inf.
    """
    ordinary = (scale > 1e-30) & (scale < 1e30)
    y = values.to(tl.float32) * tl.where(ordinary, 1.0 / scale, float("nan")).to(tl.float32)
    lower, upper = gumbel_bounds(hi)
    lower = tl.where(greedy, 0.0, lower)
    upper = tl.where(greedy, 0.0, upper)
    # 2**-19 covers several float32 roundings, and 2**-22 relative in the hardware's logarithm
    lower = y + lower - (tl.abs(y) + tl.abs(lower) + 1.0) * 1.9073486328125e-06
    upper = y + upper + (tl.abs(y) + tl.abs(upper) + 1.0) * 1.9073486328125e-06
    lower = tl.where(lower == lower, lower, float("-inf"))
    upper = tl.where(upper == upper, upper, float("inf"))
    impossible = values == float("-inf")
    return tl.where(impossible, float("-inf"), lower), tl.where(impossible, float("-inf"), upper)


@triton.jit(
    do_not_specialize=[
        "seed_lo",
        "seed_hi",
        "seeds_stride",
        "step",
        "t_lo",
        "t_hi",
        "n1",
        "draws",
        "begin",
        "each",
        "m_lo",
        "m_hi",
    ]
)
def screen(
    logits, n1, s0, s1, vocab, draws, begin, each, groups,
    seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps,
    t_lo, t_hi, temperatures, m_lo, m_hi, ms, levels, kept, bounds, status,
    GROUP: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """`bounds` [2, rows, groups], of draw `begin` + program: lower and upper bounds of the best score in each
    group of tokens. Reports NaN and +inf.
    """
    local = tl.program_id(0).to(tl.int64)
    draw = begin + local
    part = tl.program_id(1)
    scale, greedy = scale_of(per_draw(draw, t_lo, t_hi, temperatures))
    row = row_of(logits, draw, n1, s0, s1)
    k0, k1, position, number, row_id = stream_words(
        draw, n1, seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps
    )
    sink = bounds + local * groups
    plane = tl.num_programs(0).to(tl.int64) * groups
    worst = 0
    for tile in range(part * each, tl.minimum((part + 1) * each, tl.cdiv(vocab, 4 * Q))):
        first = tl.cast(tile, tl.int64) * (4 * Q)
        values, code = kept_tile(
            row, first, vocab, draw, draws, scale, greedy, m_lo, m_hi, ms, levels, kept, Q
        )
        worst = tl.where(worst == 0, code, worst)
        hi = element_words(first // 4, Q, TOKEN, 0, k0, k1, position, number, row_id)
        lower, upper = score_bounds(values, scale, greedy, hi)
        group = first // GROUP + tl.arange(0, 4 * Q // GROUP)
        inside = group < groups
        tl.store(sink + group, tl.max(tl.reshape(lower, (4 * Q // GROUP, GROUP)), axis=1), mask=inside)
        tl.store(
            sink + plane + group, tl.max(tl.reshape(upper, (4 * Q // GROUP, GROUP)), axis=1), mask=inside
        )
    report(status, draw, worst)


@triton.jit(do_not_specialize=["k"])
def bound(bounds, groups, k, ends, counts, Q: tl.constexpr):
    """`ends`: a bound that at least k scores of a row reach, -inf where there are fewer groups. Clears
    `counts`.
    """
    local = tl.program_id(0).to(tl.int64)
    tl.store(ends + local, kth_largest(bounds + local * groups, groups, tl.cast(k, tl.int64), Q))
    tl.store(counts + local, tl.zeros((), tl.int32))


@triton.jit(
    do_not_specialize=[
        "seed_lo",
        "seed_hi",
        "seeds_stride",
        "step",
        "t_lo",
        "t_hi",
        "n1",
        "draws",
        "begin",
        "each",
        "m_lo",
        "m_hi",
    ]
)
def pick(
    logits, n1, s0, s1, vocab, draws, begin, each, groups,
    seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps,
    t_lo, t_hi, temperatures, m_lo, m_hi, ms, levels, kept, bounds, ends, listed, held, counts,
    GROUP: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """`listed`, `held` [rows, vocab]: tokens and exact scores y + G that reach `ends`, `counts` of them,
    in no order.
    """
    local = tl.program_id(0).to(tl.int64)
    draw = begin + local
    part = tl.program_id(1)
    scale, greedy = scale_of(per_draw(draw, t_lo, t_hi, temperatures))
    row = row_of(logits, draw, n1, s0, s1)
    k0, k1, position, number, row_id = stream_words(
        draw, n1, seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps
    )
    upper = bounds + (tl.num_programs(0) + local) * groups
    end = tl.load(ends + local)
    for tile in range(part * each, tl.minimum((part + 1) * each, tl.cdiv(vocab, 4 * Q))):
        first = tl.cast(tile, tl.int64) * (4 * Q)
        group = first // GROUP + tl.arange(0, 4 * Q // GROUP)
        best = tl.max(tl.load(upper + group, mask=group < groups, other=float("-inf")), axis=0)
        if (best >= end) & (best > float("-inf")):
            values, _ = kept_tile(
                row, first, vocab, draw, draws, scale, greedy, m_lo, m_hi, ms, levels, kept, Q
            )
            hi = element_words(first // 4, Q, TOKEN, 0, k0, k1, position, number, row_id)
            lo = element_words(first // 4, Q, TOKEN, 1, k0, k1, position, number, row_id)
            score = tl.reshape(exact_scores(values, scale, greedy, hi, lo), (4 * Q,))
            chosen = (score >= end.to(tl.float64)) & (score > float("-inf"))
            found = tl.sum(chosen.to(tl.int32), axis=0)
            if found > 0:
                start = tl.atomic_add(counts + local, found)
                place = local * vocab + start + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
                tl.store(listed + place, (first + tl.arange(0, 4 * Q)).to(tl.int32), mask=chosen)
                tl.store(held + place, score, mask=chosen)


@triton.jit(do_not_specialize=["begin", "k", "room"])
def select(
    listed, held, vocab, k, begin, room, ends, counts, found, places, status, Q: tl.constexpr
):  # fmt: skip
    """`found` and `places` [rows, room]: scores and tokens of the k best of a list, or of all of a short one;
    `counts` becomes their number.
    """
    local = tl.program_id(0).to(tl.int64)
    listed += local * vocab
    held += local * vocab
    size = tl.load(counts + local)
    end = tl.load(ends + local).to(tl.float64)
    threshold = ordered(end)
    last = tl.full((), 1 << 62, tl.int64)
    if size > DIRECT:
        top = end
        for start in range(0, size, 4 * Q):
            values, _ = source_tile(held, listed, held, start, size, True, end, Q)
            top = tl.maximum(top, largest(values))
        nothing = tl.zeros((), tl.int64)
        zero = tl.zeros((), tl.float64)
        threshold, last = find_kept(
            held, listed, held, size, True, vocab, tl.minimum(k, size).to(tl.int64), zero + 1.0, end,
            ordered(top), nothing, zero, zero, top, zero + 1.0, Q,
        )  # fmt: skip
    count = tl.zeros((), tl.int32)
    for start in range(0, size, 4 * Q):
        values, index = source_tile(held, listed, held, start, size, True, end, Q)
        values = tl.reshape(values, (4 * Q,))
        index = tl.reshape(index, (4 * Q,))
        chosen = within(values, index, threshold, last).to(tl.int32)
        place = count + tl.cumsum(chosen, axis=0) - 1
        mask = (chosen > 0) & (place < room)
        tl.store(found + local * room + place, values, mask=mask)
        tl.store(places + local * room + place, index, mask=mask)
        count += tl.sum(chosen, axis=0)
    tl.store(counts + local, count)
    report(status, begin + local, tl.where(size == 0, 3, tl.where(size < k, 4, 0)))


@triton.jit(do_not_specialize=["begin", "k", "room"])
def rank(found, places, counts, k, begin, room, tokens, scores, MINE: tl.constexpr, OTHERS: tl.constexpr):
    """Put a row's chosen tokens, `MINE` at a time, where their rank among all of them says; token 0 where
    there are too few.
    """
    local = tl.program_id(0).to(tl.int64)
    found += local * room
    places += local * room
    count = tl.load(counts + local)
    step = tl.num_programs(1) * MINE
    for start in range(tl.program_id(1) * MINE, tl.maximum(count, k), step):
        mine = start + tl.arange(0, MINE)
        score = tl.load(found + mine, mask=mine < count, other=float("-inf"))
        token = tl.load(places + mine, mask=mine < count, other=0)
        place = tl.zeros((MINE,), tl.int32)
        for first in range(0, count, OTHERS):
            other = first + tl.arange(0, OTHERS)
            rival = tl.load(found + other, mask=other < count, other=float("-inf"))
            rival_token = tl.load(places + other, mask=other < count, other=0)
            ahead = (rival[None, :] > score[:, None]) | (
                (rival[None, :] == score[:, None]) & (rival_token[None, :] < token[:, None])
            )
            place += tl.sum((ahead & (other < count)[None, :]).to(tl.int32), axis=1)
        place = tl.where(mine < count, place, mine)
        sink = (begin + local) * k + place
        tl.store(tokens + sink, token, mask=place < k)
        if scores is not None:
            tl.store(scores + sink, score, mask=place < k)


def draw_some(
    batch: Batch,
    begin: int,
    count: int,
    k: int,
    streams: Stream,
    floor: tuple[Any, ...],
    kept: tuple[Tensor | None, Tensor | None],
    tokens: Tensor,
    scores: Tensor | None,
    status: Tensor,
) -> None:
    """Draws `begin` to `begin` + `count`; `floor` is the halves of min_p, and min_ps."""
    vocab, groups, room = batch.vocab, triton.cdiv(batch.vocab, GROUP), max(k, min(DIRECT.value, batch.vocab))
    bounds = batch.new(2, count, groups, dtype=torch.float32)
    ends, counts = batch.new(count, dtype=torch.float32), batch.new(count, dtype=torch.int32)
    listed, held = batch.new(count, vocab, dtype=torch.int32), batch.new(count, vocab, dtype=torch.float64)
    found, places = batch.new(count, room, dtype=torch.float64), batch.new(count, room, dtype=torch.int64)
    tiles = triton.cdiv(vocab, BLOCK)
    parts, each = splits(batch.logits, count, tiles, waves=32)
    shape = (*batch.where, batch.draws, begin, each, groups, *streams, *batch.heat, *floor, *kept, bounds)
    launch(screen, (count, parts), *shape, status, GROUP=GROUP, Q=BLOCK // 4, num_warps=4)
    launch(bound, (count,), bounds, groups, k, ends, counts, Q=512, num_warps=8)
    launch(pick, (count, parts), *shape, ends, listed, held, counts, GROUP=GROUP, Q=BLOCK // 4, num_warps=4)
    arguments: tuple[Any, ...] = (listed, held, vocab, k, begin, room, ends, counts, found, places, status)
    launch(select, (count,), *arguments, Q=512, num_warps=8)
    arguments = (found, places, counts, k, begin, room, tokens, scores)
    launch(rank, (count, triton.cdiv(k, 32)), *arguments, MINE=32, OTHERS=128, num_warps=4)


def gumbel_topk(
    logits: Tensor,
    k: int,
    tokens: Tensor,
    scores: Tensor | None,
    seed: int,
    seeds: Tensor | None,
    rows: Tensor | None,
    positions: Tensor | None,
    step: int,
    steps: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    top_k: int,
    top_ks: Tensor | None,
    top_p: float,
    top_ps: Tensor | None,
    min_p: float,
    min_ps: Tensor | None,
) -> None:
    """Write `k` tokens per row of `logits`. See ``driftmax.gumbel_topk``; arguments as in its op's schema."""
    batch = Batch(logits, temperature, temperatures)
    streams, status = stream(seed, seeds, rows, positions, step, steps), status_word(logits.device)
    floor = (*halves(min_p), min_ps)
    levels = kept = None
    if (top_k, top_ks, top_p, top_ps, min_p, min_ps) != (0, None, 1.0, None, 0.0, None):
        law = (top_k, top_ks, *halves(top_p), top_ps, *floor)
        narrow = narrowed(batch, law, summed(batch), None)
        levels, kept = narrow.levels, batch.new(2, batch.draws, dtype=torch.int64)
        arguments = (*batch.where, batch.draws, *batch.heat, *law, *narrow, kept)
        size, _, warps = search_sizes(law)
        launch(kept_sets, (batch.draws,), *arguments, LIST=LIST, Q=size, num_warps=warps)
    most = min(batch.draws, max(1, _PLACES // batch.vocab))
    for begin in range(0, batch.draws, most):
        count = min(most, batch.draws - begin)
        draw_some(batch, begin, count, k, streams, floor, (levels, kept), tokens, scores, status)


def specialisations() -> Iterator[tuple[Any, ...]]:
    """Arguments of `gumbel_topk` that between them launch every variant worth compiling ahead of time."""
    one, off = (5, None, None, None, 0, None), (1.0, None, 0, None, 1.0, None, 0.0, None)
    tokens, scores = torch.empty(2, 40, dtype=torch.int64), torch.empty(2, 40, dtype=torch.float64)
    for dtype in FLOATS:
        yield (torch.empty(2, 128 * BLOCK, dtype=dtype), 40, tokens, None, *one, *off)
    for dtype in FLOATS:
        logits = torch.empty(2, 128 * BLOCK, dtype=dtype)
        yield (logits, 40, tokens, scores, *one, 1.0, None, 500, None, 0.95, None, 0.01, None)
