"""Philox4x32-10 and the counter layout of docs/numerics.md section 1, as device functions."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import core  # Triton 3.2 has add, sub and mul only there


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds on four counter words under two key words, all uint32, broadcast; four uint32 tensors."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        low0 = core.mul(c0, 0xD2511F53, sanitize_overflow=False)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low1 = core.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = core.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = core.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def stream_words(draw, n1, seed_lo, seed_hi, seeds, seeds_stride, rows, positions, step, steps):
    """Key and counter words (k0, k1, position, step, row) of draw number `draw` (int64 scalar), all uint32.

    Absent tensors are None. The seed comes in two halves so that its size does not choose the kernel's
    signature.
    """
    leading = draw // n1
    if seeds is not None:
        seed = tl.load(seeds + leading * seeds_stride)
        k0 = seed.to(tl.uint32)
        k1 = (seed >> 32).to(tl.uint32)
    else:
        k0 = seed_lo.to(tl.uint32)
        k1 = seed_hi.to(tl.uint32)
    row = leading.to(tl.uint32)
    if rows is not None:
        row = tl.load(rows + leading).to(tl.uint32)
    if positions is not None:
        position = tl.load(positions + draw).to(tl.uint32)
    else:
        position = (draw - leading * n1).to(tl.uint32)
    number = step.to(tl.uint32)
    if steps is not None:
        number = tl.load(steps).to(tl.uint32)
    return k0, k1, position, number, row


@triton.jit
def block_words(block, purpose: tl.constexpr, plane: tl.constexpr, k0, k1, position, step, row):
    """The four words of each Philox block (int64 tensor of block numbers); plane 1 makes the low words of
    64.
    """
    c0 = block.to(tl.uint32)
    c1 = core.add(position, (block >> 32).to(tl.uint32), sanitize_overflow=False)
    c2 = step | ((purpose + plane * 0x80) << 24)
    return philox4x32(c0, c1, c0 * 0 + c2, c0 * 0 + row, k0, k1)


@triton.jit
def interleave(w0, w1, w2, w3, BLOCKS: tl.constexpr):
    """Four vectors [BLOCKS] as the columns of [BLOCKS, 4]."""
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCKS, 4))


@triton.jit
def element_words(
    first, BLOCKS: tl.constexpr, purpose: tl.constexpr, plane: tl.constexpr, k0, k1, position, step, row
):
    """Words of elements 4 * first .. 4 * (first + BLOCKS), uint32 [BLOCKS, 4]: one Philox call for each
    four.
    """
    block = first + tl.arange(0, BLOCKS).to(tl.int64)
    w0, w1, w2, w3 = block_words(block, purpose, plane, k0, k1, position, step, row)
    return interleave(w0, w1, w2, w3, BLOCKS)


@triton.jit
def single_words(element, purpose: tl.constexpr, plane: tl.constexpr, k0, k1, position, step, row):
    """Words of scattered elements (int64 tensor): a Philox call for each."""
    w0, w1, w2, w3 = block_words(element >> 2, purpose, plane, k0, k1, position, step, row)
    word = (element & 3).to(tl.int32)
    return tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
