"""Ahead-of-time compilation of every Triton kernel, for any target, on a machine without a GPU (`driftmax compile`).

The launchers are asked what they would launch (``driftmax.kernels.launch.recording``); each distinct launch is compiled with
Triton's own compiler for each target, down to machine code (cubin by the bundled ptxas, hsaco by LLVM).
"""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["OPS", "TARGETS", "CompiledKernel", "compile_kernels", "launches"]

#: Targets of the continuous-integration gate.
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

#: Ops with Triton kernels: ``driftmax.kernels.<op>`` has the launcher ``<op>`` and ``specialisations``.
OPS = ("fill", "categorical", "gumbel_topk", "lm_head_categorical")

_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel, specialised and compiled for one target.

    Attributes
    ----------
    target, kernel, variant : str
        What was compiled; `variant` names the types and constants that differ between specialisations.
    ok : bool
        Whether machine code came out.
    error : str
        First line of the compiler's message, or empty.
    registers, spills : int or None
        Per thread, where the tools tell.
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
    if name.startswith("gfx"):
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
    """Registers and spills per thread, read from AMD's assembly; ptxas' numbers need its log, see `_ptxas`."""
    text = compiled.asm.get("amdgcn")
    if text is None:
        return _ptxas(compiled)
    numbers: dict[str, int] = {}
    for line in text.splitlines():
        key, _, value = line.strip().partition(":")
        if key in (".vgpr_count", ".vgpr_spill_count") and value.strip().isdigit():
            numbers[key] = int(value)
    return numbers.get(".vgpr_count"), numbers.get(".vgpr_spill_count")


def _ptxas(compiled: Any) -> tuple[int | None, int | None]:
    """Registers from the cubin's ELF section flags; None where the layout is not the expected one."""
    cubin = compiled.asm.get("cubin")
    if not cubin or cubin[:4] != b"\x7fELF":
        return None, None
    table = int.from_bytes(cubin[40:48], "little")
    size, count = int.from_bytes(cubin[58:60], "little"), int.from_bytes(cubin[60:62], "little")
    for number in range(count):
        header = cubin[table + number * size : table + (number + 1) * size]
        is_code = int.from_bytes(header[4:8], "little") == 1 and int.from_bytes(header[8:16], "little") & 4
        if is_code:  # SHT_PROGBITS, executable: sh_info keeps the register count in its high byte
            return int.from_bytes(header[44:48], "little") >> 24, None
    return None, None


def _compile(target: str, what: _Specialisation) -> CompiledKernel:
    import triton
    from triton.compiler import ASTSource

    attributes = {(index,): [["tt.divisibility", 16]] for index in what.aligned}
    source = ASTSource(
        fn=what.kernel, signature=dict(what.signature), constexprs=dict(what.constants), attrs=attributes
    )
    begin, error, compiled = time.perf_counter(), "", None
    try:
        compiled = triton.compile(source, target=_target(target), options=dict(what.options))
    except Exception as failure:  # whatever a compiler raises is this row's result, and the caller's to judge
        error = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
    seconds = time.perf_counter() - begin
    if compiled is None:
        return CompiledKernel(target, what.kernel.__name__, what.variant, False, error, None, None, 0, 0, seconds)
    registers, spills = _resources(compiled)
    shared, size = int(compiled.metadata.shared), len(compiled.kernel)
    return CompiledKernel(
        target, what.kernel.__name__, what.variant, True, "", registers, spills, shared, size, seconds
    )


def compile_kernels(
    targets: Sequence[str] = TARGETS,
    *,
    ops: Sequence[str] = OPS,
    progress: Callable[[CompiledKernel], None] | None = None,
) -> list[CompiledKernel]:
    """Compile every kernel of the given ops for every target; needs no GPU.

    Parameters
    ----------
    targets : sequence of str, default `TARGETS`
        ``sm_XX`` (NVIDIA) and ``gfxXXX`` (AMD) architectures.
    ops : sequence of str, default `OPS`
        Which ops' kernels.
    progress : callable, optional
        Called with each row as it is done.

    Returns
    -------
    list of CompiledKernel
        One row per target and specialisation; a failure is a row with ``ok`` false, not an exception.

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
    distinct: dict[_Specialisation, None] = {}
    for op in ops:
        distinct.update(dict.fromkeys(_specialise(record) for record in launches(op)))
    rows: list[CompiledKernel] = []
    with _fresh_cache():
        for target in targets:
            for what in distinct:
                rows.append(_compile(target, what))
                if progress is not None:
                    progress(rows[-1])
    return rows
