"""`categorical`: block sums over the whole machine, then one program per row races the blocks and the
winner's tokens.

``block_sums`` reads the logits once and leaves three numbers for each block of 1024; ``finish`` does the rest
from them and reads one block again. ``token_race`` is the other method, ``small`` is both for rows of one
block; filters: filters.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from driftmax.errors import status_word
from driftmax.kernels import noise
from driftmax.kernels.filters import filtered_rows
from driftmax.kernels.launch import BLOCK, Stream, halves, launch, splits, stream
from driftmax.kernels.philox import element_words, stream_words
from driftmax.kernels.race import (
    LN2,
    first_where,
    largest,
    load_tile,
    per_draw,
    powers,
    race_tile,
    report,
    row_of,
    scale_of,
    store_stats,
    tile_index,
    total,
    widened,
)
from torch import Tensor

TOKEN = tl.constexpr(16)
BLOCK_NOISE = tl.constexpr(17)
SUMMARY = tl.constexpr(64)  # quarter of the blocks that `row_summary` takes at a time


@triton.jit
def store_block(values, scale, sink, plane, kind: tl.constexpr):
    """A block's maximum m, sum of e = exp((l - m)/T) and of log2(e) e: at `sink`, each `plane` further."""
    top = tl.max(values, axis=0)
    coarse: tl.constexpr = (kind == tl.float16) | (kind == tl.bfloat16)
    exponent, mass = powers(values, tl.where(top == float("-inf"), 0.0, top), scale, coarse)
    tl.store(sink, top)
    tl.store(sink + plane, tl.sum(mass, axis=0))
    tl.store(sink + 2 * plane, tl.sum(exponent * mass, axis=0))


@triton.jit(do_not_specialize=["t_lo", "t_hi", "n1", "draws", "each"])
def block_sums(
    logits, n1, s0, s1, vocab, blocks, each, draws, t_lo, t_hi, temperatures, sums, BLOCK: tl.constexpr
):
    """`sums` [3, draws, blocks]: what `store_block` says of each block.

    Programs (draw, part); a block's numbers do not depend on how a row is cut into parts.
    """
    draw = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    scale, _ = scale_of(per_draw(draw, t_lo, t_hi, temperatures))
    row = row_of(logits, draw, n1, s0, s1)
    sink = sums + draw * blocks
    plane = draws.to(tl.int64) * blocks
    for block in range(part * each, tl.minimum((part + 1) * each, blocks)):
        index = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        values = widened(tl.load(row + index, mask=index < vocab, other=float("-inf")))
        store_block(values, scale, sink + block, plane, logits.dtype.element_ty)


@triton.jit
def row_maximum(sums, blocks, Q: tl.constexpr):
    """(largest block maximum, first block that has it, largest of the others) in float64."""
    top = tl.full((), float("-inf"), tl.float64)
    at = tl.zeros((), tl.int64)
    for first in range(0, blocks, 4 * Q):
        index = tile_index(first, Q)
        maxima = tl.load(sums + index, mask=index < blocks, other=float("-inf")).to(tl.float64)
        most = largest(maxima)
        better = most > top
        at = tl.where(better, first_where(maxima == most, index), at)
        top = tl.where(better, most, top)
    other = tl.full((), float("-inf"), tl.float64)
    for first in range(0, blocks, 4 * Q):
        index = tile_index(first, Q)
        maxima = tl.load(sums + index, mask=(index < blocks) & (index != at), other=float("-inf")).to(
            tl.float64
        )
        other = tl.maximum(other, largest(maxima))
    return top, at, other


