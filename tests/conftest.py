"""Fixtures shared by all tests; puts the repository root on the path, for ``tests.statistics``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import driftmax
import pytest
import torch
from driftmax.ops._dispatch import debug_enabled

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture
def root() -> Path:
    """The repository root."""
    return ROOT


@pytest.fixture(params=["reference", "cpp"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that must work on the CPU, by name."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """No test leaves threads, debugging or an unread status word behind."""
    threads, debug = torch.get_num_threads(), debug_enabled()
    yield
    torch.set_num_threads(threads)
    driftmax.set_debug(debug)
    driftmax.check_status()
