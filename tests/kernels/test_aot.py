"""Ahead-of-time compilation: nothing is forgotten, both vendors work, what does not fit is a failure."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from driftmax import aot


def jit_functions(folder: Path) -> tuple[set[str], set[str]]:
    """Names of all @triton.jit functions of the kernels, and of those that another one calls."""
    defined: set[str] = set()
    called: set[str] = set()
    for path in folder.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any(
                "triton.jit" in ast.unparse(d) for d in node.decorator_list
            ):
                defined.add(node.name)
                for call in ast.walk(node):
                    if isinstance(call, ast.Call):
                        called.add(ast.unparse(call.func).split(".")[-1])
    return defined, called


def test_every_kernel_is_compiled_ahead_of_time(root: Path) -> None:
    defined, called = jit_functions(root / "kernels")
    entries = defined - called
    assert {"fill_kernel", "finish", "head_tiles"} <= entries  # the reading of the sources works
    launched = {record.kernel.__name__ for op in aot.OPS for record in aot.launches(op)}
    assert entries == launched


def constants(decorator: ast.expr) -> set[str]:
    """What a decorator's do_not_specialize lists."""
    words = {keyword.arg: keyword.value for keyword in getattr(decorator, "keywords", [])}
    return set(ast.literal_eval(words["do_not_specialize"])) if "do_not_specialize" in words else set()


def test_no_argument_that_is_converted_may_become_a_constant(root: Path) -> None:
    """Triton makes a constant of an integer that is 1, a batch of one row, and a constant has no `.to`."""
    _, called = jit_functions(root / "kernels")
    converted = 0
    for path in (root / "kernels").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or not node.decorator_list or node.name in called:
                continue
            free = {a.arg for a in node.args.args} - constants(node.decorator_list[0])
            for call in ast.walk(node):
                if isinstance(call, ast.Attribute) and call.attr == "to" and isinstance(call.value, ast.Name):
                    converted += 1
                    assert call.value.id not in free, f"{path.name}: {node.name} converts {call.value.id}"
    assert converted > 10  # the reading of the sources works


def test_every_op_with_a_launcher_is_listed(root: Path) -> None:
    launchers = {
        path.stem for path in (root / "kernels").glob("*.py") if "def specialisations" in path.read_text()
    }
    assert launchers == set(aot.OPS)


@pytest.mark.parametrize("target", ["sm_9x", "cuda", "gfx", ""])
def test_unknown_targets_are_refused_before_any_work(target: str) -> None:
    with pytest.raises(ValueError, match="target must look like"):
        aot.compile_kernels([target])


def test_spread_leaves_out_no_specialisation_and_no_kernel() -> None:
    found = aot._distinct(aot.OPS)
    pairs = aot._spread(aot.TARGETS, found)
    assert len(set(pairs)) == len(pairs) < 0.65 * len(found) * len(aot.TARGETS)
    numbers = set(range(len(found)))
    assert {number for target, number in pairs if target == "gfx942"} == numbers
    assert {number for target, number in pairs if target != "gfx942"} == numbers
    for target in aot.TARGETS:
        here = {found[number].kernel.__name__ for at, number in pairs if at == target}
        assert here == {what.kernel.__name__ for what in found}
    assert aot._spread(["sm_90"], found) == [("sm_90", number) for number in range(len(found))]


SCRIPT = """
from driftmax import aot
wanted = [s for s in aot._distinct(["categorical"]) if s.kernel.__name__ == "block_sums"][0]
aot._SHARED["gfx942"] = -1
for target in ("sm_90", "gfx942"):
    with aot._fresh_cache():
        row = aot._compile(target, wanted)
    print(target, row.ok, row.binary_bytes > 1000, (row.registers or 0) > 8, row.error)
"""


def test_a_kernel_compiles_for_both_vendors_and_must_fit() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    nvidia, amd = done.stdout.splitlines()
    assert nvidia.rstrip() == "sm_90 True True True"
    if "ld.lld not found" in amd:
        pytest.skip("Triton 3.2 takes AMD's linker from ROCm, which is not here")
    assert amd == "gfx942 False True True 0 bytes of shared memory, gfx942 has -1"
