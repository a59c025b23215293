"""The Triton suite in processes of its own: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SUITE = Path(__file__).with_name("suite.py")


def run_suite(**environment: str) -> None:
    """Run suite.py under pytest; its whole report is the message if it fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(SUITE)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_interpreted() -> None:
    run_suite(TRITON_INTERPRET="1", OMP_NUM_THREADS="1", DRIFTMAX_TEST_DEVICE="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here; the interpreted run covers the same suite"
)
def test_compiled() -> None:
    run_suite(TRITON_INTERPRET="0", DRIFTMAX_TEST_DEVICE="cuda")
