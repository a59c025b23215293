"""Where the threshold of a filtered row lies: the whole machine counts, and lists the few tokens near it.

Four launches after the block sums. ``plan`` (a program per row) sets `WIDTHS` nested windows under the
maximum; ``census`` counts the tokens of each 1024-block in each window and sums their mass; ``choose`` (a
program per row) takes the narrowest window that holds all that a filter can keep, and its neighbour that does
not; ``gather`` lists the tokens between those two, the border, and the tokens above if all fit. filters.py
then finds the threshold among the border tokens. Blocks that no window reaches are not read again.

Sums of mass run over blocks in one order, so a row's windows and list do not depend on its batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from driftmax.kernels.launch import BLOCK, interpreted, launch, splits
from driftmax.kernels.race import (
    largest,
    per_draw,
    powers,
    report,
    row_of,
    scale_of,
    tile_index,
    total,
    widened,
)
from torch import Tensor

if TYPE_CHECKING:
    from driftmax.kernels.categorical import Batch

LIST = 16384  # tokens a row's list can hold
WIDTHS = 8  # windows of a row
STEP = tl.constexpr(0.06)  # a window is narrower than the next by this share of the widest
SPAN = tl.constexpr(2.5)  # widest window of a top-k beyond the block maxima, in spreads of those

# What a row's list holds
WHOLE = tl.constexpr(0)  # every token that may be kept, the border last
BORDER = tl.constexpr(1)  # the border alone
NOTHING = tl.constexpr(2)  # not even that fits: the row itself is searched
BAD = tl.constexpr(3)  # a row without a law


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
def unordered(key, kind: tl.constexpr):
    """The value of type `kind` whose key this is."""
    if kind == tl.float64:
        value = (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    else:
        bits = key.to(tl.int32)
        value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return value


@triton.jit
def middle(low, high):
    """Upper midpoint of two int64, without overflow."""
    return (low >> 1) + (high >> 1) + ((low | high) & 1)


@triton.jit
def kth_largest(source, count, k, Q: tl.constexpr):
    """The k-th largest of `count` numbers, -inf where there are fewer; NaN is the smallest.

    The first tile stays in registers: more than one is rare.
    """
    kind: tl.constexpr = source.dtype.element_ty
    index = tile_index(tl.zeros((), tl.int64), Q)
    values = tl.load(source + index, mask=index < count, other=float("-inf"))
    held = ordered(tl.where(values == values, values, float("-inf")))
    low = tl.min(tl.min(held, axis=1), axis=0)
    high = largest(held)
    for first in range(4 * Q, count, 4 * Q):
        index = tile_index(first, Q)
        values = tl.load(source + index, mask=index < count, other=float("-inf"))
        others = ordered(tl.where(values == values, values, float("-inf")))
        low = tl.minimum(low, tl.min(tl.min(others, axis=1), axis=0))
        high = tl.maximum(high, largest(others))
    while low < high:
        key = middle(low, high)
        reached = total((held >= key).to(tl.int32))
        for first in range(4 * Q, count, 4 * Q):
            index = tile_index(first, Q)
            values = tl.load(source + index, mask=index < count, other=float("-inf"))
            others = ordered(tl.where(values == values, values, float("-inf")))
            reached += total((others >= key).to(tl.int32))
        low = tl.where(reached >= k, key, low)
        high = tl.where(reached >= k, high, key - 1)
    return tl.where(k <= count, unordered(low, kind), float("-inf"))


@triton.jit
def row_total(sums, plane, blocks, scale, Q: tl.constexpr):
    """(maximum logit, sum of exp(y - top), NaN where a sum is) of a row from its block sums, float64."""
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
def spread(sums, blocks, top, Q: tl.constexpr):
    """`top` minus the least block maximum that is not -inf."""
    least = top
    for first in range(0, blocks, 4 * Q):
        index = tile_index(first, Q)
        maxima = tl.load(sums + index, mask=index < blocks, other=float("-inf")).to(tl.float64)
        maxima = tl.where(maxima == float("-inf"), top, maxima)
        least = tl.minimum(least, tl.min(tl.min(maxima, axis=1), axis=0))
    return top - least


@triton.jit
def law_of(draw, vocab, greedy, k, ks, p_lo, p_hi, ps, m_lo, m_hi, ms):
    """(top-k, 0 if it cuts nothing, top-p, min-p) of a draw; temperature 0 ignores filters."""
    most = tl.cast(k, tl.int64)
    if ks is not None:
        most = tl.load(ks + draw)
    most = tl.where(greedy | (most >= vocab), 0, most)
    p = tl.where(greedy, 1.0, per_draw(draw, p_lo, p_hi, ps))
    m = tl.where(greedy, 0.0, per_draw(draw, m_lo, m_hi, ms))
    return most, p, m


@triton.jit
def windows(sums, vocab, blocks, top, mass, scale, k, p, m):
    """(widest window's lower end, its distance from `top`) in logits, float64.

    top-k: at least k tokens reach the k-th largest block maximum; without that bound the widest window is all
    of the row. top-p: tokens further down than this have less than 1 - p of the mass, even if all V were
    there.
    """
    span = tl.zeros((), tl.float64)
    lowest = top
    if k > 0:
        reached = kth_largest(sums, blocks, k, 256).to(tl.float64)
        lowest = reached
        span = top - reached
        if reached == float("-inf"):
            span = spread(sums, blocks, top, 256) * SPAN
    else:
        width = 0.001 - 1.0001 * tl.log(tl.where(m > 0.0, m, 1.0))  # beyond it min-p keeps nothing
        if p < 1.0:
            width = tl.maximum(tl.log(tl.cast(vocab, tl.float64) / ((1.0 - p) * mass)), 0.0) + 0.01
        span = width * scale
        lowest = top - span
    return lowest, span


@triton.jit(do_not_specialize=["t_lo", "t_hi", "draws", "k", "p_lo", "p_hi", "m_lo", "m_hi"])
def plan(
    vocab, blocks, draws, t_lo, t_hi, temperatures, k, ks, p_lo, p_hi, ps, m_lo, m_hi, ms,
    sums, cuts, levels, status, WIDTHS: tl.constexpr,
):  # fmt: skip
    """`cuts` [draws, WIDTHS]: lower ends of a row's windows, ascending, +inf where none is wanted; and what
    `choose` says of `levels`, as far as it is known. Reports bad rows where `status` is given.
    """
    draw = tl.program_id(0).to(tl.int64)
    scale, greedy = scale_of(per_draw(draw, t_lo, t_hi, temperatures))
    most, p, m = law_of(draw, vocab, greedy, k, ks, p_lo, p_hi, ps, m_lo, m_hi, ms)
    kind: tl.constexpr = sums.dtype.element_ty
    own = sums + draw * blocks
    top, mass = row_total(own, draws.to(tl.int64) * blocks, blocks, scale, 64)
    if status is not None:
        empty = tl.where(top == float("-inf"), 3, 0)
        report(status, draw, tl.where(top == float("inf"), 2, tl.where(mass != mass, 1, empty)))
    good = (mass == mass) & (top < float("inf")) & (top > float("-inf"))
    lowest = tl.full((), float("inf"), tl.float64)
    span = tl.full((), float("-inf"), tl.float64)
    if good & ((most > 0) | (p < 1.0) | (m > 0.0)):
        lowest, span = windows(own, vocab, blocks, top, mass, scale, most, p, m)
        # A finite end keeps tokens of probability zero out
        if kind == tl.float64:
            lowest = tl.maximum(lowest, -1.7976931348623157e308)
        else:
            lowest = tl.maximum(lowest, -3.4028234663852886e38)
    for width in tl.static_range(WIDTHS):
        end = lowest
        if width > 0:
            end = tl.maximum(lowest, top - span * (1.0 - width * STEP))
        tl.store(cuts + draw * WIDTHS + width, end.to(kind))
    tl.store(levels + draw, tl.where(good, top, float("nan")))
    tl.store(levels + draws + draw, mass)


@triton.jit
def block_values(row, block, vocab, BLOCK: tl.constexpr):
    """Logits of a block, -inf behind the row's end. Offsets of 32 bits save registers."""
    first = tl.cast(block, tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    left = tl.minimum(vocab - first, BLOCK).to(tl.int32)
    return widened(tl.load(row + first + offset, mask=offset < left, other=float("-inf")))


@triton.jit(do_not_specialize=["t_lo", "t_hi", "n1", "draws", "each"])
def census(
    logits, n1, s0, s1, vocab, blocks, draws, each, t_lo, t_hi, temperatures,
    sums, cuts, levels, counts, masses, BLOCK: tl.constexpr, WIDTHS: tl.constexpr,
):  # fmt: skip
    """`counts` and `masses` [draws, WIDTHS, blocks]: tokens of each block in each window, and their sum of
    exp(y - top).

    Programs (draw, part); a block's numbers do not depend on how a row is cut into parts.
    """
    draw = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    scale, _ = scale_of(per_draw(draw, t_lo, t_hi, temperatures))
    row = row_of(logits, draw, n1, s0, s1)
    top = tl.load(levels + draw).to(sums.dtype.element_ty)
    ends = cuts + draw * WIDTHS
    lowest = tl.load(ends)
    for block in range(part * each, tl.minimum((part + 1) * each, blocks)):
        most = tl.load(sums + draw * blocks + block)
        sink = draw * WIDTHS * blocks + block
        if most >= lowest:
            values = block_values(row, block, vocab, BLOCK)
            mass = powers(values, top, scale)[1]
            for width in range(WIDTHS):
                end = tl.load(ends + width)
                count = tl.zeros((), tl.int32)
                held = tl.zeros((), sums.dtype.element_ty)
                if most >= end:
                    inside = values >= end
                    count = tl.sum(inside.to(tl.int32), axis=0)
                    held = tl.sum(tl.where(inside, mass, 0.0), axis=0)
                tl.store(counts + sink + width * blocks, count)
                tl.store(masses + sink + width * blocks, held)
        else:
            for width in range(WIDTHS):
                tl.store(counts + sink + width * blocks, 0)
                tl.store(masses + sink + width * blocks, 0.0)


@triton.jit
def window_total(counts, masses, blocks, Q: tl.constexpr):
    """(tokens, mass) of a window over all blocks, int64 and float64."""
    count = tl.zeros((), tl.int64)
    mass = tl.zeros((), tl.float64)
    for first in range(0, blocks, 4 * Q):
        index = tile_index(first, Q)
        inside = index < blocks
        count += total(tl.load(counts + index, mask=inside, other=0).to(tl.int64))
        mass += total(tl.load(masses + index, mask=inside, other=0.0).to(tl.float64))
    return count, mass


@triton.jit
def running(values):
    """Sums of int32 `values` up to and including each, int32."""
    # Triton 3.2 interprets a sum in numpy's int64 and calls it int32: a store would write over the next
    # element. Compiled, the two casts are nothing.
    return tl.cumsum(values, axis=0).to(tl.int64).to(tl.int32)


@triton.jit
def place_blocks(inner, inner_blocks, outer, blocks, begin, sure, sure_blocks, edge, Q: tl.constexpr):
    """`sure` and `edge`: where in the list a block's tokens of the inner window and of the border start, -1
    where there are none to list.

    `inner`, `outer`: its tokens in the two windows. There is no inner one if `inner_blocks` is 0, and it is
    not listed if `sure_blocks` is 0. The border starts at `begin`.
    """
    before = tl.zeros((), tl.int32)
    edge_before = tl.cast(begin, tl.int32)
    for first in range(0, blocks, 4 * Q):
        index = first + tl.arange(0, 4 * Q)
        mask = index < blocks
        own = tl.load(inner + index, mask=index < inner_blocks, other=0)
        others = tl.load(outer + index, mask=mask, other=0) - own
        place = before + running(own) - own
        edge_place = edge_before + running(others) - others
        tl.store(sure + index, tl.where((own > 0) & (index < sure_blocks), place, -1), mask=mask)
        tl.store(edge + index, tl.where(others > 0, edge_place, -1), mask=mask)
        before += tl.sum(own, axis=0)
        edge_before += tl.sum(others, axis=0)


@triton.jit(do_not_specialize=["t_lo", "t_hi", "draws", "k", "p_lo", "p_hi", "m_lo", "m_hi"])
def choose(
    vocab, blocks, draws, t_lo, t_hi, temperatures, k, ks, p_lo, p_hi, ps, m_lo, m_hi, ms,
    cuts, counts, masses, levels, sizes, places,
    WIDTHS: tl.constexpr, LIST: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """A row's window, from the tallies; one program per draw.

    `levels` [5, draws] float64: maximum, mass, lower ends of the window and of the inner one, mass of the
    inner one. `sizes` [4, draws] int32: what the list holds, tokens in the window, in the inner one, in the
    border. `places` [2, draws, blocks]: see `place_blocks`.
    """
    draw = tl.program_id(0).to(tl.int64)
    _, greedy = scale_of(per_draw(draw, t_lo, t_hi, temperatures))
    most, p, m = law_of(draw, vocab, greedy, k, ks, p_lo, p_hi, ps, m_lo, m_hi, ms)
    top = tl.load(levels + draw)
    target = p * tl.load(levels + draws + draw) * 1.000001  # rounding of the sums
    own = draw * WIDTHS * blocks
    count, inner_count = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    inner_mass = tl.zeros((), tl.float64)
    end, inner_end = tl.full((), float("-inf"), tl.float64), tl.full((), float("inf"), tl.float64)
    width = tl.full((), WIDTHS - 1, tl.int32)
    found = tl.full((), -1, tl.int32)
    nothing = (top != top) | ((most == 0) & (p >= 1.0) & (m == 0.0))
    while (width >= 0) & (found < 0) & (nothing == 0):
        count, mass = window_total(counts + own + width * blocks, masses + own + width * blocks, blocks, 64)
        end = tl.load(cuts + draw * WIDTHS + width).to(tl.float64)
        # The widest window of a top-k holds k tokens or all that have a probability; min-p's all it keeps
        enough = (width == 0) & ((most > 0) | (p >= 1.0))
        enough = enough | tl.where(most > 0, count >= most, (p < 1.0) & (mass >= target))
        if enough:
            found = width
        elif (most == 0) | (p >= 1.0):  # top-p inside top-k may cut anywhere
            inner_count, inner_mass, inner_end = count, mass, end
        width -= 1
    holds = tl.full((), 2, tl.int32)
    border = count - inner_count
    if (found >= 0) & (border <= LIST):
        holds = tl.where(count <= LIST, 0, 1)
    holds = tl.where(top != top, 3, holds)
    if holds < 2:
        outer = counts + own + found * blocks
        begin = tl.where(holds == 0, inner_count, 0)
        place_blocks(
            outer + blocks, tl.where(inner_count > 0, blocks, 0), outer, blocks, begin,
            places + draw * blocks, tl.where(holds == 0, blocks, 0), places + (draws + draw) * blocks, Q,
        )  # fmt: skip
    else:
        end = tl.where(found >= 0, end, float("-inf"))
        for first in range(0, blocks, 4 * Q):
            index = first + tl.arange(0, 4 * Q)
            unlisted = tl.full((4 * Q,), -1, tl.int32)
            tl.store(places + draw * blocks + index, unlisted, mask=index < blocks)
            tl.store(places + (draws + draw) * blocks + index, unlisted, mask=index < blocks)
    tl.store(levels + 2 * draws + draw, end)
    tl.store(levels + 3 * draws + draw, inner_end)
    tl.store(levels + 4 * draws + draw, inner_mass)
    tl.store(sizes + draw, holds)
    tl.store(sizes + draws + draw, count.to(tl.int32))
    tl.store(sizes + 2 * draws + draw, inner_count.to(tl.int32))
    tl.store(sizes + 3 * draws + draw, border.to(tl.int32))


@triton.jit
def list_some(chosen, first, values, start, listed, held, SIZE: tl.constexpr):
    """Write the chosen of SIZE tokens from `first` on, ascending, to the list from `start` on; count them."""
    place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(listed + start + place, first + tl.arange(0, SIZE), mask=chosen)
    tl.store(held + start + place, values, mask=chosen)
    return tl.sum(chosen.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["n1", "draws", "each"])
def gather(
    logits, n1, s0, s1, vocab, blocks, draws, each, levels, places, listed, held,
    BLOCK: tl.constexpr, PIECE: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """`listed` and `held` [draws, LIST]: numbers and logits of the tokens that `places` gives a place.

    A block goes in pieces: a whole one takes so many registers that few programs run side by side.
    """
    draw = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = row_of(logits, draw, n1, s0, s1)
    kind: tl.constexpr = held.dtype.element_ty
    end = tl.load(levels + 2 * draws + draw).to(kind)
    inner_end = tl.load(levels + 3 * draws + draw).to(kind)
    own = listed + draw * LIST
    own_held = held + draw * LIST
    for block in range(part * each, tl.minimum((part + 1) * each, blocks)):
        sure = tl.load(places + draw * blocks + block)
        edge = tl.load(places + (draws + draw) * blocks + block)
        if (sure >= 0) | (edge >= 0):
            for piece in range(block * (BLOCK // PIECE), (block + 1) * (BLOCK // PIECE)):
                values = block_values(row, piece, vocab, PIECE)
                first = tl.cast(piece, tl.int32) * PIECE
                if sure >= 0:
                    sure += list_some(values >= inner_end, first, values, sure, own, own_held, PIECE)
                if edge >= 0:
                    inside = (values >= end) & (values < inner_end)
                    edge += list_some(inside, first, values, edge, own, own_held, PIECE)


class Narrow(NamedTuple):
    """What `narrowed` leaves for the search, in the order that kernels take it."""

    levels: Tensor
    sizes: Tensor
    listed: Tensor
    held: Tensor


def narrowed(batch: Batch, law: tuple[Any, ...], sums: Tensor, status: Tensor | None) -> Narrow:
    """Windows and lists of every draw; `law` as ``filters.filtered_rows`` has it. Bad rows go to `status`."""
    draws, blocks = batch.draws, triton.cdiv(batch.vocab, BLOCK)
    cuts = batch.new(draws, WIDTHS, dtype=batch.wide)
    levels, sizes = batch.new(5, draws, dtype=torch.float64), batch.new(4, draws, dtype=torch.int32)
    counts = batch.new(draws, WIDTHS, blocks, dtype=torch.int32)
    masses = batch.new(draws, WIDTHS, blocks, dtype=batch.wide)
    places = batch.new(2, draws, blocks, dtype=torch.int32)
    listed = batch.new(draws, LIST, dtype=torch.int32)
    held = batch.new(draws, LIST, dtype=batch.wide)
    arguments: tuple[Any, ...] = (batch.vocab, blocks, draws, *batch.heat, *law, sums, cuts, levels, status)
    launch(plan, (draws,), *arguments, WIDTHS=WIDTHS, num_warps=4)
    parts, each = splits(batch.logits, draws, blocks, waves=64)
    shape = (*batch.where, blocks, draws, each)
    arguments = (*shape, *batch.heat, sums, cuts, levels, counts, masses)
    launch(census, (draws, parts), *arguments, BLOCK=BLOCK, WIDTHS=WIDTHS, num_warps=1)
    arguments = (batch.vocab, blocks, draws, *batch.heat, *law, cuts, counts, masses, levels, sizes, places)
    launch(choose, (draws,), *arguments, WIDTHS=WIDTHS, LIST=LIST, Q=256, num_warps=4)
    arguments = (*shape, levels, places, listed, held)
    piece = BLOCK // 2 if interpreted() else 256
    launch(gather, (draws, parts), *arguments, BLOCK=BLOCK, PIECE=piece, LIST=LIST, num_warps=1)
    return Narrow(levels, sizes, listed, held)
