"""The command line on tiny sizes: each subcommand, its exit codes, its files, and helpful errors."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import driftmax
import pytest
import torch
from driftmax import aot, cli
from driftmax.bench import report, runner
from driftmax.bench.cases import CASES, overhead
from driftmax.bench.harness import GateFailed, Settings, Workload


def _workloads(settings: Settings) -> Iterator[Workload]:
    """One workload that passes and one that does not."""
    x = torch.ones(1000)

    def refuse() -> None:
        raise GateFailed("the draws do not follow the law")

    def add() -> torch.Tensor:
        return x + 1

    more: dict[str, Any] = {"peers": {"torch sub": lambda: x - 1}, "limit": x.sum, "limit_name": "bare read"}
    yield Workload("overhead", "good", "float32", 1, 1000, subject=add, gate=lambda: None, **more)
    yield Workload("overhead", "bad", "float32", 1, 1000, subject=add, gate=refuse, **more)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"driftmax {driftmax.__version__}"


def test_python_dash_m_is_the_same_command() -> None:
    command = [sys.executable, "-m", "driftmax", "--version"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert answer.stdout.strip() == f"driftmax {driftmax.__version__}"


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["bench", "--threads", "0"], ["bench", "--device", "tpu"]]
)
def test_wrong_usage_exits_with_two(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2


def test_bench_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in CASES)


def test_bench_writes_tidy_rows_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows_file, picture = tmp_path / "new" / "rows.csv", tmp_path / "speed.png"
    command = ["bench", "--quick", "--case", "overhead", "--csv", str(rows_file), "--plot", str(picture)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "overhead" in printed
    assert "passed its correctness gate" in printed
    rows = _rows(rows_file)
    assert tuple(rows[0]) == report.COLUMNS
    contenders = {row["contender"]: row for row in rows}
    assert {"driftmax", "limit"} < set(contenders)
    ours, limit = contenders["driftmax"], contenders["limit"]
    assert float(ours["ratio"]) == 1.0
    share = float(limit["median_ms"]) / float(ours["median_ms"])
    assert float(ours["share_of_limit"]) == pytest.approx(share, rel=2e-3)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_failed_gate_fails_the_command_and_leaves_no_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overhead, "workloads", _workloads)
    rows_file = tmp_path / "rows.csv"
    assert cli.main(["bench", "--quick", "--case", "overhead", "--csv", str(rows_file)]) == 1
    assert {row["variant"] for row in _rows(rows_file)} == {"good"}
    printed = capsys.readouterr().out
    assert "overhead/bad" in printed
    assert "GATE FAILED" in printed
    assert "1 workloads FAILED" in printed


def test_bench_names_unknown_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--case", "overhead", "nothing"]) == 2
    message = capsys.readouterr().err
    assert "no case called nothing" in message
    assert "categorical" in message


def test_plot_without_matplotlib_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "--case", "overhead", "--plot", str(tmp_path / "x.png")]) == 2
    assert 'pip install "driftmax[bench]"' in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_bench_on_a_missing_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--case", "overhead", "--device", "cuda"]) == 2
    assert "no CUDA" in capsys.readouterr().err


def test_threads_are_set_for_the_run_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "workloads", lambda settings: seen.append(settings.threads) or iter(()))
    before, seen = torch.get_num_threads(), []
    assert cli.main(["bench", "--case", "overhead", "--threads", "3"]) == 0
    assert seen == [3]
    assert torch.get_num_threads() == before


def _row(target: str, error: str) -> aot.CompiledKernel:
    return aot.CompiledKernel(target, "categorical", "*fp32", not error, error, 64, None, 0, 4096, 0.5)


@pytest.mark.parametrize(("error", "code"), [("", 0), ("ptxas: out of registers", 1)])
def test_compile_prints_a_table_and_fails_with_its_kernels(
    error: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile_kernels(
        targets: list[str], *, spread: bool, progress: Callable[[Any], None]
    ) -> list[aot.CompiledKernel]:
        assert spread == (error == "")
        rows = [_row(target, error if target == "sm_90" else "") for target in targets]
        for row in rows:
            progress(row)
        return rows

    monkeypatch.setattr(aot, "compile_kernels", compile_kernels)
    spread = [] if error else ["--spread"]
    assert cli.main(["compile", "--targets", "sm_80, sm_90", *spread]) == code
    printed = capsys.readouterr().out
    assert "sm_80    categorical              ok " in printed
    assert f"{2 - code} of 2 kernels compiled for sm_80, sm_90" in printed
    assert error in printed


def test_compile_defaults_to_the_gates_targets() -> None:
    assert tuple(cli.TARGETS.split(",")) == aot.TARGETS


def test_compile_refuses_strange_targets(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", "--targets", "sm_9x"]) == 2
    assert "sm_9x" in capsys.readouterr().err


def test_compile_without_a_target_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", "--targets", ","]) == 2
    assert "names no target" in capsys.readouterr().err


def test_doctor_prints_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    from driftmax import doctor

    monkeypatch.setattr(doctor, "PROBE_BYTES", 1 << 20)
    code = cli.main(["doctor", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert code == (0 if answer["healthy"] else 1)
    assert answer["versions"]["driftmax"] == driftmax.__version__
