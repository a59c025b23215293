"""`lm_head_categorical`: vocabulary tiles of the product go through a dot and straight into block sums and
a race.

Logits never reach memory. A tile of 128 tokens leaves, per row, its sums and the two tokens that lead its
race in float32; ``head_finish`` races the blocks of 1024 and then the winner's candidates, exactly. Tile
shapes and the order of the sums over D are fixed, so a draw does not depend on the batch it is in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from driftmax.errors import status_word
from driftmax.kernels import noise
from driftmax.kernels.categorical import BLOCK_NOISE, TOKEN, Batch, draw_rows
from driftmax.kernels.launch import BLOCK, Stream, halves, interpreted, launch, stream
from driftmax.kernels.philox import block_words, element_words, single_words, stream_words
from driftmax.kernels.race import (
    FAR,
    LN2,
    LOG2E,
    exact_scores,
    first_where,
    largest,
    per_draw,
    report,
    scale_of,
    store_stats,
    tile_index,
    total,
    winner_of,
)
from torch import Tensor

TILE_M, TILE_N = 64, 128
SUBS = tl.constexpr(8)  # tiles of a block of the block race
_ROWS = 512  # rows at a time: bounds the scratch
_LOGITS = 1 << 25  # logits stored at a time where filters need whole rows


@triton.jit
def project(
    hidden, weight, bias, rows, columns, draws, vocab, depth, h0, h1, w0, w1,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Logits [M, N] in float32 of the given rows and columns (int64), -inf behind the vocabulary's end."""
    hidden_rows = hidden + (tl.minimum(rows, draws - 1) * h0)[:, None]
    weight_rows = weight + (tl.minimum(columns, vocab - 1) * w0)[None, :]
    sums = tl.zeros((M, N), tl.float32)
    for start in range(0, depth, K):
        inner = start + tl.arange(0, K).to(tl.int64)
        a = tl.load(hidden_rows + (inner * h1)[None, :], mask=(inner < depth)[None, :], other=0.0)
        b = tl.load(weight_rows + (inner * w1)[:, None], mask=(inner < depth)[:, None], other=0.0)
        if WIDEN:  # the interpreter has no bfloat16 arithmetic
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + tl.minimum(columns, vocab - 1)).to(tl.float32)[None, :]
    return tl.where((columns < vocab)[None, :], sums, float("-inf"))


@triton.jit
def row_best(values, columns):
    """Largest value of each row and its lowest column."""
    best = tl.max(values, axis=1)
    at = tl.min(tl.where(values == best[:, None], columns[None, :], FAR), axis=1)
    return best, at


@triton.jit
def at_column(values, columns, at):
    """The value of each row at column `at`; 0 where there is no such column."""
    return tl.sum(tl.where(columns[None, :] == at[:, None], values, 0.0), axis=1)


