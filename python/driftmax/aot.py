"""Ahead-of-time compilation of every Triton kernel for any target, without a GPU (`driftmax compile`).

The launchers are asked what they would launch (``driftmax.kernels.launch.recording``); each distinct launch
is compiled with Triton's own compiler for each target, down to machine code (cubin by the bundled ptxas,
hsaco by LLVM).
"""

from __future__ import annotations

import importlib
import inspect
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["OPS", "TARGETS", "CompiledKernel", "compile_kernels", "launches"]

#: Targets of the continuous-integration gate.
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

#: Ops with Triton kernels: ``driftmax.kernels.<op>`` has the launcher ``<op>`` and ``specialisations``.
OPS = ("fill", "categorical", "gumbel_topk", "lm_head_categorical", "transfer", "unmask")

#: Shared memory a program may have; more compiles and then does not launch.
_SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}

_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel, specialised and compiled for one target.

    Attributes
    ----------
    target, kernel, variant : str
        What was compiled; `variant` names the types and constants that differ between specialisations.
    ok : bool
        Whether machine code came out that fits the target.
    error : str
        The reason if not, else empty.
    registers, spills : int or None
        Per thread, where the tools tell: registers, and spilled registers (AMD) or bytes of stack (NVIDIA).
    shared_bytes, binary_bytes : int
        Shared memory of a program; size of the machine code.
    seconds : float
        Wall time of the compilation.
    """

    target: str
    kernel: str
    variant: str
    ok: bool
    error: str
    registers: int | None
    spills: int | None
    shared_bytes: int
    binary_bytes: int
    seconds: float


@dataclass(frozen=True)
class _Specialisation:
    """A kernel with the types and constants that Triton would give to one launch."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def variant(self) -> str:
        """Short text that tells specialisations of a kernel apart."""
        types = ",".join(kind for _, kind in self.signature if kind.startswith("*"))
        constants = ",".join(f"{name}={value}" for name, value in self.constants if value is not None)
        return f"{types};{constants}"


def launches(op: str) -> list[Any]:
    """Every launch of ``driftmax.kernels.<op>`` for its ``specialisations()``, nothing run."""
    from driftmax.kernels.launch import recording

    module = importlib.import_module(f"driftmax.kernels.{op}")
    launcher: Callable[..., None] = getattr(module, op)
    with recording() as records:
        for arguments in module.specialisations():
            launcher(*arguments)
    return records


def _integer(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _specialise(record: Any) -> _Specialisation:
    """The signature Triton gives to a launch: 1 becomes a constant, divisibility by 16 an attribute."""
    signature: list[tuple[str, str]] = []
    constants: list[tuple[str, Any]] = []
    aligned: list[int] = []
    options = dict(record.meta)
    positional = dict(zip(record.kernel.arg_names, record.arguments, strict=False))
    for index, parameter in enumerate(record.kernel.params):
        name = parameter.name
        value = positional[name] if name in positional else options.pop(name)
        kind = "constexpr"
        if isinstance(value, torch.Tensor):
            kind = _TYPES[value.dtype]
            aligned.append(index)
        elif isinstance(value, int) and not parameter.is_constexpr:
            if parameter.do_not_specialize or value != 1:
                kind = _integer(value)
            if not parameter.do_not_specialize and value % 16 == 0:
                aligned.append(index)
        if kind == "constexpr":
            constants.append((name, value))
        signature.append((name, kind))
    return _Specialisation(
        record.kernel, tuple(signature), tuple(constants), tuple(aligned), tuple(sorted(options.items()))
    )


def _target(name: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if name.startswith("sm_") and name[3:].isdigit():
        return GPUTarget("cuda", int(name[3:]), 32)
    if re.fullmatch(r"gfx[0-9a-f]{3,4}", name):
        return GPUTarget("hip", name, 32 if name.startswith(("gfx10", "gfx11", "gfx12")) else 64)
    raise ValueError(f"target must look like sm_90 or gfx942, not {name!r}")


@contextmanager
def _fresh_cache() -> Iterator[None]:
    """Compile for real, not from Triton's cache, and leave nothing in it."""
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TRITON_CACHE_DIR"]
            else:
                os.environ["TRITON_CACHE_DIR"] = before


def _resources(compiled: Any) -> tuple[int | None, int | None]:
    """Registers and spilled registers (NVIDIA: bytes of stack) per thread, where the tools tell."""
    text = compiled.asm.get("amdgcn")
    if text is not None:
        numbers = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text))
        return _number(numbers.get("vgpr_count")), _number(numbers.get("vgpr_spill_count"))
    nvidia = importlib.import_module("triton.backends.nvidia.compiler")
    tool = Path(str(nvidia.__file__)).parent / "bin" / "cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=False
        )
    numbers = dict(re.findall(r"\b(REG|STACK):(\d+)", told.stdout))
    return _number(numbers.get("REG")), _number(numbers.get("STACK"))


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


def _reason(failure: BaseException) -> str:
    """Last line of the innermost cause: Triton puts the source first and the reason last."""
    while failure.__cause__ is not None:
        failure = failure.__cause__
    return (str(failure).strip().splitlines() or [""])[-1] or type(failure).__name__


