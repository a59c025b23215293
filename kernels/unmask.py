"""`unmask`: list the draws to make, then make them, by programs that share the list.

`decide` writes the list; its order varies from run to run, no draw depends on it. The rest is done as
`categorical` does it: block sums, the block race, the winning block's token race. Programs that outnumber the
list leave at once, so a step costs what it reveals, and nothing is read on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from driftmax.errors import status_word
from driftmax.kernels import noise
from driftmax.kernels.categorical import (
    BLOCK_NOISE,
    FLOATS,
    SUMMARY,
    TOKEN,
    Batch,
    fault_of,
    one_tile,
    row_summary,
    store_block,
)
from driftmax.kernels.launch import BLOCK, halves, launch, resident, stream
from driftmax.kernels.philox import element_words, single_words, stream_words
from driftmax.kernels.race import (
    load_tile,
    per_draw,
    race_tile,
    report,
    row_of,
    scale_of,
    tile_index,
    widened,
)
from torch import Tensor

UNIFORM = tl.constexpr(2)


@triton.jit(
    do_not_specialize=["seed_lo", "seed_hi", "seeds_stride", "step", "length", "mask_id", "p_lo", "p_hi"]
)
def decide(
    tokens, length, mask_id, p_lo, p_hi, probabilities,
    seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps,
    chosen, counter, revealed,
    Q: tl.constexpr,
):  # fmt: skip
    """Append one row's draws to `chosen`, whose length is `counter`, and count them in `revealed`."""
    row = tl.program_id(0).to(tl.int64)
    probability = per_draw(row, p_lo, p_hi, probabilities)
    # Element j of the row's uniforms decides on position j; their own position is 0.
    k0, k1, origin, number, row_id = stream_words(
        row, 1, seed_lo, seed_hi, seeds, seeds_stride, rows, None, step, steps
    )
    count = tl.zeros((), tl.int64)
    for first in range(0, length, 4 * Q):
        index = tile_index(first, Q)
        draw = row * length + index
        inside = index < length
        token = tl.load(tokens + draw, mask=inside, other=0)
        if positions is not None:
            element = tl.load(positions + draw, mask=inside, other=0)
            hi = single_words(element, UNIFORM, 0, k0, k1, origin, number, row_id)
            lo = single_words(element, UNIFORM, 1, k0, k1, origin, number, row_id)
        else:
            hi = element_words(first // 4, Q, UNIFORM, 0, k0, k1, origin, number, row_id)
            lo = element_words(first // 4, Q, UNIFORM, 1, k0, k1, origin, number, row_id)
        reveal = inside & (token == mask_id) & (noise.uniform(hi, lo, True) < probability)
        taken = tl.reshape(reveal.to(tl.int64), (4 * Q,))
        many = tl.sum(taken, axis=0)
        start = tl.atomic_add(counter, many)
        place = start + tl.cumsum(taken, axis=0) - 1
        tl.store(chosen + place, tl.reshape(draw, (4 * Q,)), mask=taken > 0)
        count += many
    tl.store(revealed + row, count)


@triton.jit
def without(values, index, first, SIZE: tl.constexpr, mask_id, forbidden, forbidden_count):
    """Logits of tokens `index`, all in [first, first + SIZE), -inf at the mask and at forbidden ones."""
    values = tl.where(index == mask_id, float("-inf"), values)
    if forbidden is not None:
        for number in range(0, forbidden_count):
            token = tl.load(forbidden + number)
            if (token >= first) & (token < first + SIZE):
                values = tl.where(index == token, float("-inf"), values)
    return values


@triton.jit(do_not_specialize=["t_lo", "t_hi", "n1", "draws", "mask_id", "forbidden_count"])
def chosen_sums(
    logits, n1, s0, s1, vocab, blocks, draws, mask_id, forbidden, forbidden_count,
    t_lo, t_hi, temperatures, chosen, counter, sums,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`sums` [3, draws, blocks], filled for as many draws as were chosen, in the order of the list."""
    items = tl.load(counter) * blocks
    plane = draws.to(tl.int64) * blocks
    for item in range(tl.program_id(0).to(tl.int64), items, tl.num_programs(0)):
        place = item // blocks
        first = (item - place * blocks) * BLOCK
        draw = tl.load(chosen + place)
        scale, _ = scale_of(per_draw(draw, t_lo, t_hi, temperatures))
        row = row_of(logits, draw, n1, s0, s1)
        index = first + tl.arange(0, BLOCK)
        values = widened(tl.load(row + index, mask=index < vocab, other=float("-inf")))
        values = without(values, index, first, BLOCK, mask_id, forbidden, forbidden_count)
        store_block(values, scale, sums + item, plane, logits.dtype.element_ty)


@triton.jit(
    do_not_specialize=[
        "seed_lo", "seed_hi", "seeds_stride", "step", "t_lo", "t_hi", "n1", "draws", "mask_id",
        "forbidden_count",
    ]
)  # fmt: skip
def reveal(
    logits, n1, s0, s1, vocab, blocks, draws, mask_id, forbidden, forbidden_count,
    seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps,
    t_lo, t_hi, temperatures, chosen, counter, sums, tokens, revealed, status,
    ONE: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Draw and write the chosen tokens, from the block sums, or by the token race where `sums` is None.

    What cannot be drawn is reported, stays masked, and is taken off the count.
    """
    for place in range(tl.program_id(0).to(tl.int64), tl.load(counter), tl.num_programs(0)):
        draw = tl.load(chosen + place)
        scale, greedy = scale_of(per_draw(draw, t_lo, t_hi, temperatures))
        row = row_of(logits, draw, n1, s0, s1)
        k0, k1, position, number, row_id = stream_words(
            draw, n1, seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps
        )
        first = draw * 0
        fault = 0
        if sums is not None:
            own = sums + place * blocks
            top, at, _, _, _, winner, bad = row_summary(
                own, draws.to(tl.int64) * blocks, blocks, scale, k0, k1, position, number, row_id,
                BLOCK_NOISE, True, ONE, SUMMARY,
            )  # fmt: skip
            first = tl.where(greedy, at, winner) * (4 * Q)
            fault = fault_of(top, bad)
        values = load_tile(row, first, vocab, Q)
        values = without(values, tile_index(first, Q), first, 4 * Q, mask_id, forbidden, forbidden_count)
        best = tl.full((), float("-inf"), tl.float64)
        token = tl.zeros((), tl.int64)
        best, token, code = race_tile(
            values, first, best, token, scale, greedy, TOKEN, Q, k0, k1, position, number, row_id
        )
        if sums is None:
            fault = tl.where((code == 0) & (best == float("-inf")), 3, code)
        report(status, draw, fault)
        if fault == 0:
            tl.store(tokens + draw, token)
        else:
            tl.atomic_add(revealed + draw // n1, tl.full((), -1, tl.int64))


def unmask(
    logits: Tensor,
    tokens: Tensor,
    revealed: Tensor,
    mask_id: int,
    forbidden: Tensor | None,
    probability: float,
    probabilities: Tensor | None,
    seed: int,
    seeds: Tensor | None,
    rows: Tensor | None,
    positions: Tensor | None,
    step: int,
    steps: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
) -> None:
    """Unmask some positions. See ``driftmax.unmask``; arguments as in its op's schema."""
    batch = Batch(logits, temperature, temperatures)
    streams = stream(seed, seeds, rows, positions, step, steps)
    chosen = batch.new(batch.draws, dtype=torch.int64)
    counter = batch.new(1, dtype=torch.int64).zero_()
    arguments: tuple[Any, ...] = (tokens, batch.n1, mask_id, *halves(probability), probabilities, *streams)
    launch(decide, (logits.shape[0],), *arguments, chosen, counter, revealed, Q=256, num_warps=4)
    blocks = triton.cdiv(batch.vocab, BLOCK)
    banned = (mask_id, forbidden, 0 if forbidden is None else forbidden.numel())
    shape = (*batch.where, blocks, batch.draws, *banned)
    sums = None
    if blocks > 1:
        sums = batch.new(3, batch.draws, blocks, dtype=batch.wide)
        programs = min(batch.draws * blocks, resident(logits, 32))
        launch(chosen_sums, (programs,), *shape, *batch.heat, chosen, counter, sums, BLOCK=BLOCK, num_warps=1)
    arguments = (*shape, *streams, *batch.heat, chosen, counter, sums, tokens, revealed)
    quarter = 64 if batch.vocab <= 256 else 256
    programs = min(batch.draws, resident(logits, 8))
    status = status_word(logits.device)
    launch(reveal, (programs,), *arguments, status, ONE=one_tile(blocks), Q=quarter, num_warps=4)


def specialisations() -> Iterator[tuple[Any, ...]]:
    """Arguments of `unmask` that between them launch every variant worth compiling ahead of time."""
    one = (5, None, None, None, 0, None)
    tokens, revealed, columns = (torch.zeros(2, 64, dtype=torch.int64), *torch.zeros(2, 2, dtype=torch.int64))
    for dtype in FLOATS:
        logits = torch.empty(1, 1, 128 * BLOCK, dtype=dtype).expand(2, 64, -1)
        yield logits, tokens, revealed, 7, None, 0.5, None, *one, 1.0, None
        yield logits[..., :1000], tokens, revealed, 7, None, 0.5, None, *one, 1.0, None
    row = torch.zeros(2, dtype=torch.int64)
    per_row = (0, row, row, tokens, 0, row[:1])
    chance, heat = torch.ones(2, dtype=torch.float64), torch.ones(2, 64, dtype=torch.float64)
    logits = torch.empty(1, 1, 50257).expand(2, 64, -1)  # a vocabulary no load of which is aligned
    for vocab in (50257, 50):
        yield logits[..., :vocab], tokens, revealed, 7, columns, 0.0, chance, *per_row, 1.0, heat
