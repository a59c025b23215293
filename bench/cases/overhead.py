"""What a call costs beside its work: `driftmax.categorical` on a tiny tensor against a bare core call.

The limit is that bare call with ready-made pointers: the difference of the two medians is the price of
argument checks and dispatch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import driftmax
import torch

from ... import _core
from .. import peers
from ..harness import GateFailed, Run, Settings, Workload

VOCABULARY = 8


def bare_call(logits: torch.Tensor, tokens: torch.Tensor, settings: Settings) -> Run:
    """The compiled core's categorical with its arguments prepared beforehand."""
    shape = (logits.shape[0], 1, logits.stride(0), 0, logits.shape[1])
    streams = (settings.seed, 0, 0, 0, 0)
    options = (1.0, 0, 0, 0, 1.0, 0, 0.0, 0)  # temperature, top_k, top_p, min_p; no per-row values
    arguments: tuple[Any, ...] = (logits.data_ptr(), 0, *shape, *streams, *options, 0)
    arguments = (*arguments, tokens.data_ptr(), 0, settings.threads)
    core = _core.categorical

    def call(keep: tuple[torch.Tensor, torch.Tensor] = (logits, tokens)) -> int:  # keeps both buffers alive
        return core(*arguments)

    return call


def workloads(settings: Settings) -> Iterator[Workload]:
    """One tiny row; only the CPU has a compiled core to call."""
    if settings.device.type != "cpu":
        return
    logits = torch.randn(1, VOCABULARY, generator=settings.generator(4))
    out = torch.empty(1, dtype=torch.int64)
    bare = bare_call(logits, out, settings)

    def subject() -> torch.Tensor:
        return driftmax.categorical(logits, rng=settings.seed, out=out)

    def gate() -> None:
        wanted = int(subject())
        out.fill_(-1)
        bare()
        if int(out) != wanted:
            raise GateFailed(f"the bare call drew token {int(out)}, the public one {wanted}")

    yield Workload(
        case="overhead",
        variant="tiny row",
        dtype="float32",
        n=1,
        v=VOCABULARY,
        subject=subject,
        gate=gate,
        peers={
            "torch gumbel fp32": peers.gumbel_argmax(logits, torch.float32),
            "torch multinomial": peers.multinomial(logits),
        },
        limit=bare,
        limit_name="bare core call",
        shortest_sample_s=20e-3,  # thousands of calls: the steady price, not that of a cold cache
    )
