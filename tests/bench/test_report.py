"""Rows, table and pictures: what a whole run leaves behind, from the same code path as the command."""

from __future__ import annotations

from pathlib import Path

import pytest
from driftmax.bench import machine, plots, report, runner
from driftmax.bench.cases import CASES
from driftmax.bench.harness import LIMIT, SUBJECT, Result, Settings, Timing, Workload

matplotlib = pytest.importorskip("matplotlib", reason="pictures need matplotlib")
PNG = b"\x89PNG"


def test_a_whole_quick_run(tiny: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every case, with rows and all pictures, on tiny shapes."""
    code = runner.run(quick=True, csv=tmp_path / "cpu.csv", plot=tmp_path / "speed.png")
    printed = capsys.readouterr().out
    assert code == 0, printed
    rows = report.read_csv(tmp_path / "cpu.csv")
    assert {row["case"] for row in rows} == set(CASES) - {"law", "discrete", "decoding"}
    for row in rows:
        assert float(row["median_ms"]) > 0
        assert (row["share_of_limit"] != "") == (row["contender"] == SUBJECT)
        assert row["machine"]
        assert row["date"]
    assert (tmp_path / "speed.png").read_bytes().startswith(PNG)
    assert (tmp_path / "fp32_fault.png").read_bytes().startswith(PNG)
    assert (tmp_path / "discrete.png").read_bytes().startswith(PNG)
    assert (tmp_path / "decoding.png").read_bytes().startswith(PNG)
    assert {row["contender"] for row in report.read_csv(tmp_path / "decoding.csv")} > {SUBJECT, LIMIT}
    assert {row["what"] for row in report.read_csv(tmp_path / "discrete.csv")} == {"calls", "sampler alone"}
    laws = report.read_csv(tmp_path / "law.csv")
    assert {row["kind"] for row in laws} == {"analytic", "measured"}
    assert "us over a bare core call" in printed


def test_pictures_can_be_drawn_from_stored_rows(tiny: Settings, tmp_path: Path) -> None:
    runner.run(quick=True, cases=["overhead", "law"], csv=tmp_path / "rows.csv")
    plots.speed(report.read_csv(tmp_path / "rows.csv"), tmp_path / "a.png")
    plots.law(report.read_csv(tmp_path / "law.csv"), tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert (tmp_path / "b.png").stat().st_size > 10_000


def _result(**timings: float) -> Result:
    workload = Workload(
        "categorical", "block", "float32", 4, 9, lambda: None, lambda: None, limit_name="bare read"
    )
    return Result(workload, {name: Timing(value, 0.1, 5) for name, value in timings.items()})


def test_rows_carry_ratios_and_the_share_of_the_limit() -> None:
    result = _result(driftmax=2.0, limit=1.0, peer=30.0)
    here = machine.describe(Settings().device)
    rows = {row["contender"]: row for row in report.rows_of(result, Settings(), "v3", here)}
    assert rows["peer"]["ratio"] == 15.0
    assert rows[SUBJECT]["share_of_limit"] == 0.5
    assert rows[SUBJECT]["isa"] == "v3"
    assert rows["peer"]["isa"] == ""
    assert rows[LIMIT]["limit"] == "bare read"
    assert set(rows[SUBJECT]) == set(report.COLUMNS)


def test_the_table_names_the_best_peer() -> None:
    line = report.line_of(_result(driftmax=2.0, limit=1.0, slow=30.0, fast=8.0), "v3")
    assert "fast" in line
    assert "4x" in line
    assert "50 %" in line
    assert "slow" not in line


@pytest.mark.parametrize(("ms", "text"), [(0.0021, "2.1 us"), (12.34, "12.3 ms"), (2500.0, "2.5 s")])
def test_durations_have_fitting_units(ms: float, text: str) -> None:
    assert report.duration(ms) == text


def test_the_machine_is_described_without_a_host_name() -> None:
    import platform

    columns = machine.describe(Settings().device).columns()
    assert columns["machine"]
    assert int(columns["cores"]) >= 1
    assert platform.node() not in {str(value) for value in columns.values()}
    assert machine.version_of("no-such-distribution") == "absent"


def test_the_summary_leads_with_the_largest_categorical_row() -> None:
    def result(case: str, n: int, **peers: float) -> Result:
        def nothing() -> None: ...

        beside = {"a read": nothing}
        workload = Workload(case, "block", "float32", n, 1000, nothing, nothing, beside=beside)
        timings = {SUBJECT: 1.0, LIMIT: 0.5, "a read": 0.8, **peers}
        return Result(workload, {name: Timing(value, 0.1, 5) for name, value in timings.items()})

    results = [
        result("categorical", 1, a=9.0, b=9.0, c=9.0),
        result("categorical", 64, a=7.0, b=8.0),
        result("categorical", 128, a=5.0),
        result("fill", 999, a=5.0, b=6.0),
    ]
    here = machine.describe(Settings().device)
    text = report.summary(results, [], here, Settings())
    assert "N=64 V=1000: 1 ms; its peers take 7x a, 8x b\n" in text
    assert "2x the time of the limit (), 1.25x a read\n" in text
