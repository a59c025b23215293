"""Masked diffusion end to end: network calls, sampler time without a network, and RADD-small.

Calls are counted, not timed: the plain loop's, those of a cache that keeps the whole batch's output while no
token of it changed, and those of rows on their own clocks, against n (1 - (1 - 1/n)**L) for one row (Ou et
al., 2024). Sampler time is taken with a network that costs nothing, so that all of it is the sampler's. The
plain loop is ancestral sampling as published implementations have it: a network call at every step, and a
float64 categorical over tokens and mask at every position.

RADD-small has random weights. Sampler and draws in it are what is left of a step after the network's body,
clocked within that step, and a plain matrix product of the head at the positions revealed, timed right after
it; the step's share of the time to draw the plan is added. (As a difference of matrix products it may come
out below zero. "All but the body" counts the product as the sampler's, and so is an upper bound.) Whole runs
of 4096 steps take hours: a few steps are timed, and rows that say "hours" are the product of calls and
seconds per call.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from driftmax.discrete import Ancestral, FirstHitting, LogLinear, Plan, Problem, Sampler, sample
from driftmax.discrete.network import RADD, Head, RADDConfig
from torch import Tensor
from torch.nn import functional

from .. import gates, memory, plots
from ..harness import Settings
from ..report import Finding, Row

VOCABULARIES = (50257, 126464)
LENGTH = 1024
BATCHES = (1, 16)
STEPS = (64, 256, 1024, 4096)
SCHEDULE = LogLinear()
LARGEST = 2**26  # entries of a float64 tensor that the plain loop may make: half a gigabyte
PLAIN, CAREFUL = "torch, plain loop", "torch, careful"


class Null:
    """A network that costs nothing: the same law at every position, whatever the tokens."""

    time_independent = True

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self, tokens: Tensor, t: Tensor | None = None) -> Tensor:
        return self.logits.expand(*tokens.shape, -1)


class Clocked:
    """A network with a clock on its body; it keeps the last features."""

    time_independent = True

    def __init__(self, network: RADD) -> None:
        self.network, self.seconds, self.last = network, 0.0, torch.empty(0)

    @property
    def head(self) -> Head:
        """The network's."""
        return self.network.head

    def features(self, tokens: Tensor) -> Tensor:
        """The network's, timed."""
        start = time.perf_counter()
        self.last = self.network.features(tokens)
        self.seconds = time.perf_counter() - start
        return self.last

    def __call__(self, tokens: Tensor, t: Tensor | None = None) -> Tensor:
        return functional.linear(self.features(tokens), *self.head)


def expected_calls(steps: int, length: int) -> float:
    """Expected network calls of one row."""
    return steps * (1.0 - (1.0 - 1.0 / steps) ** length)


def _unmask_probabilities(steps: int) -> list[float]:
    times = SCHEDULE.grid(steps)
    inner = [float(SCHEDULE.unmask_probability(s, t)) for t, s in itertools.pairwise(times[:-1])]
    return [*inner, 1.0]


def plain_step(logits: Tensor, tokens: Tensor, unmask: float, mask_id: int) -> Tensor:
    """A step as usually written: mask among the categories, float64 race, all positions."""
    law = torch.softmax(logits, -1, dtype=torch.float64).mul_(unmask)
    stay = torch.full((*tokens.shape, 1), 1.0 - unmask, dtype=torch.float64, device=law.device)
    law = torch.cat((law, stay), -1)
    race = law.div_(torch.empty_like(law).exponential_())
    return torch.where(tokens == mask_id, race.argmax(-1), tokens)


