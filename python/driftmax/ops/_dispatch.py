"""Op records, their registration with torch.library, and the one place that chooses a backend.

In eager mode an op's implementation is called directly; under ``torch.compile``, ``torch.export`` or with
tensor subclasses (fake tensors) the registered ``torch.ops.driftmax.<name>`` is, and ends in the same
implementation. Every op writes into tensors that the caller allocated and returns nothing, so that `out=` and
the compiled path are one.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from driftmax.errors import BackendUnavailable, check_status
from driftmax.ops._threads import torch_team

# The ops call the core through this name; where it does not import they are never reached (see `_missing`).
_core_error: ImportError | None = None
try:
    import driftmax._core as core
except ImportError as _error:
    _core_error = _error
    core = None  # type: ignore[assignment]  # keeps the ops importable; `_missing` keeps them from using it
else:
    core.borrow_team(torch_team())

__all__ = ["OPS", "Op", "available_backends", "core", "debug_enabled", "set_debug", "use_backend"]

BACKENDS = ("cpp", "triton", "reference")
_AUTO = {"cpu": "cpp", "cuda": "triton"}

Implementation = Callable[..., None]

#: Every registered op by name.
OPS: dict[str, Op] = {}

_Library: Any = torch.library.Library  # untyped in torch
_library = _Library("driftmax", "FRAGMENT")
_chosen: ContextVar[str] = ContextVar("driftmax_backend", default="auto")
_debug = os.environ.get("DRIFTMAX_DEBUG", "0") not in ("", "0")


@dataclass(eq=False)
class Op:
    """One fused primitive: what the dispatcher, the tests and the bench need to know of it.

    Parameters
    ----------
    name : str
        Basename of the op's files and its name in ``torch.ops.driftmax``.
    schema : str
        Arguments in torch.library's language, written tensors marked ``(a!)``. An argument ``str backend`` is
        appended.
    device_of : int
        Index of the argument whose device decides.
    cpp : callable
        Takes the schema's arguments (without backend) and calls the compiled core.
    reference : callable
        The same in plain torch.
    samples : callable
        Yields argument tuples, for ``torch.library.opcheck`` and smoke tests.

    Notes
    -----
    The Triton implementation is ``driftmax.kernels.<name>.<name>``, imported when first used. It takes the
    schema's arguments in order and reports bad values through ``driftmax.errors.status_word``.
    """

    name: str
    schema: str
    cpp: Implementation
    reference: Implementation
    samples: Callable[[], Iterable[tuple[Any, ...]]]
    device_of: int = 0
    _resolved: dict[str, Implementation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        signature = f"{self.name}({self.schema}, str backend) -> ()"
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
        _library.define(signature, tags=tags)
        _library.impl(self.name, self._registered, "CompositeExplicitAutograd")
        torch.library.register_fake(f"driftmax::{self.name}", self.fake, lib=_library)
        OPS[self.name] = self

    def fake(self, *arguments: Any) -> None:
        """Shape function: nothing to say, the op only writes into tensors it is given."""

    def _registered(self, *arguments: Any) -> None:
        self.implementation(arguments[-1], arguments[self.device_of])(*arguments[:-1])

    def implementation(self, backend: str, tensor: Tensor) -> Implementation:
        """What runs this op on `tensor`'s device with `backend` ("auto": by `use_backend`, then device)."""
        if backend == "auto":
            backend = _chosen.get()
            if backend == "auto":
                backend = "cpp" if tensor.is_cpu else _AUTO.get(tensor.device.type, "reference")
        if backend == "cpp" and not tensor.is_cpu:
            raise BackendUnavailable(f"backend 'cpp' runs on cpu tensors, not on {tensor.device.type}")
        if backend == "triton" and not tensor.is_cuda and not _interpreted():
            raise BackendUnavailable(
                f"backend 'triton' runs on cuda tensors, not on {tensor.device.type} "
                "(set TRITON_INTERPRET=1 before the import to run it, slowly, on the CPU)"
            )
        found = self._resolved.get(backend)
        if found is None:
            found = self._resolve(backend)
        return _checked(found) if _debug else found

    def _resolve(self, backend: str) -> Implementation:
        _require_name(backend)
        missing = _missing(backend)
        if missing is not None:
            raise BackendUnavailable(f"backend {backend!r} is not available: {missing}")
        if backend == "triton":
            found: Implementation = getattr(
                importlib.import_module(f"driftmax.kernels.{self.name}"), self.name
            )
        else:
            found = self.cpp if backend == "cpp" else self.reference
        self._resolved[backend] = found
        return found

    def runner(self, backend: str, tensor: Tensor) -> Implementation:
        """What to call with the schema's arguments.

        The implementation itself, or the registered operator where a compiler or subclass has to see it.
        """
        if is_compiling() or type(tensor) not in _PLAIN:
            operator = getattr(torch.ops.driftmax, self.name)
            return lambda *arguments: operator(*arguments, backend)
        # The usual case first: CPU tensors, nothing forced. Its errors raise at once, so debugging adds
        # nothing.
        if tensor.is_cpu and backend == "auto" and core is not None and _chosen.get() == "auto":
            return self.cpp
        return self.implementation(backend, tensor)


