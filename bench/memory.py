"""Extra peak memory of one call: torch's allocator knows on CUDA, the resident-set high mark on Linux."""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from pathlib import Path

import torch

from .harness import Run

MB = 1e6


def _resident(field: str) -> float:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1]) * 1024.0
    raise OSError(f"/proc/self/status has no {field}")


def _give_back_freed_memory() -> None:
    """Let glibc return what earlier calls freed, so that it does not hide what the next call needs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def extra_peak_mb(run: Run, device: torch.device) -> float | None:
    """Peak memory during one call beyond what was in use before it, in MB; None where it cannot be measured.

    The call runs once before, so that one-time allocations (thread stacks, code) do not count.
    """
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MB
    if not sys.platform.startswith("linux"):
        return None
    _give_back_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high mark to the present
    except OSError:  # a kernel or container without this switch
        return None
    resident = _resident("VmRSS")
    run()
    return max(0.0, _resident("VmHWM") - resident) / MB
