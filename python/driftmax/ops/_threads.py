"""Whose threads the compiled core uses (docs/decisions/0010)."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

__all__ = ["torch_team"]


def torch_team() -> int:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch uses; 0 where there is none, or where
    ``DRIFTMAX_THREADS=own`` asks for the core's own threads.

    Raises ValueError where that variable says neither ``own`` nor ``torch``.
    """
    wanted = os.environ.get("DRIFTMAX_THREADS") or "torch"
    if wanted not in ("own", "torch"):
        raise ValueError(f"DRIFTMAX_THREADS={wanted}: expected own or torch")
    if wanted == "own" or not sys.platform.startswith("linux"):
        return 0
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # Loaded already: nothing is opened. A look-up through its handle ends in the runtime it is bound to,
        # also where the process holds several.
        loaded = ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        entry = loaded.GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(entry, ctypes.c_void_p).value or 0
