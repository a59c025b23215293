"""`driftmax.random` fills against torch's, into a buffer made once and larger than the last-level cache.

The limit is a bare write of the same bytes. The gate checks moments, and that the first elements are the
reference backend's bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from driftmax import random

from .. import gates, inputs, limits
from ..harness import GateFailed, Settings, Workload

ELEMENTS = 2**24
PREFIX = 4096
# mean, variance and kurtosis of each distribution
MOMENTS = {
    "uniform": (0.5, 1.0 / 12.0, 1.8),
    "exponential": (1.0, 1.0, 9.0),
    "gumbel": (0.5772156649015329, math.pi**2 / 6.0, 5.4),
    "normal": (0.0, 1.0, 3.0),
}


def torch_fill(kind: str, buffer: torch.Tensor) -> Callable[[], torch.Tensor]:
    """torch's own way to fill a buffer with the distribution, in place."""
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "uniform": buffer.uniform_,
        "exponential": buffer.exponential_,
        "gumbel": lambda: buffer.uniform_().log_().neg_().log_().neg_(),
        "normal": buffer.normal_,
    }
    return ways[kind]


def _workload(settings: Settings, kind: str, dtype: torch.dtype) -> Workload:
    buffer = torch.empty(ELEMENTS, dtype=dtype, device=settings.device)
    peer_buffer = torch.empty_like(buffer)
    fill = getattr(random, kind)
    options = {"rng": settings.seed, "dtype": dtype, "device": settings.device}

    def gate() -> None:
        fill(ELEMENTS, out=buffer, **options)
        gates.check_moments(buffer, *MOMENTS[kind], kind)
        wanted = fill(PREFIX, backend="reference", **options)
        if not torch.equal(buffer[:PREFIX], wanted):
            raise GateFailed(f"{kind}: the first elements are not the reference's, bit for bit")

    return Workload(
        case="fill",
        variant=kind,
        dtype=str(dtype).removeprefix("torch."),
        n=1,
        v=ELEMENTS,
        subject=lambda: fill(ELEMENTS, out=buffer, **options),
        gate=gate,
        peers={f"torch {kind}": torch_fill(kind, peer_buffer)},
        limit=limits.bare_write(buffer),
        limit_name="bare write",
    )


def workloads(settings: Settings) -> Iterator[Workload]:
    """Every distribution in float32; normals and Gumbels in float64 too."""
    for kind in ("normal",) if settings.quick else ("uniform", "exponential", "gumbel", "normal"):
        yield _workload(settings, kind, inputs.DTYPES["float32"])
    if not settings.quick:
        for kind in ("normal", "gumbel"):
            yield _workload(settings, kind, inputs.DTYPES["float64"])
