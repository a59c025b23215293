"""One benchmark run from the command line: choose cases, run them, print, store and draw."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import limits, machine, real_logits, report
from .cases import CASES, load
from .harness import GateFailed, Result, Settings, Workload, run_all

QUICK_ROUNDS, QUICK_BUDGET_S, QUICK_LEAST = 5, 0.6, 2


def listing() -> str:
    """Case names and what they measure."""
    return "\n".join(f"{name:<20} {what}" for name, what in CASES.items())


@dataclass
class _Run:
    """What a run has collected so far."""

    settings: Settings
    machine: machine.Machine
    results: list[Result] = field(default_factory=list)
    failures: list[tuple[Workload, GateFailed]] = field(default_factory=list)
    rows: list[report.Row] = field(default_factory=list)

    def on_result(self, result: Result) -> None:
        isa = limits.current_isa(self.settings) if result.isa is None else result.isa
        self.results.append(result)
        self.rows += report.rows_of(result, self.settings, isa, self.machine)
        print(report.line_of(result, isa), flush=True)

    def on_failure(self, workload: Workload, failure: GateFailed) -> None:
        self.failures.append((workload, failure))
        print(f"{workload.label}: GATE FAILED: {failure}", flush=True)


def _settings(quick: bool, device: str, threads: int | None) -> Settings:
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "--device cuda: torch sees no CUDA or ROCm device; install a torch built for your GPU"
        )
    settings = Settings(device=torch.device(device), threads=threads or torch.get_num_threads(), quick=quick)
    if quick:
        return dataclasses.replace(
            settings, rounds=QUICK_ROUNDS, budget_s=QUICK_BUDGET_S, least_rounds=QUICK_LEAST
        )
    return settings


def _chosen(cases: Sequence[str] | None) -> list[str]:
    unknown = [name for name in cases or () if name not in CASES]
    if unknown:
        raise ValueError(f"no case called {', '.join(unknown)}; there are {', '.join(CASES)}")
    return [name for name in CASES if cases is None or name in cases]


def require_matplotlib() -> None:
    """Fail before an hour's work, not after it.

    Raises
    ------
    ImportError
        If matplotlib is not installed, saying how to get it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('--plot needs matplotlib: pip install "driftmax[bench]"')


def run(
    *,
    quick: bool = False,
    cases: Sequence[str] | None = None,
    csv: Path | None = None,
    plot: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> int:
    """Run the benchmarks.

    Parameters
    ----------
    quick : bool, default False
        The main workloads only, few rounds: under a minute on two cores.
    cases : sequence of str, optional
        Names from :data:`driftmax.bench.cases.CASES`; all by default.
    csv, plot : Path, optional
        Where rows and the picture go. The law and discrete cases write their own beside them.
    device : {"cpu", "cuda"}, default "cpu"
    threads : int, optional
        Threads of torch and driftmax; torch's present number by default.

    Returns
    -------
    int
        0, or 1 when a correctness gate failed.

    Raises
    ------
    ValueError
        For an unknown case.
    ImportError
        If a picture is asked for and matplotlib is missing.
    RuntimeError
        If ``device`` is not there.
    """
    chosen = _chosen(cases)
    if plot is not None:
        require_matplotlib()
    settings = _settings(quick, device, threads)
    with machine.threads(settings.threads):
        return _run(chosen, settings, csv, plot)


def _run(chosen: Sequence[str], settings: Settings, csv: Path | None, plot: Path | None) -> int:
    """The run itself, with everything checked beforehand."""
    state = _Run(settings, machine.describe(settings.device))
    if "categorical" in chosen or "gumbel_topk" in chosen:
        print(real_logits.real_model(quick=settings.quick).summary(), flush=True)
    print(report.header())
    findings = []
    for name in chosen:
        case = load(name)
        if hasattr(case, "workloads"):
            run_all(case.workloads(settings), settings, state.on_result, state.on_failure)
        if hasattr(case, "report"):
            findings.append(case.report(settings))
    for finding in findings:
        print(f"\n{finding.text}")
    print(f"\n{report.summary(state.results, state.failures, state.machine, settings)}")
    broken = [finding.failure for finding in findings if finding.failure]
    for failure in broken:
        print(f"FAILED: {failure}")
    _store(state, findings, csv, plot)
    return 1 if state.failures or broken else 0


def _store(state: _Run, findings: Sequence[report.Finding], csv: Path | None, plot: Path | None) -> None:
    """Write rows and pictures where asked."""
    if csv is not None:
        if state.rows:
            report.write_csv(csv, state.rows, report.COLUMNS)
        for finding in findings:
            rows = [{**row, **state.machine.columns()} for row in finding.rows]
            report.write_csv(csv.with_name(finding.csv_name), rows, tuple(rows[0]))
    if plot is not None:
        from . import plots

        if state.rows:
            plots.speed(state.rows, plot)
        for finding in findings:
            finding.draw(finding.rows, plot.with_name(finding.plot_name))