_PLAIN = (Tensor, torch.nn.Parameter)


def _checked(implementation: Implementation) -> Implementation:
    def run(*arguments: Any) -> None:
        implementation(*arguments)
        check_status()

    return run


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _missing(backend: str) -> str | None:
    """Why `backend` cannot be used here, and what to do about it; None if it can."""
    if backend == "cpp" and _core_error is not None:
        return (
            f"the compiled core does not import ({_core_error}); reinstall with a C++ compiler: pip install ."
        )
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; pip install triton (Linux)"
        if not torch.cuda.is_available() and not _interpreted():
            return (
                "torch sees no CUDA or ROCm device; install a torch for your GPU, or set TRITON_INTERPRET=1"
            )
    return None


def available_backends() -> dict[str, str | None]:
    """Every backend with the reason why it is missing here, or None where it works.

    Examples
    --------
    >>> import driftmax
    >>> driftmax.available_backends()["reference"] is None
    True
    """
    return {backend: _missing(backend) for backend in BACKENDS}


def _require_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(
            f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, not {backend!r}"
        )


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run every op inside the block with `backend`, unless a call names its own; per thread and async task.

    With ``torch.compile`` put the block around the call of the compiled function, not into it.

    Parameters
    ----------
    backend : str
        "reference", "cpp", "triton", or "auto" (by device).

    Raises
    ------
    ValueError
        If there is no backend of that name.
    BackendUnavailable
        If it cannot run here.

    Examples
    --------
    >>> import torch, driftmax
    >>> with driftmax.use_backend("reference"):
    ...     tokens = driftmax.categorical(torch.zeros(2, 5), rng=0)
    >>> bool((tokens == driftmax.categorical(torch.zeros(2, 5), rng=0)).all())
    True
    """
    if backend != "auto":
        _require_name(backend)
        missing = _missing(backend)
        if missing is not None:
            raise BackendUnavailable(f"backend {backend!r} is not available: {missing}")
    token = _chosen.set(backend)
    try:
        yield
    finally:
        _chosen.reset(token)


def set_debug(enabled: bool) -> None:
    """Check the kernels' status word after every op, at a device sync each (also ``DRIFTMAX_DEBUG=1``).

    Examples
    --------
    >>> import driftmax
    >>> driftmax.set_debug(True)
    >>> driftmax.set_debug(False)
    """
    global _debug
    _debug = bool(enabled)


def debug_enabled() -> bool:
    """Whether `set_debug` is on.

    Examples
    --------
    >>> from driftmax.ops._dispatch import debug_enabled
    >>> debug_enabled()
    False
    """
    return _debug
