"""What the numbers were measured on: processor, cores, versions. Never a host name."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("model name", "cpu model")):
                return line.split(":", 1)[1].strip()
    if sys.platform == "darwin":
        answer = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Logical cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_bytes() -> int:
    """Size of the largest cache that a core reads through; 64 MiB where the system does not say."""
    sizes = [64 << 20]
    if described := list(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")):
        sizes = [int(path.read_text(encoding="ascii").strip().removesuffix("K")) << 10 for path in described]
    return max(sizes)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with this many threads, and leave torch's setting as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def version_of(package: str) -> str:
    """Installed version of a distribution, or ``"absent"``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@dataclass(frozen=True)
class Machine:
    """Columns that every stored row carries."""

    machine: str
    cores: int
    system: str
    python: str
    torch: str
    triton: str
    numpy: str
    driftmax: str
    date: str

    def columns(self) -> dict[str, str | int]:
        """The fields as row columns."""
        return asdict(self)


def describe(device: torch.device) -> Machine:
    """The machine and the software as they are now; on CUDA the GPU's name stands for the machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    return Machine(
        machine=name,
        cores=cores(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        triton=version_of("triton"),
        numpy=version_of("numpy"),
        driftmax=version_of("driftmax"),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
