"""The pictures, drawn from rows alone: speed against peers and limit, the fp32 fault, masked diffusion."""

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


TIMES = {
    "torch, plain loop": (GREY, "--", "", "torch, plain loop: n times one step"),
    "torch, careful": (ORANGE, "-", "o", "torch, careful: draws only what it reveals"),
    "driftmax Ancestral": (BLUE, "-", "s", "driftmax Ancestral"),
    "driftmax Plan": (GREEN, "-", "D", "driftmax Plan"),
}


def _expected_calls(steps: Sequence[float], length: int) -> list[float]:
    return [n * (1.0 - (1.0 - 1.0 / n) ** length) for n in steps]


def _fitted(steps: Sequence[float], seconds: Sequence[float], length: int) -> tuple[list[float], list[float]]:
    """a + b times the expected calls, by least squares of the relative errors; a curve over the steps."""
    import numpy as np

    calls = np.array(_expected_calls(steps, length))
    weights = 1.0 / np.array(seconds)
    columns = np.stack((np.ones_like(calls), calls), 1)
    fit = np.linalg.lstsq(columns * weights[:, None], np.ones_like(calls), rcond=None)[0]
    grid = np.geomspace(min(steps), max(steps), 60).tolist()
    return grid, [float(fit[0] + fit[1] * one) for one in _expected_calls(grid, length)]


