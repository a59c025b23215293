"""A tile of the fused head: its product, and noise made in the registers that hold it.

The order of tokens in a tile is that of the registers of matrix instructions, so that the four tokens of
a Philox call lie in one thread.
"""

from __future__ import annotations

import triton
import triton.language as tl
from driftmax.kernels.philox import block_words
from driftmax.kernels.race import LOG2E
from triton.language.extra.cuda import libdevice

THIRD = tl.constexpr(1.4426950408889634 / 3)
HALF = tl.constexpr(1.4426950408889634 / 2)
STEP = tl.constexpr(2.0**-32 * (1 - 2.0**-24))  # so that no word becomes 1 in float32


@triton.jit
def token_order(N: tl.constexpr, SWAP: tl.constexpr):
    """Which token of a tile lies in each of its N columns.

    The order is that of the registers of NVIDIA's matrix instructions: four tokens that share a Philox call
    lie in one thread. Elsewhere it costs nothing.
    """
    column = tl.arange(0, N)
    if SWAP:  # bits r w w h g g g -> g g g w w r h
        token = ((column & 7) << 4) | ((column & 0x30) >> 2) | ((column & 0x40) >> 5) | ((column & 8) >> 3)
    else:  # bits j j j i q q b -> j j j q q i b
        token = (column & 0x71) | ((column & 6) << 1) | ((column & 8) >> 2)
    return token


@triton.jit
def in_order(w0, w1, w2, w3, D: tl.constexpr, N: tl.constexpr, SWAP: tl.constexpr):
    """Four tiles [D, N / 4], the tokens 0, 1, 2, 3 (mod 4), as one [D, N] in the order of `token_order`."""
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    if SWAP:
        words = tl.permute(tl.reshape(words, (D, 8, N // 32, 2, 2)), (0, 3, 2, 4, 1))
    else:
        words = tl.permute(tl.reshape(words, (D, N // 16, 4, 2, 2)), (0, 1, 3, 2, 4))
    return tl.reshape(words, (D, N))


@triton.jit
def row_sums(values, D: tl.constexpr, N: tl.constexpr, SWAP: tl.constexpr):
    """Sums of each row, by pairs in the order of the tokens: a reduction's own order would depend on the
    tile's layout.
    """
    if SWAP:
        values = tl.sum(tl.sum(tl.reshape(values, (D, 2, N // 32, 2, 8)), axis=3), axis=1)
        values = tl.permute(values, (0, 2, 1))
    else:
        values = tl.sum(tl.sum(tl.reshape(values, (D, N // 16, 2, 4, 2)), axis=4), axis=2)
    values = tl.reshape(values, (D, N // 4))
    for level in tl.static_range(3, 8):
        values = tl.sum(tl.reshape(values, (D, 2, N >> level)), axis=1)
    return tl.reshape(values, (D,))


@triton.jit
def project(
    hidden, weight, bias, draw, first, vocab, depth, h0, h1, w0, w1,
    D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SWAP: tl.constexpr, EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Logits [D, N] in float32 of the draws `draw` and the N tokens from `first` on, in the order of
    `token_order`; -inf behind the vocabulary's end.

    With SWAP the vocabulary lies on the axis where matrix instructions have their fixed 64 rows, so that few
    draws make a small tile. Whatever the tile, a logit is summed up over `depth` in the same order: its
    accumulator goes through the instructions one after another, and their depth depends on the dtype alone.
    """
    inner = tl.arange(0, K)
    token = tl.minimum(first + token_order(N, SWAP), vocab - 1)
    if SWAP:
        left, right = weight + (token * w0)[:, None], hidden + (draw * h0)[None, :]
        left += (inner * w1)[None, :]
        right += (inner * h1)[:, None]
        sums = tl.zeros((N, D), tl.float32)
        left_step, right_step = K * w1, K * h1
    else:
        left, right = hidden + (draw * h0)[:, None], weight + (token * w0)[None, :]
        left += (inner * h1)[None, :]
        right += (inner * w1)[:, None]
        sums = tl.zeros((D, N), tl.float32)
        left_step, right_step = K * h1, K * w1
    for start in range(0, depth, K):
        if EVEN:
            a = tl.load(left)
            b = tl.load(right)
        else:
            a = tl.load(left, mask=(inner < depth - start)[None, :], other=0.0)
            b = tl.load(right, mask=(inner < depth - start)[:, None], other=0.0)
        if WIDEN:  # the interpreter has no bfloat16 arithmetic
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        sums = tl.dot(a, b, sums, input_precision="ieee")
        left += left_step
        right += right_step
    if SWAP:
        sums = tl.trans(sums)
    if bias is not None:
        sums += tl.load(bias + token).to(tl.float32)[None, :]
    if not EVEN:
        sums = tl.where((first + token_order(N, SWAP) < vocab)[None, :], sums, float("-inf"))
    return sums


@triton.jit
def near_exponentials(
    first, logits, k0, k1, position, step, row_id, purpose: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, SWAP: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Float32 exponentials [D, N] of the tokens from `first` on, in units of log 2, within 2**-12 of the
    exact ones (those above 9, one in 8000, within 2**-22 e**E absolutely).

    High words are enough where they are not small; the low ones are made if any is.
    """
    block = (first // 4 + tl.arange(0, N // 4).to(tl.int64))[None, :]
    w0, w1, w2, w3 = block_words(block, purpose, 0, k0, k1, position, step, row_id)
    hi = in_order(w0, w1, w2, w3, D, N, SWAP).to(tl.float32)
    u = tl.fma(hi, STEP, 2.0**-33)
    # The logits change nothing here. They are named for their layout, so that the words are made in it.
    least = tl.maximum(u, tl.minimum(logits, 0.0))
    if tl.min(tl.min(least, axis=1), axis=0) < 2.0**-20:
        v0, v1, v2, v3 = block_words(block, purpose, 1, k0, k1, position, step, row_id)
        lo = in_order(v0, v1, v2, v3, D, N, SWAP).to(tl.float32)
        u = tl.fma(hi, STEP, tl.fma(lo, 2.0**-64, 2.0**-65))
    series = u * tl.fma(u, tl.fma(u, THIRD, HALF), LOG2E)
    # NVIDIA's is one instruction, good to 2**-22 absolutely, where log2 is a polynomial.
    logarithm = libdevice.fast_log2f(1.0 - u) if NVIDIA else tl.log2(1.0 - u)
    return tl.where(u < 0.015625, series, logarithm * -1.0)


@triton.jit
def all_exponentials(
    first, logits, k0, k1, position, step, row_id, purpose: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, SWAP: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """`near_exponentials` of a tile; of a large one in two halves, since all its words at once do not fit the
    registers.
    """
    if SWAP:
        waits = near_exponentials(first, logits, k0, k1, position, step, row_id, purpose, D, N, SWAP, NVIDIA)
    else:
        H: tl.constexpr = N // 2
        left, right = tl.split(tl.permute(tl.reshape(logits, (D, 2, H)), (0, 2, 1)))
        early = near_exponentials(first, left, k0, k1, position, step, row_id, purpose, D, H, SWAP, NVIDIA)
        late = near_exponentials(
            first + H, right, k0, k1, position, step, row_id, purpose, D, H, SWAP, NVIDIA
        )
        waits = tl.reshape(tl.permute(tl.join(early, late), (0, 2, 1)), (D, N))
    return waits
