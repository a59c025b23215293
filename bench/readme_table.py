"""Writes the table between README.md's bench marks from the rows: ``python bench/readme_table.py``."""

from __future__ import annotations

import csv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def table(rows: list[dict[str, str]]) -> str:
    """Markdown table of one line per workload: median, ratio to each peer, share of the limit."""
    workloads: list[dict[str, dict[str, str]]] = []  # by contender; driftmax comes first
    for row in rows:
        if row["contender"] == "driftmax":
            workloads.append({})
        workloads[-1][row["contender"]] = row
    first = rows[0]
    lines = [
        f"{first['machine']}, {first['threads']} threads, torch {first['torch']}, {first['date']}. "
        "Ratios are peer / driftmax.",
        "",
        "| case | N × V | median | peers | of limit |",
        "|---|---|---:|---|---:|",
    ]
    for contenders in workloads:
        own = contenders.pop("driftmax")
        limit = contenders.pop("limit", None)
        median = float(own["median_ms"])
        ratios = sorted((float(row["median_ms"]) / median, name) for name, row in contenders.items())
        peers = ", ".join(f"{ratio:.3g}× {name}" for ratio, name in ratios) or "–"
        share = f"{100 * float(limit['median_ms']) / median:.0f} %" if limit else "–"
        name = f"{own['case']}: {own['variant']}, {own['dtype']} [{own['isa']}]"
        lines.append(f"| {name} | {own['N']} × {own['V']} | {duration(median)} | {peers} | {share} |")
    return "\n".join(lines)


def duration(milliseconds: float) -> str:
    """Three digits with a unit."""
    return f"{milliseconds:.3g} ms" if milliseconds >= 1 else f"{1000 * milliseconds:.3g} µs"


def main() -> None:
    """Replace the marked block of README.md."""
    with (ROOT / "bench" / "results" / "cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN, 1)
    _, after = rest.split(END, 1)
    readme.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
