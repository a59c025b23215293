"""The timing harness: interleaving, medians, repeats of quick calls, budgets, and the gate before it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from driftmax.bench import harness
from driftmax.bench.harness import LIMIT, SUBJECT, GateFailed, Result, Settings, Timing, Workload


class Clock:
    """A clock that only moves when a contender runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def contender(self, name: str, seconds: float) -> harness.Run:
        def run() -> None:
            self.calls.append(name)
            self.now += seconds

        return run

    def measure(self, times: dict[str, float], settings: Settings) -> dict[str, Timing]:
        contenders = {name: self.contender(name, seconds) for name, seconds in times.items()}
        return harness.measure(contenders, settings, clock=self, sleep=lambda _: None)


def _workload(subject: harness.Run, gate: harness.Run, **more: Any) -> Workload:
    return Workload(
        case="toy",
        variant="plain",
        dtype="float32",
        n=2,
        v=3,
        subject=subject,
        gate=gate,
        peers={"peer": subject},
        **more,
    )


def test_medians_are_the_contenders_own_times() -> None:
    timings = Clock().measure({SUBJECT: 0.002, "peer": 0.010}, Settings(rounds=5))
    assert timings[SUBJECT].median_ms == pytest.approx(2.0)
    assert timings["peer"].median_ms == pytest.approx(10.0)
    assert timings["peer"].samples == 5


def test_rounds_are_interleaved_and_every_second_one_runs_backwards() -> None:
    clock = Clock()
    clock.measure({"a": 0.01, "b": 0.01, "c": 0.01}, Settings(rounds=3))
    timed = clock.calls[-9:]
    assert timed == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]


def test_quick_calls_are_repeated_inside_a_sample_and_reported_per_call() -> None:
    clock = Clock()
    timings = clock.measure({"quick": 1e-6}, Settings(rounds=3))
    assert timings["quick"].median_ms == pytest.approx(1e-3)
    assert len(clock.calls) >= 3 * harness.SHORTEST_SAMPLE_S / 1e-6


def test_what_runs_beside_is_timed_and_no_peer() -> None:
    def nothing() -> None: ...

    result = harness.run_workload(_workload(nothing, nothing, beside={"read": nothing}), Settings(rounds=3))
    assert set(result.timings) == {SUBJECT, "read", "peer"}
    assert result.peers == ["peer"]


def test_slow_contenders_run_in_fewer_rounds_but_at_least_three() -> None:
    clock = Clock()
    timings = clock.measure({"fast": 0.001, "slow": 2.0}, Settings(rounds=9, budget_s=1.0))
    assert (timings["fast"].samples, timings["slow"].samples) == (9, 3)


def test_spread_is_the_interquartile_range() -> None:
    assert harness._summary([0.001, 0.002, 0.003, 0.004, 0.005]) == Timing(
        pytest.approx(3.0), pytest.approx(2.0), 5
    )


def test_result_ratios_and_share() -> None:
    timings = {SUBJECT: Timing(2.0, 0.0, 3), LIMIT: Timing(1.5, 0.0, 3), "x": Timing(30.0, 0.0, 3)}
    result = Result(_workload(lambda: None, lambda: None), {**timings, "y": Timing(10.0, 0.0, 3)})
    assert result.best_peer == "y"
    assert result.ratio("x") == pytest.approx(15.0)
    assert result.share == pytest.approx(0.75)
    del timings[LIMIT]
    assert math.isnan(Result(_workload(lambda: None, lambda: None), timings).share)


def test_a_failed_gate_stops_the_workload_before_any_timing() -> None:
    ran = []

    def refuse() -> None:
        raise GateFailed("wrong law")

    bad = _workload(lambda: ran.append("subject"), refuse)
    good = _workload(lambda: torch.zeros(1), lambda: None)
    results, failures = [], []
    harness.run_all(
        iter([bad, good]), Settings(rounds=3), results.append, lambda w, f: failures.append((w, str(f)))
    )
    assert ran == []
    assert failures == [(bad, "wrong law")]
    assert [result.workload for result in results] == [good]


def test_gate_and_timing_run_inside_the_workloads_context() -> None:
    import contextlib

    inside: list[bool] = [False]
    seen: list[bool] = []

    @contextlib.contextmanager
    def around():  # type: ignore[no-untyped-def]  # a generator of nothing
        inside[0] = True
        yield
        inside[0] = False

    look = lambda: seen.append(inside[0])  # noqa: E731  # a two-word callable
    harness.run_workload(_workload(look, look, around=around), Settings(rounds=3))
    assert all(seen)
    assert not inside[0]
