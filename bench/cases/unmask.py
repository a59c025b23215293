"""`driftmax.unmask`: one ancestral step on stored logits, against the same step written in torch.

The limit is a bare read of the logits of the positions that the step reveals. The gate holds the step to its
parts done one after another, bit for bit, the number revealed to its binomial law, and the tokens to the
softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import driftmax
import torch

from .. import gates, inputs, limits
from ..harness import GateFailed, Run, Settings, Workload

LENGTH = 256


def masked(rows: int, length: int, mask_id: int, device: torch.device) -> torch.Tensor:
    """Every position masked."""
    return torch.full((rows, length), mask_id, dtype=torch.int64, device=device)


def gumbel_everywhere(logits: torch.Tensor, tokens: torch.Tensor, probability: float, mask_id: int) -> Run:
    """As published loops write it: float64 Gumbels on every position, then `where` the mask is unmasked."""

    def step() -> torch.Tensor:
        noise = torch.empty(logits.shape, dtype=torch.float64, device=logits.device).exponential_()
        drawn = (logits - noise.log_()).argmax(-1)
        u = torch.rand(tokens.shape, dtype=torch.float64, device=tokens.device)
        return torch.where((tokens == mask_id) & (u < probability), drawn, tokens)

    return step


def race_where_revealed(logits: torch.Tensor, tokens: torch.Tensor, probability: float, mask_id: int) -> Run:
    """The careful way in torch: decide, gather the rows, exponential race in float32 on those alone."""

    def step() -> torch.Tensor:
        u = torch.rand(tokens.shape, dtype=torch.float64, device=tokens.device)
        row, position = ((tokens == mask_id) & (u < probability)).nonzero(as_tuple=True)
        result = tokens.clone()
        chance = torch.softmax(logits[row, position], -1)
        result[row, position] = chance.div_(torch.empty_like(chance).exponential_()).argmax(-1)
        return result

    return step


def uniform_then_categorical(
    logits: torch.Tensor, tokens: torch.Tensor, probability: float, mask_id: int, seed: int
) -> Callable[[], torch.Tensor]:
    """The same tokens from driftmax's own parts: uniform, nonzero, gather, `categorical`, scatter."""
    streams = driftmax.RowStreams(seed, tokens.shape[0])

    def step() -> torch.Tensor:
        u = driftmax.random.uniform(tokens.shape, rng=streams, dtype=torch.float64, device=tokens.device)
        row, position = ((tokens == mask_id) & (u < probability)).nonzero(as_tuple=True)
        result = tokens.clone()
        result[row, position] = driftmax.categorical(
            logits[row, position], rng=streams[row].at(positions=position)
        )
        return result

    return step


def _workload(settings: Settings, variant: str, logits: torch.Tensor, probability: float) -> Workload:
    rows, length, vocab = logits.shape
    start = masked(rows, length, vocab, settings.device)

    def subject() -> torch.Tensor:
        tokens = start.clone()
        driftmax.unmask(logits, tokens, probability, mask_id=vocab, rng=settings.seed)
        return tokens

    def gate() -> None:
        wanted = uniform_then_categorical(logits, start, probability, vocab, settings.seed)()
        gates.check_equal_tokens(subject(), wanted, 0, variant)
        revealed = int((subject() != vocab).sum())
        spread = math.sqrt(start.numel() * probability * (1 - probability))
        if abs(revealed - start.numel() * probability) > gates.FALSE_ALARM_SIGMA * spread + 1:
            raise GateFailed(f"{variant}: {revealed} of {start.numel()} revealed at {probability}")
        draws = settings.gate_draws
        many = masked(1, draws, vocab, settings.device)
        driftmax.unmask(logits[:1, :1].expand(1, draws, vocab), many, 1.0, mask_id=vocab, rng=settings.seed)
        gates.check_law(many, torch.softmax(logits[0, 0].double(), -1), f"{variant} law")

    revealed = subject() != vocab
    arguments = (logits, start, probability, vocab)
    peers: dict[str, Run] = {
        "torch race where revealed": race_where_revealed(*arguments),
        "driftmax uniform + categorical": uniform_then_categorical(*arguments, settings.seed),
    }
    if probability >= 0.01:  # hundreds of times the work otherwise: the row would show nothing else
        peers["torch fp64 gumbel everywhere"] = gumbel_everywhere(*arguments)
    read = logits[revealed] if bool(revealed.any()) else logits[:1, :1].flatten(0, 1)
    return Workload(
        case="unmask",
        variant=variant,
        dtype=str(logits.dtype).removeprefix("torch."),
        n=rows * length,
        v=vocab,
        subject=subject,
        gate=gate,
        peers=peers,
        limit=limits.bare_read(read, settings),
        limit_name="bare read of what is revealed",
    )


def workloads(settings: Settings) -> Iterator[Workload]:
    """An early step of a short grid, and one of a long grid."""
    vocab = 5000 if settings.quick else 50257
    rows, length = (2, 32) if settings.quick else (4, LENGTH)
    logits = inputs.zipf(settings, rows * length, vocab).view(rows, length, vocab)
    yield _workload(settings, "zipf, p=1/16", logits, 1 / 16)
    if not settings.quick:
        yield _workload(settings, "zipf, p=1/256", logits, 1 / 256)
