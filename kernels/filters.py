"""Top-k, top-p and min-p without sorting: a kept set is a threshold on the logit and a last index among its
ties.

One program per row. It lists the tokens within a few nats of the maximum (all that filters usually keep),
bisects the bit pattern of the threshold over that list, and draws from what is left. Where the list would not
hold them, it bisects over the row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from driftmax.kernels.launch import BLOCK, Stream, interpreted, launch
from driftmax.kernels.philox import element_words, single_words, stream_words
from driftmax.kernels.race import (
    FAR,
    exact_scores,
    largest,
    per_draw,
    powers,
    reaches,
    report,
    row_of,
    scale_of,
    store_stats,
    tile_index,
    total,
    widened,
    winner_of,
)
from torch import Tensor

if TYPE_CHECKING:
    from driftmax.kernels.categorical import Batch

LIST = 16384  # tokens a row's list can hold
TOKEN = tl.constexpr(16)


@triton.jit
def ordered(values):
    """int64 keys in the order of `values`; the two zeros are equal."""
    plain = tl.where(values == 0.0, 0.0, values)
    if values.dtype == tl.float64:
        bits = plain.to(tl.int64, bitcast=True)
        key = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = plain.to(tl.int32, bitcast=True)
        key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return key


@triton.jit
def source_tile(row, listed, first, count, compact, cut, Q: tl.constexpr):
    """(logits, token numbers) of the tile at `first` of the list or of the row; -inf below `cut` and behind
    the end.
    """
    place = tile_index(first, Q)
    inside = place < count
    index = place
    if compact:
        index = tl.load(listed + place, mask=inside, other=0).to(tl.int64)
    values = widened(tl.load(row + index, mask=inside, other=float("-inf")))
    return tl.where(values >= cut, values, float("-inf")), index


@triton.jit
def within(values, index, threshold, last):
    """Which tokens a kept set (threshold key, last index among its ties) holds; never one of probability
    zero.
    """
    key = ordered(values)
    return ((key > threshold) | ((key == threshold) & (index <= last))) & (values != float("-inf"))


@triton.jit
def tally(
    row, listed, count, compact, cut, threshold, last, key, ties_to, top, scale,
    MASS: tl.constexpr, TIES: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """How many kept tokens, or what mass exp(y - top), have a key >= `key`; TIES: == `key` and index <=
    `ties_to`.
    """
    result = tl.zeros((), tl.float64)
    for first in range(0, count, 4 * Q):
        values, index = source_tile(row, listed, first, count, compact, cut, Q)
        own = ordered(values)
        counted = own >= key
        if TIES:
            counted = (own == key) & (index <= ties_to)
        counted = counted & within(values, index, threshold, last)
        if MASS:
            _, mass = powers(values, top, scale)
            result += total(tl.where(counted, mass, 0.0)).to(tl.float64)
        else:
            result += total(counted.to(tl.int32)).to(tl.float64)
    return result


@triton.jit
def middle(low, high):
    """Upper midpoint of two int64, without overflow."""
    return (low >> 1) + (high >> 1) + ((low | high) & 1)


@triton.jit
def bisect_key(
    row,
    listed,
    count,
    compact,
    cut,
    threshold,
    last,
    low,
    high,
    target,
    top,
    scale,
    MASS: tl.constexpr,
    Q: tl.constexpr,
):
    """The largest key in [low, high] whose tally reaches `target`; `low` where none above it does."""
    while low < high:
        key = middle(low, high)
        reached = (
            tally(row, listed, count, compact, cut, threshold, last, key, 0, top, scale, MASS, False, Q)
            >= target
        )
        low = tl.where(reached, key, low)
        high = tl.where(reached, high, key - 1)
    return low


@triton.jit
def last_tie(
    row, listed, count, compact, cut, threshold, last, key, wanted, vocab, top, scale, Q: tl.constexpr
):
    """The index of the `wanted`-th kept token with this key, in ascending order; FAR where there are no
    more.
    """
    ties = tally(row, listed, count, compact, cut, threshold, last, key, FAR, top, scale, False, True, Q)
    low = tl.zeros((), tl.int64)
    high = tl.cast(vocab, tl.int64) - 1
    if wanted < ties:
        while low < high:
            half = (low + high) >> 1
            enough = (
                tally(
                    row, listed, count, compact, cut, threshold, last, key, half, top, scale, False, True, Q
                )
                >= wanted
            )
            high = tl.where(enough, half, high)
            low = tl.where(enough, low, half + 1)
    else:
        low = tl.full((), 1 << 62, tl.int64)
    return low


@triton.jit
def list_tokens(row, listed, vocab, cut, top, scale, LIST: tl.constexpr, Q: tl.constexpr):
    """Write the tokens with logits >= cut to the list while they fit; (their number, their mass)."""
    count = tl.zeros((), tl.int64)
    mass = tl.zeros((), tl.float64)
    for first in range(0, vocab, 4 * Q):
        index = first + tl.arange(0, 4 * Q).to(tl.int64)
        values = widened(tl.load(row + index, mask=index < vocab, other=float("-inf")))
        chosen = (values >= cut) & (values != float("-inf"))
        found = tl.sum(chosen.to(tl.int32), axis=0)
        if found > 0:
            place = count + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
            tl.store(listed + place, index.to(tl.int32), mask=chosen & (place < LIST))
            _, e = powers(values, top, scale)
            mass += tl.sum(tl.where(chosen, e, 0.0), axis=0).to(tl.float64)
            count += found
    return count, mass


@triton.jit
def row_total(sums, plane, blocks, scale, Q: tl.constexpr):
    """(maximum logit, sum of exp(y - top), whether a sum is NaN) of a row from its block sums, float64."""
    top = tl.full((), float("-inf"), tl.float64)
    for first in range(0, blocks, 4 * Q):
        index = tile_index(first, Q)
        top = tl.maximum(
            top, largest(tl.load(sums + index, mask=index < blocks, other=float("-inf")).to(tl.float64))
        )
    finite = tl.where(top == float("-inf"), 0.0, top)
    mass = tl.zeros((), tl.float64)
    for first in range(0, blocks, 4 * Q):
        index = tile_index(first, Q)
        gap = (
            tl.load(sums + index, mask=index < blocks, other=float("-inf")).to(tl.float64) - finite
        ) / scale
        mass += total(
            tl.load(sums + plane + index, mask=index < blocks, other=0.0).to(tl.float64) * tl.exp(gap)
        )
    return top, mass


@triton.jit
def find_kept(row, listed, vocab, k, p, m, top, scale, mass, LIST: tl.constexpr, Q: tl.constexpr):
    """(threshold, last, cut, count, compact) of a row: its kept set, and the list or row that holds all of
    it.

    `k` is the number of top-k (0: off), `p` of top-p (>= 1: off), `m` of min-p. `mass` is the row's,
    relative to `top`.
    """
    # Widen the window under the maximum until it holds every token that top-k or top-p can keep.
    width = tl.full((), 8.0, tl.float64)
    if (k == 0) & (p >= 1.0):
        width = 0.001 - 1.0001 * tl.log(m)  # min-p alone: beyond this it keeps nothing
    cut = top
    count = tl.zeros((), tl.int64)
    enough = 0
    while enough == 0:
        cut = (top.to(tl.float64) - width * scale).to(top.dtype)
        count, held = list_tokens(row, listed, vocab, cut, top, scale, LIST, Q)
        everything = width > 1.0e300
        by_k = (k > 0) & (count >= k)
        by_p = (k == 0) & ((p >= 1.0) | (held >= p * mass * 1.000001))
        enough = (everything | by_k | by_p).to(tl.int32)
        width = tl.where(width > 20.0, float("inf"), width * 3.0)
    compact = count <= LIST
    size = tl.where(compact, count, tl.cast(vocab, tl.int64))
    highest = ordered(top)
    threshold = ordered(cut)
    last = tl.full((), 1 << 62, tl.int64)
    lowest = threshold
    if k > 0:
        wanted = tl.minimum(k, count).to(tl.float64)
        found = bisect_key(
            row, listed, size, compact, cut, lowest, last, lowest, highest, wanted, top, scale, False, Q
        )
        above = tally(
            row, listed, size, compact, cut, lowest, last, found + 1, 0, top, scale, False, False, Q
        )
        last = last_tie(
            row, listed, size, compact, cut, lowest, last, found, wanted - above, vocab, top, scale, Q
        )
        threshold = found
        mass = tally(
            row, listed, size, compact, cut, threshold, last, threshold, 0, top, scale, True, False, Q
        )
    if p < 1.0:
        target = p * mass
        found = bisect_key(
            row, listed, size, compact, cut, threshold, last, threshold, highest, target, top, scale, True, Q
        )
        above = tally(
            row, listed, size, compact, cut, threshold, last, found + 1, 0, top, scale, True, False, Q
        )
        ties = tally(row, listed, size, compact, cut, threshold, last, found, FAR, top, scale, False, True, Q)
        level = tally(row, listed, size, compact, cut, threshold, last, found, FAR, top, scale, True, True, Q)
        needed = tl.maximum(tl.ceil((target - above) / (level / ties)), 1.0)
        end = last_tie(row, listed, size, compact, cut, threshold, last, found, needed, vocab, top, scale, Q)
        last = tl.where(found == threshold, tl.minimum(last, end), end)
        threshold = found
    return threshold, last, cut, size, compact


@triton.jit
def law_of(draw, greedy, k, ks, p_lo, p_hi, ps, m_lo, m_hi, ms):
    """(top-k, top-p, min-p) of a draw; temperature 0 ignores filters."""
    most = tl.cast(k, tl.int64)
    if ks is not None:
        most = tl.load(ks + draw)
    most = tl.where(greedy, 0, most)
    p = tl.where(greedy, 1.0, per_draw(draw, p_lo, p_hi, ps))
    m = tl.where(greedy, 0.0, per_draw(draw, m_lo, m_hi, ms))
    return most, p, m


@triton.jit
def peak_of(top, kind: tl.constexpr):
    """A row's maximum (float64) in the precision of `widened` logits."""
    peak = top
    if kind != tl.float64:
        peak = top.to(tl.float32)
    return peak