@torch.no_grad()
def plain_ancestral(
    model: Callable[..., Tensor],
    shape: tuple[int, int],
    steps: int,
    mask_id: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Ancestral sampling by the plain step; the network's last category is mask_id - 1."""
    tokens = torch.full(shape, mask_id, device=device)
    for unmask in _unmask_probabilities(steps):
        tokens = plain_step(model(tokens), tokens, unmask, mask_id)
    return tokens


@torch.no_grad()
def careful_ancestral(
    model: Callable[..., Tensor],
    shape: tuple[int, int],
    steps: int,
    mask_id: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The same law by a careful torch loop: a clock decides, needless calls and draws are left out."""
    tokens = torch.full(shape, mask_id, device=device)
    for unmask in _unmask_probabilities(steps):
        where = (tokens == mask_id) & (torch.rand(shape, dtype=torch.float64, device=device) < unmask)
        if not bool(where.any()):
            continue
        law = torch.softmax(model(tokens)[where], -1, dtype=torch.float64)
        tokens[where] = law.div_(torch.empty_like(law).exponential_()).argmax(-1)
    return tokens


@dataclass(frozen=True)
class Setting:
    """What a row is about."""

    what: str
    batch: int
    length: int
    vocab: int
    steps: int

    def row(self, sampler: str, quantity: str, value: float) -> Row:
        """A tidy row."""
        return {
            "what": self.what,
            "sampler": sampler,
            "B": self.batch,
            "L": self.length,
            "V": self.vocab,
            "n": self.steps,
            "quantity": quantity,
            "value": float(f"{value:.4g}"),
        }


def _plan_calls(batch: int, length: int, steps: int | None, sampler: Sampler, seed: int) -> int:
    """Calls of a run; they do not depend on the network."""
    model = Null(torch.zeros(4))
    result = sample(
        model, (batch, length), mask_id=4, sampler=sampler, schedule=SCHEDULE, steps=steps, rng=seed
    )
    return result.nfe


def call_rows(settings: Settings) -> Iterator[Row]:
    """Network calls, counted."""
    length = 128 if settings.quick else LENGTH
    for batch in BATCHES:
        for steps in STEPS[:2] if settings.quick else STEPS:
            here = Setting("calls", batch, length, VOCABULARIES[0], steps)
            yield here.row("plain loop", "calls", steps)
            yield here.row("one row, expected", "calls", expected_calls(steps, length))
            for name, sampler in (("batch cache", Ancestral()), ("driftmax Plan", Plan())):
                yield here.row(name, "calls", _plan_calls(batch, length, steps, sampler, settings.seed))
        here = Setting("calls", batch, length, VOCABULARIES[0], 0)
        calls = _plan_calls(batch, length, None, FirstHitting(), settings.seed)
        yield here.row("driftmax FirstHitting", "calls", calls)


@dataclass(frozen=True)
class Contender:
    """A way to sample, by name."""

    name: str
    run: Callable[[], object]


def _seconds(contenders: list[Contender], rounds: int, budget_s: float = float("inf")) -> dict[str, float]:
    """Median seconds of each, interleaved; whoever has used up the budget sits out the further rounds."""
    times: dict[str, list[float]] = {one.name: [] for one in contenders}
    for _ in range(rounds):
        for one in contenders:
            if sum(times[one.name]) > budget_s:
                continue
            start = time.perf_counter()
            one.run()
            times[one.name].append(time.perf_counter() - start)
    return {name: statistics.median(seen) for name, seen in times.items()}


def _contenders(model: Null, here: Setting, seed: int) -> list[Contender]:
    """driftmax's samplers, and the careful loop where it takes seconds."""
    shape, mask_id = (here.batch, here.length), here.vocab

    def ours(sampler: Sampler, steps: int | None = here.steps) -> Callable[[], object]:
        return lambda: sample(
            model, shape, mask_id=mask_id, sampler=sampler, schedule=SCHEDULE, steps=steps, rng=seed
        )

    if not here.steps:
        return [Contender("driftmax FirstHitting", ours(FirstHitting(), None))]
    found = [Contender("driftmax Plan", ours(Plan())), Contender("driftmax Ancestral", ours(Ancestral()))]
    if here.batch == 1 or (here.steps == LENGTH and here.vocab == VOCABULARIES[0]):
        careful = Contender(CAREFUL, lambda: careful_ancestral(model, shape, here.steps, mask_id))
        found.append(careful)
    return found


def _plain_rows(settings: Settings, model: Null, length: int, vocab: int) -> Iterator[Row]:
    """The plain loop: one step timed, the steps of a whole run multiplied; where it is bearable a whole run.

    A step on as many positions as keep its tensors below `LARGEST` entries; each position costs the same.
    """
    positions = min(length, LARGEST // (vocab + 1))
    tokens = torch.full((1, positions), vocab)
    step = Contender(PLAIN, lambda: plain_step(model(tokens), tokens, 0.5, vocab))
    _seconds([step], 1)
    seconds = _seconds([step], 3)[PLAIN]
    here = Setting("sampler alone", 1, length, vocab, 0)
    yield here.row(PLAIN, f"s per step on {positions} positions", seconds)
    for steps in (4,) if settings.quick else (16, *STEPS):
        run = Setting("sampler alone", 1, length, vocab, steps)
        whole = steps * seconds * length / positions
        yield run.row(PLAIN, "s per sequence, steps x s per step", whole)
        if steps <= 16 and positions == length:
            plain = Contender(PLAIN, functools.partial(plain_ancestral, model, (1, length), steps, vocab))
            yield run.row(PLAIN, "s per sequence", _seconds([plain], 1)[PLAIN])


def _law_gate(model: Null, settings: Settings) -> None:
    """Plan draws the network's law."""
    logits = model.logits
    gates.law_gate(
        lambda many: sample(
            model, (8, many.shape[0] // 8), mask_id=logits.numel(), steps=16, rng=settings.seed
        ).tokens.view(-1),
        logits,
        torch.softmax(logits.double(), 0),
        "Plan",
        settings.gate_draws,
    )


def sampler_rows(settings: Settings) -> Iterator[Row]:
    """Seconds per generated sequence with a network that costs nothing."""
    length = 32 if settings.quick else LENGTH
    vocabularies = VOCABULARIES[:1] if settings.quick else VOCABULARIES
    grids = (
        [(1, 8), (2, 8), (1, 0)] if settings.quick else [(1, 16), *itertools.product(BATCHES, (*STEPS, 0))]
    )
    for vocab in vocabularies:
        model = Null(-torch.log(torch.arange(1, vocab + 1, dtype=torch.float32)))
        _law_gate(model, settings)
        for batch, steps in grids:
            here = Setting("sampler alone", batch, length, vocab, steps)
            for name, seconds in _seconds(_contenders(model, here, settings.seed), 3, 2.0).items():
                yield here.row(name, "s per sequence", seconds / batch)
        yield from _plain_rows(settings, model, length, vocab)


def _whole_rows(settings: Settings, network: RADD, length: int) -> Iterator[Row]:
    """One call, and a whole run of each loop at 16 steps."""
    vocab, steps = network.config.vocab_size, 16
    tokens = torch.full((1, length), vocab)
    calls = [
        Contender("network's body", lambda: network.features(tokens)),
        Contender("network's body, head at every position", lambda: network(tokens)),
    ]
    here = Setting("RADD-small", 1, length, vocab, 0)
    for name, seconds in _seconds(calls, 3).items():
        yield here.row(name, "s per call", seconds)
    here = Setting("RADD-small", 1, length, vocab, steps)
    runs = [
        Contender(
            "driftmax Plan",
            lambda: sample(
                network, (1, length), mask_id=vocab, schedule=SCHEDULE, steps=steps, rng=settings.seed
            ),
        ),
        Contender(PLAIN, lambda: plain_ancestral(network, (1, length), steps, vocab)),
    ]
    for name, seconds in _seconds(runs, 1).items():
        yield here.row(name, "s per sequence", seconds)


@dataclass(frozen=True)
class Step:
    """Seconds of one step of `Plan`, and its parts."""

    whole: float
    body: float  # of the network, in this very step
    product: float  # of the head at the positions revealed, right after it

    @property
    def sampler(self) -> float:
        """What is neither body nor product: draws, and all of the sampler's own."""
        return self.whole - self.body - self.product


def plan_steps(network: RADD, problem: Problem, model: Clocked, count: int) -> list[Step]:
    """The first `count` steps of a plan after one that warms up; the drawing of the plan is shared out.

    The batch of each call is compacted as ever: early calls have all rows.
    """
    start = time.perf_counter()
    state = Plan().init(problem)
    share = (time.perf_counter() - start) / max(state.total, 1)
    steps = []
    for _ in range(min(count + 1, state.total)):
        start = time.perf_counter()
        state = Plan().step(state)
        whole = time.perf_counter() - start
        hidden = model.last.flatten(0, 1)[: int(state.history[-1].revealed)]
        product = Contender("product", functools.partial(functional.linear, hidden, *network.head))
        steps.append(Step(whole + share, model.seconds, _seconds([product], 3)["product"]))
    return steps[1:]


def _step_rows(here: Setting, steps: list[Step]) -> Iterator[Row]:
    """Parts of a step, and the sampler's share of the network's time."""
    parts = (
        ("driftmax Plan", [one.whole for one in steps]),
        ("network's body", [one.body for one in steps]),
        ("head's product where revealed", [one.product for one in steps]),
        ("sampler and draws", [one.sampler for one in steps]),
    )
    for name, seconds in parts:
        yield here.row(name, "s per call", statistics.median(seconds))
    share = statistics.median(one.sampler / (one.body + one.product) for one in steps)
    yield here.row("sampler and draws", "share of the network's time", share)
    beside = statistics.median((one.whole - one.body) / one.body for one in steps)
    yield here.row("all but the body", "share of the body's time", beside)


@torch.no_grad()
def plain_row_seconds(network: RADD, length: int) -> float:
    """Head and draws of the plain loop for one row of a batch, without the network's body."""
    vocab = network.config.vocab_size
    tokens = torch.full((1, length), vocab)
    hidden = network.features(tokens)
    row = Contender("row", lambda: plain_step(functional.linear(hidden, *network.head), tokens, 1e-3, vocab))
    _seconds([row], 1)
    return _seconds([row], 3)["row"]


@torch.no_grad()
def step_rows(
    settings: Settings, network: RADD, here: Setting, count: int, plain_row: float
) -> Iterator[Row]:
    """Steps of `Plan` on the grid of ``here.steps``, with their parts; the plain loop's; hours of whole runs.

    A call of the plain loop has the body's call with all rows in common with Plan's early calls. Its head and
    draws take `plain_row` seconds for one row, and that times the rows: the tensors of all rows do not fit
    into memory together. Late calls of Plan have fewer rows, which its hours do not count.
    """
    model = Clocked(network)
    shape = (here.batch, here.length)
    problem = Problem(
        model, shape, mask_id=here.vocab, schedule=SCHEDULE, steps=here.steps, rng=settings.seed
    )
    taken = plan_steps(network, problem, model, count)
    yield from _step_rows(here, taken)
    own = statistics.median(one.whole for one in taken)
    plain = statistics.median(one.body for one in taken) + here.batch * plain_row
    yield here.row(f"{PLAIN}: body + {here.batch} x head and draws of a row", "s per call", plain)
    calls = _plan_calls(*shape, here.steps, Plan(), settings.seed)
    yield here.row("driftmax Plan", "hours, calls x s per call", calls * own / 3600)
    yield here.row(PLAIN, "hours, calls x s per call", here.steps * plain / 3600)


@torch.no_grad()
def memory_rows(settings: Settings, network: RADD, length: int) -> Iterator[Row]:
    """Peak memory of one step beyond the weights and the tokens."""
    vocab, steps = network.config.vocab_size, 1024
    tokens = torch.full((1, length), vocab)
    problem = Problem(network, (1, length), mask_id=vocab, schedule=SCHEDULE, steps=steps, rng=settings.seed)
    state = Plan().init(problem)
    ways = [
        Contender("network's body", lambda: network.features(tokens)),
        Contender("driftmax Plan", lambda: Plan().step(state)),
        Contender(PLAIN, lambda: plain_step(network(tokens), tokens, 1 / steps, vocab)),
    ]
    for way in ways:
        extra = memory.extra_peak_mb(way.run, settings.device)
        if extra is not None:
            yield Setting("memory", 1, length, vocab, steps).row(way.name, "extra peak MB of a step", extra)


def network_rows(settings: Settings) -> Iterator[Row]:
    """RADD-small with random weights: whole runs, the parts of a step, and memory."""
    torch.manual_seed(settings.seed)
    network = RADD(RADDConfig.small()).eval()
    torch.nn.init.normal_(network.output_layer.linear.weight, std=0.02)  # it starts at zero
    with torch.no_grad():
        yield from _whole_rows(settings, network, LENGTH)
        here = Setting("RADD-small", 1, LENGTH, network.config.vocab_size, 0)
        plain_row = plain_row_seconds(network, LENGTH)
        yield here.row(f"{PLAIN}: head and draws of a row", "s per call", plain_row)
        for batch, steps, count in (*((1, steps, 4) for steps in STEPS), (16, 4096, 2)):
            here = Setting("RADD-small", batch, LENGTH, network.config.vocab_size, steps)
            yield from step_rows(settings, network, here, count, plain_row)
        yield from memory_rows(settings, network, LENGTH)


def _text(rows: list[Row]) -> str:
    lines = [f"discrete: masked diffusion, {'what':<16}{'sampler':<50}{'B':>3}{'L':>6}{'V':>8}{'n':>6}"]
    for row in rows:
        lines.append(
            f"{'':<28}{row['what']:<16}{row['sampler']:<50}{row['B']:>3}{row['L']:>6}{row['V']:>8}"
            f"{row['n'] or '':>6}  {row['value']:>10g} {row['quantity']}"
        )
    return "\n".join(lines)


def report(settings: Settings) -> Finding:
    """All rows; the gate inside raises where the sampler's law is wrong."""
    rows = [*call_rows(settings), *sampler_rows(settings)]
    if not settings.quick:
        rows += network_rows(settings)
    return Finding(_text(rows), rows, "discrete.csv", "discrete.png", plots.discrete)
