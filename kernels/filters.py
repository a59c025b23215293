"""Top-k, top-p and min-p without sorting: a kept set is a threshold on the logit and a last index among its
ties.

narrow.py lists the few tokens among which the threshold lies. One program per row bisects its bit pattern
over them, in registers where they fit one tile, and draws from what is left. Where a list would not hold
them, it bisects over the row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from driftmax.kernels.launch import Stream, halves, launch
from driftmax.kernels.narrow import LIST, NOTHING, WHOLE, law_of, middle, narrowed, ordered
from driftmax.kernels.philox import element_words, single_words, stream_words
from driftmax.kernels.race import (
    exact_scores,
    largest,
    per_draw,
    powers,
    reaches,
    row_of,
    scale_of,
    store_stats,
    total,
    widened,
    winner_of,
)
from torch import Tensor

if TYPE_CHECKING:
    from driftmax.kernels.categorical import Batch

TOKEN = tl.constexpr(16)


@triton.jit
def source_tile(row, listed, held, first, count, compact, cut, Q: tl.constexpr):
    """(logits, int32 token numbers) of the tile at `first` of the list or of the row; -inf below `cut` and
    behind the end.
    """
    # 32 bits: the addresses of a tile that is read in a loop are kept in registers
    place = tl.cast(first, tl.int32) + (tl.arange(0, Q) * 4)[:, None] + tl.arange(0, 4)[None, :]
    inside = place < count
    index = place
    if compact:
        index = tl.load(listed + place, mask=inside, other=0)
        values = tl.load(held + place, mask=inside, other=float("-inf"))
    else:
        values = widened(tl.load(row + place, mask=inside, other=float("-inf")))
    return tl.where(values >= cut, values, float("-inf")), index


@triton.jit
def within(values, index, threshold, last):
    """Which tokens a kept set (threshold key, last index among its ties) holds; never one of probability
    zero.
    """
    key = ordered(values)
    return ((key > threshold) | ((key == threshold) & (index <= last))) & (values != float("-inf"))


@triton.jit
def ones(values, index, threshold, last):
    """1 for the tokens of a tile that are kept, 0 for the others."""
    return within(values, index, threshold, last).to(tl.float32)


@triton.jit
def weights(values, index, threshold, last, top, scale, by_mass):
    """exp(y - top), or without `by_mass` 1, of the tokens of a tile that are kept; 0 for the others."""
    _, mass = powers(values, top, scale)
    return tl.where(within(values, index, threshold, last), tl.where(by_mass, mass, 1.0), 0.0)


@triton.jit
def short_keys(values):
    """`ordered` in as many bits as the values have."""
    key = ordered(values)
    if values.dtype != tl.float64:
        key = key.to(tl.int32)
    return key


@triton.jit
def reaching(
    weight, values, row, listed, held, count, compact, cut, threshold, last, key, top, scale, by_mass,
    Q: tl.constexpr,
):  # fmt: skip
    """Total weight of the tokens with keys >= `key`.

    The first tile's `weights` and logits are given, and stay in registers.
    """
    own = short_keys(values)
    result = total(tl.where(own >= key.to(own.dtype), weight, 0.0)).to(tl.float64)
    for first in range(4 * Q, count, 4 * Q):
        others, index = source_tile(row, listed, held, first, count, compact, cut, Q)
        other_weight = weights(others, index, threshold, last, top, scale, by_mass)
        result += total(tl.where(ordered(others) >= key, other_weight, 0.0)).to(tl.float64)
    return result


@triton.jit
def bisect_key(
    weight, values, row, listed, held, count, compact, cut, threshold, last, high, target, top, scale,
    by_mass, Q: tl.constexpr,
):  # fmt: skip
    """The largest key in [threshold, high] that `target` of the weight reaches; `threshold` if none above it
    has as much.
    """
    low = threshold
    while low < high:
        key = middle(low, high)
        weighed = reaching(
            weight,
            values,
            row,
            listed,
            held,
            count,
            compact,
            cut,
            threshold,
            last,
            key,
            top,
            scale,
            by_mass,
            Q,
        )
        low = tl.where(weighed >= target, key, low)
        high = tl.where(weighed >= target, high, key - 1)
    return low


@triton.jit
def around(
    weight, values, index, row, listed, held, count, compact, cut, threshold, last, key, top, scale, by_mass,
    Q: tl.constexpr,
):  # fmt: skip
    """(weight of the keys above `key`, weight of those equal to it, number of those)."""
    own = short_keys(values)
    short = key.to(own.dtype)
    above = total(tl.where(own > short, weight, 0.0)).to(tl.float64)
    level = total(tl.where(own == short, weight, 0.0)).to(tl.float64)
    ties = total(tl.where(own == short, ones(values, index, threshold, last), 0.0)).to(tl.float64)
    for first in range(4 * Q, count, 4 * Q):
        others, other_index = source_tile(row, listed, held, first, count, compact, cut, Q)
        other_weight = weights(others, other_index, threshold, last, top, scale, by_mass)
        keys = ordered(others)
        above += total(tl.where(keys > key, other_weight, 0.0)).to(tl.float64)
        level += total(tl.where(keys == key, other_weight, 0.0)).to(tl.float64)
        ties += total(tl.where(keys == key, ones(others, other_index, threshold, last), 0.0)).to(tl.float64)
    return above, level, ties


@triton.jit
def last_tie(
    values, index, row, listed, held, count, compact, cut, threshold, last, key, ties, wanted, vocab,
    Q: tl.constexpr,
):  # fmt: skip
    """The index of the `wanted`-th kept token with this key, in ascending order; FAR if all `ties` are
    wanted.
    """
    low = tl.zeros((), tl.int64)
    high = tl.cast(vocab, tl.int64) - 1
    if wanted < ties:
        level = tl.where(ordered(values) == key, ones(values, index, threshold, last), 0.0)
        while low < high:
            half = (low + high) >> 1
            upto = total(tl.where(index <= half, level, 0.0)).to(tl.float64)
            for first in range(4 * Q, count, 4 * Q):
                others, other_index = source_tile(row, listed, held, first, count, compact, cut, Q)
                chosen = (ordered(others) == key) & (other_index <= half)
                upto += total(tl.where(chosen, ones(others, other_index, threshold, last), 0.0))
            high = tl.where(upto >= wanted, half, high)
            low = tl.where(upto >= wanted, low, half + 1)
    else:
        low = tl.full((), 1 << 62, tl.int64)
    return low


@triton.jit
def find_kept(
    row, listed, held, count, compact, vocab, k, p, cut, highest, known_count, known_mass, mass, top, scale,
    Q: tl.constexpr,
):  # fmt: skip
    """(threshold key, last index among its ties) of a row's kept set under top-k and top-p.

    The threshold is that of one of `count` tokens of the list (or row) with a logit >= `cut` and a key <=
    `highest`. `known_count` more tokens, of mass `known_mass`, are kept whatever it is (none if both filters
    are on). `k` is the number of top-k (0: off), at most what there is, `p` of top-p (>= 1: off); masses are
    relative to `top`. Top-k is stage 0, in which each token weighs 1, top-p stage 1.
    """
    threshold = ordered(cut)
    last = tl.full((), 1 << 62, tl.int64)
    values, index = source_tile(row, listed, held, 0, count, compact, cut, Q)
    for stage in range(2):
        by_mass = stage == 1
        if tl.where(by_mass, p < 1.0, k > 0):
            weight = weights(values, index, threshold, last, top, scale, by_mass)
            target = (k - known_count).to(tl.float64)
            if by_mass:
                if k > 0:
                    mass = reaching(
                        weight, values, row, listed, held, count, compact, cut, threshold, last, threshold,
                        top, scale, by_mass, Q,
                    )  # fmt: skip
                target = p * mass - known_mass
            found = bisect_key(
                weight, values, row, listed, held, count, compact, cut, threshold, last, highest, target, top,
                scale, by_mass, Q,
            )  # fmt: skip
            above, level, ties = around(
                weight, values, index, row, listed, held, count, compact, cut, threshold, last, found, top,
                scale, by_mass, Q,
            )  # fmt: skip
            needed = tl.maximum(tl.ceil((target - above) / (level / tl.maximum(ties, 1.0))), 1.0)
            end = last_tie(
                values, index, row, listed, held, count, compact, cut, threshold, last, found, ties, needed,
                vocab, Q,
            )  # fmt: skip
            last = tl.where(found == threshold, tl.minimum(last, end), end)
            threshold = found
    return threshold, last


@triton.jit
def search(
    row, listed, held, levels, sizes, draws, draw, vocab, k, p, scale, kind: tl.constexpr, Q: tl.constexpr
):
    """`find_kept` of a good row on what narrow.py left of it; `kind` is the type of its widened logits."""
    top = tl.load(levels + draw).to(kind)
    mass = tl.load(levels + draws + draw)
    cut = tl.load(levels + 2 * draws + draw).to(kind)
    inner_end = tl.load(levels + 3 * draws + draw).to(kind)
    known_mass = tl.load(levels + 4 * draws + draw)
    holds = tl.load(sizes + draw)
    k = tl.minimum(k, tl.load(sizes + draws + draw).to(tl.int64))
    known_count = tl.load(sizes + 2 * draws + draw).to(tl.int64)
    count = tl.load(sizes + 3 * draws + draw)
    begin = tl.where(holds == WHOLE, known_count, 0)
    compact = holds < NOTHING
    if holds == NOTHING:  # the whole row, inner window included
        count = tl.cast(vocab, tl.int32)
        known_count = known_count * 0
        known_mass = known_mass * 0.0
        inner_end = top
    highest = ordered(tl.minimum(inner_end, top))
    return find_kept(
        row, listed + begin, held + begin, count, compact, vocab, k, p, cut, highest, known_count, known_mass,
        mass, top, scale, Q,
    )  # fmt: skip


@triton.jit
def above_min_p(values, top, scale, m):
    """exp(y - y_top) >= min_p in float64, as the reference compares it."""
    return tl.exp(values.to(tl.float64) / scale - top.to(tl.float64) / scale) >= m


@triton.jit(
    do_not_specialize=["seed_lo", "seed_hi", "seeds_stride", "step", "t_lo", "t_hi", "n1", "draws", "k"]
)
def filtered(
    logits, n1, s0, s1, vocab, draws,
    seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps,
    t_lo, t_hi, temperatures, k, ks, p_lo, p_hi, ps, m_lo, m_hi, ms,
    levels, sizes, listed, held, tokens, stats,
    LIST: tl.constexpr, Q: tl.constexpr, RACE: tl.constexpr,
):  # fmt: skip
    """One program per draw: the kept set by tiles of 4 Q, the token race on it by tiles of 4 RACE, and its
    by-products.
    """
    draw = tl.program_id(0).to(tl.int64)
    scale, greedy = scale_of(per_draw(draw, t_lo, t_hi, temperatures))
    row = row_of(logits, draw, n1, s0, s1)
    own, own_held = listed + draw * LIST, held + draw * LIST
    k0, k1, position, number, row_id = stream_words(
        draw, n1, seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps
    )
    most, p, m = law_of(draw, vocab, greedy, k, ks, p_lo, p_hi, ps, m_lo, m_hi, ms)
    holds = tl.load(sizes + draw)
    token = tl.zeros((), tl.int64)
    if holds <= NOTHING:
        kind: tl.constexpr = held.dtype.element_ty
        threshold, last = search(
            row, own, own_held, levels, sizes, draws, draw, vocab, most, p, scale, kind, Q
        )
        top = tl.load(levels + draw)
        peak = top.to(kind)
        cut = tl.load(levels + 2 * draws + draw).to(kind)
        compact = holds == WHOLE
        count = tl.where(compact, tl.load(sizes + draws + draw), vocab).to(tl.int32)
        best = tl.full((), float("-inf"), tl.float64)
        kept_mass = tl.zeros((), tl.float64)
        moment = tl.zeros((), tl.float64)
        second = tl.full((), float("-inf"), tl.float64)
        tops = tl.zeros((), tl.int32)
        for first in range(0, count, 4 * RACE):
            values, index = source_tile(row, own, own_held, first, count, compact, cut, RACE)
            index = index.to(tl.int64)
            kept = within(values, index, threshold, last)
            if m > 0.0:
                kept = kept & above_min_p(values, peak, scale, m)
            values = tl.where(kept, values, float("-inf"))
            if compact:
                hi = single_words(index, TOKEN, 0, k0, k1, position, number, row_id)
            else:
                hi = element_words(first // 4, RACE, TOKEN, 0, k0, k1, position, number, row_id)
            if largest(reaches(values, best, scale, greedy, hi).to(tl.int32)) > 0:
                lo = single_words(index, TOKEN, 1, k0, k1, position, number, row_id)
                best, token = winner_of(exact_scores(values, scale, greedy, hi, lo), index, best, token)
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


# Quarter of the border tokens that a program's registers hold, of the tokens it races at a time, its warps:
# by mass the border is long, by number short.
BY_MASS, BY_NUMBER = (1024, 512, 16), (256, 256, 8)


def search_sizes(law: tuple[Any, ...]) -> tuple[int, int, int]:
    """Q, RACE and warps for a `law` as `filtered_rows` has it."""
    p_lo, p_hi, top_ps = law[2:5]
    return BY_NUMBER if top_ps is None and (p_lo, p_hi) == halves(1.0) else BY_MASS


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
    narrow = narrowed(batch, law, sums, status)
    arguments = (*batch.where, batch.draws, *streams, *batch.heat, *law, *narrow, tokens, stats)
    search, race, warps = search_sizes(law)
    launch(filtered, (batch.draws,), *arguments, LIST=LIST, Q=search, RACE=race, num_warps=warps)
