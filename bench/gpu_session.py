"""One run on a GPU: its device and sizes, checks that do not hide one another, rows of checks and timings."""

from __future__ import annotations

import csv
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import driftmax
import torch

__all__ = ["Run", "Session", "agree", "both", "equal", "write"]

Run = Callable[[], object]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch annotates its instances only


@dataclass
class Session:
    """Device, sizes and results of one run."""

    device: torch.device
    rounds: int = 30  # timings of each contender; 0 only runs each once, which compiles its kernels
    checks: list[dict[str, object]] = field(default_factory=list)
    rows: list[dict[str, object]] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """Whether this is the real thing."""
        return self.device.type == "cuda"

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Gaussian logits, the same in every run on this device."""
        generator = torch.Generator(self.device).manual_seed(len(shape) + shape[-1])
        # In float32 first, so that the values of the dtypes are roundings of the same numbers.
        return (torch.randn(*shape, generator=generator, device=self.device) * 3).to(dtype)

    def check(self, name: str, test: Callable[..., str], *arguments: Any, **options: Any) -> bool:
        """Run a check that returns what it saw and raises AssertionError on a failure."""
        begin = time.perf_counter()
        try:
            ok, seen = True, test(*arguments, **options)
            driftmax.check_status()
        except (
            Exception
        ) as failure:  # one failed check must not hide the others; it is in the table and the exit code
            ok, seen = False, f"{type(failure).__name__}: {str(failure).splitlines()[:1]}"
            traceback.print_exc()
        self.checks.append(
            {"check": name, "ok": ok, "seen": seen, "seconds": round(time.perf_counter() - begin, 2)}
        )
        print(f"{'ok  ' if ok else 'FAIL'} {name}: {seen}", flush=True)
        return ok

    def _replayed(self, run: Run) -> Run:
        """A CUDA graph's replay where the call can be captured, else the call."""
        torch.cuda.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
        except RuntimeError:  # some peers sync inside; they are timed as users call them
            torch.cuda.synchronize()
            return run
        return graph.replay

    def _times(self, run: Run, graph: bool) -> list[float]:
        """Seconds of a call with a cold L2; after one that compiles."""
        begin = time.perf_counter()
        run()
        if not self.on_gpu:
            return [time.perf_counter() - begin]
        replay = self._replayed(run) if graph and self.rounds else run
        flush = torch.empty(1 << 28, dtype=torch.int8, device=self.device)
        seconds = []
        for _ in range(self.rounds):
            flush.zero_()
            start, end = _event(), _event()
            start.record()
            replay()
            end.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        return seconds

    def bench(
        self,
        case: str,
        variant: str,
        shape: tuple[int, int],
        runs: dict[str, Run],
        limit: Run,
        *,
        graph: bool = True,
        waits: frozenset[str] = frozenset(),
    ) -> None:
        """Time driftmax (first), its peers and the limit; add one row for each.

        In the replay of a CUDA graph, but for those that wait for the device inside (`waits`).
        """
        medians: dict[str, float] = {}
        for name, run in {**runs, "limit": limit}.items():
            try:
                times = self._times(run, graph and name not in waits)
            except Exception as failure:  # a peer that fails at this size is reported as such, not timed
                print(
                    f"     {case} {variant} {name}: {type(failure).__name__}: {str(failure).splitlines()[:1]}"
                )
                continue
            if times:
                medians[name] = statistics.median(times)
        ours, floor = medians.get("driftmax"), medians.get("limit")
        for name, median in medians.items():
            row: dict[str, object] = {
                "case": case, "variant": variant, "N": shape[0], "V": shape[1], "contender": name,
                "median_ms": round(median * 1e3, 5),
                "ratio": round(median / ours, 3) if ours else "",
                "share_of_limit": round(floor / ours, 3) if floor and ours and name == "driftmax" else "",
            }  # fmt: skip
            self.rows.append(row)
            print(
                "     " + "  ".join(f"{key}={value}" for key, value in row.items() if value != ""), flush=True
            )


def both(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, Any]:
    """The Triton and the reference result of a call."""
    return function(*arguments, **options, backend="triton"), function(
        *arguments, **options, backend="reference"
    )


def agree(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Assert that both backends give the same bits."""
    return equal(*both(function, *arguments, **options))


def equal(ours: torch.Tensor, theirs: torch.Tensor) -> str:
    """Assert bitwise equality; say of how much."""
    differ = int((ours != theirs).sum())
    assert differ == 0, f"{differ} of {ours.numel()} differ"
    return f"{ours.numel()} equal"


def write(path: Path, rows: list[dict[str, object]], constants: dict[str, object]) -> None:
    """Tidy rows with the machine's columns."""
    if rows:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *constants])
            writer.writeheader()
            writer.writerows(row | constants for row in rows)
