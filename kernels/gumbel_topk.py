"""`gumbel_topk`: exact scores of every kept token, the k largest by bisection of their bit patterns, then
their ranks.

Scores are float64 and stored, some rows at a time; nothing is sorted: a rank is a count over the k chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from driftmax.errors import status_word
from driftmax.kernels.categorical import FLOATS, Batch, summed
from driftmax.kernels.filters import (
    LIST,
    above_min_p,
    find_kept,
    law_of,
    peak_of,
    row_total,
    source_tile,
    width,
    within,
)
from driftmax.kernels.launch import BLOCK, halves, launch, splits, stream
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
_SCORES = 1 << 25  # scores stored at a time: 256 MB


@triton.jit(do_not_specialize=["t_lo", "t_hi", "n1", "draws", "k"])
def kept_sets(
    logits, n1, s0, s1, vocab, blocks, draws, t_lo, t_hi, temperatures, k, ks, p_lo, p_hi, ps, m_lo, m_hi, ms,
    sums, listed, kept, LIST: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """`kept` [2, draws]: threshold key and last index of each draw's kept set; a bad row keeps everything."""
    draw = tl.program_id(0).to(tl.int64)
    scale, greedy = scale_of(per_draw(draw, t_lo, t_hi, temperatures))
    row = row_of(logits, draw, n1, s0, s1)
    most, p, m = law_of(draw, greedy, k, ks, p_lo, p_hi, ps, m_lo, m_hi, ms)
    top, mass = row_total(sums + draw * blocks, draws.to(tl.int64) * blocks, blocks, scale, 64)
    threshold = tl.full((), -(1 << 63), tl.int64)
    last = tl.full((), 1 << 62, tl.int64)
    if (mass == mass) & (top < float("inf")) & (top > float("-inf")):
        peak = peak_of(top, logits.dtype.element_ty)
        threshold, last, _, _, _ = find_kept(
            row, listed + draw * LIST, vocab, most, p, m, peak, scale, mass, LIST, Q
        )
    tl.store(kept + draw, threshold)
    tl.store(kept + draws + draw, last)


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
        "each",
        "begin",
    ]
)
def perturbed(
    logits, n1, s0, s1, vocab, blocks, draws, begin, each,
    seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps,
    t_lo, t_hi, temperatures, m_lo, m_hi, ms, sums, kept, scores, status,
    Q: tl.constexpr,
):  # fmt: skip
    """Scores y + G of draw `begin` + program, -inf where a token is not kept. `kept` is None without
    filters.
    """
    local = tl.program_id(0).to(tl.int64)
    draw = begin + local
    part = tl.program_id(1)
    scale, greedy = scale_of(per_draw(draw, t_lo, t_hi, temperatures))
    row = row_of(logits, draw, n1, s0, s1)
    k0, k1, position, number, row_id = stream_words(
        draw, n1, seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps
    )
    worst = 0
    if kept is not None:
        m = tl.where(greedy, 0.0, per_draw(draw, m_lo, m_hi, ms))
        threshold = tl.load(kept + draw)
        last = tl.load(kept + draws + draw)
        top, _ = row_total(sums + draw * blocks, draws.to(tl.int64) * blocks, blocks, scale, 64)
    for tile in range(part * each, tl.minimum((part + 1) * each, tl.cdiv(vocab, 4 * Q))):
        first = tl.cast(tile, tl.int64) * (4 * Q)
        values = load_tile(row, first, vocab, Q)
        code = status_of(values)
        worst = tl.where(worst == 0, code, worst)
        index = tile_index(first, Q)
        if kept is not None:
            inside = within(values, index, threshold, last)
            if m > 0.0:
                inside = inside & above_min_p(values, top, scale, m)
            values = tl.where(inside, values, float("-inf"))
        hi = element_words(first // 4, Q, TOKEN, 0, k0, k1, position, number, row_id)
        lo = element_words(first // 4, Q, TOKEN, 1, k0, k1, position, number, row_id)
        score = exact_scores(values, scale, greedy, hi, lo)
        tl.store(
            scores + local * vocab + index, tl.where(score == score, score, float("-inf")), mask=index < vocab
        )
    report(status, draw, worst)


@triton.jit(do_not_specialize=["begin", "k"])
def select(
    scores, vocab, k, begin, listed, found, places, counts, status, LIST: tl.constexpr, Q: tl.constexpr
):
    """The k largest scores of a row (fewer where fewer are finite), in ascending order of token: `found`
    and `places`.
    """
    local = tl.program_id(0).to(tl.int64)
    row = scores + local * vocab
    top = tl.full((), float("-inf"), tl.float64)
    for first in range(0, vocab, 4 * Q):
        top = tl.maximum(top, largest(load_tile(row, first, vocab, Q)))
    count = tl.zeros((), tl.int64)
    if top > float("-inf"):
        one = tl.full((), 1.0, tl.float64)
        wanted = tl.cast(k, tl.int64)
        threshold, last, cut, size, compact = find_kept(
            row, listed + local * LIST, vocab, wanted, one, one * 0.0, top, one, one, LIST, Q
        )
        for start in range(0, size, 4 * Q):
            values, index = source_tile(row, listed + local * LIST, start, size, compact, cut, Q)
            values = tl.reshape(values, (4 * Q,))
            index = tl.reshape(index, (4 * Q,))
            chosen = within(values, index, threshold, last).to(tl.int32)
            place = count + tl.cumsum(chosen, axis=0) - 1
            mask = (chosen > 0) & (place < k)
            tl.store(found + local * k + place, values, mask=mask)
            tl.store(places + local * k + place, index, mask=mask)
            count += tl.sum(chosen, axis=0)
    tl.store(counts + local, count)
    report(status, begin + local, tl.where(top == float("-inf"), 3, tl.where(count < k, 4, 0)))


@triton.jit(do_not_specialize=["begin", "k"])
def rank(found, places, counts, k, begin, tokens, scores, MINE: tl.constexpr, OTHERS: tl.constexpr):
    """Put `MINE` of a row's chosen tokens where their rank among all of them says; token 0 where there are
    too few.
    """
    local = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + local)
    mine = tl.program_id(1).to(tl.int64) * MINE + tl.arange(0, MINE)
    score = tl.load(found + local * k + mine, mask=mine < count, other=float("-inf"))
    token = tl.load(places + local * k + mine, mask=mine < count, other=0)
    place = tl.zeros((MINE,), tl.int64)
    for first in range(0, count, OTHERS):
        other = first + tl.arange(0, OTHERS).to(tl.int64)
        rival = tl.load(found + local * k + other, mask=other < count, other=float("-inf"))
        rival_token = tl.load(places + local * k + other, mask=other < count, other=0)
        ahead = (rival[None, :] > score[:, None]) | (
            (rival[None, :] == score[:, None]) & (rival_token[None, :] < token[:, None])
        )
        place += tl.sum((ahead & (other < count)[None, :]).to(tl.int32), axis=1)
    place = tl.where(mine < count, place, mine)
    sink = (begin + local) * k + place
    tl.store(tokens + sink, token, mask=mine < k)
    if scores is not None:
        tl.store(scores + sink, score, mask=mine < k)


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
    blocks = triton.cdiv(batch.vocab, BLOCK)
    shape = (*batch.where, blocks, batch.draws)
    sums = kept = None
    floor = (*halves(min_p), min_ps)
    if not (
        top_ks is None and top_ps is None and min_ps is None and top_k == 0 and top_p == 1.0 and min_p == 0.0
    ):
        sums = summed(batch)
        kept = batch.new(2, batch.draws, dtype=torch.int64)
        listed = batch.new(batch.draws, LIST, dtype=torch.int32)
        law = (top_k, top_ks, *halves(top_p), top_ps, *floor)
        arguments: tuple[Any, ...] = (*shape, *batch.heat, *law, sums, listed, kept)
        launch(kept_sets, (batch.draws,), *arguments, LIST=LIST, Q=width(), num_warps=8)
    most = min(batch.draws, max(1, _SCORES // batch.vocab))
    all_scores = batch.new(most, batch.vocab, dtype=torch.float64)
    listed = batch.new(most, LIST, dtype=torch.int32)
    found = batch.new(most, k, dtype=torch.float64)
    places, counts = batch.new(most, k, dtype=torch.int64), batch.new(most, dtype=torch.int64)
    for begin in range(0, batch.draws, most):
        count = min(most, batch.draws - begin)
        parts, each = splits(logits, count, blocks)
        arguments = (*shape, begin, each, *streams, *batch.heat, *floor, sums, kept, all_scores, status)
        launch(perturbed, (count, parts), *arguments, Q=256, num_warps=4)
        arguments = (all_scores, batch.vocab, k, begin, listed, found, places, counts, status)
        launch(select, (count,), *arguments, LIST=LIST, Q=width(), num_warps=8)
        arguments = (found, places, counts, k, begin, tokens, scores)
        launch(rank, (count, triton.cdiv(k, 32)), *arguments, MINE=32, OTHERS=128, num_warps=4)


def specialisations() -> Iterator[tuple[Any, ...]]:
    """Arguments of `gumbel_topk` that between them launch every variant worth compiling ahead of time."""
    one, off = (5, None, None, None, 0, None), (1.0, None, 0, None, 1.0, None, 0.0, None)
    tokens, scores = torch.empty(2, 40, dtype=torch.int64), torch.empty(2, 40, dtype=torch.float64)
    for dtype in FLOATS:
        yield (torch.empty(2, 128 * BLOCK, dtype=dtype), 40, tokens, None, *one, *off)
    logits = torch.empty(2, 128 * BLOCK)
    yield (logits, 40, tokens, scores, *one, 1.0, None, 500, None, 0.95, None, 0.01, None)
