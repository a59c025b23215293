"""``driftmax doctor``: what this installation can do here, what is missing and why, and a short self-test.

Nothing in here raises for a broken installation; what is wrong becomes a line of the report.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import platform
import select
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

import driftmax
from driftmax.bench import gates, machine
from driftmax.bench.harness import GateFailed

# Known answers of Philox4x32-10 from the Random123 distribution: counter, key, result.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
PROBE_BYTES = 1 << 28  # larger than any last-level cache
FORK_PATIENCE_S = 5.0
FILLS = ("uniform", "exponential", "gumbel", "normal")


@dataclass(frozen=True)
class Check:
    """One item of the self-test."""

    name: str
    passed: bool
    detail: str
    seconds: float


@dataclass(frozen=True)
class Report:
    """Everything the doctor found.

    Attributes
    ----------
    versions : dict
        Of Python, the system, driftmax and what it stands on.
    cpu : dict
        Processor, cores, threads, instruction sets in use and available, read bandwidth in GB/s.
    backends : dict
        Name to ``"available"`` or the reason why it is missing.
    gpu : str
        The device's name and memory, or why there is none.
    checks : list of Check
        The self-test.
    """

    versions: dict[str, str]
    cpu: dict[str, Any]
    backends: dict[str, str]
    gpu: str
    checks: list[Check]

    @property
    def healthy(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {**dataclasses.asdict(self), "healthy": self.healthy}

    def text(self) -> str:
        """The report for a terminal."""
        lines = ["versions"]
        lines += [f"  {name:<12} {version}" for name, version in self.versions.items()]
        lines.append("cpu")
        lines += [f"  {name.replace('_', ' '):<24} {_plain(value)}" for name, value in self.cpu.items()]
        lines.append("backends")
        lines += [f"  {name:<12} {state}" for name, state in self.backends.items()]
        lines += ["gpu", f"  {self.gpu}", "self-test"]
        for check in self.checks:
            state = "ok" if check.passed else "FAILED"
            lines.append(f"  {state:<7} {check.name:<28} {check.detail} ({check.seconds:.2f} s)")
        failed = sum(not check.passed for check in self.checks)
        lines.append("all well" if self.healthy else f"{failed} of {len(self.checks)} checks failed")
        return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def examine() -> Report:
    """Look at the installation and run the self-test (a few seconds).

    Returns
    -------
    Report

    Examples
    --------
    >>> from driftmax import doctor
    >>> doctor.examine().healthy
    True
    """
    core, reason = _core()
    backends = {name: missing or "available" for name, missing in driftmax.available_backends().items()}
    return Report(_versions(), _cpu(core, reason), backends, _gpu(), _self_test(core, reason, backends))


def _core() -> tuple[ModuleType | None, str]:
    """The compiled core, or None and why it does not import."""
    try:
        return importlib.import_module("driftmax._core"), ""
    except ImportError as error:
        return None, f"the compiled core does not import: {error}"


def _versions() -> dict[str, str]:
    return {
        "driftmax": driftmax.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": machine.version_of("triton"),
        "numpy": machine.version_of("numpy"),
        "matplotlib": machine.version_of("matplotlib"),
    }


def _cpu(core: ModuleType | None, reason: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "processor": machine.cpu_model(),
        "cores": machine.cores(),
        "threads": torch.get_num_threads(),
    }
    if core is None:
        return found | {"instruction_set": reason}
    found["threads_from"] = "torch's OpenMP runtime" if core.team_is_borrowed() else "driftmax"
    found["instruction_set"] = core.isa()
    found["instruction_sets_here"] = core.available_isas()
    if os.environ.get("DRIFTMAX_ISA"):
        found["instruction_set_forced"] = f"DRIFTMAX_ISA={os.environ['DRIFTMAX_ISA']}"
    found["read_bandwidth_gb_per_s"] = read_bandwidth(core, torch.get_num_threads())
    return found


def read_bandwidth(core: ModuleType, threads: int, nbytes: int = PROBE_BYTES) -> float:
    """Best of five bare reads of a buffer larger than the cache, in GB/s."""
    buffer = torch.ones(nbytes // 4)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        core.read_sum(buffer.data_ptr(), nbytes, threads)
        best = min(best, time.perf_counter() - start)
    return nbytes / best / 1e9


def _gpu() -> str:
    if not torch.cuda.is_available():
        build = torch.version.cuda or torch.version.hip
        why = "this torch is a CPU build" if build is None else f"torch for {build} sees no device"
        return f"none: {why}"
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return "; ".join(names)


# ----- the self-test -----


class CheckFailed(Exception):
    """A check found something wrong; the message says what."""


def _run(name: str, check: Callable[[], str]) -> Check:
    """Run one check; whatever it raises is its failure, for the doctor must reach the end of its round."""
    start = time.perf_counter()
    try:
        detail, passed = check(), True
    except Exception as error:  # a diagnosis tool reports every kind of fault instead of dying of it
        detail, passed = f"{type(error).__name__}: {error}", False
    return Check(name, passed, detail, time.perf_counter() - start)


def _self_test(core: ModuleType | None, reason: str, backends: dict[str, str]) -> list[Check]:
    present = [name for name, state in backends.items() if state == "available" and name != "reference"]
    checks: list[tuple[str, Callable[[], str]]] = []
    if core is None:
        checks.append(("compiled core", lambda: _fail(reason)))
    else:
        checks += [
            ("Philox known answers", lambda: _known_answers(core)),
            ("instruction sets agree", lambda: _isas_agree(core)),
            ("thread counts agree", _threads_agree),
            ("fork", _fork),
        ]
    checks.append(("backends agree", lambda: _backends_agree(present)))
    checks.append(("categorical law", _law))
    return [_run(name, check) for name, check in checks]


def _fail(reason: str) -> str:
    raise CheckFailed(reason)


def _known_answers(core: ModuleType) -> str:
    for counter, key, wanted in KNOWN_ANSWERS:
        got = tuple(core.philox4x32(*counter, *key))
        if got != wanted:
            raise CheckFailed(f"counter {counter} gives {got}, published is {wanted}")
    return f"{len(KNOWN_ANSWERS)} published vectors"


def _logits(rows: int, vocabulary: int) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(7)).mul_(3.0)


def _draws(device: str = "cpu", backend: str = "auto") -> list[torch.Tensor]:
    """A little of everything: fills and tokens whose bits are promised."""
    drawn = [
        getattr(driftmax.random, kind)(1001, rng=11, device=device, backend=backend).cpu() for kind in FILLS
    ]
    logits = _logits(4, 2000).to(device)
    return [*drawn, driftmax.categorical(logits, rng=11, method="gumbel", backend=backend).cpu()]


def _same(one: list[torch.Tensor], other: list[torch.Tensor], what: str) -> None:
    for name, a, b in zip((*FILLS, "categorical"), one, other, strict=True):
        if not torch.equal(a, b):
            raise CheckFailed(f"{what}: {int((a != b).sum())} of {a.numel()} {name} draws differ")


def _isas_agree(core: ModuleType) -> str:
    chosen = core.isa()
    names = list(core.available_isas())
    try:
        core.set_isa(names[0])
        first = _draws(backend="cpp")
        for name in names[1:]:
            core.set_isa(name)
            _same(first, _draws(backend="cpp"), f"{names[0]} against {name}")
    finally:
        core.set_isa(chosen)
    return f"same bits on {', '.join(names)}"


def _threads_agree() -> str:
    threads = torch.get_num_threads()
    logits = _logits(3, 70_000)
    try:
        torch.set_num_threads(1)
        alone = driftmax.categorical(logits, rng=5)
        torch.set_num_threads(max(3, threads))
        together = driftmax.categorical(logits, rng=5)
    finally:
        torch.set_num_threads(threads)
    if not torch.equal(alone, together):
        raise CheckFailed("one thread and several draw different tokens")
    return f"same tokens on 1 and {max(3, threads)} threads"


def _backends_agree(present: list[str]) -> str:
    if not present:
        raise CheckFailed("only the reference backend works here")
    wanted = _draws(backend="reference")
    for backend in present:
        _same(
            wanted,
            _draws("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu", backend),
            f"reference against {backend}",
        )
    return f"same bits on reference, {', '.join(present)}"


def _law() -> str:
    """Chi-square of 20000 draws over 50 tokens, one of them impossible: false alarms once in 1e9 runs."""
    logits = _logits(1, 50)[0]
    logits[3] = -math.inf
    try:
        gates.law_gate(
            lambda many: driftmax.categorical(many, rng=3),
            logits,
            torch.softmax(logits.double(), -1),
            "categorical",
            20_000,
        )
    except GateFailed as failure:
        raise CheckFailed(str(failure)) from failure
    return "20000 draws follow the softmax"


def _fork() -> str:
    """A forked child must draw what its parent draws, and not hang on threads that the fork did not copy."""
    if not hasattr(os, "fork"):
        return "this system does not fork"
    logits = _logits(64, 20_000)
    wanted = driftmax.categorical(logits, rng=9)  # starts the thread pool in the parent
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python 3.12 warns of forking with threads: the point here
        child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if torch.equal(driftmax.categorical(logits, rng=9), wanted) else 2
        finally:
            os.write(writer, bytes([code]))
            os._exit(0)  # leave without the parent's exit handlers
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], FORK_PATIENCE_S)
    answer = os.read(reader, 1) if ready else b""
    os.close(reader)
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if not ready:
        raise CheckFailed(f"a forked child hung for {FORK_PATIENCE_S:.0f} s")
    if answer != b"\0":
        raise CheckFailed("a forked child draws other tokens" if answer == b"\2" else "a forked child failed")
    return "a forked child draws the same tokens"
