"""`lm_head_categorical`: vocabulary tiles of the product go through a dot and straight into block sums and
a race.

Logits never reach memory. A tile of 128 tokens leaves, per row, its sums and the two tokens that lead its
race in float32; ``head_finish`` races the blocks of 1024 and then the winner's candidates, exactly. A tile
has as many draws as the batch fills, but the order of every sum is fixed, so a draw does not depend on the
batch it is in.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from driftmax.errors import status_word
from driftmax.kernels import noise
from driftmax.kernels.categorical import BLOCK_NOISE, TOKEN, Batch, draw_rows
from driftmax.kernels.head import all_exponentials, project, row_sums, token_order
from driftmax.kernels.launch import BLOCK, Stream, halves, interpreted, launch, stream
from driftmax.kernels.philox import element_words, single_words, stream_words
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
    total,
    winner_of,
)
from torch import Tensor

TILE = 128  # tokens of a tile
SUBS = tl.constexpr(BLOCK // TILE)  # tiles of a block of the block race
_ROWS = 512  # rows at a time: bounds the scratch
_LOGITS = 1 << 25  # logits stored at a time where filters need whole rows

NEVER = tl.constexpr(0x7FFFFFFF)  # above every clock


@triton.jit
def tile_leaders(
    logits, draw, local, first, tile, count, tiles, n1,
    seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps,
    t_lo, t_hi, temperatures, numbers, leaders,
    D: tl.constexpr, N: tl.constexpr, SWAP: tl.constexpr, NVIDIA: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """What `head_tiles` leaves of one tile of logits [D, N]. Its token race is a race of clocks E / e**y, and
    their float32 bits, the token's number in the low ones, are compared as integers.
    """
    k0, k1, position, number, row_id = stream_words(
        draw, n1, seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps
    )
    scale, greedy = scale_of(per_draw(draw, t_lo, t_hi, temperatures))
    factor = tl.maximum(tl.minimum(LOG2E / scale, 1.0e30), 1.0e-30).to(tl.float32)
    any_greedy = greedy
    if temperatures is not None:
        any_greedy = tl.max(greedy.to(tl.int32), axis=0) > 0
        factor = factor[:, None]
    if seeds is not None:
        k0, k1 = k0[:, None], k1[:, None]
    waits = all_exponentials(
        first, logits, k0, k1, position[:, None], number, row_id[:, None], TOKEN, D, N, SWAP, NVIDIA
    )
    token = token_order(N, SWAP)[None, :]
    top = tl.max(logits, axis=1)
    exponent = (logits - tl.where(top == float("-inf"), 0.0, top)[:, None]) * factor
    exponent = tl.maximum(exponent, -1100.0, propagate_nan=tl.PropagateNan.ALL)
    mass = tl.exp2(exponent)
    key = ((waits * tl.exp2(exponent * -1.0)).to(tl.int32, bitcast=True) & -N) | token
    leader = tl.min(key, axis=1)
    if any_greedy:
        foremost = tl.min(tl.where(logits == top[:, None], token, N - 1), axis=1)
        exact = tl.min(tl.where(token == foremost[:, None], key, NEVER), axis=1)
        leader = tl.where(greedy, exact, leader)
    chaser = tl.min(tl.where(key == leader[:, None], NEVER, key), axis=1)
    first_logit = tl.max(tl.where(key == leader[:, None], logits, float("-inf")), axis=1)
    second_logit = tl.max(tl.where(key == chaser[:, None], logits, float("-inf")), axis=1)
    plane = tl.cast(count, tl.int64) * tiles
    place = local * tiles + tile
    inside = local < count
    tl.store(numbers + place, top, mask=inside)
    tl.store(numbers + place + plane, row_sums(mass, D, N, SWAP), mask=inside)
    tl.store(numbers + place + 2 * plane, first_logit, mask=inside)
    tl.store(numbers + place + 3 * plane, second_logit, mask=inside)
    tl.store(leaders + place, (first + (leader & (N - 1))).to(tl.int32), mask=inside)
    tl.store(leaders + place + plane, (first + (chaser & (N - 1))).to(tl.int32), mask=inside)
    if STATS:
        at = tl.min(tl.where(logits == top[:, None], token, N - 1), axis=1)
        second = tl.max(tl.where(token == at[:, None], float("-inf"), logits), axis=1)
        tl.store(numbers + place + 4 * plane, row_sums(exponent * mass, D, N, SWAP), mask=inside)
        tl.store(numbers + place + 5 * plane, second, mask=inside)


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
    D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SWAP: tl.constexpr, EVEN: tl.constexpr,
    WIDEN: tl.constexpr, NVIDIA: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """One tile of the product; `numbers` [6 or, without stats, 4, count, tiles] and `leaders` [2, count,
    tiles] for `head_finish`.

    numbers: maximum, sum of e = exp(y - y_max), logits of the two leaders, sum of log2(e) e, runner-up.
    """
    program = tl.program_id(0)
    bands = tl.cdiv(count, D)  # neighbours share the tile of the weight
    tile = program // bands
    local = (program - tile * bands).to(tl.int64) * D + tl.arange(0, D)
    first = tile.to(tl.int64) * N
    draw = begin + tl.minimum(local, count - 1)
    logits = project(
        hidden, weight, bias, draw, first, vocab, depth, h0, h1, w0, w1, D, N, K, SWAP, EVEN, WIDEN
    )
    tile_leaders(
        logits, draw, local, first, tile, count, tiles, n1,
        seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps,
        t_lo, t_hi, temperatures, numbers, leaders, D, N, SWAP, NVIDIA, STATS,
    )  # fmt: skip


@triton.jit
def chunk(first, B: tl.constexpr):
    """Numbers of B blocks from `first` on, int64 [B], and of their tiles, [B, SUBS]."""
    block = first + tl.arange(0, B).to(tl.int64)
    return block, block[:, None] * SUBS + tl.arange(0, SUBS)[None, :]


@triton.jit
def head_maximum(own, tiles, B: tl.constexpr):
    """(largest logit, first tile that has it) of a row, float64."""
    top = tl.full((), float("-inf"), tl.float64)
    at = tl.zeros((), tl.int64)
    for first in range(0, tl.cdiv(tiles, SUBS), B):
        _, index = chunk(first, B)
        maxima = tl.load(own + index, mask=index < tiles, other=float("-inf"))
        most = largest(maxima)
        here = first_where(maxima == most, index)
        better = most.to(tl.float64) > top
        at = tl.where(better, here, at)
        top = tl.where(better, most.to(tl.float64), top)
    return top, at


@triton.jit
def head_second(own, plane, tiles, at, B: tl.constexpr):
    """The runner-up of a row whose largest logit is in tile `at`, float64."""
    other = tl.load(own + 5 * plane + at)
    for first in range(0, tl.cdiv(tiles, SUBS), B):
        _, index = chunk(first, B)
        maxima = tl.load(own + index, mask=(index < tiles) & (index != at), other=float("-inf"))
        other = tl.maximum(other, largest(maxima))
    return other.to(tl.float64)


@triton.jit
def head_sums(
    own, plane, tiles, top, scale, k0, k1, position, step, row_id,
    purpose: tl.constexpr, B: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """(sum of exp(y - top), of (y - top) exp(y - top), winner of the block race) of a row."""
    mass = tl.zeros((), tl.float64)
    moment = tl.zeros((), tl.float64)
    best = tl.full((), float("inf"), tl.float64)
    winner = tl.zeros((), tl.int64)
    for first in range(0, tl.cdiv(tiles, SUBS), B):
        block, index = chunk(first, B)
        inside = index < tiles
        maxima = tl.load(own + index, mask=inside, other=float("-inf"))
        sums = tl.load(own + plane + index, mask=inside, other=0.0)
        gap = (maxima.to(tl.float64) - top) / scale
        factor = tl.exp(gap)
        share = sums.to(tl.float64) * factor
        weight = tl.sum(share, axis=1)
        mass += tl.sum(weight, axis=0)
        if STATS:
            bits = tl.load(own + 4 * plane + index, mask=inside, other=0.0).to(tl.float64)
            moment += total(tl.where(share > 0.0, share * gap + bits * factor * LN2, 0.0))
        hi = element_words(first // 4, B // 4, purpose, 0, k0, k1, position, step, row_id)
        lo = element_words(first // 4, B // 4, purpose, 1, k0, k1, position, step, row_id)
        wait = tl.reshape(noise.exponential(hi, lo, True), (B,))
        clock = tl.where(weight > 0.0, wait / weight, float("inf"))
        soonest = tl.min(clock, axis=0)
        here = tl.min(tl.where(clock == soonest, block, FAR), axis=0)
        winner = tl.where(soonest < best, here, winner)
        best = tl.where(soonest < best, soonest, best)
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
    RACE: tl.constexpr, B: tl.constexpr, W: tl.constexpr, STATS: tl.constexpr,
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
    top, at = head_maximum(own, tiles, B)
    finite = tl.where(top == float("-inf"), 0.0, top)
    mass, moment, winner = head_sums(
        own, plane, tiles, finite, scale, k0, k1, position, number, row_id, BLOCK_NOISE, B, STATS
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
    for first in range(start, stop, W):
        tile = first + tl.arange(0, W)
        inside = tile < stop
        values = tl.join(
            tl.load(own + 2 * plane + tile, mask=inside, other=float("-inf")),
            tl.load(own + 3 * plane + tile, mask=inside, other=float("-inf")),
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
    if STATS:
        second = head_second(own, plane, tiles, at, B)
        store_stats(stats, draws, draw, chosen, top, second, scale, mass, moment)


@triton.jit(do_not_specialize=["draws", "begin", "count"])
def head_logits(
    hidden, weight, bias, draws, vocab, depth, h0, h1, w0, w1, begin, count, logits,
    D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SWAP: tl.constexpr, EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Store the float32 logits of rows begin .. begin + count, tile by tile as `head_tiles` makes them."""
    program = tl.program_id(0)
    bands = tl.cdiv(count, D)
    tile = program // bands
    local = (program - tile * bands).to(tl.int64) * D + tl.arange(0, D)
    first = tile.to(tl.int64) * N
    draw = begin + tl.minimum(local, count - 1)
    values = project(
        hidden, weight, bias, draw, first, vocab, depth, h0, h1, w0, w1, D, N, K, SWAP, EVEN, WIDEN
    )
    token = first + token_order(N, SWAP)
    where = logits + (local * vocab)[:, None] + token[None, :]
    tl.store(where, values, mask=(local < count)[:, None] & (token < vocab)[None, :])


