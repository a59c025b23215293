"""Workloads, the correctness gate, and the interleaved timing that every benchmark shares.

A workload's time is only taken after its gate has passed. Then driftmax, each peer and the limit run in turn,
round after round, so that a slow spell of the machine falls on all of them; medians of the rounds are
compared.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

Run = Callable[[], object]

SUBJECT = "driftmax"
LIMIT = "limit"
SHORTEST_SAMPLE_S = 200e-6  # a timed sample lasts at least this long: quicker calls are repeated inside it
SETTLE_S = 2e-3  # lets a peer's spinning OpenMP workers go to sleep before the next contender is timed


class GateFailed(AssertionError):
    """A sampler's output is wrong, so its time means nothing and is not reported."""


@dataclass(frozen=True)
class Settings:
    """What the command line fixes for every case.

    Attributes
    ----------
    device : torch.device
        Where the workloads live.
    threads : int
        Size of the thread pools (torch's and driftmax's).
    quick : bool
        Fewer workloads and rounds: the whole run stays under a minute on two cores.
    rounds : int
        Interleaved rounds per workload.
    budget_s : float
        Longest time one contender may take over all rounds; slow peers run in fewer rounds.
    least_rounds : int
        Rounds that every contender takes part in, whatever they cost.
    seed : int
        Seed of every synthetic input and of every draw.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int = 1
    quick: bool = False
    rounds: int = 15
    budget_s: float = 3.0
    least_rounds: int = 3
    seed: int = 0

    @property
    def gate_draws(self) -> int:
        """Draws of a chi-square gate: fewer in a quick run."""
        return 1024 if self.quick else 4096

    @property
    def backend(self) -> str:
        """Name of the driftmax backend that ``auto`` picks on this device."""
        return {"cpu": "cpp", "cuda": "triton"}.get(self.device.type, "reference")

    def generator(self, stream: int = 0) -> torch.Generator:
        """A CPU generator for inputs, one per ``stream``."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + stream)


@dataclass(frozen=True)
class Workload:
    """One thing to time: what driftmax runs, whom it is compared with, and what bounds it.

    Attributes
    ----------
    case, variant, dtype : str
        Names for the row; the three of them and the shape identify it.
    n, v : int
        Rows and vocabulary size (rows and row length for fills).
    subject : callable
        The driftmax call.
    gate : callable
        Raises :class:`GateFailed` when the subject's output is wrong. Runs first.
    peers : mapping of str to callable
        The other ways to get the same result, each at its best setting.
    limit : callable or None
        What no implementation can beat here, for example a bare read of the same bytes.
    limit_name : str
        What ``limit`` is, in words.
    beside : mapping of str to callable
        Timed in the same rounds for scale; not peers, for they do not give the same result.
    around : callable
        Makes the context manager that gate and timing run in.
    isa : str or None
        Instruction set that ``around`` forces.
    extra_mb : callable
        Extra peak memory by contender in MB, where the workload is about memory. Runs after the gate.
    shortest_sample_s : float
        Quicker calls are repeated within a sample until it lasts this long.
    """

    case: str
    variant: str
    dtype: str
    n: int
    v: int
    subject: Run
    gate: Run
    peers: Mapping[str, Run] = field(default_factory=dict)
    limit: Run | None = None
    limit_name: str = ""
    beside: Mapping[str, Run] = field(default_factory=dict)
    around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    isa: str | None = None
    extra_mb: Callable[[], Mapping[str, float]] = dict
    shortest_sample_s: float = SHORTEST_SAMPLE_S

    @property
    def label(self) -> str:
        """How the workload is called in messages."""
        return f"{self.case}/{self.variant} {self.dtype} N={self.n} V={self.v}"


@dataclass(frozen=True)
class Timing:
    """Median and interquartile range of one contender's samples, in milliseconds."""

    median_ms: float
    iqr_ms: float
    samples: int


