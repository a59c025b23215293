"""`transfer`: one program per row bisects the bit patterns of its scores for the last one to be written.

Nothing is sorted. A window of at most `TILE` positions stays in registers; longer ones are read again for
every bit, from cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from driftmax.kernels.launch import halves, launch
from driftmax.kernels.narrow import middle, ordered
from driftmax.kernels.race import per_draw
from torch import Tensor

NEVER = tl.constexpr(-(1 << 63))  # below the key of every score


@triton.jit
def candidates(tokens, scores, eligible, mask_id, first, end, TILE: tl.constexpr):
    """(keys, scores) of positions [first, first + TILE): NEVER where nothing may be written; NaN as -inf."""
    position = first + tl.arange(0, TILE)
    inside = position < end
    may = inside & (tl.load(tokens + position, mask=inside, other=0) == mask_id)
    if eligible is not None:
        may = may & (tl.load(eligible + position, mask=inside, other=0) != 0)
    score = tl.load(scores + position, mask=inside, other=float("-inf"))
    score = tl.where(score == score, score, float("-inf"))
    return tl.where(may, ordered(score), NEVER), score


@triton.jit
def reach(held, tokens, scores, eligible, mask_id, begin, end, key, SINGLE: tl.constexpr, TILE: tl.constexpr):
    """How many candidates have a key >= `key`; `held` are those of a window of one tile."""
    if SINGLE:
        count = tl.sum((held >= key).to(tl.int32), axis=0)
    else:
        count = tl.zeros((), tl.int32)
        for first in range(begin, end, TILE):
            keys, _ = candidates(tokens, scores, eligible, mask_id, first, end, TILE)
            count += tl.sum((keys >= key).to(tl.int32), axis=0)
    return count


@triton.jit
def survey(tokens, scores, eligible, mask_id, begin, end, least, TILE: tl.constexpr):
    """(number of candidates, smallest key, largest key, number with a score >= `least`) of a row's window."""
    size = tl.zeros((), tl.int32)
    above = tl.zeros((), tl.int32)
    low = tl.full((), (1 << 63) - 1, tl.int64)
    high = tl.full((), -(1 << 63), tl.int64)
    for first in range(begin, end, TILE):
        keys, score = candidates(tokens, scores, eligible, mask_id, first, end, TILE)
        may = keys != NEVER
        size += tl.sum(may.to(tl.int32), axis=0)
        above += tl.sum((may & (score.to(tl.float64) >= least)).to(tl.int32), axis=0)
        low = tl.minimum(low, tl.min(tl.where(may, keys, (1 << 63) - 1), axis=0))
        high = tl.maximum(high, tl.max(keys, axis=0))
    return size, tl.where(size > 0, low, 0), high, above


@triton.jit(do_not_specialize=["length", "mask_id", "begin", "end", "count", "t_lo", "t_hi"])
def move(
    tokens, drawn, scores, moved, length, mask_id, begin, end, eligible, count, counts,
    t_lo, t_hi, thresholds,
    RULE: tl.constexpr, SINGLE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One row: the count, the last key to be written and how many of its ties, the writes."""
    row = tl.program_id(0).to(tl.int64)
    tokens += row * length
    drawn += row * length
    scores += row * length
    moved += row * length
    if eligible is not None:
        eligible += row * length
    least = per_draw(row, t_lo, t_hi, thresholds)
    size, low, high, above = survey(tokens, scores, eligible, mask_id, begin, end, least, TILE)
    many = tl.cast(count, tl.int64)
    if counts is not None:
        many = tl.load(counts + row)
    if RULE == 1:
        many = tl.maximum(many, above.to(tl.int64))
    many = tl.maximum(tl.minimum(many, size.to(tl.int64)), 0)
    held, _ = candidates(tokens, scores, eligible, mask_id, begin, end, TILE)
    if many > 0:
        while low < high:
            key = middle(low, high)
            enough = reach(held, tokens, scores, eligible, mask_id, begin, end, key, SINGLE, TILE) >= many
            low = tl.where(enough, key, low)
            high = tl.where(enough, high, key - 1)
    # `low` is now the key of the last token to be written; of its ties the first ones are.
    better = reach(held, tokens, scores, eligible, mask_id, begin, end, low + 1, SINGLE, TILE)
    ties = many - better
    low = tl.where(many > 0, low, (1 << 63) - 1)  # above every key
    seen = tl.zeros((), tl.int64)
    for first in range(begin, end, TILE):
        keys, _ = candidates(tokens, scores, eligible, mask_id, first, end, TILE)
        position = first + tl.arange(0, TILE)
        tie = (keys == low).to(tl.int64)
        place = seen + tl.cumsum(tie, axis=0)
        take = (keys > low) | ((keys == low) & (place <= ties))
        seen += tl.sum(tie, axis=0)
        tl.store(moved + position, take.to(tl.uint8), mask=position < end)
        tl.store(tokens + position, tl.load(drawn + position, mask=take, other=0), mask=take)
    for first in range(0, length, TILE):
        position = first + tl.arange(0, TILE)
        outside = ((position < begin) | (position >= end)) & (position < length)
        tl.store(moved + position, (position * 0).to(tl.uint8), mask=outside)


def transfer(
    tokens: Tensor,
    drawn: Tensor,
    scores: Tensor,
    moved: Tensor,
    mask_id: int,
    begin: int,
    end: int,
    eligible: Tensor | None,
    count: int,
    counts: Tensor | None,
    rule: int,
    threshold: float,
    thresholds: Tensor | None,
) -> None:
    """Write the best-scoring tokens. See ``driftmax.transfer``; arguments as in its op's schema."""
    rows, length = tokens.shape
    tile = 1024 if end - begin <= 1024 else 4096
    bytes_of = None if eligible is None else eligible.view(torch.uint8)
    window = (length, mask_id, begin, end, bytes_of)
    law = (count, counts, *halves(threshold), thresholds)
    single = end - begin <= tile
    launch(
        move, (rows,), tokens, drawn, scores, moved.view(torch.uint8), *window, *law,
        RULE=rule, SINGLE=single, TILE=tile, num_warps=4 if tile == 1024 else 16,
    )  # fmt: skip


def specialisations() -> Iterator[tuple[Any, ...]]:
    """Arguments of `transfer` that between them launch every variant worth compiling ahead of time."""
    tokens, scores = torch.zeros(2, 8192, dtype=torch.int64), torch.zeros(2, 8192)
    moved, counts = torch.zeros(2, 8192, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    least = torch.zeros(2, dtype=torch.float64)
    yield tokens, tokens, scores, moved, 7, 0, 1024, None, 3, None, 0, 0.0, None
    yield tokens, tokens, scores, moved, 7, 32, 64, moved, 0, counts, 0, 0.0, None
    yield tokens, tokens, scores, moved, 7, 0, 4096, None, 1, None, 1, 0.9, None
    yield tokens, tokens, scores.double(), moved, 7, 0, 8192, moved, 0, counts, 1, 0.0, least
