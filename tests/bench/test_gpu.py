"""The GPU run: failures are written down and stop the timings that rest on them; the picture."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from driftmax.bench import gpu, gpu_plot
from driftmax.bench.gpu_session import Session, equal

MACHINE: dict[str, object] = {"device": "none"}


@pytest.fixture
def session() -> Session:
    return Session(torch.device("cpu"), rounds=1)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def failing(session: Session) -> None:
    """Two checks, of which the first fails."""
    ones = torch.ones(3)
    session.check("wrong", equal, ones, torch.tensor([1.0, 2.0, 1.0]))
    session.check("right", equal, ones, ones)


def test_a_failed_check_is_written_down_and_does_not_hide_the_next(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu.CHECKS, "categorical", failing)
    assert gpu.run_checks(session, ["categorical"], tmp_path, MACHINE) == 1
    rows = read(tmp_path / "checks_categorical.csv")
    assert [(row["check"], row["ok"]) for row in rows] == [("wrong", "False"), ("right", "True")]
    assert "1 of 3 differ" in rows[0]["seen"]
    assert gpu.failed_groups(tmp_path) == {"categorical"}


def test_timings_that_rest_on_a_failed_check_are_left_out(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(session: Session) -> None:
        runs = {"driftmax": lambda: torch.ones(3).sum(), "peer": lambda: 1 / 0}
        session.bench("case", "variant", (1, 3), runs, lambda: None)

    monkeypatch.setitem(gpu.CHECKS, "categorical", failing)
    for group in ("gumbel_topk", "fill"):
        monkeypatch.setitem(gpu.SPEED, group, timed)
    gpu.run_checks(session, ["categorical"], tmp_path, MACHINE)
    gpu.run_speed(session, ["gumbel_topk", "fill"], tmp_path, MACHINE)
    assert not (tmp_path / "gpu_gumbel_topk.csv").exists()
    rows = read(tmp_path / "gpu_fill.csv")
    assert [row["contender"] for row in rows] == ["driftmax", "limit"]  # a peer that fails is not timed
    assert float(rows[0]["median_ms"]) > 0
    assert float(rows[0]["share_of_limit"]) > 0


def test_groups_that_timings_rest_on_exist() -> None:
    for group, needs in gpu.NEEDS.items():
        assert group in gpu.SPEED
        assert set(needs) <= set(gpu.CHECKS)
    assert all(group in gpu.CHECKS for group in gpu.SPEED if group not in gpu.NEEDS)


def test_the_picture_has_a_panel_for_each_kind_of_draw(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    rows = [
        {
            "case": case,
            "variant": variant,
            "N": n,
            "V": 9,
            "contender": name,
            "median_ms": 0.1 * n,
            "device": "x",
        }
        for case, variant, _, _ in gpu_plot.PANELS[:4]
        for n in (1, 64)
        for name in ("driftmax", "torch something", "limit")
    ]
    gpu_plot.gpu(rows, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