@triton.jit
def near_gumbels(
    first, k0, k1, position, step, row_id, purpose: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """Float32 Gumbels [M, N] of the tokens from `first` on, within 2**-11 of the exact ones.

    High words are enough where they are not small; the low ones are made if any is.
    """
    block = (first // 4 + tl.arange(0, N // 4).to(tl.int64))[None, :]
    w0, w1, w2, w3 = block_words(block, purpose, 0, k0, k1, position, step, row_id)
    hi = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (M, N))
    lo = hi * 0 + 0x80000000
    if tl.min(tl.min((hi >> 12).to(tl.int32), axis=1), axis=0) == 0:
        v0, v1, v2, v3 = block_words(block, purpose, 1, k0, k1, position, step, row_id)
        lo = tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), (M, N))
    return noise.gumbel(hi, lo, False)


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
        "count",
    ]
)
def head_tiles(
    hidden, weight, bias, draws, vocab, depth, h0, h1, w0, w1, begin, count, tiles, n1,
    seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps,
    t_lo, t_hi, temperatures, numbers, leaders,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One tile of the product; `numbers` [6, count, tiles] and `leaders` [2, count, tiles] for
    `head_finish`.

    numbers: maximum, sum of e = exp(y - y_max), sum of log2(e) e, runner-up, and the logits of the two
    leaders.
    """
    program = tl.program_id(0)
    bands = tl.cdiv(count, M)  # neighbours share the tile of the weight
    tile = program // bands
    local = (program - tile * bands).to(tl.int64) * M + tl.arange(0, M)
    draw = begin + tl.minimum(local, count - 1)
    first = tile.to(tl.int64) * N
    columns = first + tl.arange(0, N)
    logits = project(hidden, weight, bias, draw, columns, draws, vocab, depth, h0, h1, w0, w1, M, N, K, WIDEN)
    k0, k1, position, number, row_id = stream_words(
        draw, n1, seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps
    )
    scale, greedy = scale_of(per_draw(draw, t_lo, t_hi, temperatures) + draw.to(tl.float64) * 0.0)
    none = (draw * 0).to(tl.uint32)
    gumbels = near_gumbels(
        first, (none + k0)[:, None], (none + k1)[:, None], (none + position)[:, None],
        (none + number)[:, None], (none + row_id)[:, None], TOKEN, M, N,
    )  # fmt: skip
    top, at = row_best(logits, columns)
    second = tl.max(tl.where(columns[None, :] == at[:, None], float("-inf"), logits), axis=1)
    gap = logits - tl.where(top == float("-inf"), 0.0, top)[:, None]
    gap = tl.maximum(gap, -3.0e38, propagate_nan=tl.PropagateNan.ALL)
    factor = tl.minimum(LOG2E / scale, 1.0e30)
    high = factor.to(tl.float32)
    low = (factor - high.to(tl.float64)).to(tl.float32)
    exponent = tl.fma(gap, high[:, None], gap * low[:, None])
    exponent = tl.maximum(exponent, -1100.0, propagate_nan=tl.PropagateNan.ALL)
    mass = tl.exp2(exponent)
    score = exponent * 0.6931471805599453 + gumbels
    score = tl.where(greedy[:, None], gap, score)
    score = tl.where(logits == float("-inf"), float("-inf"), score)
    _, leader = row_best(score, columns)
    _, chaser = row_best(tl.where(columns[None, :] == leader[:, None], float("-inf"), score), columns)
    leader = tl.minimum(leader, vocab - 1)
    chaser = tl.minimum(chaser, vocab - 1)
    plane = tl.cast(count, tl.int64) * tiles
    sink = numbers + local * tiles + tile
    inside = local < count
    tl.store(sink, top, mask=inside)
    tl.store(sink + plane, tl.sum(mass, axis=1), mask=inside)
    tl.store(sink + 2 * plane, tl.sum(exponent * mass, axis=1), mask=inside)
    tl.store(sink + 3 * plane, second, mask=inside)
    tl.store(sink + 4 * plane, at_column(logits, columns, leader), mask=inside)
    tl.store(sink + 5 * plane, at_column(logits, columns, chaser), mask=inside)
    tl.store(leaders + local * tiles + tile, leader.to(tl.int32), mask=inside)
    tl.store(leaders + plane + local * tiles + tile, chaser.to(tl.int32), mask=inside)


@triton.jit
def head_maximum(own, plane, tiles, Q: tl.constexpr):
    """(largest logit, first tile that has it, runner-up) of a row, float64."""
    top = tl.full((), float("-inf"), tl.float64)
    at = tl.zeros((), tl.int64)
    for first in range(0, tiles, 4 * Q):
        index = tile_index(first, Q)
        maxima = tl.load(own + index, mask=index < tiles, other=float("-inf")).to(tl.float64)
        most = largest(maxima)
        better = most > top
        at = tl.where(better, first_where(maxima == most, index), at)
        top = tl.where(better, most, top)
    other = tl.load(own + 3 * plane + at).to(tl.float64)
    for first in range(0, tiles, 4 * Q):
        index = tile_index(first, Q)
        maxima = tl.load(own + index, mask=(index < tiles) & (index != at), other=float("-inf")).to(
            tl.float64
        )
        other = tl.maximum(other, largest(maxima))
    return top, at, other


@triton.jit
def head_sums(
    own, plane, tiles, top, scale, k0, k1, position, step, row_id, purpose: tl.constexpr, Q: tl.constexpr
):
    """(sum of exp(y - top), of (y - top) exp(y - top), winner of the block race) of a row."""
    mass = tl.zeros((), tl.float64)
    moment = tl.zeros((), tl.float64)
    best = tl.full((), float("inf"), tl.float64)
    winner = tl.zeros((), tl.int64)
    for first in range(0, tl.cdiv(tiles, SUBS), 4 * Q):
        block = tile_index(first, Q)
        index = block[:, :, None] * SUBS + tl.arange(0, SUBS)[None, None, :]
        inside = index < tiles
        gap = (tl.load(own + index, mask=inside, other=float("-inf")).to(tl.float64) - top) / scale
        factor = tl.exp(gap)
        share = tl.load(own + plane + index, mask=inside, other=0.0).to(tl.float64) * factor
        bits = tl.load(own + 2 * plane + index, mask=inside, other=0.0).to(tl.float64)
        weight = tl.sum(share, axis=2)
        mass += total(weight)
        moment += total(tl.sum(tl.where(share > 0.0, share * gap + bits * factor * LN2, 0.0), axis=2))
        hi = element_words(first // 4, Q, purpose, 0, k0, k1, position, step, row_id)
        lo = element_words(first // 4, Q, purpose, 1, k0, k1, position, step, row_id)
        clock = tl.where(weight > 0.0, noise.exponential(hi, lo, True) / weight, float("inf"))
        soonest = tl.min(tl.min(clock, axis=1), axis=0)
        sooner = soonest < best
        winner = tl.where(sooner, first_where(clock == soonest, block), winner)
        best = tl.where(sooner, soonest, best)
    return mass, moment, winner


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
        "count",
    ]
)
def head_finish(
    draws, begin, count, tiles, n1,
    seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps,
    t_lo, t_hi, temperatures, numbers, leaders, tokens, stats, status,
    RACE: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """One program per draw: block race (or every tile's leaders), then the exact race of the leaders."""
    local = tl.program_id(0).to(tl.int64)
    draw = begin + local
    scale, greedy = scale_of(per_draw(draw, t_lo, t_hi, temperatures))
    k0, k1, position, number, row_id = stream_words(
        draw, n1, seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps
    )
    plane = tl.cast(count, tl.int64) * tiles
    own = numbers + local * tiles
    top, at, second = head_maximum(own, plane, tiles, Q)
    finite = tl.where(top == float("-inf"), 0.0, top)
    mass, moment, winner = head_sums(
        own, plane, tiles, finite, scale, k0, k1, position, number, row_id, BLOCK_NOISE, Q
    )
    start = tl.zeros((), tl.int64)
    stop = tl.cast(tiles, tl.int64)
    if RACE:
        start = winner * SUBS
        stop = tl.minimum(start + SUBS, stop)
    start = tl.where(greedy, at, start)
    stop = tl.where(greedy, at + 1, stop)
    best = tl.full((), float("-inf"), tl.float64)
    token = tl.zeros((), tl.int64)
    chosen = finite
    for first in range(start, stop, 4 * Q):
        tile = first + tl.arange(0, 4 * Q)
        inside = tile < stop
        values = tl.join(
            tl.load(own + 4 * plane + tile, mask=inside, other=float("-inf")),
            tl.load(own + 5 * plane + tile, mask=inside, other=float("-inf")),
        )
        mine = leaders + local * tiles + tile
        index = tl.join(tl.load(mine, mask=inside, other=0), tl.load(mine + plane, mask=inside, other=0)).to(
            tl.int64
        )
        hi = single_words(index, TOKEN, 0, k0, k1, position, number, row_id)
        lo = single_words(index, TOKEN, 1, k0, k1, position, number, row_id)
        before = best
        best, token = winner_of(exact_scores(values, scale, greedy, hi, lo), index, best, token)
        if best > before:
            chosen = largest(tl.where(index == token, values, float("-inf"))).to(tl.float64)
    empty = tl.where(top == float("-inf"), 3, 0)
    report(status, draw, tl.where(top == float("inf"), 2, tl.where(mass != mass, 1, empty)))
    tl.store(tokens + draw, token)
    if stats is not None:
        store_stats(stats, draws, draw, chosen, top, second, scale, mass, moment)


@triton.jit(do_not_specialize=["draws", "begin", "count"])
def head_logits(
    hidden, weight, bias, draws, vocab, depth, h0, h1, w0, w1, begin, count, logits,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Store the float32 logits of rows begin .. begin + count, tile by tile as `head_tiles` makes them."""
    program = tl.program_id(0)
    bands = tl.cdiv(count, M)
    tile = program // bands
    local = (program - tile * bands).to(tl.int64) * M + tl.arange(0, M)
    columns = tile.to(tl.int64) * N + tl.arange(0, N)
    draw = begin + tl.minimum(local, count - 1)
    values = project(hidden, weight, bias, draw, columns, draws, vocab, depth, h0, h1, w0, w1, M, N, K, WIDEN)
    where = logits + local[:, None] * vocab + columns[None, :]
    tl.store(where, values, mask=(local < count)[:, None] & (columns < vocab)[None, :])


def _shape(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    """The product's operands and sizes in the order the kernels take them; `hidden` is [draws, D]."""
    sizes = (hidden.shape[0], weight.shape[0], hidden.shape[1])
    return (hidden, weight, bias, *sizes, *hidden.stride(), *weight.stride())


def _tile(hidden: Tensor) -> dict[str, Any]:
    """Sizes of a tile: they depend on the dtype alone, and fit the 64 KB of shared memory of the smallest
    target.
    """
    return {"M": TILE_M, "N": TILE_N, "K": 256 // hidden.element_size() // 2, "WIDEN": interpreted()}


def _fused(
    shape: tuple[Any, ...],
    n1: int,
    tokens: Tensor,
    stats: Tensor | None,
    streams: Stream,
    heat: Any,
    method: int,
) -> None:
    """The unfiltered law, no logits stored."""
    hidden, draws, vocab = shape[0], shape[3], shape[4]
    tiles, most = triton.cdiv(vocab, TILE_N), min(draws, _ROWS)
    numbers = torch.empty(6 * most * tiles, dtype=torch.float32, device=hidden.device)
    leaders = torch.empty(2 * most * tiles, dtype=torch.int32, device=hidden.device)
    for begin in range(0, draws, most):
        count = min(most, draws - begin)
        common = (n1, *streams, *heat, numbers, leaders)
        grid = (tiles * triton.cdiv(count, TILE_M),)
        launch(
            head_tiles, grid, *shape, begin, count, tiles, *common, **_tile(hidden), num_warps=8, num_stages=3
        )
        ends = (tokens, stats, status_word(hidden.device))
        launch(
            head_finish,
            (count,),
            draws,
            begin,
            count,
            tiles,
            *common,
            *ends,
            RACE=method == 0,
            Q=16,
            num_warps=4,
        )


def _stored(
    shape: tuple[Any, ...],
    n1: int,
    tokens: Tensor,
    stats: Tensor | None,
    streams: tuple[Any, ...],
    heat: tuple[Any, ...],
    law: tuple[Any, ...],
    method: int,
) -> None:
    """Filters, and float64: some rows of logits at a time through `categorical`'s kernels."""
    hidden, weight, bias, draws, vocab = shape[:5]
    seed, seeds, rows, positions, step, steps = streams
    draw = torch.arange(draws, device=hidden.device)
    row = torch.div(draw, n1, rounding_mode="floor")
    row_ids = row if rows is None else rows[row]
    places = draw % n1 if positions is None else positions.reshape(-1)
    status = status_word(hidden.device)
    most = max(1, min(draws, _LOGITS // vocab))
    for begin in range(0, draws, most):
        part = slice(begin, min(begin + most, draws))
        count = part.stop - begin
        if hidden.dtype == torch.float64:
            logits = hidden[part] @ weight.T
            logits = logits if bias is None else logits + bias
        else:
            logits = torch.empty(count, vocab, dtype=torch.float32, device=hidden.device)
            grid = (triton.cdiv(vocab, TILE_N) * triton.cdiv(count, TILE_M),)
            launch(
                head_logits, grid, *shape, begin, count, logits, **_tile(hidden), num_warps=8, num_stages=3
            )
        whole = (*heat, *law)
        some: tuple[Any, ...] = tuple(v.reshape(-1)[part] if isinstance(v, Tensor) else v for v in whole)
        own_seeds = seeds if seeds is None or seeds.numel() == 1 else seeds[row[part]]
        own = stream(seed, own_seeds, row_ids[part], places[part], step, steps)
        drawn = torch.empty_like(draw[part])
        kept = None if stats is None else torch.empty(4, count, dtype=stats.dtype, device=stats.device)
        word = torch.zeros_like(status)
        draw_rows(Batch(logits, *some[:2]), drawn, kept, own, some[2:], method, word)
        # The chunk's own draw numbers become the batch's, still without a look at them on the host.
        status.copy_(torch.where((status == 0) & (word != 0), word + (begin << 8), status))
        tokens.view(-1)[part] = drawn
        if stats is not None and kept is not None:
            stats.view(4, -1)[:, part] = kept


@torch.no_grad()
def lm_head_categorical(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    """Write one token per row of `hidden`. See ``driftmax.lm_head_categorical``; arguments as in its op's
    schema.
    """
    n1 = hidden.shape[1] if hidden.dim() == 3 else 1
    shape = _shape(hidden.reshape(-1, hidden.shape[-1]), weight, bias)
    law = (top_k, top_ks, top_p, top_ps, min_p, min_ps)
    streams = (seed, seeds, rows, positions, step, steps)
    # Rows of one block are a token race, bitwise that of `categorical` on the same logits.
    if hidden.dtype == torch.float64 or weight.shape[0] <= BLOCK or law != (0, None, 1.0, None, 0.0, None):
        _stored(shape, n1, tokens, stats, streams, (temperature, temperatures), law, method)
    else:
        _fused(shape, n1, tokens, stats, stream(*streams), (*halves(temperature), temperatures), method)


def specialisations() -> Iterator[tuple[Any, ...]]:
    """Arguments of `lm_head_categorical` that between them launch every variant worth compiling ahead of
    time.
    """
    one, off = (5, None, None, None, 0, None), (1.0, None, 0, None, 1.0, None, 0.0, None)
    tokens = torch.empty(2, dtype=torch.int64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        hidden, weight = torch.empty(2, 256, dtype=dtype), torch.empty(4096, 256, dtype=dtype)
        bias = torch.empty(4096, dtype=dtype) if dtype == torch.float16 else None
        yield (hidden, weight, bias, tokens, torch.empty(4, 2), *one, *off, 0)
    yield (hidden, weight, None, tokens, None, *one, *off, 1)
    yield (hidden, weight, None, tokens, None, *one, 1.0, None, 50, None, 0.9, None, 0.0, None, 0)