@triton.jit
def part_sums(
    maxima, sums, plane, first, blocks, top, scale, k0, k1, position, step, row_id,
    purpose: tl.constexpr, RACE: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Of the blocks from `first` on: (sum of exp(y - top), sum of (y - top) exp(y - top), soonest clock of
    the block race, its block, whether a sum is NaN). Without RACE the clock is infinite.
    """
    index = tile_index(first, Q)
    inside = index < blocks
    gap = (maxima - top) / scale
    factor = tl.exp(gap)
    weight = tl.load(sums + plane + index, mask=inside, other=0.0).to(tl.float64) * factor
    bits = tl.load(sums + 2 * plane + index, mask=inside, other=0.0).to(tl.float64)
    mass = total(weight)
    moment = total(tl.where(weight > 0.0, weight * gap + bits * factor * LN2, 0.0))
    bad = largest((weight != weight).to(tl.int32))
    soonest = tl.full((), float("inf"), tl.float64)
    winner = tl.zeros((), tl.int64)
    if RACE:
        hi = element_words(first // 4, Q, purpose, 0, k0, k1, position, step, row_id)
        lo = element_words(first // 4, Q, purpose, 1, k0, k1, position, step, row_id)
        clock = tl.where(weight > 0.0, noise.exponential(hi, lo, True) / weight, float("inf"))
        soonest = tl.min(tl.min(clock, axis=1), axis=0)
        winner = first_where(clock == soonest, index)
    return mass, moment, soonest, winner, bad


@triton.jit
def row_summary(
    sums, plane, blocks, scale, k0, k1, position, step, row_id,
    purpose: tl.constexpr, RACE: tl.constexpr, ONE: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """(maximum, first block that has it, maximum of the other blocks, sum of exp(y - y_top), sum of (y -
    y_top) exp(y - y_top), winner of the block race or 0, whether a sum is NaN) of a row. ONE: its blocks fit
    one tile.
    """
    if ONE:
        index = tile_index(0, Q)
        maxima = tl.load(sums + index, mask=index < blocks, other=float("-inf")).to(tl.float64)
        top = largest(maxima)
        at = first_where(maxima == top, index)
        other = largest(tl.where(index == at, float("-inf"), maxima))
        finite = tl.where(top == float("-inf"), 0.0, top)
        mass, moment, _, winner, bad = part_sums(
            maxima, sums, plane, 0, blocks, finite, scale, k0, k1, position, step, row_id, purpose, RACE, Q
        )
    else:
        top, at, other = row_maximum(sums, blocks, Q)
        finite = tl.where(top == float("-inf"), 0.0, top)
        mass = tl.zeros((), tl.float64)
        moment = tl.zeros((), tl.float64)
        best = tl.full((), float("inf"), tl.float64)
        winner = tl.zeros((), tl.int64)
        bad = tl.zeros((), tl.int32)
        for first in range(0, blocks, 4 * Q):
            index = tile_index(first, Q)
            maxima = tl.load(sums + index, mask=index < blocks, other=float("-inf")).to(tl.float64)
            own, share, soonest, leader, broken = part_sums(
                maxima, sums, plane, first, blocks, finite, scale, k0, k1, position, step, row_id,
                purpose, RACE, Q,
            )  # fmt: skip
            mass += own
            moment += share
            bad = tl.maximum(bad, broken)
            winner = tl.where(soonest < best, leader, winner)
            best = tl.minimum(best, soonest)
    return top, at, other, mass, moment, winner, bad


def one_tile(blocks: int) -> bool:
    """Whether a row's blocks fit the tile that `row_summary` is called with."""
    return blocks <= 4 * int(SUMMARY.value)


@triton.jit
def fault_of(top, bad):
    """Status code of a row from its maximum and whether a block sum is NaN."""
    empty = tl.where(top == float("-inf"), 3, 0)
    return tl.where(top == float("inf"), 2, tl.where(bad > 0, 1, empty))


@triton.jit
def runner_up(row, block, vocab, top, other, Q: tl.constexpr):
    """The second largest logit of a row whose maximum `top` is in `block`; `other` is the largest of the
    other blocks.
    """
    values = load_tile(row, block * (4 * Q), vocab, Q).to(tl.float64)
    index = tile_index(block * (4 * Q), Q)
    at = first_where(values == top, index)
    return tl.maximum(other, largest(tl.where(index == at, float("-inf"), values)))


@triton.jit(
    do_not_specialize=["seed_lo", "seed_hi", "seeds_stride", "step", "t_lo", "t_hi", "n1", "draws", "parts"]
)
def finish(
    logits, n1, s0, s1, vocab, blocks, parts, draws,
    seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps,
    t_lo, t_hi, temperatures, sums, scores, winners, tokens, stats, status,
    RACE: tl.constexpr, ONE: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """One program per draw: the token and the by-products from the block sums (RACE) or from the parts'
    best tokens.

    Without RACE, `sums` is None where no by-product is wanted.
    """
    draw = tl.program_id(0).to(tl.int64)
    scale, greedy = scale_of(per_draw(draw, t_lo, t_hi, temperatures))
    row = row_of(logits, draw, n1, s0, s1)
    k0, k1, position, number, row_id = stream_words(
        draw, n1, seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps
    )
    token = tl.zeros((), tl.int64)
    if sums is not None:
        plane = draws.to(tl.int64) * blocks
        own = sums + draw * blocks
        top, at, other, mass, moment, winner, bad = row_summary(
            own, plane, blocks, scale, k0, k1, position, number, row_id, BLOCK_NOISE, RACE, ONE, SUMMARY
        )
        if RACE:
            chosen = tl.where(greedy, at, winner)
            values = load_tile(row, chosen * (4 * Q), vocab, Q)
            best = tl.full((), float("-inf"), tl.float64)
            _, token, _ = race_tile(
                values,
                chosen * (4 * Q),
                best,
                token,
                scale,
                greedy,
                TOKEN,
                Q,
                k0,
                k1,
                position,
                number,
                row_id,
            )
            report(status, draw, fault_of(top, bad))
    if not RACE:
        best = tl.full((), float("-inf"), tl.float64)
        for first in range(0, parts, 4 * Q):
            index = tile_index(first, Q)
            inside = index < parts
            score = tl.load(scores + draw * parts + index, mask=inside, other=float("-inf"))
            most = largest(score)
            # Parts ascend with their tokens, so the first part with the best score has the lowest token.
            if most > best:
                token = tl.load(winners + draw * parts + first_where(score == most, index))
                best = most
        report(status, draw, tl.where(best == float("-inf"), 3, 0))
    tl.store(tokens + draw, token)
    if stats is not None:
        second = runner_up(row, at, vocab, top, other, Q)
        chosen_logit = widened(tl.load(row + token)).to(tl.float64)
        store_stats(stats, draws, draw, chosen_logit, top, second, scale, mass, moment)


@triton.jit(
    do_not_specialize=["seed_lo", "seed_hi", "seeds_stride", "step", "t_lo", "t_hi", "n1", "each", "parts"]
)
def token_race(
    logits, n1, s0, s1, vocab, each, parts,
    seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps,
    t_lo, t_hi, temperatures, scores, winners, status,
    Q: tl.constexpr,
):  # fmt: skip
    """Token race on `each` tiles of a row; programs (draw, part) leave their best score and token."""
    draw = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    scale, greedy = scale_of(per_draw(draw, t_lo, t_hi, temperatures))
    row = row_of(logits, draw, n1, s0, s1)
    k0, k1, position, number, row_id = stream_words(
        draw, n1, seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps
    )
    best = tl.full((), float("-inf"), tl.float64)
    token = tl.zeros((), tl.int64)
    worst = 0
    last = tl.cdiv(vocab, 4 * Q)
    for tile in range(part * each, tl.minimum((part + 1) * each, last)):
        first = tl.cast(tile, tl.int64) * (4 * Q)
        values = load_tile(row, first, vocab, Q)
        best, token, code = race_tile(
            values, first, best, token, scale, greedy, TOKEN, Q, k0, k1, position, number, row_id
        )
        worst = tl.where(worst == 0, code, worst)
    report(status, draw, worst)
    tl.store(scores + draw * parts + part, best)
    tl.store(winners + draw * parts + part, token)


@triton.jit(do_not_specialize=["seed_lo", "seed_hi", "seeds_stride", "step", "t_lo", "t_hi", "n1", "draws"])
def small(
    logits, n1, s0, s1, vocab, draws,
    seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps,
    t_lo, t_hi, temperatures, tokens, stats, status,
    Q: tl.constexpr,
):  # fmt: skip
    """Rows of at most one tile: race and by-products in one program per draw."""
    draw = tl.program_id(0).to(tl.int64)
    scale, greedy = scale_of(per_draw(draw, t_lo, t_hi, temperatures))
    row = row_of(logits, draw, n1, s0, s1)
    k0, k1, position, number, row_id = stream_words(
        draw, n1, seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps
    )
    values = load_tile(row, 0, vocab, Q)
    best = tl.full((), float("-inf"), tl.float64)
    token = tl.zeros((), tl.int64)
    best, token, code = race_tile(
        values, draw * 0, best, token, scale, greedy, TOKEN, Q, k0, k1, position, number, row_id
    )
    report(status, draw, tl.where((code == 0) & (best == float("-inf")), 3, code))
    tl.store(tokens + draw, token)
    if stats is not None:
        index = tile_index(0, Q)
        top = largest(values)
        at = first_where(values == top, index)
        second = largest(tl.where(index == at, float("-inf"), values)).to(tl.float64)
        exponent, mass = powers(values, tl.where(top == float("-inf"), 0.0, top), scale)
        moment = total(exponent * mass).to(tl.float64) * LN2
        chosen_logit = widened(tl.load(row + token)).to(tl.float64)
        store_stats(
            stats,
            draws,
            draw,
            chosen_logit,
            top.to(tl.float64),
            second,
            scale,
            total(mass).to(tl.float64),
            moment,
        )


class Batch:
    """Shape, strides and temperature of a batch of logits, in the order the kernels take them."""

    def __init__(self, logits: Tensor, temperature: float, temperatures: Tensor | None) -> None:
        self.logits, self.vocab = logits, logits.shape[-1]
        self.n1, s1 = (logits.shape[1], logits.stride(1)) if logits.dim() == 3 else (1, 0)
        self.draws = logits.shape[0] * self.n1
        self.where = (logits, self.n1, logits.stride(0), s1, self.vocab)
        self.heat = (*halves(temperature), temperatures)
        self.wide = torch.float64 if logits.dtype == torch.float64 else torch.float32

    def new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Scratch beside the logits."""
        return torch.empty(shape, dtype=dtype, device=self.logits.device)


def summed(batch: Batch) -> Tensor:
    """The block sums of every draw, [3, draws, blocks]."""
    blocks = triton.cdiv(batch.vocab, BLOCK)
    sums = batch.new(3, batch.draws, blocks, dtype=batch.wide)
    parts, each = splits(batch.logits, batch.draws, blocks, waves=128)
    arguments = (*batch.where, blocks, each, batch.draws, *batch.heat, sums)
    launch(block_sums, (batch.draws, parts), *arguments, BLOCK=BLOCK, num_warps=1)
    return sums


def unfiltered(
    batch: Batch, tokens: Tensor, stats: Tensor | None, streams: Stream, method: int, status: Tensor
) -> None:
    """Either method on whole rows."""
    if batch.vocab <= BLOCK:
        quarter = 16 if batch.vocab <= 64 else 64 if batch.vocab <= 256 else 256
        arguments: tuple[Any, ...] = (*batch.where, batch.draws, *streams, *batch.heat, tokens, stats, status)
        launch(small, (batch.draws,), *arguments, Q=quarter, num_warps=4)
        return
    blocks = triton.cdiv(batch.vocab, BLOCK)
    sums = summed(batch) if method == 0 or stats is not None else None
    scores = winners = None
    parts = 1
    if method == 1:
        parts, each = splits(batch.logits, batch.draws, blocks, waves=4)
        scores = batch.new(batch.draws, parts, dtype=torch.float64)
        winners = batch.new(batch.draws, parts, dtype=torch.int64)
        arguments = (*batch.where, each, parts, *streams, *batch.heat, scores, winners, status)
        launch(token_race, (batch.draws, parts), *arguments, Q=256, num_warps=4)
    sources = (sums, scores, winners, tokens, stats, status)
    arguments = (*batch.where, blocks, parts, batch.draws, *streams, *batch.heat, *sources)
    launch(finish, (batch.draws,), *arguments, RACE=method == 0, ONE=one_tile(blocks), Q=256, num_warps=4)


def categorical(
    logits: Tensor,
    tokens: Tensor,
    stats: Tensor | None,
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
    method: int,
) -> None:
    """Write one token per row of `logits`. See ``driftmax.categorical``; arguments as in its op's schema."""
    batch = Batch(logits, temperature, temperatures)
    streams = stream(seed, seeds, rows, positions, step, steps)
    law = (top_k, top_ks, top_p, top_ps, min_p, min_ps)
    draw_rows(batch, tokens, stats, streams, law, method, status_word(logits.device))


def draw_rows(
    batch: Batch,
    tokens: Tensor,
    stats: Tensor | None,
    streams: Stream,
    law: tuple[Any, ...],
    method: int,
    status: Tensor,
) -> None:
    """Tokens and by-products of whole rows; `law` is top_k, top_ks, top_p, top_ps, min_p, min_ps."""
    if law == (0, None, 1.0, None, 0.0, None):
        unfiltered(batch, tokens, stats, streams, method, status)
    else:
        top_k, top_ks, top_p, top_ps, min_p, min_ps = law
        halved = (top_k, top_ks, *halves(top_p), top_ps, *halves(min_p), min_ps)
        filtered_rows(batch, tokens, stats, streams, halved, summed(batch), status)


# float16 differs from bfloat16 in the loads alone: the fused head's specialisations compile it.
FLOATS = (torch.float32, torch.bfloat16, torch.float64)


def specialisations() -> Iterator[tuple[Any, ...]]:
    """Arguments of `categorical` that between them launch every variant worth compiling ahead of time."""
    one, off = (5, None, None, None, 0, None), (1.0, None, 0, None, 1.0, None, 0.0, None)
    row = torch.zeros(2, dtype=torch.int64)
    half = torch.full((2,), 0.5, dtype=torch.float64)
    tokens = torch.empty(2, dtype=torch.int64)
    for dtype in FLOATS:
        logits = torch.empty(2, 128 * BLOCK, dtype=dtype)
        stats = torch.empty(4, 2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        yield (logits, tokens, stats, *one, *off, 0)
        yield (logits, tokens, None, *one, *off, 1)
        yield (logits[:, :1000], tokens, stats, *one, *off, 0)
        yield (logits, tokens, stats, *one, 1.0, None, 50, None, 0.9, None, 0.0, None, 0)
    yield (torch.empty(1, 1).expand(2, 2**19), tokens, None, *one, *off, 0)  # blocks for more than one tile
    logits = torch.empty(2, 50257)  # a vocabulary no load of which is aligned
    yield (logits, tokens, None, *one, *off, 0)
    yield (logits, tokens, torch.empty(4, 2), 0, row, row, row, 0, row[:1], 1.0, half, *off[2:], 1)
    for vocab in (50, 200):
        yield (logits[:, :vocab], tokens, None, *one, *off, 0)
    yield (
        logits,
        tokens,
        torch.empty(4, 2),
        0,
        row,
        row,
        row,
        0,
        row[:1],
        1.0,
        half,
        0,
        row,
        1.0,
        half,
        0.0,
        half,
        0,
    )
