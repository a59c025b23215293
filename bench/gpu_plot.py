"""The picture of the GPU rows: ``python -m driftmax.bench.gpu_plot ROWS PICTURE``."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .plots import BLUE, GREEN, GREY, INK, ORANGE, Rows, _pyplot, _save, _tidy

__all__ = ["gpu", "main"]

PURPLE = "#cc79a7"
# What a contender is drawn as, by how its name begins: the first that fits.
STYLES = (
    ("driftmax", GREEN, "-", "D"),
    ("limit", INK, ":", ""),
    ("flashinfer softmax", BLUE, "--", "s"),
    ("flashinfer", BLUE, "-", "s"),
    ("torch.compile", PURPLE, "-", "v"),
    ("matmul + driftmax", GREY, "-", "^"),
    ("torch multinomial", GREY, "-", "^"),
    ("", ORANGE, "-", "o"),
)
PANELS = (
    ("categorical", "block float32", "A draw a row, float32", "bare read of the logits"),
    ("categorical", "block bfloat16", "A draw a row, bfloat16", "bare read of the logits"),
    ("categorical", "top_k=50 float32", "top-k 50, float32", "bare read of the logits"),
    ("categorical", "top_p=0.9 float32", "top-p 0.9, float32", "bare read of the logits"),
    ("categorical", "gumbel float32", 'method="gumbel", float32', "bare read of the logits"),
    ("lm_head_categorical", "bfloat16 D=4096", "Fused head, bfloat16, D = 4096", "matrix product alone"),
)


def _style(name: str) -> tuple[str, str, str]:
    return next((color, dashes, marker) for start, color, dashes, marker in STYLES if name.startswith(start))


def _panel(axes: Any, rows: Sequence[Mapping[str, Any]], limit: str) -> None:
    """Microseconds against rows of the batch, a line for each contender."""
    for name in dict.fromkeys(row["contender"] for row in rows):
        line = sorted(
            (int(row["N"]), float(row["median_ms"]) * 1e3) for row in rows if row["contender"] == name
        )
        color, dashes, marker = _style(name)
        axes.plot(
            *zip(*line, strict=True),
            color=color,
            linestyle=dashes,
            marker=marker,
            markeredgecolor="white",
            markersize=6,
            linewidth=2.4 if name == "driftmax" else 1.6,
            zorder=3 if name == "driftmax" else 2,
            label=limit if name == "limit" else name,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({int(row["N"]) for row in rows})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.set_xlabel("rows")
    axes.set_ylabel("median time [µs]")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.6 ** len(axes.lines))  # room for the legend
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    _tidy(axes)


def gpu(rows: Rows, path: Path) -> None:
    """Time against batch size, beside the peers and the limit: a panel for each kind of draw in the rows.

    Parameters
    ----------
    rows : sequence of mappings
        Rows of the GPU bench, read back from its CSV file.
    path : Path
        The picture to write.
    """
    found = []
    for case, variant, title, limit in PANELS:
        inside = [row for row in rows if (row["case"], row["variant"]) == (case, variant)]
        if inside:
            found.append((inside, title, limit))
    plt = _pyplot()
    lines = -(-len(found) // 3)
    figure, axes = plt.subplots(
        lines, min(3, len(found)), figsize=(13.5, 4.6 * lines), constrained_layout=True, squeeze=False
    )
    for panel in axes.flat[len(found) :]:
        panel.set_visible(False)
    for panel, (inside, title, limit) in zip(axes.flat, found, strict=False):
        _panel(panel, inside, limit)
        panel.set_title(title, loc="left", fontsize=11)
    figure.suptitle(f"{rows[0]['device']}, V = {found[0][0][0]['V']}, cold L2", fontsize=12)
    _save(figure, path)
    plt.close(figure)


def main() -> None:
    """Draw a CSV file's rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    with options.rows.open(newline="") as file:
        gpu(list(csv.DictReader(file)), options.picture)


if __name__ == "__main__":
    main()
