"""Masked diffusion end to end: network calls, sampler time without a network, and RADD-small.

Calls are counted, not timed: the plain loop's, those of a cache that keeps the whole batch's output while no
token of it changed, and those of rows on their own clocks, against n (1 - (1 - 1/n)**L) for one row (Ou et
al., 2024). Sampler time is taken with a network that costs nothing, so that all of it is the sampler's. The
plain loop is ancestral sampling as published implementations have it: a network call at every step, and a
float64 categorical over tokens and mask at every position.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from driftmax.discrete import Ancestral, FirstHitting, LogLinear, Plan, sample
from driftmax.discrete.network import RADD, RADDConfig

from .. import gates, plots
from ..harness import Settings
from ..report import Finding, Row

VOCABULARY = 50257
LENGTH = 1024
BATCHES = (1, 16)
STEPS = (64, 256, 1024, 4096)
SCHEDULE = LogLinear()


class Null:
    """A network that costs nothing: the same law at every position, whatever the tokens."""

    time_independent = True

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, tokens: torch.Tensor, t: torch.Tensor | None = None) -> torch.Tensor:
        return self.logits.expand(*tokens.shape, -1)


def expected_calls(steps: int, length: int) -> float:
    """Expected network calls of one row."""
    return steps * (1.0 - (1.0 - 1.0 / steps) ** length)


@torch.no_grad()
def plain_ancestral(model: Callable[..., torch.Tensor], shape: tuple[int, int], steps: int) -> torch.Tensor:
    """Ancestral sampling as usually written: mask among the categories, float64 race, all positions."""
    mask_id = VOCABULARY
    tokens = torch.full(shape, mask_id)
    times = SCHEDULE.grid(steps)
    for k in range(steps):
        unmask = float(SCHEDULE.unmask_probability(times[k + 1], times[k])) if k + 1 < steps else 1.0
        law = torch.softmax(model(tokens), -1, dtype=torch.float64) * unmask
        law = torch.cat((law, torch.full((*shape, 1), 1.0 - unmask, dtype=torch.float64)), -1)
        race = law.div_(torch.empty_like(law).exponential_())
        tokens = torch.where(tokens == mask_id, race.argmax(-1), tokens)
    return tokens


@torch.no_grad()
def careful_ancestral(model: Callable[..., torch.Tensor], shape: tuple[int, int], steps: int) -> torch.Tensor:
    """The same law by a careful torch loop: a clock decides, needless calls and draws are left out."""
    mask_id = VOCABULARY
    tokens = torch.full(shape, mask_id)
    times = SCHEDULE.grid(steps)
    for k in range(steps):
        unmask = float(SCHEDULE.unmask_probability(times[k + 1], times[k])) if k + 1 < steps else 1.0
        where = (tokens == mask_id) & (torch.rand(shape, dtype=torch.float64) < unmask)
        if not bool(where.any()):
            continue
        law = torch.softmax(model(tokens)[where], -1, dtype=torch.float64)
        tokens[where] = law.div_(torch.empty_like(law).exponential_()).argmax(-1)
    return tokens


def _row(what: str, sampler: str, batch: int, length: int, steps: int, quantity: str, value: float) -> Row:
    return {
        "what": what,
        "sampler": sampler,
        "B": batch,
        "L": length,
        "V": VOCABULARY,
        "n": steps,
        "quantity": quantity,
        "value": float(f"{value:.4g}"),
    }


def call_rows(settings: Settings) -> Iterator[Row]:
    """Network calls, counted."""
    length = 128 if settings.quick else LENGTH
    model = Null(torch.zeros(4))
    for batch in BATCHES:
        for steps in STEPS[:2] if settings.quick else STEPS:
            what = ("calls", batch, length, steps)
            yield _row(what[0], "plain loop", *what[1:], "calls", steps)
            yield _row(what[0], "one row, expected", *what[1:], "calls", expected_calls(steps, length))
            for name, sampler in (("batch cache", Ancestral()), ("driftmax Plan", Plan())):
                result = sample(
                    model,
                    (batch, length),
                    mask_id=4,
                    sampler=sampler,
                    schedule=SCHEDULE,
                    steps=steps,
                    rng=settings.seed,
                )
                yield _row(what[0], name, *what[1:], "calls", result.nfe)
        result = sample(model, (batch, length), mask_id=4, sampler=FirstHitting(), rng=settings.seed)
        yield _row("calls", "driftmax FirstHitting", batch, length, 0, "calls", result.nfe)


@dataclass(frozen=True)
class Contender:
    """A way to sample, by name."""

    name: str
    run: Callable[[], object]


def _seconds(contenders: list[Contender], rounds: int) -> dict[str, float]:
    """Median seconds of each, interleaved."""
    times: dict[str, list[float]] = {one.name: [] for one in contenders}
    for _ in range(rounds):
        for one in contenders:
            start = time.perf_counter()
            one.run()
            times[one.name].append(time.perf_counter() - start)
    return {name: statistics.median(seen) for name, seen in times.items()}


def _contenders(model: Null, batch: int, length: int, steps: int, seed: int) -> list[Contender]:
    shape = (batch, length)

    def ours(sampler: Plan | Ancestral) -> Callable[[], object]:
        return lambda: sample(
            model, shape, mask_id=VOCABULARY, sampler=sampler, schedule=SCHEDULE, steps=steps, rng=seed
        )

    return [
        Contender("driftmax Plan", ours(Plan())),
        Contender("driftmax Ancestral", ours(Ancestral())),
        Contender("torch, careful", lambda: careful_ancestral(model, shape, steps)),
        Contender("torch, plain loop", lambda: plain_ancestral(model, shape, steps)),
    ]


def sampler_rows(settings: Settings) -> Iterator[Row]:
    """Seconds per generated sequence with a network that costs nothing."""
    logits = -torch.log(torch.arange(1, VOCABULARY + 1, dtype=torch.float32))
    model = Null(logits)
    gates.law_gate(
        lambda many: sample(
            model, (8, many.shape[0] // 8), mask_id=VOCABULARY, steps=16, rng=settings.seed
        ).tokens.view(-1),
        logits,
        torch.softmax(logits.double(), 0),
        "Plan",
        settings.gate_draws,
    )
    shapes = ((2, 32, 8),) if settings.quick else ((1, LENGTH, 16), (1, LENGTH, 1024), (16, LENGTH, 1024))
    for batch, length, steps in shapes:
        *quicker, plain = _contenders(model, batch, length, steps, settings.seed)
        times = _seconds(quicker, 3)
        if batch * steps <= 16:  # minutes: once, and not where it would take an hour
            times |= _seconds([plain], 1)
        for name, seconds in times.items():
            yield _row("sampler alone", name, batch, length, steps, "s per sequence", seconds / batch)


def network_rows(settings: Settings) -> Iterator[Row]:
    """RADD-small with random weights: one call, and a whole run of each loop at 16 steps."""
    torch.manual_seed(settings.seed)
    network = RADD(RADDConfig.small()).eval()
    batch, length, steps = 1, LENGTH, 16
    tokens = torch.full((batch, length), network.config.mask_id)
    with torch.no_grad():
        calls = [
            Contender("features", lambda: network.features(tokens)),
            Contender("features and head at every position", lambda: network(tokens)),
        ]
        for name, seconds in _seconds(calls, 3).items():
            yield _row("RADD-small", name, batch, length, 0, "s per call", seconds)
    shape = (batch, length)
    runs = [
        Contender(
            "driftmax Plan",
            lambda: sample(
                network, shape, mask_id=VOCABULARY, schedule=SCHEDULE, steps=steps, rng=settings.seed
            ),
        ),
        Contender("torch, plain loop", lambda: plain_ancestral(network, shape, steps)),
    ]
    for name, seconds in _seconds(runs, 1).items():
        yield _row("RADD-small", name, batch, length, steps, "s per sequence", seconds)


def _text(rows: list[Row]) -> str:
    lines = [f"discrete: masked diffusion, {'what':<16}{'sampler':<38}{'B':>3}{'L':>6}{'n':>6}"]
    for row in rows:
        lines.append(
            f"{'':<27}{row['what']:<16}{row['sampler']:<38}{row['B']:>3}{row['L']:>6}{row['n'] or '':>6}"
            f"  {row['value']:>10g} {row['quantity']}"
        )
    return "\n".join(lines)


def report(settings: Settings) -> Finding:
    """All rows; the gate inside raises where the sampler's law is wrong."""
    rows = [*call_rows(settings), *sampler_rows(settings)]
    if not settings.quick:
        rows += network_rows(settings)
    return Finding(_text(rows), rows, "discrete.csv", "discrete.png", plots.discrete)
