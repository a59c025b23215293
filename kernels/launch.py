"""What the launchers share: scalars and streams in the form the kernels take, the launch itself, and its
recording.

The ahead-of-time compiler asks the launchers themselves what they launch (`recording`), so that its list
cannot go stale.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

BLOCK = 1024  # tokens per block of the block race

#: Options of every launch. A fused multiply-add that the source does not ask for would change the noise.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: Any
    arguments: tuple[Any, ...]
    meta: dict[str, Any]


_records: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **meta: Any) -> None:
    """Run `kernel` on `grid`, or only note it down inside `recording`."""
    if _records is not None:
        _records.append(Launch(kernel, arguments, meta | OPTIONS))
    else:
        kernel[grid](*arguments, **meta, **OPTIONS)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches inside the block go to the list that this yields, not to a device."""
    global _records
    _records = []
    try:
        yield _records
    finally:
        _records = None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: a program costs milliseconds, so make few and wide
    ones.
    """
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


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
    """A 32-bit word as the int32 of the same bits, so that a scalar's value never changes a kernel's
    signature.
    """
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


def resident(tensor: Tensor, waves: int) -> int:
    """Programs that fill the device: `waves` on each processor."""
    return waves * _processors(tensor.device.index or 0) if tensor.is_cuda else 2


def splits(tensor: Tensor, draws: int, pieces: int, waves: int = 8) -> tuple[int, int]:
    """How many programs share a row of `pieces` pieces, and pieces per program. No draw depends on it."""
    wanted = max(1, min(pieces, triton.cdiv(resident(tensor, waves), draws), 65535))
    each = triton.cdiv(pieces, wanted)
    return triton.cdiv(pieces, each), each
