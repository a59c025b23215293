"""`fill`: noise straight from the counters. `driftmax.random` is its public face."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from driftmax.ops._arguments import DTYPES, pointer, sink
from driftmax.ops._dispatch import Op, core
from driftmax.random import Rng, RowStreams, resolve
from driftmax.reference.fill import PURPOSE
from driftmax.reference.fill import fill as reference

__all__ = ["fill"]

SCHEMA = (
    # out contiguous, seen as [n_rows, length]; kind is the purpose tag of docs/numerics.md;
    # positions: one per row, None means 0
    "Tensor(a!) out, int kind, SymInt n_rows, "
    "SymInt seed, Tensor? seeds, Tensor? rows, Tensor? positions, SymInt step, Tensor? steps"
)


def fill(
    kind: str,
    shape: int | Sequence[int],
    *,
    rng: Rng = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A tensor of "bits", "uniform", "exponential", "gumbel" or "normal" noise; see ``driftmax.random``.

    Examples
    --------
    >>> from driftmax.ops.fill import fill
    >>> fill("uniform", 3, rng=0).shape
    torch.Size([3])
    """
    allowed = (torch.int32,) if kind == "bits" else (torch.float32, torch.float64)
    if dtype not in allowed:
        raise TypeError(f"{kind} makes {' or '.join(map(str, allowed))}, not {dtype}")
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if any(size < 0 for size in shape):
        raise ValueError(f"shape must not be negative, not {shape}")
    if device is None:
        device = "cpu" if out is None else out.device
    device = torch.device(device)
    values = (
        torch.empty(shape, dtype=dtype, device=device) if out is None else sink(out, shape, dtype, device)
    )
    n_rows = 1
    if isinstance(rng, RowStreams):
        if not shape or shape[0] != len(rng):
            raise ValueError(f"rng holds {len(rng)} rows, so shape must begin with {len(rng)}; it is {shape}")
        n_rows = shape[0]
    streams = resolve(rng, n_rows, n_rows, values)
    if values.numel():
        OP.runner(backend, values)(values, PURPOSE[kind], n_rows, *streams)
    return values if out is None or out is values else out.copy_(values)


def _cpp(
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
    length = out.numel() // n_rows
    if seeds is not None and seeds.numel() == 1:
        seed, seeds = int(seeds), None
    core.fill(
        kind,
        DTYPES[out.dtype],
        out.data_ptr(),
        n_rows,
        length,
        length,
        seed & 0xFFFFFFFFFFFFFFFF,
        pointer(seeds),
        pointer(rows),
        pointer(positions),
        step if steps is None else int(steps),
        torch.get_num_threads(),
    )


def _samples() -> Iterator[tuple[Any, ...]]:
    yield torch.empty(5, dtype=torch.int32), PURPOSE["bits"], 1, 3, None, None, None, 0, None
    for kind in ("uniform", "exponential", "gumbel", "normal"):
        yield torch.empty(7), PURPOSE[kind], 1, 3, None, None, None, 9, None
        seeds, rows = torch.tensor([1, -2, 3]), torch.tensor([0, 9, 2**32 - 1])
        positions, steps = torch.tensor([4, 0, 2**32 - 1]), torch.tensor([2**24 - 1])
        yield torch.empty(3, 6, dtype=torch.float64), PURPOSE[kind], 3, 0, seeds, rows, positions, 0, steps


OP = Op("fill", SCHEMA, cpp=_cpp, reference=reference, samples=_samples)
