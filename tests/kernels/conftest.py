"""The device of the Triton suite: the CPU, interpreted, or CUDA with ``DRIFTMAX_TEST_DEVICE=cuda``."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """Where the kernels of ``suite.py`` run."""
    return torch.device(os.environ.get("DRIFTMAX_TEST_DEVICE", "cpu"))
