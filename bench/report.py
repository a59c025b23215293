"""Tidy rows from results: the CSV file that plots and the README read, and the table on the terminal."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .harness import LIMIT, SUBJECT, GateFailed, Result, Settings, Workload
from .machine import Machine

Row = dict[str, str | int | float]


@dataclass(frozen=True)
class Finding:
    """What a case has to say beside timings.

    Attributes
    ----------
    text : str
        For the terminal.
    rows : sequence of rows
        Tidy, all with the same columns.
    csv_name, plot_name : str
        File names, used beside the files that the command line names.
    draw : callable
        Draws the rows into a picture: ``draw(rows, path)``.
    failure : str or None
        What is wrong, if something is: the command then exits with code 1.
    """

    text: str
    rows: Sequence[Row]
    csv_name: str
    plot_name: str
    draw: Callable[[Sequence[Row], Path], None]
    failure: str | None = None


COLUMNS = (
    *("case", "variant", "dtype", "N", "V", "device", "backend", "isa", "threads", "contender"),
    *("median_ms", "iqr_ms", "samples", "ratio", "limit", "limit_ms", "share_of_limit", "extra_mb"),
    *("machine", "cores", "system", "python", "torch", "triton", "numpy", "driftmax", "date"),
)


def rows_of(result: Result, settings: Settings, isa: str, machine: Machine) -> list[Row]:
    """One row per contender of a workload.

    ``ratio`` is the contender's median over driftmax's (how many times longer it takes); ``share_of_limit``
    is the limit's median over driftmax's and stands in driftmax's row.
    """
    workload = result.workload
    rows: list[Row] = []
    for name, timing in result.timings.items():
        ours = name == SUBJECT
        row: Row = {
            "case": workload.case,
            "variant": workload.variant,
            "dtype": workload.dtype,
            "N": workload.n,
            "V": workload.v,
            "device": settings.device.type,
            "backend": settings.backend if ours else "",
            "isa": isa if ours else "",
            "threads": settings.threads,
            "contender": name,
            "median_ms": _digits(timing.median_ms),
            "iqr_ms": _digits(timing.iqr_ms),
            "samples": timing.samples,
            "ratio": _digits(result.ratio(name)),
            "limit": workload.limit_name,
            "limit_ms": _digits(result.timings[LIMIT].median_ms) if LIMIT in result.timings else "",
            "share_of_limit": _digits(result.share) if ours and not math.isnan(result.share) else "",
            "extra_mb": _digits(result.extra_mb[name]) if name in result.extra_mb else "",
        }
        rows.append({**row, **machine.columns()})
    return rows


def _digits(value: float) -> float:
    """Four significant digits: more would pretend a precision that timings do not have."""
    return float(f"{value:.4g}")


def write_csv(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Write rows; the folder is made when missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a stored file, as text."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


HEADER = ("case", "variant", "dtype", "N", "V", "isa", "median", "best peer", "", "of limit", "limit")
WIDTHS = (20, 22, 8, 8, 9, 7, 12, 20, 8, 9, 0)


def header() -> str:
    """The table's first line."""
    return _line(HEADER)


def _line(cells: Sequence[str]) -> str:
    right = {3, 4, 6, 8, 9}
    parts = [
        cell.rjust(width) if i in right else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True))
    ]
    return "  ".join(parts).rstrip()


def duration(milliseconds: float) -> str:
    """A time with a unit that suits it."""
    if milliseconds < 1.0:
        return f"{milliseconds * 1e3:.3g} us"
    if milliseconds < 1e3:
        return f"{milliseconds:.3g} ms"
    return f"{milliseconds / 1e3:.3g} s"


def line_of(result: Result, isa: str) -> str:
    """One workload as a line of the table."""
    workload, best = result.workload, result.best_peer
    share = "" if math.isnan(result.share) else f"{100 * result.share:.0f} %"
    cells = (
        *(workload.case, workload.variant, workload.dtype, str(workload.n), str(workload.v), isa),
        duration(result.subject.median_ms),
        best or "",
        "" if best is None else f"{result.ratio(best):.3g}x",
        share,
        workload.limit_name if share else "",
    )
    return _line(cells)


def summary(
    results: Sequence[Result],
    failures: Sequence[tuple[Workload, GateFailed]],
    machine: Machine,
    settings: Settings,
) -> str:
    """The closing lines: what it ran on, the headline row against every peer, and what failed its gate."""
    lines = [
        f"{len(results)} workloads on {machine.machine} ({machine.cores} cores, {settings.threads} threads), "
        f"torch {machine.torch}, driftmax {machine.driftmax}, {machine.date}"
    ]
    headline = max(results, key=_headline_rank, default=None)
    if headline is not None and headline.peers:
        against = ", ".join(f"{headline.ratio(name):.3g}x {name}" for name in headline.peers)
        lines.append(
            f"{headline.workload.label}: {duration(headline.subject.median_ms)}; its peers take {against}"
        )
        if not math.isnan(headline.share):
            took = {f"the time of the limit ({headline.workload.limit_name})": 1 / headline.share}
            took |= {name: 1 / headline.ratio(name) for name in headline.workload.beside}
            lines.append("  and " + ", ".join(f"{times:.3g}x {name}" for name, times in took.items()))
    lines += [
        f"{one.workload.label}: {_over_limit_us(one):.2g} us over a {one.workload.limit_name}"
        for one in results
        if one.workload.case == "overhead"
    ]
    if failures:
        lines.append(f"{len(failures)} workloads FAILED their correctness gate and were not timed:")
        lines += [f"  {workload.label}: {failure}" for workload, failure in failures]
    else:
        lines.append("every workload passed its correctness gate before it was timed")
    return "\n".join(lines)


def _over_limit_us(result: Result) -> float:
    return 1e3 * (result.subject.median_ms - result.timings[LIMIT].median_ms)


def _headline_rank(result: Result) -> tuple[bool, bool, int]:
    """The largest categorical workload that has several peers, the first of equals."""
    workload = result.workload
    return (workload.case == "categorical", len(result.peers) > 1, workload.n * workload.v)
