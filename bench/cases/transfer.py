"""`driftmax.transfer`: writing the best-scoring tokens of every row, against the loop that decoders write.

The limit is a bare read of the scores. The gate compares with a sort, for every rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import driftmax
import torch

from .. import gates, limits
from ..harness import Run, Settings, Workload

MASK = 1 << 20


def topk_per_row(tokens: torch.Tensor, drawn: torch.Tensor, scores: torch.Tensor, count: torch.Tensor) -> Run:
    """As published decoders write it: -inf where nothing may move, then topk row by row."""

    def step() -> torch.Tensor:
        masked = tokens == MASK
        confidence = torch.where(masked, scores, -torch.inf)
        moved = torch.zeros_like(masked)
        for row in range(tokens.shape[0]):
            moved[row, confidence[row].topk(int(count[row])).indices] = True
        return torch.where(moved, drawn, tokens)

    return step


def sorted_ranks(
    tokens: torch.Tensor, drawn: torch.Tensor, scores: torch.Tensor, count: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """All rows at once: a stable sort and the rank of every position. Also what the gate compares with."""

    def step() -> torch.Tensor:
        masked = tokens == MASK
        order = torch.where(masked, scores, -torch.inf).argsort(dim=1, descending=True, stable=True)
        place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, place)
        return torch.where(masked & (rank < count[:, None]), drawn, tokens)

    return step


def above(tokens: torch.Tensor, drawn: torch.Tensor, scores: torch.Tensor, least: float) -> Run:
    """The threshold rule in torch: every score that reaches it, and the best one in any case."""

    def step() -> torch.Tensor:
        confidence = torch.where(tokens == MASK, scores, -torch.inf)
        moved = confidence >= least
        moved.scatter_(1, confidence.argmax(1, keepdim=True), True)
        return torch.where(moved, drawn, tokens)

    return step


def _workload(settings: Settings, variant: str, rows: int, length: int, least: float | None) -> Workload:
    generator = settings.generator(3)
    scores = torch.rand(rows, length, generator=generator).to(settings.device)
    drawn = torch.randint(0, MASK, (rows, length), generator=generator).to(settings.device)
    start = torch.where(torch.rand(rows, length, generator=generator) < 0.5, MASK, 0).to(settings.device)
    count = torch.full((rows,), max(1, length // 64), device=settings.device)
    by_threshold = least is not None
    wanted = (start == MASK) & (scores >= (least or 0.0))
    expected = wanted.sum(1) if by_threshold else count

    def subject() -> torch.Tensor:
        tokens = start.clone()
        many = None if by_threshold else count
        driftmax.transfer(tokens, drawn, scores, many, mask_id=MASK, threshold=least)
        return tokens

    def gate() -> None:
        sorted_tokens = sorted_ranks(start, drawn, scores, expected.clamp(min=1))()
        gates.check_equal_tokens(subject(), sorted_tokens, 0, variant)

    peers: dict[str, Run] = {}
    if least is not None:
        peers["torch threshold"] = above(start, drawn, scores, least)
    else:
        peers["torch topk per row"] = topk_per_row(start, drawn, scores, count)
        peers["torch sort"] = sorted_ranks(start, drawn, scores, count)
    return Workload(
        case="transfer",
        variant=variant,
        dtype="float32",
        n=rows,
        v=length,
        subject=subject,
        gate=gate,
        peers=peers,
        limit=limits.bare_read(scores, settings),
        limit_name="bare read",
    )


def workloads(settings: Settings) -> Iterator[Workload]:
    """A batch of usual length by count and by threshold, and one long row."""
    rows, length = (4, 256) if settings.quick else (16, 4096)
    yield _workload(settings, "count", rows, length, None)
    yield _workload(settings, "threshold", rows, length, 0.95)
    if not settings.quick:
        yield _workload(settings, "count, long", 1, 32768, None)
