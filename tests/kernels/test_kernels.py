"""The Triton suite in processes of its own: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SUITES = [Path(__file__).with_name(name) for name in ("suite.py", "suite_steps.py")]


def run_suite(suite: Path, **environment: str) -> None:
    """Run a suite under pytest; its whole report is the message if it fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.stem)
def test_interpreted(suite: Path) -> None:
    run_suite(suite, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", DRIFTMAX_TEST_DEVICE="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here; the interpreted run covers the same suite"
)
@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.stem)
def test_compiled(suite: Path) -> None:
    run_suite(suite, TRITON_INTERPRET="0", DRIFTMAX_TEST_DEVICE="cuda")
