"""Writes the tables between README.md's marks from the rows: ``python bench/readme_table.py``."""

from __future__ import annotations

import csv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GPU_ROWS = {1, 64}  # of the GPU's batch sizes, those in the table, and the largest


def lines(rows: list[dict[str, str]]) -> list[str]:
    """Markdown table of one line per workload: median, ratio to each peer, share of the limit."""
    workloads: list[dict[str, dict[str, str]]] = []  # by contender; driftmax comes first
    for row in rows:
        if row["contender"] == "driftmax":
            workloads.append({})
        workloads[-1][row["contender"]] = row
    lines = ["| case | N × V | median | peers | of limit |", "|---|---|---:|---|---:|"]
    for contenders in workloads:
        own = contenders.pop("driftmax")
        limit = contenders.pop("limit", None)
        median = float(own["median_ms"])
        ratios = sorted((float(row["median_ms"]) / median, name) for name, row in contenders.items())
        peers = ", ".join(f"{ratio:.3g}× {name}" for ratio, name in ratios) or "–"
        share = f"{100 * float(limit['median_ms']) / median:.0f} %" if limit else "–"
        name = f"{own['case']}: {own['variant']}"
        if "isa" in own:
            name += f", {own['dtype']} [{own['isa']}]"
        lines.append(f"| {name} | {own['N']} × {own['V']} | {duration(median)} | {peers} | {share} |")
    return lines


def cpu_table(rows: list[dict[str, str]]) -> str:
    """All rows, and where they come from."""
    first = rows[0]
    head = (
        f"{first['machine']}, {first['threads']} threads, torch {first['torch']}, {first['date']}. "
        "Ratios are peer / driftmax."
    )
    return "\n".join((head, "", *lines(rows)))


def gpu_table(rows: list[dict[str, str]]) -> str:
    """The rows of some batch sizes, and where they come from."""
    first = rows[0]
    largest: dict[tuple[str, str], int] = {}
    for row in rows:
        kind = row["case"], row["variant"]
        largest[kind] = max(largest.get(kind, 0), int(row["N"]))
    shown = [row for row in rows if int(row["N"]) in {*GPU_ROWS, largest[row["case"], row["variant"]]}]
    head = f"{first['device']}, torch {first['torch']}, Triton {first['triton']}, {first['date']}."
    return "\n".join((head, "", *lines(shown)))


def duration(milliseconds: float) -> str:
    """Three digits with a unit."""
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.3g} s"
    return f"{milliseconds:.3g} ms" if milliseconds >= 1 else f"{1000 * milliseconds:.3g} µs"


def main() -> None:
    """Replace the marked blocks of README.md."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, table in (("cpu", cpu_table), ("avx512", cpu_table), ("gpu", gpu_table)):
        with (ROOT / "bench" / "results" / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, rest = text.split(begin, 1)
        _, after = rest.split(end, 1)
        text = f"{before}{begin}\n{table(rows)}\n{end}{after}"
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
