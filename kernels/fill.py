"""`fill`: noise straight from the counters, one Philox call for four elements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from driftmax.kernels import noise
from driftmax.kernels.launch import interpreted, launch, stream
from driftmax.kernels.philox import block_words, interleave, stream_words
from torch import Tensor

BITS = tl.constexpr(1)
UNIFORM = tl.constexpr(2)
EXPONENTIAL = tl.constexpr(3)
GUMBEL = tl.constexpr(4)
NORMAL = tl.constexpr(5)


@triton.jit(do_not_specialize=["seed_lo", "seed_hi", "seeds_stride", "step"])
def fill_kernel(
    out,
    length,
    tiles,
    seed_lo,
    seed_hi,
    seeds,
    seeds_stride,
    rows,
    positions,
    step,
    steps,
    KIND: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Elements 4 * BLOCKS * tile .. of one row; program = row * tiles + tile."""
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    first = (program - row * tiles) * BLOCKS
    # With n1 = 1 the default position is 0.
    k0, k1, position, number, row_id = stream_words(
        row, 1, seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps
    )
    block = first + tl.arange(0, BLOCKS)
    h0, h1, h2, h3 = block_words(block, KIND, 0, k0, k1, position, number, row_id)
    F64: tl.constexpr = out.dtype.element_ty == tl.float64
    if KIND == BITS:
        values = interleave(h0, h1, h2, h3, BLOCKS).to(tl.int32, bitcast=True)
    elif KIND == UNIFORM and not F64:
        values = noise.uniform(interleave(h0, h1, h2, h3, BLOCKS), None, False)
    else:
        l0, l1, l2, l3 = block_words(block, KIND, 1, k0, k1, position, number, row_id)
        if KIND == NORMAL:
            n0, n1 = noise.normal_pair(h0, l0, h1, l1, F64)
            n2, n3 = noise.normal_pair(h2, l2, h3, l3, F64)
            values = interleave(n0, n1, n2, n3, BLOCKS)
        else:
            hi = interleave(h0, h1, h2, h3, BLOCKS)
            lo = interleave(l0, l1, l2, l3, BLOCKS)
            if KIND == UNIFORM:
                values = noise.uniform(hi, lo, F64)
            elif KIND == EXPONENTIAL:
                values = noise.exponential(hi, lo, F64)
            else:
                values = noise.gumbel(hi, lo, F64)
    index = (block * 4)[:, None] + tl.arange(0, 4)[None, :]
    tl.store(out + row * length + index, values, mask=index < length)


def fill(
    out: Tensor,
    kind: int,
    n_rows: int,
    seed: int,
    seeds: Tensor | None,
    rows: Tensor | None,
    positions: Tensor | None,
    step: int,
    steps: Tensor | None,
) -> None:
    """Fill the contiguous `out`, seen as [n_rows, length], with one stream per row. See
    ``driftmax.random``.
    """
    length = out.numel() // n_rows
    blocks = 4096 if interpreted() else 256
    tiles = triton.cdiv(length, 4 * blocks)
    streams = stream(seed, seeds, rows, positions, step, steps)
    launch(
        fill_kernel, (n_rows * tiles,), out, length, tiles, *streams, KIND=kind, BLOCKS=blocks, num_warps=4
    )


def specialisations() -> Iterator[tuple[Any, ...]]:
    """Arguments of `fill` that between them launch every variant worth compiling ahead of time."""
    one, row = (5, None, None, None, 0, None), torch.zeros(2, dtype=torch.int64)
    per_row = (0, row, row, row, 0, row[:1])
    yield (torch.empty(4096, dtype=torch.int32), 1, 1, *one)
    for kind in (2, 3, 4, 5):
        for dtype in (torch.float32, torch.float64):
            yield (torch.empty(4096, dtype=dtype), kind, 1, *one)
    yield (torch.empty(2, 4096), 5, 2, *per_row)
