"""Imports point one way, an op is six files of one name, every public name has an example that runs."""

from __future__ import annotations

import ast
import doctest
import inspect
from pathlib import Path

import driftmax
import driftmax.discrete
import pytest
from driftmax.ops._dispatch import OPS

PACKAGE = Path(__file__).resolve().parent.parent / "python" / "driftmax"

# A module imports from lower layers and from its own. What is not listed (cli, bench, ...) sits on top.
LAYERS = {
    "errors": 0,
    "random": 1,
    "_core": 2,
    "reference": 2,
    "kernels": 2,
    "ops": 3,
    "sde": 4,
    "discrete": 5,
    "bridge": 5,
    "flow": 5,
    "bsde": 5,
    "xva": 6,
    "distributed": 7,
}
TOP = 8
# Reached on call, not on import: noise fills are ops, which stand on the streams that random.py defines.
EXCEPTIONS = {("random", "ops")}


def unit(module: str) -> str:
    """First part of a module's name below the package."""
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> set[str]:
    """Units of driftmax that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {unit(alias.name) for alias in node.names if alias.name.startswith("driftmax.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "driftmax":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("driftmax."):
            found.add(unit(node.module))
    return found


def files() -> list[Path]:
    # rglob does not follow the links to kernels/ and bench/ on every Python version: name them.
    linked = [path for name in ("kernels", "bench") for path in (PACKAGE / name).resolve().rglob("*.py")]
    own = [path for path in PACKAGE.rglob("*.py") if path.resolve().is_relative_to(PACKAGE)]
    return sorted({path.resolve() for path in own + linked})


def unit_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else PACKAGE.parent.parent)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@pytest.mark.parametrize("path", files(), ids=lambda path: f"{unit_of(path)}/{path.name}")
def test_imports_point_one_way(path):
    source = unit_of(path)
    for target in imports(path):
        if target == source or target not in LAYERS or (source, target) in EXCEPTIONS:
            continue
        assert LAYERS[target] < LAYERS.get(source, TOP), f"{source} must not import {target}"


def test_the_import_rule_sees_a_violation(tmp_path):
    path = tmp_path / "errors.py"
    path.write_text("def f():\n    from driftmax.ops.categorical import categorical\n")
    assert imports(path) == {"ops"}
    path.write_text("import driftmax.ops.fill as f\nfrom driftmax import _core\n")
    assert imports(path) == {"ops", "_core"}


@pytest.mark.parametrize("name", sorted(OPS))
def test_an_op_is_six_files_of_one_name(name, root):
    wanted = [
        f"csrc/{name}.cpp",
        f"kernels/{name}.py",
        f"python/driftmax/ops/{name}.py",
        f"python/driftmax/reference/{name}.py",
        f"tests/ops/test_{name}.py",
        f"bench/cases/{name}.py",
    ]
    assert [path for path in wanted if not (root / path).is_file()] == []


def test_every_op_module_registers_an_op():
    modules = {path.stem for path in (PACKAGE / "ops").glob("*.py") if not path.stem.startswith("_")}
    assert modules == set(OPS)


def public() -> list[tuple[str, object]]:
    """Public functions and classes with their own public functions; properties and data have no examples."""
    modules = {
        "driftmax": driftmax,
        "driftmax.random": driftmax.random,
        "driftmax.discrete": driftmax.discrete,
    }
    names = [
        (f"{path}.{name}", getattr(module, name))
        for path, module in modules.items()
        for name in module.__all__
    ]
    return [(name, value) for name, value in names if inspect.isfunction(value) or inspect.isclass(value)]


@pytest.mark.parametrize(("name", "value"), public(), ids=[name for name, _ in public()])
def test_docstring_examples_run(name, value):
    found = doctest.DocTestFinder(recurse=False).find(value, name)
    assert found, f"{name} has no docstring"
    assert found[0].examples, f"{name} has no example"
    if isinstance(value, type):
        methods = [(key, method) for key, method in vars(value).items() if inspect.isfunction(method)]
        for key, method in methods:
            if not key.startswith("_"):
                found += doctest.DocTestFinder(recurse=False).find(method, f"{name}.{key}")
    runner = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    for test in found:
        assert runner.run(test).failed == 0