def _shape(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    """The product's operands and sizes in the order the kernels take them; `hidden` is [draws, D]."""
    sizes = (hidden.shape[0], weight.shape[0], hidden.shape[1])
    return (hidden, weight, bias, *sizes, *hidden.stride(), *weight.stride())


@lru_cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have; without a GPU, where launches are only recorded, those of an H100."""
    if device.type != "cuda":
        return 232448
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


#: Draws of a tile: (depth of a step for 16-bit numbers, warps, stages), the fastest of those tried on an
#: H100. No bit depends on them. Tiles of 256 draws were slower than twice 128.
_TILES = {16: (128, 4, 4), 32: (128, 4, 2), 64: (128, 4, 2), 128: (64, 8, 6)}


def _tile(shape: tuple[Any, ...], count: int) -> dict[str, Any]:
    """Constants and launch options of `count` draws' tiles."""
    hidden, vocab, depth = shape[0], shape[4], shape[5]
    size = hidden.element_size()
    # AMD's matrix instructions change their depth below 32, and float32 has no matrix instruction to feed.
    least, most = 32 if torch.version.hip else 16, 128 if size == 2 else 64
    wide = min(max(triton.next_power_of_2(count), least), most)
    deep, warps, stages = _TILES[wide]
    deep = deep if size == 2 else 32
    fit = _shared_memory(hidden.device) // ((TILE + wide) * deep * size)
    return {
        "N": TILE,
        "D": wide,
        "K": deep,
        "SWAP": wide < 64,
        "EVEN": depth % deep == 0 and vocab % TILE == 0,
        "WIDEN": interpreted(),
        "num_warps": warps if size == 2 else 8,
        "num_stages": max(2, min(stages, fit)),
    }


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
    tiles, most, planes = triton.cdiv(vocab, TILE), min(draws, _ROWS), 4 if stats is None else 6
    numbers = torch.empty(planes * most * tiles, dtype=torch.float32, device=hidden.device)
    leaders = torch.empty(2 * most * tiles, dtype=torch.int32, device=hidden.device)
    tile = _tile(shape, most)
    race = {"NVIDIA": not (torch.version.hip or interpreted()), "STATS": stats is not None}
    # Blocks at a time: chosen by the vocabulary alone, since the order of sums depends on it.
    finish = {"B": min(max(triton.next_power_of_2(triton.cdiv(vocab, BLOCK)), 4), 128)}
    finish |= {"RACE": method == 0, "W": int(SUBS) if method == 0 else 256, "STATS": stats is not None}
    for begin in range(0, draws, most):
        count = min(most, draws - begin)
        common = (n1, *streams, *heat, numbers, leaders)
        grid = (tiles * triton.cdiv(count, tile["D"]),)
        launch(head_tiles, grid, *shape, begin, count, tiles, *common, **tile, **race)
        ends = (tokens, stats, status_word(hidden.device))
        launch(head_finish, (count,), draws, begin, count, tiles, *common, *ends, **finish, num_warps=4)


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
            tile = _tile(shape, count)
            grid = (triton.cdiv(vocab, TILE) * triton.cdiv(count, tile["D"]),)
            launch(head_logits, grid, *shape, begin, count, logits, **tile)
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
    for dtype, vocab in ((torch.float32, 4000), (torch.float16, 4000), (torch.bfloat16, 4096)):
        hidden, weight = torch.empty(2, 256, dtype=dtype), torch.empty(vocab, 256, dtype=dtype)
        bias = torch.empty(vocab, dtype=dtype) if dtype == torch.float16 else None
        yield (hidden, weight, bias, tokens, torch.empty(4, 2), *one, *off, 0)
    yield (hidden, weight, None, tokens, None, *one, *off, 1)
    for draws in sorted(_TILES)[1:]:
        hidden, tokens = torch.empty(draws, 256, dtype=dtype), torch.empty(draws, dtype=torch.int64)
        yield (hidden, weight, None, tokens, None, *one, *off, 0)
    yield (hidden, weight, None, tokens, None, *one, 1.0, None, 50, None, 0.9, None, 0.0, None, 0)
