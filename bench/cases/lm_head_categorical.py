"""`driftmax.lm_head_categorical`: hidden states and head weights to tokens, the logits never stored.

The limit is the matrix product alone. Peers store the logits and then sample: with torch's fastest way, and
with `driftmax.categorical`. The extra peak memory of each is measured too. The gate holds draws from one
hidden state to its softmax, and the tokens to those of the unfused path (which differ only where rounding of
the product decides).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import driftmax
import torch

from .. import gates, limits, memory, peers
from ..harness import SUBJECT, Run, Settings, Workload

VOCABULARY = 50257
DRAWS = 512  # of the law gate: each costs a row of the product


def _problem(settings: Settings, n: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and head weights whose logits have a standard deviation of about 2."""
    generator = settings.generator(3)
    hidden = torch.randn(n, width, generator=generator)
    weight = torch.randn(VOCABULARY, width, generator=generator).mul_(2.0 / width**0.5)
    return hidden.to(settings.device), weight.to(settings.device)


def _stored_then_torch(hidden: torch.Tensor, weight: torch.Tensor) -> Run:
    def draw() -> torch.Tensor:
        probability = torch.softmax(hidden @ weight.T, -1)
        return probability.div_(torch.empty_like(probability).exponential_()).argmax(-1)

    return draw


def _stored_then_driftmax(hidden: torch.Tensor, weight: torch.Tensor, seed: int) -> Run:
    return lambda: driftmax.categorical(hidden @ weight.T, rng=seed)


def _extra(runs: Mapping[str, Run], device: torch.device) -> dict[str, float]:
    """Extra peak memory by contender, where it can be measured."""
    measured = {name: memory.extra_peak_mb(run, device) for name, run in runs.items()}
    return {name: value for name, value in measured.items() if value is not None}


def _workload(settings: Settings, n: int, width: int) -> Workload:
    hidden, weight = _problem(settings, n, width)

    def subject() -> torch.Tensor:
        return driftmax.lm_head_categorical(hidden, weight, rng=settings.seed)

    def gate() -> None:
        law = torch.softmax(hidden[0].double() @ weight.T.double(), -1)
        drawn = driftmax.lm_head_categorical(hidden[:1].expand(DRAWS, -1), weight, rng=settings.seed)
        gates.check_law(drawn, law, "lm_head law")
        unfused = driftmax.categorical(hidden @ weight.T, rng=settings.seed)
        gates.check_equal_tokens(subject(), unfused, 1 + n // 100, "lm_head against the unfused path")

    against = {
        "matmul + torch race": _stored_then_torch(hidden, weight),
        "matmul + categorical": _stored_then_driftmax(hidden, weight, settings.seed),
    }
    return Workload(
        case="lm_head_categorical",
        variant=f"width {width}",
        dtype="float32",
        n=n,
        v=VOCABULARY,
        subject=subject,
        gate=gate,
        peers={**against, "matmul + multinomial": _stored_then_multinomial(hidden, weight)},
        limit=limits.matrix_product(hidden, weight),
        limit_name="matrix product",
        extra_mb=lambda: _extra({SUBJECT: subject, **against}, settings.device),
    )


def _stored_then_multinomial(hidden: torch.Tensor, weight: torch.Tensor) -> Run:
    def draw() -> torch.Tensor:
        return peers.multinomial(hidden @ weight.T)()

    return draw


def workloads(settings: Settings) -> Iterator[Workload]:
    """Batches from one row to 256, at the width of a small language model."""
    if settings.quick:
        yield _workload(settings, 16, 256)
        return
    for n in (1, 16, 64, 256):
        yield _workload(settings, n, 768)
