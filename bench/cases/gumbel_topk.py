"""`driftmax.gumbel_topk`: k draws per row without replacement.

The limit is a bare read of the logits. The gate holds the first token of each list to the softmax, and whole
lists to the reference backend's.
"""

from __future__ import annotations

from collections.abc import Iterator

import driftmax
import torch

from .. import gates, inputs, limits
from ..harness import Run, Settings, Workload

VOCABULARY = 50257
REFERENCE_ROWS = 4


def gumbel_then_topk(logits: torch.Tensor, k: int) -> Run:
    """topk(logits - log(-log U)) in float32, in place."""
    noise = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)

    def draw() -> torch.Tensor:
        noise.uniform_().log_().neg_().log_()
        torch.sub(logits, noise, out=noise)
        return torch.topk(noise, k, dim=-1).indices

    return draw


def multinomial(logits: torch.Tensor, k: int) -> Run:
    """torch.multinomial(softmax(logits), k, replacement=False)."""
    return lambda: torch.multinomial(torch.softmax(logits, -1), k, replacement=False)


def _workload(settings: Settings, variant: str, logits: torch.Tensor, k: int) -> Workload:
    def gate() -> None:
        law = torch.softmax(logits[0].double(), -1)
        gates.law_gate(
            lambda many: driftmax.gumbel_topk(many, k, rng=settings.seed)[:, 0],
            logits[0],
            law,
            f"{variant} law",
            settings.gate_draws // 4,
        )
        few = logits[: 2 if settings.quick else REFERENCE_ROWS]
        wanted = driftmax.gumbel_topk(few, k, rng=settings.seed, backend="reference")
        gates.check_equal_tokens(driftmax.gumbel_topk(few, k, rng=settings.seed), wanted, 0, variant)

    return Workload(
        case="gumbel_topk",
        variant=variant,
        dtype=str(logits.dtype).removeprefix("torch."),
        n=logits.shape[0],
        v=logits.shape[1],
        subject=lambda: driftmax.gumbel_topk(logits, k, rng=settings.seed),
        gate=gate,
        peers={"torch gumbel topk": gumbel_then_topk(logits, k), "torch multinomial": multinomial(logits, k)},
        limit=limits.bare_read(logits, settings),
        limit_name="bare read",
    )


def workloads(settings: Settings) -> Iterator[Workload]:
    """A few draws and many, on Zipf rows and real ones."""
    n = 64 if settings.quick else 256
    logits = inputs.zipf(settings, n, VOCABULARY)
    yield _workload(settings, "zipf, k=8", logits, 8)
    if settings.quick:
        return
    yield _workload(settings, "zipf, k=256", logits, 256)
    yield _workload(settings, "real, k=8", inputs.real(1024, settings.quick)[:n].to(settings.device), 8)
