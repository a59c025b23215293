"""The two pictures, drawn from rows alone: speed against peers and limit, and the fp32 fault."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]

# Okabe and Ito's palette: told apart by readers with any colour vision.
ORANGE, BLUE, GREEN, GREY, INK = "#d55e00", "#0072b2", "#009e73", "#9a9a9a", "#222222"
DPI = 160


def _pyplot() -> Any:
    """matplotlib without a display."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "driftmax[bench]"') from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    axes.grid(axis="both", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


SAMPLERS = {
    "fp32": ("torch Gumbel-argmax, float32", ORANGE, "-", "o"),
    "fp64": ("torch Gumbel-argmax, float64", BLUE, "-", "s"),
    "driftmax": ("driftmax.categorical, float32 logits", GREEN, (0, (4, 3)), "D"),
}
SHIFT = {"fp32": 1.0, "fp64": 0.93, "driftmax": 1.075}  # keeps the dots of equal N apart


def _law_panel(axes: Any, rows: Rows, quantity: str) -> None:
    """Lines analytic, dots measured."""
    for sampler, (label, color, dashes, marker) in SAMPLERS.items():
        inside = [row for row in rows if row["sampler"] == sampler and row["mask"] == "inside"]
        line = [row for row in inside if row["kind"] == "analytic"]
        dots = [row for row in inside if row["kind"] == "measured"]
        axes.plot(
            [int(row["N"]) for row in line],
            [float(row[quantity]) for row in line],
            color=color,
            linestyle=dashes,
            linewidth=2.2,
            label=label,
        )
        axes.errorbar(
            [int(row["N"]) * SHIFT[sampler] for row in dots],
            [float(row[quantity]) for row in dots],
            yerr=[2.0 * float(row[f"{quantity}_error"]) for row in dots],
            fmt=marker,
            color=color,
            markeredgecolor="white",
            markersize=7,
            capsize=3,
            linewidth=1.2,
        )
    axes.set_xscale("log", base=2)
    ticks = sorted({int(row["N"]) for row in rows if row["mask"] == "inside"})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.set_xlabel("sampling steps N")
    _tidy(axes)


def law(rows: Rows, path: Path) -> None:
    """Entropy and total variation against the number of steps.

    Parameters
    ----------
    rows : sequence of mappings
        Rows of the law case, fresh or read back from its CSV file.
    path : Path
        The picture to write.
    """
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4), constrained_layout=True)
    _law_panel(left, rows, "entropy")
    _law_panel(right, rows, "tv")
    left.set_ylabel("entropy of the unmasked token [nats]")
    right.set_ylabel("total variation from the exact law")
    left.set_title("Entropy drawn", loc="left", fontsize=11)
    right.set_title("Distance from the exact law", loc="left", fontsize=11)
    outside = [r for r in rows if r["mask"] == "outside" and r["sampler"] == "fp32"]
    if outside:
        right.annotate(
            f"float32, mask kept out of the categorical:\n{float(outside[0]['tv']):.3f} at every N",
            xy=(0.03, 0.84),
            xycoords="axes fraction",
            fontsize=8.5,
            color=ORANGE,
        )
    left.legend(
        loc="lower left", frameon=False, fontsize=9, title="lines: analytic law; dots: measured, 2 sigma"
    )
    figure.suptitle(
        "Masked diffusion, mask inside the categorical: float32 noise draws the wrong law (Zipf, K = 50257)",
        fontsize=12,
    )
    _save(figure, path)
    plt.close(figure)


CALLS = {
    "plain loop": (GREY, "--", "", "plain loop: a call a step"),
    "batch cache": (ORANGE, "-", "o", "cache of the whole batch's output"),
    "driftmax Plan": (GREEN, "-", "D", "driftmax Plan: rows on their own clocks"),
    "one row, expected": (INK, ":", "", "n (1 - (1 - 1/n)^L), one row"),
}


