"""Everything that needs a GPU: ``python -m driftmax.bench.gpu checks|warm|speed [GROUP ...] --out FOLDER``.

``checks`` writes ``checks_GROUP.csv`` and exits with 1 if one failed. ``warm`` runs each timed call once,
which compiles its kernels; groups can be warmed in processes side by side. ``speed`` writes
``gpu_GROUP.csv``, and leaves out a group of which a check in the folder failed. ``bench/gpu.sh`` does all of
it in order. ``--device cpu`` is a dry run in Triton's interpreter (set TRITON_INTERPRET=1) at toy sizes,
which times nothing worth reading.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path

import driftmax
import torch
import triton

from . import gpu_checks, gpu_discrete, gpu_speed
from .gpu_session import Session, write

Group = Callable[[Session], None]

CHECKS: dict[str, Group] = {
    "fill": gpu_checks.check_fills,
    "categorical": gpu_checks.check_categorical,
    "law": gpu_checks.check_law,
    "capture": gpu_checks.check_capture,
    "head": gpu_checks.check_head,
    "steps": gpu_checks.check_steps,
    "samplers": gpu_discrete.check_samplers,
    "uniform": gpu_discrete.check_uniform,
    "loops": gpu_discrete.check_loops,
    "guided": gpu_discrete.check_guided,
    "captured": gpu_discrete.check_captured,
    "networks": gpu_discrete.check_networks,
}
SPEED: dict[str, Group] = {
    "fill": gpu_speed.bench_fills,
    "categorical": gpu_speed.bench_categorical,
    "gumbel_topk": gpu_speed.bench_topk,
    "head": gpu_speed.bench_head,
    "steps": gpu_speed.bench_steps,
    "discrete": gpu_discrete.bench_discrete,
}
# Checks without which a group's timings would be of something else.
NEEDS = {
    "categorical": ("categorical", "law", "capture"),
    "gumbel_topk": ("categorical",),
    "discrete": ("samplers", "loops", "networks"),
}


def failed_groups(out: Path) -> set[str]:
    """Groups of checks of which one failed, by the tables in the folder."""
    found = set()
    for path in out.glob("checks_*.csv"):
        with path.open(newline="") as file:
            if any(row["ok"] != "True" for row in csv.DictReader(file)):
                found.add(path.stem.removeprefix("checks_"))
    return found


def run_checks(session: Session, groups: list[str], out: Path, machine: dict[str, object]) -> int:
    """All checks of the groups; 1 if one failed."""
    for group in groups:
        session.checks.clear()
        CHECKS[group](session)
        write(out / f"checks_{group}.csv", session.checks, machine)
    return int(bool(failed_groups(out) & set(groups)))


def run_speed(session: Session, groups: list[str], out: Path, machine: dict[str, object]) -> int:
    """All timings of the groups whose checks passed."""
    failed = failed_groups(out)
    for group in groups:
        session.rows.clear()
        if needed := failed & set(NEEDS.get(group, (group,))):
            print(f"     {group}: not timed, checks failed: {', '.join(sorted(needed))}")
            continue
        begin = time.perf_counter()
        SPEED[group](session)
        print(f"     {group}: {time.perf_counter() - begin:.1f} s", flush=True)
        write(out / f"gpu_{group}.csv", session.rows, machine)
    return 0


def main() -> int:
    """Parse, run, and say what ran where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("checks", "warm", "speed"))
    parser.add_argument("groups", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    known = CHECKS if options.what == "checks" else SPEED
    groups = options.groups or list(known)
    if unknown := set(groups) - set(known):
        parser.error(f"no group {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    session = Session(torch.device(options.device), 0 if options.what == "warm" else options.rounds)
    options.out.mkdir(parents=True, exist_ok=True)
    machine: dict[str, object] = {
        "device": torch.cuda.get_device_name() if session.on_gpu else "interpreter",
        "torch": torch.__version__, "triton": triton.__version__, "driftmax": driftmax.__version__,
        "python": sys.version.split()[0], "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print(machine, driftmax.available_backends(), flush=True)
    if options.what == "checks":
        return run_checks(session, groups, options.out, machine)
    if options.what == "warm":
        for group in groups:
            SPEED[group](session)
        return 0
    return run_speed(session, groups, options.out, machine)


if __name__ == "__main__":
    sys.exit(main())
