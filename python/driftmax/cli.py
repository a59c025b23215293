"""The ``driftmax`` command: ``bench``, ``generate``, ``doctor`` and ``compile``.

This file only parses arguments and prints; the work is in :mod:`driftmax.bench`,
:mod:`driftmax.discrete.generate`, :mod:`driftmax.doctor` and :mod:`driftmax.aot`, imported when their
subcommand is called. Exit codes: 0 all well, 1 a check failed (a gate, a self-test, a kernel that does not
compile), 2 wrong usage or something missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from driftmax.aot import CompiledKernel

TARGETS = "sm_80,sm_90,sm_100,gfx942"

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    from driftmax import __version__

    parser = argparse.ArgumentParser(prog="driftmax", description="Exact, fast and reproducible samplers.")
    parser.add_argument("--version", action="version", version=f"driftmax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    bench = commands.add_parser(
        "bench",
        help="time every op against its peers and the machine's limit",
        description="Microbenchmarks. Each workload first passes a correctness gate; then driftmax, its "
        "peers and the machine's limit run in turn, and their medians are compared.",
    )
    bench.add_argument(
        "--quick", action="store_true", help="the main workloads only, under a minute on two cores"
    )
    bench.add_argument(
        "--case", nargs="+", action="extend", metavar="NAME", help="only these cases (see --list)"
    )
    bench.add_argument(
        "--csv", type=Path, metavar="FILE", help="write tidy rows (law, discrete, decoding beside it)"
    )
    bench.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the rows (fp32_fault, discrete, decoding beside it)"
    )
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    bench.add_argument(
        "--threads", type=_positive, metavar="N", help="threads of torch and driftmax (default: torch's)"
    )
    bench.add_argument("--list", action="store_true", help="list the cases and stop")
    bench.set_defaults(run=_bench)

    _generate_parser(
        commands.add_parser("generate", help="Python-like text from the shipped byte-level model")
    )

    doctor = commands.add_parser(
        "doctor",
        help="what is installed, what is missing and why, and a self-test",
        description="Versions, instruction sets, threads, memory bandwidth, backends, GPU, and a self-test "
        "of at most ten seconds. Exit code 1 when a check fails.",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    doctor.set_defaults(run=_doctor)

    compile_ = commands.add_parser(
        "compile",
        help="compile the Triton kernels ahead of time, without a GPU",
        description="Compile every Triton kernel for the given targets, without a GPU. Exit code 1 "
        "when one fails.",
    )
    compile_.add_argument(
        "--targets", default=TARGETS, metavar="LIST", help=f"comma-separated (default {TARGETS})"
    )
    compile_.add_argument(
        "--spread",
        action="store_true",
        help="each specialisation for one target of each vendor, in turn, and each kernel for all targets",
    )
    compile_.set_defaults(run=_compile)
    return parser


def _generate_parser(generate: argparse.ArgumentParser) -> None:
    generate.description = (
        "Draw text from the byte-level masked-diffusion model that ships with driftmax, trained on the "
        "Python standard library. The text goes to the standard output, the seed and the network calls to "
        "the standard error."
    )
    source = generate.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="how the text begins")
    source.add_argument(
        "--infill", type=Path, metavar="FILE", help="fill the gaps <?N?> (N bytes) of FILE; - is stdin"
    )
    generate.add_argument(
        "--sampler",
        default="blocks",
        metavar="NAME",
        help="blocks (default: left to right, 8 bytes at a time), plan, ancestral, euler, first-hitting, "
        "or a rule: confidence, entropy, margin",
    )
    generate.add_argument(
        "--steps", type=_positive, metavar="N", help="steps per 256 bytes (default: one byte at a time)"
    )
    generate.add_argument(
        "--length", type=_positive, metavar="N", help="bytes after the prompt (default: up to 256 with it)"
    )
    generate.add_argument(
        "--seed", type=int, metavar="N", help="repeat a text (default: a new one each time)"
    )
    generate.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="of each draw (default 1)",
    )
    generate.add_argument(
        "--top-p",
        type=float,
        default=0.9,
        metavar="P",
        help="draw from the likeliest bytes that have this probability (default 0.9; 1: the model's law)",
    )
    generate.add_argument("--watch", action="store_true", help="show the text while it unmasks")
    generate.set_defaults(run=_generate)


def _bench(arguments: argparse.Namespace) -> int:
    from driftmax.bench import runner

    if arguments.list:
        print(runner.listing())
        return EXIT_OK
    return runner.run(
        quick=arguments.quick,
        cases=arguments.case,
        csv=arguments.csv,
        plot=arguments.plot,
        device=arguments.device,
        threads=arguments.threads,
    )


def _generate(arguments: argparse.Namespace) -> int:
    from driftmax.discrete import generate

    return generate.run(
        prompt=arguments.prompt,
        infill=arguments.infill,
        sampler=arguments.sampler,
        steps=arguments.steps,
        length=arguments.length,
        seed=arguments.seed,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        watch=arguments.watch,
    )


def _doctor(arguments: argparse.Namespace) -> int:
    from driftmax import doctor

    report = doctor.examine()
    print(json.dumps(report.as_dict(), indent=2) if arguments.json else report.text())
    return EXIT_OK if report.healthy else EXIT_FAILED


def _compile(arguments: argparse.Namespace) -> int:
    from driftmax import aot

    targets = [name.strip() for name in arguments.targets.split(",") if name.strip()]
    if not targets:
        raise ValueError(f"--targets names no target; the default is {TARGETS}")
    print(f"{'target':<8} {'kernel':<24} {'result':<7} {'registers':>9} {'bytes':>8} {'time':>7}  variant")
    rows = aot.compile_kernels(
        targets, spread=arguments.spread, progress=lambda row: print(_compiled(row), flush=True)
    )
    failed = [row for row in rows if not row.ok]
    print(f"{len(rows) - len(failed)} of {len(rows)} kernels compiled for {', '.join(targets)}")
    for row in failed:
        print(f"FAILED {row.target} {row.kernel} {row.variant}: {row.error}")
    return EXIT_FAILED if failed or not rows else EXIT_OK


def _compiled(row: CompiledKernel) -> str:
    """One compiled kernel as a line of the table."""
    registers = "" if row.registers is None else str(row.registers)
    result = "ok" if row.ok else "FAILED"
    size = f"{registers:>9} {row.binary_bytes:>8} {row.seconds:>5.1f} s"
    return f"{row.target:<8} {row.kernel:<24} {result:<7} {size}  {row.variant}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; ``sys.argv[1:]`` by default.

    Returns
    -------
    int
        Exit code: 0 all well, 1 a check failed, 2 wrong usage or something missing.

    Examples
    --------
    >>> from driftmax.cli import main
    >>> main(["bench", "--list"]) == 0  # doctest: +ELLIPSIS
    categorical ...
    True
    """
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ImportError, FileNotFoundError, RuntimeError, ValueError) as error:
        print(f"driftmax {arguments.command}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print(f"driftmax {arguments.command}: interrupted", file=sys.stderr)
        return 130
