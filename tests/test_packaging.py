"""What the built archives contain, and that the compiled core in the wheel loads on its own.

Archives are taken from the folder named by DRIFTMAX_DIST (CI builds them there); else they are built here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one sdist and the wheel that was built from it."""
    given = os.environ.get("DRIFTMAX_DIST")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("driftmax-*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture(scope="module")
def sdist_names(dist: Path) -> set[str]:
    (path,) = dist.glob("driftmax-*.tar.gz")
    with tarfile.open(path) as archive:
        return {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in archive.getnames()}


def sources(folder: str) -> set[str]:
    """The Python modules under a top-level folder of the checkout, as paths relative to it."""
    base = ROOT / folder
    return {
        path.relative_to(base).as_posix() for path in base.rglob("*.py") if "__pycache__" not in path.parts
    }


def package_files(names: set[str]) -> set[str]:
    return {name.removeprefix("driftmax/") for name in names if name.startswith("driftmax/")}


def test_wheel_holds_every_module_of_the_package(wheel_names: set[str]) -> None:
    expected = sources("python/driftmax")
    expected |= {f"kernels/{name}" for name in sources("kernels")}
    expected |= {f"bench/{name}" for name in sources("bench")}
    assert len(expected) > 20
    assert {name for name in package_files(wheel_names) if name.endswith(".py")} == expected


def test_wheel_holds_types_core_and_licence(wheel_names: set[str]) -> None:
    files = package_files(wheel_names)
    assert {"py.typed", "_core.pyi", "discrete/bytes_model.safetensors"} <= files
    assert len([name for name in files if name.startswith("_core.") and name.endswith((".so", ".pyd"))]) == 1
    assert [name for name in wheel_names if name.endswith(".dist-info/licenses/LICENSE")]


def test_wheel_holds_nothing_else(wheel_names: set[str]) -> None:
    outside = {name for name in wheel_names if not name.startswith("driftmax/") and ".dist-info/" not in name}
    assert outside == set()
    data = {"py.typed", "discrete/bytes_model.safetensors"}
    strange = {
        name
        for name in package_files(wheel_names) - data
        if not name.endswith((".py", ".pyi", ".so", ".pyd"))
    }
    assert strange == set()
    parts = {part for name in wheel_names for part in PurePosixPath(name).parts}
    assert not parts & {"tests", "csrc", "__pycache__", "results", "build"}


def test_sdist_holds_what_a_build_and_its_tests_need(sdist_names: set[str]) -> None:
    needed = {
        "CMakeLists.txt",
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "constraints.txt",
        "python/driftmax/py.typed",
    }
    needed |= {f"csrc/{path.name}" for path in (ROOT / "csrc").glob("*.[ch]*")}
    needed |= {f"kernels/{name}" for name in sources("kernels")} | {
        f"bench/{name}" for name in sources("bench")
    }
    needed |= {f"tests/{name}" for name in sources("tests")}
    assert needed - sdist_names == set()
    assert not {name for name in sdist_names if name.endswith((".so", ".o", ".pyc"))}


def test_metadata(wheel: Path, wheel_names: set[str]) -> None:
    (name,) = [name for name in wheel_names if name.endswith(".dist-info/METADATA")]
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    requires = {line.split(">")[0].split(";")[0].strip() for line in metadata.get_all("Requires-Dist", [])}
    assert {"numpy", "safetensors", "torch", "tqdm"} <= requires


def test_core_in_the_wheel_loads_without_torch(wheel: Path, wheel_names: set[str], tmp_path: Path) -> None:
    (core,) = [
        name for name in wheel_names if name.startswith("driftmax/_core.") and name.endswith((".so", ".pyd"))
    ]
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(core, tmp_path)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import _core; "
        "assert 'torch' not in sys.modules; print(*(f'{w:08x}' for w in _core.philox4x32(0, 0, 0, 0, 0, 0)))"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-c", program, str(tmp_path / "driftmax")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    # The known answer of Random123 for Philox4x32-10 with counter and key zero.
    assert run.stdout.split() == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