@triton.jit
def above_min_p(values, top, scale, m):
    """exp(y - y_top) >= min_p in float64, as the reference compares it."""
    return tl.exp(values.to(tl.float64) / scale - top.to(tl.float64) / scale) >= m


@triton.jit(
    do_not_specialize=["seed_lo", "seed_hi", "seeds_stride", "step", "t_lo", "t_hi", "n1", "draws", "k"]
)
def filtered(
    logits, n1, s0, s1, vocab, blocks, draws,
    seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps,
    t_lo, t_hi, temperatures, k, ks, p_lo, p_hi, ps, m_lo, m_hi, ms,
    sums, listed, tokens, stats, status,
    LIST: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """One program per draw: the kept set, the token race on it, and its by-products."""
    draw = tl.program_id(0).to(tl.int64)
    scale, greedy = scale_of(per_draw(draw, t_lo, t_hi, temperatures))
    row = row_of(logits, draw, n1, s0, s1)
    own = listed + draw * LIST
    k0, k1, position, number, row_id = stream_words(
        draw, n1, seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps
    )
    most, p, m = law_of(draw, greedy, k, ks, p_lo, p_hi, ps, m_lo, m_hi, ms)
    top, mass = row_total(sums + draw * blocks, draws.to(tl.int64) * blocks, blocks, scale, 64)
    broken = (mass != mass) | (top == float("inf"))
    code = tl.where(top == float("inf"), 2, tl.where(mass != mass, 1, tl.where(top == float("-inf"), 3, 0)))
    report(status, draw, code)
    token = tl.zeros((), tl.int64)
    if (broken == 0) & (top > float("-inf")):
        peak = peak_of(top, logits.dtype.element_ty)
        threshold, last, cut, count, compact = find_kept(
            row, own, vocab, most, p, m, peak, scale, mass, LIST, Q
        )
        best = tl.full((), float("-inf"), tl.float64)
        kept_mass = tl.zeros((), tl.float64)
        moment = tl.zeros((), tl.float64)
        second = tl.full((), float("-inf"), tl.float64)
        tops = tl.zeros((), tl.int32)
        for first in range(0, count, 4 * Q):
            values, index = source_tile(row, own, first, count, compact, cut, Q)
            kept = within(values, index, threshold, last)
            if m > 0.0:
                kept = kept & above_min_p(values, peak, scale, m)
            values = tl.where(kept, values, float("-inf"))
            if compact:
                hi = single_words(index, TOKEN, 0, k0, k1, position, number, row_id)
            else:
                hi = element_words(first // 4, Q, TOKEN, 0, k0, k1, position, number, row_id)
            if largest(reaches(values, best, scale, greedy, hi).to(tl.int32)) > 0:
                lo = single_words(index, TOKEN, 1, k0, k1, position, number, row_id)
                scores = exact_scores(values, scale, greedy, hi, lo)
                best, token = winner_of(scores, index, best, token)
            if stats is not None:
                exponent, e = powers(values, peak, scale)
                kept_mass += total(e).to(tl.float64)
                moment += total(exponent * e).to(tl.float64) * 0.6931471805599453
                tops += total((values == peak).to(tl.int32))
                second = tl.maximum(
                    second, largest(tl.where(values == peak, float("-inf"), values)).to(tl.float64)
                )
        if stats is not None:
            second = tl.where(tops > 1, top, second)
            chosen = widened(tl.load(row + token)).to(tl.float64)
            store_stats(stats, draws, draw, chosen, top, second, scale, kept_mass, moment)
    tl.store(tokens + draw, token)


def width() -> int:
    """Quarter of the tokens of a tile."""
    return 2048 if interpreted() else 512


def filtered_rows(
    batch: Batch,
    tokens: Tensor,
    stats: Tensor | None,
    streams: Stream,
    law: tuple[Any, ...],
    sums: Tensor,
    status: Tensor,
) -> None:
    """Draw from the kept sets of whole rows; `law` is top_k, top_ks, the halves of top_p, top_ps, and so
    for min_p.
    """
    listed = batch.new(batch.draws, LIST, dtype=torch.int32)
    shape = (*batch.where, triton.cdiv(batch.vocab, BLOCK), batch.draws)
    arguments = (*shape, *streams, *batch.heat, *law, sums, listed, tokens, stats, status)
    launch(filtered, (batch.draws,), *arguments, LIST=LIST, Q=width(), num_warps=8)