def _time_panel(axes: Any, rows: Rows) -> None:
    """Seconds per sequence against steps, network for free: filled at the smaller vocabulary."""
    batch = min(int(row["B"]) for row in rows)
    timed = [
        row for row in rows if int(row["B"]) == batch and str(row["quantity"]).startswith("s per sequence")
    ]
    vocabularies = sorted({int(row["V"]) for row in timed})
    length = int(timed[0]["L"])
    for vocab in vocabularies:
        first = vocab == vocabularies[0]
        for sampler, (color, dashes, marker, label) in TIMES.items():
            # Of the plain loop the projected times, which there are for every n.
            wanted = (
                "s per sequence, steps x s per step" if sampler == "torch, plain loop" else "s per sequence"
            )
            line = [
                (int(row["n"]), float(row["value"]))
                for row in timed
                if row["sampler"] == sampler and int(row["V"]) == vocab and row["quantity"] == wanted
            ]
            steps, seconds = [n for n, _ in line], [value for _, value in line]
            axes.plot(
                steps,
                seconds,
                color=color,
                linestyle=dashes,
                linewidth=2.0 if first else 1.0,
                marker=marker,
                markersize=6,
                markerfacecolor=color if first else "white",
                label=label if first else None,
            )
            if sampler == "driftmax Plan" and len(line) > 2:
                label = "a + b n (1 - (1 - 1/n)^L), fitted to Plan"
                axes.plot(*_fitted(steps, seconds, length), ":", color=INK, label=label if first else None)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("steps n of the time grid")
    axes.set_ylabel("seconds per sequence")
    kinds = f"V = {vocabularies[0]}" + (f" (open: {vocabularies[1]})" if len(vocabularies) > 1 else "")
    axes.set_title(f"Sampler alone, batch of {batch}, L = {length}, {kinds}", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    axes.margins(y=0.3)
    _tidy(axes)


def _network_panel(axes: Any, rows: Rows) -> None:
    """Hours of whole runs of RADD-small, and what the sampler adds to the network's time."""
    hours = [row for row in rows if str(row["quantity"]).startswith("hours")]
    settings = list(dict.fromkeys((int(row["B"]), int(row["n"])) for row in hours))
    for i, (batch, steps) in enumerate(settings):
        times = {
            str(row["sampler"]): float(row["value"])
            for row in hours
            if (int(row["B"]), int(row["n"])) == (batch, steps)
        }
        axes.plot(list(times.values()), [i] * len(times), color="#d0d0d0", linewidth=1.5, zorder=1)
        for sampler, value in times.items():
            color, _, marker, _ = TIMES[sampler]
            axes.plot(value, i, marker or "o", color=color, markersize=8, markeredgecolor="white", zorder=2)
            text = f"{value:.3g} h" if value >= 1 else f"{60 * value:.3g} min"
            ours = sampler == "driftmax Plan"
            axes.annotate(
                text,
                (value, i),
                xytext=(-9 if ours else 9, 0),
                textcoords="offset points",
                ha="right" if ours else "left",
                va="center",
                fontsize=8.5,
                color=color if ours else INK,
            )
    shares = [100.0 * float(row["value"]) for row in rows if row["quantity"] == "share of the network's time"]
    axes.set_yticks(range(len(settings)), [f"B = {batch}, n = {steps}" for batch, steps in settings])
    axes.set_ylim(len(settings) - 0.5, -0.7)
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.set_xlabel("hours for the batch: calls x seconds of a call")
    axes.set_title(
        "RADD-small on this machine: grey plain loop, green driftmax Plan;\n"
        f"sampler and draws take at most {max(shares):.2g} % of the network's time",
        loc="left",
        fontsize=11,
    )
    _tidy(axes)
    axes.grid(axis="y", visible=False)


def discrete(rows: Rows, path: Path) -> None:
    """Network calls and the sampler's own time against steps, and whole runs of RADD-small.

    Parameters
    ----------
    rows : sequence of mappings
        Rows of the discrete case, fresh or read back from its CSV file.
    path : Path
        The picture to write.
    """
    plt = _pyplot()
    calls = [row for row in rows if row["what"] == "calls"]
    network = [row for row in rows if row["what"] == "RADD-small"]
    figure, panels = plt.subplots(2, 2, figsize=(12.5, 9.2), constrained_layout=True)
    for axes, batch in zip(panels[0], sorted({int(row["B"]) for row in calls}), strict=True):
        _calls_panel(axes, calls, batch)
    panels[0, 0].set_ylabel("network calls of the batch")
    panels[0, 0].legend(frameon=False, fontsize=8.5, loc="upper left")
    _time_panel(panels[1, 0], [row for row in rows if row["what"] == "sampler alone"])
    if network:
        _network_panel(panels[1, 1], network)
    else:
        panels[1, 1].set_visible(False)
    _save(figure, path)
    plt.close(figure)


FORMS = {
    "torch, as published": (ORANGE, "s", "torch, as published"),
    "torch, best": (BLUE, "o", "best plain torch"),
    "driftmax": (GREEN, "D", "driftmax"),
    "limit": (GREY, "|", "bare read of the logits it has to see"),
}


def _rules_panel(axes: Any, rows: Rows, names: Sequence[str]) -> None:
    """Milliseconds per sequence of every form, one line per rule."""
    for i, name in enumerate(names):
        times = {str(row["contender"]): float(row["median_ms"]) for row in rows if row["rule"] == name}
        if not times:  # its gate failed
            continue
        axes.plot(
            [min(times.values()), max(times.values())], [i, i], color="#d0d0d0", linewidth=1.5, zorder=1
        )
        for contender, (color, marker, _) in FORMS.items():
            size = 13 if marker == "|" else 7
            edge = color if marker == "|" else "white"
            axes.plot(
                times[contender],
                i,
                marker,
                color=color,
                markersize=size,
                markeredgecolor=edge,
                markeredgewidth=1.8 if marker == "|" else 1.0,
                zorder=2,
            )
        axes.annotate(
            "{:.3g}x".format(times["torch, as published"] / times["driftmax"]),
            (times["torch, as published"], i),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=ORANGE,
        )
        axes.annotate(
            "{:.3g}x".format(times["torch, best"] / times["driftmax"]),
            (times["torch, best"], i),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=BLUE,
        )
    axes.set_xscale("log")
    axes.margins(x=0.14)
    axes.set_ylim(len(names) - 0.5, -0.6)
    axes.set_yticks(range(len(names)), names)
    _tidy(axes)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def decoding(rows: Rows, path: Path) -> None:
    """Time per sequence of each decoding rule in each form, a panel for every vocabulary and temperature.

    Parameters
    ----------
    rows : sequence of mappings
        Rows of the decoding case, fresh or read back from its CSV file.
    path : Path
        The picture to write.
    """
    plt = _pyplot()
    names = list(dict.fromkeys(str(row["rule"]) for row in rows))
    vocabularies = sorted({int(row["V"]) for row in rows})
    temperatures = sorted({float(row["temperature"]) for row in rows})
    figure, panels = plt.subplots(
        len(vocabularies),
        len(temperatures),
        figsize=(12.5, 0.9 + 3.7 * len(vocabularies)),
        constrained_layout=True,
        squeeze=False,
        sharey=True,
    )
    for line, vocab in zip(panels, vocabularies, strict=True):
        for axes, temperature in zip(line, temperatures, strict=True):
            inside = [r for r in rows if int(r["V"]) == vocab and float(r["temperature"]) == temperature]
            _rules_panel(axes, inside, names)
            lengths = ", ".join(sorted({str(row["L"]) for row in inside}))
            axes.set_title(
                f"V = {vocab}, {lengths} tokens, temperature {temperature:g}", loc="left", fontsize=11
            )
    for axes in panels[-1]:
        axes.set_xlabel("ms per sequence")
    handles = [
        panels[0, 0].plot([], [], marker, color=color, label=label, markersize=8, markeredgewidth=1.5)[0]
        for color, marker, label in FORMS.values()
    ]
    figure.legend(handles=handles, fontsize=9, frameon=False, loc="outside lower center", ncols=4)
    figure.suptitle("Decoding rules, network for free; multiples are of driftmax's time", fontsize=12)
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
    right.set_xlim(0, 190)
    right.set_xlabel("share of the limit in the same run [%]")
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
    "torch's x.sum(-1)": INK,
    "torch's sum of the same bytes": "#666666",
    "torch gumbel fp32": ORANGE,
    "torch gumbel fp32, as usually written": "#a63603",
    "torch gumbel fp64": BLUE,
    "torch fp64 gumbel everywhere": "#08306b",
    "torch race fp32": "#e69f00",
    "torch race where revealed": "#f0c808",
    "torch multinomial": "#6a3d9a",
    "torch inverse cdf": "#7f7f7f",
    "torch filter + race": "#cc79a7",
    "torch gumbel topk": "#8c564b",
    "matmul + torch race": "#e69f00",
    "matmul + multinomial": "#6a3d9a",
    "matmul + categorical": GREEN,
    "torch fill": "#56b4e9",
    "driftmax uniform + categorical": "#74c476",
    "torch sort": "#9ecae1",
    "torch threshold": "#fb9a99",
    "torch topk per row": "#b15928",
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
