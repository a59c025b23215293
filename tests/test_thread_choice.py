"""Whose threads the core uses: torch's, unless the environment asks for its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from driftmax.ops._threads import torch_team


@pytest.mark.parametrize(("wanted", "said"), [("own", "False"), ("torch", "True"), ("", "True")])
def test_the_environment_chooses_the_threads(wanted, said):
    if said == "True" and not torch_team():
        # not on Linux, or a torch without OpenMP: there is no choice
        pytest.skip("this torch has no OpenMP runtime to borrow threads from")
    assert after_import(wanted).stdout.strip() == said


def test_an_unknown_choice_of_threads_is_an_error():
    assert "DRIFTMAX_THREADS=mine: expected own or torch" in after_import("mine").stderr


def after_import(wanted: str) -> subprocess.CompletedProcess[str]:
    code = "from driftmax.ops._dispatch import core; print(core.team_is_borrowed())"
    command = [sys.executable, "-c", code]
    environment = os.environ | {"DRIFTMAX_THREADS": wanted}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