@dataclass(frozen=True)
class Result:
    """A workload's timings by contender, all from the same interleaved rounds."""

    workload: Workload
    timings: Mapping[str, Timing]
    extra_mb: Mapping[str, float] = field(default_factory=dict)

    @property
    def isa(self) -> str | None:
        """The instruction set that was forced, or None where the default one ran."""
        return self.workload.isa

    @property
    def subject(self) -> Timing:
        """Timing of the driftmax call."""
        return self.timings[SUBJECT]

    def ratio(self, contender: str) -> float:
        """How many times longer than driftmax the contender took."""
        return self.timings[contender].median_ms / self.subject.median_ms

    @property
    def peers(self) -> list[str]:
        """Contenders that do the same as driftmax."""
        others = (SUBJECT, LIMIT, *self.workload.beside)
        return [name for name in self.timings if name not in others]

    @property
    def best_peer(self) -> str | None:
        """The fastest peer, or None where there is none."""
        return min(self.peers, key=lambda name: self.timings[name].median_ms, default=None)

    @property
    def share(self) -> float:
        """Share of the limit that driftmax reaches: limit / driftmax (NaN without a limit)."""
        return self.ratio(LIMIT) if LIMIT in self.timings else math.nan


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sample(run: Run, repeats: int, device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds per call over ``repeats`` calls in a row."""
    _synchronize(device)
    start = clock()
    for _ in range(repeats):
        run()
    _synchronize(device)
    return (clock() - start) / repeats


def _summary(samples: list[float]) -> Timing:
    low, median, high = np.percentile(np.asarray(samples) * 1e3, [25, 50, 75])
    return Timing(float(median), float(high - low), len(samples))


def measure(
    contenders: Mapping[str, Run],
    settings: Settings,
    *,
    shortest_sample_s: float = SHORTEST_SAMPLE_S,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Timing]:
    """Time all contenders in interleaved rounds.

    Each contender first runs once untimed and once to learn its speed. Quick calls are repeated inside one
    sample of at least `shortest_sample_s`. Every second round goes backwards, so that nobody always runs
    behind the same neighbour. A contender whose rounds would take longer than ``settings.budget_s`` takes
    part in fewer of them, at least ``settings.least_rounds``.

    Parameters
    ----------
    contenders : mapping of str to callable
        What to time, by name.
    settings : Settings
        Device, rounds and the budget.
    shortest_sample_s : float
        Least length of a sample.
    clock, sleep : callables
        Replaced by tests.

    Returns
    -------
    dict of str to Timing
        In the order of ``contenders``.
    """
    repeats: dict[str, int] = {}
    rounds: dict[str, int] = {}
    for name, run in contenders.items():
        first = _sample(run, 1, settings.device, clock)
        once = (
            first
            if first > settings.budget_s / settings.least_rounds
            else _sample(run, 1, settings.device, clock)
        )
        repeats[name] = max(1, math.ceil(shortest_sample_s / max(once, 1e-9)))
        affordable = int(settings.budget_s / max(once * repeats[name], 1e-9))
        rounds[name] = min(settings.rounds, max(settings.least_rounds, affordable))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(max(rounds.values())):
        order = list(contenders) if turn % 2 == 0 else list(contenders)[::-1]
        for name in order:
            if turn < rounds[name]:
                sleep(SETTLE_S)
                samples[name].append(_sample(contenders[name], repeats[name], settings.device, clock))
    return {name: _summary(values) for name, values in samples.items()}


def run_workload(workload: Workload, settings: Settings) -> Result:
    """Gate a workload, then time it.

    Raises
    ------
    GateFailed
        If the subject's output is wrong; nothing is timed then.
    """
    contenders: dict[str, Run] = {SUBJECT: workload.subject}
    if workload.limit is not None:
        contenders[LIMIT] = workload.limit
    contenders.update(workload.beside)
    contenders.update(workload.peers)
    with workload.around():
        workload.gate()
        extra_mb = workload.extra_mb()
        return Result(
            workload, measure(contenders, settings, shortest_sample_s=workload.shortest_sample_s), extra_mb
        )


def run_all(
    workloads: Iterator[Workload],
    settings: Settings,
    on_result: Callable[[Result], None],
    on_failure: Callable[[Workload, GateFailed], None],
) -> None:
    """Run workloads in turn; a failed gate goes to ``on_failure`` and the rest still runs."""
    for workload in workloads:
        try:
            result = run_workload(workload, settings)
        except GateFailed as failure:
            on_failure(workload, failure)
        else:
            on_result(result)
