"""What the launchers share: scalars and streams in the form the kernels take, and how a batch is cut into programs."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

BLOCK = 1024  # tokens per block of the block race

#: Launch options of every kernel. A fused multiply-add that the source does not ask for would change the noise.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}


class Stream(NamedTuple):
    """The stream arguments of ``philox.stream_words``, after `draw` and `n1`."""

    seed_lo: int
    seed_hi: int
    seeds: Tensor | None
    seeds_stride: int
    rows: Tensor | None
    positions: Tensor | None
    step: int
    steps: Tensor | None


def signed(word: int) -> int:
    """A 32-bit word as the int32 of the same bits, so that a scalar's value never changes a kernel's signature."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


def halves(value: float) -> tuple[int, int]:
    """Low and high half of a float64; Triton would pass a Python float as float32."""
    (bits,) = struct.unpack("<Q", struct.pack("<d", value))
    return signed(bits), signed(bits >> 32)


def stream(
    seed: int,
    seeds: Tensor | None,
    rows: Tensor | None,
    positions: Tensor | None,
    step: int,
    steps: Tensor | None,
) -> Stream:
    """An op's stream arguments as the kernels take them."""
    stride = 0 if seeds is None or seeds.numel() == 1 else 1
    return Stream(signed(seed), signed(seed >> 32), seeds, stride, rows, positions, signed(step), steps)


@lru_cache
def _processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def splits(tensor: Tensor, draws: int, pieces: int, waves: int = 8) -> tuple[int, int]:
    """How many programs share a row of `pieces` pieces, and pieces per program. No draw depends on it."""
    programs = waves * _processors(tensor.device.index or 0) if tensor.is_cuda else 2
    wanted = max(1, min(pieces, triton.cdiv(programs, draws), 65535))
    each = triton.cdiv(pieces, wanted)
    return triton.cdiv(pieces, each), each
