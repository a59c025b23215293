"""The doctor: a healthy report here, and every kind of fault a failed check instead of a crash."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import driftmax
import pytest
import torch
from driftmax import _core, cli, doctor


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE_BYTES", 1 << 20)


def _failed(report: doctor.Report) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


def test_this_installation_is_healthy() -> None:
    report = doctor.examine()
    assert report.healthy, report.text()
    assert report.cpu["instruction_set"] in report.cpu["instruction_sets_here"]
    assert report.cpu["read_bandwidth_gb_per_s"] > 0
    assert report.backends["reference"] == "available"
    text = report.text()
    for word in ("versions", "torch", "threads", "bandwidth", "cpp", "gpu", "self-test", "all well"):
        assert word in text
    assert report.as_dict()["healthy"] is True


def test_missing_backends_carry_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"cpp": None, "triton": "triton is not installed; pip install triton", "reference": None}
    monkeypatch.setattr(driftmax, "available_backends", lambda: states)
    report = doctor.examine()
    assert report.backends["triton"].startswith("triton is not installed")
    assert "triton is not installed" in report.text()


def test_a_missing_core_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_core", lambda: (None, "the compiled core does not import: gone"))
    monkeypatch.setattr(driftmax, "available_backends", lambda: {"cpp": "gone", "reference": None})
    report = doctor.examine()
    assert {"compiled core", "backends agree"} <= _failed(report)
    assert "gone" in report.text()


def test_the_command_fails_with_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_law", lambda: doctor._fail("skewed"))
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    assert "skewed" in printed
    assert "1 of" in printed


def _skewed(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda logits, **options: right(logits * 1.2, **options)


def test_a_skewed_law_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driftmax, "categorical", _skewed(driftmax.categorical))
    assert "categorical law" in _failed(doctor.examine())


def test_backends_that_disagree_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = driftmax.random.normal

    def normal(*arguments: Any, **options: Any) -> torch.Tensor:
        drawn = right(*arguments, **options)
        return drawn.nextafter(torch.tensor(9.0)) if options.get("backend") == "cpp" else drawn

    monkeypatch.setattr(driftmax.random, "normal", normal)
    assert _failed(doctor.examine()) == {"backends agree"}


def test_wrong_known_answers_are_found() -> None:
    class Wrong:
        @staticmethod
        def philox4x32(*words: int) -> tuple[int, int, int, int]:
            return (0, 0, 0, 0)

    with pytest.raises(doctor.CheckFailed, match="published"):
        doctor._known_answers(Wrong)  # type: ignore[arg-type]  # a stand-in for the module


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
class TestFork:
    def test_a_child_that_draws_something_else(self, monkeypatch: pytest.MonkeyPatch) -> None:
        parent, right = os.getpid(), driftmax.categorical

        def draw(*arguments: Any, **options: Any) -> torch.Tensor:
            return right(*arguments, **options) + (os.getpid() != parent)

        monkeypatch.setattr(driftmax, "categorical", draw)
        with pytest.raises(doctor.CheckFailed, match="other tokens"):
            doctor._fork()

    def test_a_child_that_hangs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import time

        parent, right = os.getpid(), driftmax.categorical

        def draw(*arguments: Any, **options: Any) -> torch.Tensor:
            if os.getpid() != parent:
                time.sleep(60)
            return right(*arguments, **options)

        monkeypatch.setattr(driftmax, "categorical", draw)
        monkeypatch.setattr(doctor, "FORK_PATIENCE_S", 0.2)
        with pytest.raises(doctor.CheckFailed, match="hung"):
            doctor._fork()

    def test_a_child_that_raises(self, monkeypatch: pytest.MonkeyPatch) -> None:
        parent, right = os.getpid(), driftmax.categorical

        def draw(*arguments: Any, **options: Any) -> torch.Tensor:
            if os.getpid() != parent:
                raise RuntimeError("no threads here")
            return right(*arguments, **options)

        monkeypatch.setattr(driftmax, "categorical", draw)
        with pytest.raises(doctor.CheckFailed, match="failed"):
            doctor._fork()


def test_bandwidth_is_finite_and_positive() -> None:
    assert 0 < doctor.read_bandwidth(_core, 1, 1 << 20) < 1e5