def _calls_panel(axes: Any, rows: Rows, batch: int) -> None:
    for sampler, (color, dashes, marker, label) in CALLS.items():
        line = [row for row in rows if row["sampler"] == sampler and int(row["B"]) == batch and int(row["n"])]
        axes.plot(
            [int(row["n"]) for row in line],
            [float(row["value"]) for row in line],
            color=color,
            linestyle=dashes,
            marker=marker,
            markersize=7,
            label=label,
            zorder=3 if sampler == "plain loop" else 2,  # it may lie under another
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("steps n of the time grid")
    axes.set_title(f"Network calls, batch of {batch}", loc="left", fontsize=11)
    _tidy(axes)


def discrete(rows: Rows, path: Path) -> None:
    """Network calls against steps, and seconds per sequence of each sampler.

    Parameters
    ----------
    rows : sequence of mappings
        Rows of the discrete case, fresh or read back from its CSV file.
    path : Path
        The picture to write.
    """
    plt = _pyplot()
    figure, panels = plt.subplots(1, 3, figsize=(14.5, 4.6), constrained_layout=True)
    calls = [row for row in rows if row["what"] == "calls"]
    for axes, batch in zip(panels, sorted({int(row["B"]) for row in calls}), strict=False):
        _calls_panel(axes, calls, batch)
    panels[0].set_ylabel("network calls of the batch")
    panels[0].legend(frameon=False, fontsize=8.5, loc="upper left")
    timed = [row for row in rows if row["quantity"] == "s per sequence"]
    colors = {"driftmax Plan": GREEN, "driftmax Ancestral": BLUE}
    labels = [f"{r['sampler']}\n{r['what']}, B = {r['B']}, n = {r['n']}" for r in timed]
    seconds = [float(row["value"]) for row in timed]
    panels[2].barh(
        range(len(timed)), seconds, color=[colors.get(str(r["sampler"]), ORANGE) for r in timed], height=0.62
    )
    for i, value in enumerate(seconds):
        panels[2].annotate(
            f"{value:.3g} s", (value, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
        )
    panels[2].set_yticks(range(len(timed)), labels, fontsize=7.5)
    panels[2].invert_yaxis()
    panels[2].set_xscale("log")
    panels[2].set_xlim(right=max(seconds) * 8)
    panels[2].set_title("Seconds per sequence (L = {})".format(timed[0]["L"]), loc="left", fontsize=11)
    _tidy(panels[2])
    _save(figure, path)
    plt.close(figure)


def _label(row: Mapping[str, Any]) -> str:
    isa = f" [{row['isa']}]" if row.get("isa") else ""
    return f"{row['case']}, {row['variant']}\n{row['dtype']}, {row['N']} x {row['V']}{isa}"


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("case", "variant", "dtype", "N", "V"))


def _groups(rows: Rows) -> list[list[Mapping[str, Any]]]:
    """Rows of one workload together; a workload starts with its driftmax row."""
    groups: list[list[Mapping[str, Any]]] = []
    for row in rows:
        if row["contender"] == "driftmax":
            groups.append([])
        groups[-1].append(row)
    return groups


def _bars(axes: Any, values: Iterable[float], color: str, text: Iterable[str]) -> None:
    numbers = list(values)
    axes.barh(range(len(numbers)), numbers, color=color, height=0.62)
    for i, (value, label) in enumerate(zip(numbers, text, strict=True)):
        axes.annotate(
            label, (value, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color=INK
        )


def speed(rows: Rows, path: Path) -> None:
    """How many times faster than each peer, and which share of the machine's limit, per workload.

    Parameters
    ----------
    rows : sequence of mappings
        Rows of a run, fresh or read back from its CSV file.
    path : Path
        The picture to write.
    """
    plt = _pyplot()
    groups = [group for group in _groups(rows) if len(group) > 1][::-1]
    height = 1.6 + 0.4 * len(groups)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12.5, height), constrained_layout=True, sharey=True, width_ratios=(3, 2)
    )
    _peer_panel(left, groups)
    shares = [100.0 * float(group[0]["share_of_limit"] or 0.0) for group in groups]
    words = [f"{share:.0f} % of a {group[0]['limit']}" for share, group in zip(shares, groups, strict=True)]
    _bars(right, shares, GREEN, words)
    right.axvline(100.0, color=GREY, linewidth=1.2)
    right.set_xlim(0, 150)
    right.set_xlabel("share of the machine's limit, measured in the same run [%]")
    left.set_yticks(range(len(groups)), [_label(group[0]) for group in groups], fontsize=8)
    first = rows[0]
    figure.suptitle(
        f"driftmax {first['driftmax']} on {first['machine']}, {first['threads']} threads, "
        f"torch {first['torch']}, {first['date']}",
        fontsize=11,
    )
    for axes in (left, right):
        _tidy(axes)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    _save(figure, path)
    plt.close(figure)


# Peers of the same kind are close in colour over all cases.
PEER_COLORS = {
    "torch gumbel fp32": ORANGE,
    "torch gumbel fp64": BLUE,
    "torch race fp32": "#e69f00",
    "torch multinomial": "#6a3d9a",
    "torch inverse cdf": "#7f7f7f",
    "torch filter + race": "#cc79a7",
    "torch gumbel topk": "#8c564b",
    "matmul + torch race": "#e69f00",
    "matmul + multinomial": "#6a3d9a",
    "matmul + categorical": GREEN,
    "torch fill": "#56b4e9",
}


def _peer_panel(axes: Any, groups: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """One dot per peer: its time over driftmax's, on a logarithmic axis."""
    present = {_family(str(row["contender"])) for group in groups for row in group}
    colors = {name: PEER_COLORS.get(name, INK) for name in sorted(present - {"driftmax", "limit"})}
    for i, group in enumerate(groups):
        ratios = [
            (str(row["contender"]), float(row["ratio"])) for row in group[1:] if row["contender"] != "limit"
        ]
        if ratios:
            values = [value for _, value in ratios]
            axes.plot([min(1.0, *values), max(values)], [i, i], color="#d0d0d0", linewidth=1.5, zorder=1)
        for name, value in ratios:
            axes.plot(
                value, i, "o", color=colors[_family(name)], markersize=7, markeredgecolor="white", zorder=2
            )
    axes.axvline(1.0, color=GREEN, linewidth=2)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xlabel("time of the peer / time of driftmax")
    handles = [
        axes.plot([], [], "o", color=color, label=name, markersize=7, markeredgecolor="white")[0]
        for name, color in colors.items()
    ]
    axes.legend(
        handles=handles, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.06), ncols=4
    )


def _family(name: str) -> str:
    """Fill peers (torch normal, torch uniform, ...) share one colour."""
    return (
        "torch fill"
        if name in {f"torch {kind}" for kind in ("normal", "uniform", "exponential", "gumbel")}
        else name
    )


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