def _source(what: _Specialisation) -> Any:
    """What Triton compiles."""
    from triton.compiler import ASTSource

    signature, constants = dict(what.signature), dict(what.constants)
    if "constexprs" in inspect.signature(ASTSource).parameters:
        attributes = {(index,): [["tt.divisibility", 16]] for index in what.aligned}
        return ASTSource(fn=what.kernel, signature=signature, constexprs=constants, attrs=attributes)
    from triton.backends.compiler import AttrsDescriptor  # Triton 3.2

    return ASTSource(
        fn=what.kernel,
        signature={name: kind for name, kind in signature.items() if kind != "constexpr"},
        constants=constants,
        attrs=AttrsDescriptor.from_hints(dict.fromkeys(what.aligned, 16)),
    )


def _for_vendor(target: str, what: _Specialisation) -> _Specialisation:
    """The specialisation that launchers choose on the target, from the one recorded, which is NVIDIA's."""
    if not target.startswith("gfx"):
        return what
    constants, options = dict(what.constants), dict(what.options)
    if "NVIDIA" in constants:  # its intrinsics
        constants["NVIDIA"] = False
    if "num_stages" in options:  # 64 KB of shared memory
        options["num_stages"] = min(options["num_stages"], 2)
    return replace(what, constants=tuple(constants.items()), options=tuple(sorted(options.items())))


def _compile(target: str, what: _Specialisation) -> CompiledKernel:
    import triton

    what = _for_vendor(target, what)
    source = _source(what)
    begin, error, compiled = time.perf_counter(), "", None
    try:
        compiled = triton.compile(source, target=_target(target), options=dict(what.options))
    except Exception as failure:  # whatever a compiler raises is this row's result, and the caller's to judge
        error = _reason(failure)
    seconds = time.perf_counter() - begin
    name = what.kernel.__name__
    if compiled is None:
        return CompiledKernel(target, name, what.variant, False, error, None, None, 0, 0, seconds)
    registers, spills = _resources(compiled)
    shared, limit = int(compiled.metadata.shared), _SHARED.get(target)
    if limit is not None and shared > limit:
        error = f"{shared} bytes of shared memory, {target} has {limit}"
    return CompiledKernel(
        target, name, what.variant, not error, error, registers, spills, shared, len(compiled.kernel), seconds
    )


def _distinct(ops: Sequence[str]) -> list[_Specialisation]:
    """Specialisations of the ops in the order of their launches, each once."""
    found: dict[_Specialisation, None] = {}
    for op in ops:
        found.update(dict.fromkeys(_specialise(record) for record in launches(op)))
    return list(found)


def _job(target: str, ops: tuple[str, ...], number: int) -> CompiledKernel:
    """A worker's part. Kernels do not pickle, so it finds the specialisation by its number."""
    with _fresh_cache():
        return _compile(target, _in_worker(ops)[number])


@lru_cache
def _in_worker(ops: tuple[str, ...]) -> list[_Specialisation]:
    return _distinct(ops)


def _spread(targets: Sequence[str], found: Sequence[_Specialisation]) -> list[tuple[str, int]]:
    """(target, number) pairs: a target of each vendor for every specialisation, in turn, and all targets for
    the first specialisation of every kernel.
    """
    vendors = [[t for t in targets if t.startswith(name)] for name in ("sm", "gfx")]
    seen: set[str] = set()
    wanted: set[tuple[str, int]] = set()
    for number, what in enumerate(found):
        name = what.kernel.__name__
        chosen = [some[number % len(some)] for some in vendors if some] if name in seen else targets
        seen.add(name)
        wanted.update((target, number) for target in chosen)
    return [
        (target, number) for target in targets for number in range(len(found)) if (target, number) in wanted
    ]


def compile_kernels(
    targets: Sequence[str] = TARGETS,
    *,
    ops: Sequence[str] = OPS,
    spread: bool = False,
    workers: int | None = None,
    progress: Callable[[CompiledKernel], None] | None = None,
) -> list[CompiledKernel]:
    """Compile every kernel of the given ops for every target; needs no GPU.

    Costs a second or two of one core per kernel, specialisation and target.

    Parameters
    ----------
    targets : sequence of str, default `TARGETS`
        ``sm_XX`` (NVIDIA) and ``gfxXXX`` (AMD) architectures.
    ops : sequence of str, default `OPS`
        Which ops' kernels.
    spread : bool, default False
        Compile each specialisation (dtypes, constants) for one target of each vendor, in turn, and only each
        kernel for all targets: three fifths of the work for `TARGETS`.
    workers : int, optional
        Processes; by default one per core, at most 8.
    progress : callable, optional
        Called with each row as it is done.

    Returns
    -------
    list of CompiledKernel
        One row per target and specialisation, or as many of them as `spread` leaves; a failure is a row
        with ``ok`` false, not an exception.

    Raises
    ------
    ValueError
        On a target that is not of one of the two forms, before anything is compiled.
    RuntimeError
        Under ``TRITON_INTERPRET=1``, where there is nothing to compile.

    Examples
    --------
    >>> from driftmax.aot import compile_kernels
    >>> compile_kernels(["sm_9x"])
    Traceback (most recent call last):
        ...
    ValueError: target must look like sm_90 or gfx942, not 'sm_9x'
    """
    for target in targets:
        _target(target)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("kernels are interpreted under TRITON_INTERPRET=1; unset it to compile them")
    chosen = tuple(ops)
    found = _distinct(chosen)
    pairs = _spread(targets, found) if spread else [(t, k) for t in targets for k in range(len(found))]
    jobs = [(target, chosen, number) for target, number in pairs]
    if workers is None:
        workers = min(8, os.cpu_count() or 1)
    rows: list[CompiledKernel] = []
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(_job, *zip(*jobs, strict=True)):
            rows.append(row)
            if progress is not None:
                progress(row)
    return rows
