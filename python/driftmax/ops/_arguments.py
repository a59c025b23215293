"""Argument checks and conversions shared by the ops: scalars stay scalars, nothing syncs a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

PerRow: TypeAlias = float | Sequence[float] | Tensor
PerRowInt: TypeAlias = int | Sequence[int] | Tensor

#: Codes of the compiled core.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3, torch.int32: 4}
FLOATS = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))
METHODS = {"auto": 0, "block": 0, "gumbel": 1}


class CategoricalStats(NamedTuple):
    """By-products of a draw, each of the leading shape; float32, or float64 for float64 logits.

    They describe the law drawn from, after temperature and filters; at temperature 0, softmax(logits).

    Examples
    --------
    >>> import torch, driftmax
    >>> _, stats = driftmax.categorical(torch.zeros(1, 4), rng=0, return_stats=True)
    >>> round(float(stats.entropy), 4), round(float(stats.log_z), 4)
    (1.3863, 1.3863)
    """

    log_prob: Tensor
    log_z: Tensor
    entropy: Tensor
    margin: Tensor


class Options(NamedTuple):
    """Temperature and filters as the ops take them: a scalar, and a tensor of one value per draw or None."""

    temperature: float
    temperatures: Tensor | None  # float64
    top_k: int  # 0: off
    top_ks: Tensor | None  # int64
    top_p: float  # 1.0: off
    top_ps: Tensor | None  # float64
    min_p: float  # 0.0: off
    min_ps: Tensor | None  # float64


def check_floats(name: str, value: Tensor, least_dim: int = 1) -> None:
    """Raise unless `value` is a floating-point tensor with at least `least_dim` dimensions."""
    if isinstance(value, Tensor) and value.dtype in FLOATS and value.ndim >= least_dim:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, not {value.dtype}")
    raise ValueError(f"{name} must have at least {least_dim} dimension(s), not shape {tuple(value.shape)}")


def rows_first(values: Tensor) -> Tensor:
    """`values` [..., V] as [rows, V] or [rows, positions, V] with unit last stride, copied if need be."""
    dim = values.ndim
    if dim == 1:
        values = values.unsqueeze(0)
    elif dim > 3:
        values = values.reshape(values.shape[0], -1, values.shape[-1])
    if values.stride(-1) != 1 and values.shape[-1] > 1:
        values = values.contiguous()
    return values


def method_code(method: str) -> int:
    """0 for the block race, 1 for one Gumbel per token."""
    code = METHODS.get(method)
    if code is None:
        raise ValueError(f"method must be 'auto', 'block' or 'gumbel', not {method!r}")
    return code


def options(
    temperature: PerRow,
    top_k: PerRowInt | None,
    top_p: PerRow | None,
    min_p: PerRow | None,
    lead: Sequence[int],
    batch: Tensor,
) -> tuple[Any, ...]:
    """Check temperature and filters and return the fields of `Options`; `lead`: leading shape of `batch`."""
    if (
        top_k is None
        and top_p is None
        and min_p is None
        and type(temperature) is float
        and 0.0 <= temperature < math.inf
    ):
        return temperature, None, 0, None, 1.0, None, 0.0, None
    temperatures = top_ks = top_ps = min_ps = None
    if isinstance(temperature, (float, int)):
        temperature = _number("temperature", float(temperature))
    else:
        temperatures, temperature = _per_draw("temperature", temperature, torch.float64, lead, batch), 1.0
    if top_k is None:
        top_k = 0
    elif isinstance(top_k, (int, torch.SymInt)):
        top_k = _number("top_k", top_k)
    else:
        top_ks, top_k = _per_draw("top_k", top_k, torch.int64, lead, batch), 0
    if top_p is None:
        top_p = 1.0
    elif isinstance(top_p, (float, int)):
        top_p = _number("top_p", float(top_p))
    else:
        top_ps, top_p = _per_draw("top_p", top_p, torch.float64, lead, batch), 1.0
    if min_p is None:
        min_p = 0.0
    elif isinstance(min_p, (float, int)):
        min_p = _number("min_p", float(min_p))
    else:
        min_ps, min_p = _per_draw("min_p", min_p, torch.float64, lead, batch), 0.0
    return temperature, temperatures, top_k, top_ks, top_p, top_ps, min_p, min_ps


def scalar_or_rows(
    name: str, value: PerRow, lead: Sequence[int], batch: Tensor
) -> tuple[float, Tensor | None]:
    """A checked float argument as the ops take it: (scalar, None), or (0.0, float64 of shape `lead`)."""
    if isinstance(value, (float, int)):
        return _number(name, float(value)), None
    return 0.0, _per_draw(name, value, torch.float64, lead, batch)


def int_or_rows(name: str, value: PerRowInt, lead: Sequence[int], batch: Tensor) -> tuple[Any, Tensor | None]:
    """The same for integers: (scalar, None), or (0, int64 of shape `lead`)."""
    if isinstance(value, (int, torch.SymInt)):
        return _number(name, value), None
    return 0, _per_draw(name, value, torch.int64, lead, batch)


_RANGES: dict[str, tuple[Any, str]] = {
    "temperature": (lambda t: (t >= 0) & (t < math.inf), "finite and not negative"),
    "top_k": (lambda k: k >= 1, "at least 1"),
    "top_p": (lambda p: (p > 0) & (p <= 1), "in (0, 1]"),
    "min_p": (lambda p: (p >= 0) & (p <= 1), "in [0, 1]"),
    "count": (lambda n: n >= 0, "at least 0"),
    "threshold": (lambda t: t == t, "a number"),
    "probability": (lambda p: (p >= 0) & (p <= 1), "in [0, 1]"),
}


def _number(name: str, value: Any) -> Any:
    holds, words = _RANGES[name]
    if not holds(value):
        raise ValueError(f"{name} must be {words}, not {value}")
    return value


def _per_draw(name: str, value: Any, dtype: torch.dtype, lead: Sequence[int], batch: Tensor) -> Tensor:
    values = value if isinstance(value, Tensor) else torch.as_tensor(value)
    if (
        values.dtype == torch.bool
        or values.is_complex()
        or (dtype == torch.int64 and values.is_floating_point())
    ):
        raise TypeError(
            f"{name} must be {'integers' if dtype == torch.int64 else 'real numbers'}, not {values.dtype}"
        )
    # A CUDA tensor cannot be looked into without a sync, a traced one not at all; the kernels cope with any
    # value.
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        holds, words = _RANGES[name]
        if not bool(holds(values).all()):
            raise ValueError(f"every {name} must be {words}")
    values = values.to(batch.device, dtype)
    try:
        return values.expand(lead).contiguous()
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {tuple(values.shape)} does not broadcast to the leading shape {tuple(lead)}"
        ) from None


_INT64 = torch.empty(0, dtype=torch.int64, device="cpu")


def empty_tokens(shape: Sequence[int], batch: Tensor, plain: bool) -> Tensor:
    """An uninitialised int64 tensor on the device of `batch`; `plain`: an ordinary CPU tensor."""
    # Nothing but sizes to parse: faster than torch.empty with dtype and device, on the path of tiny calls.
    return _INT64.new_empty(*shape) if plain and shape else empty(shape, torch.int64, batch)


def empty(shape: Sequence[int], dtype: torch.dtype, batch: Tensor) -> Tensor:
    """An uninitialised tensor on the device of `batch`."""
    # Sizes as separate arguments parse in half the time of a sequence.
    if shape:
        return torch.empty(*shape, dtype=dtype, device=batch.device)
    return torch.empty((), dtype=dtype, device=batch.device)


def sink(out: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The contiguous tensor to write for the user's `out`: itself where it is one, else one to copy from."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a torch.Tensor, not {type(out).__name__}")
    if out.dtype != dtype:
        raise TypeError(f"out must be {dtype}, not {out.dtype}")
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"out must have shape {tuple(shape)}, not {tuple(out.shape)}")
    if out.device != device:
        raise ValueError(f"out is on {out.device}, the input on {device}")
    return out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)


def check_tokens(name: str, value: Tensor, shape: Sequence[int] | None, batch: Tensor) -> None:
    """Raise unless `value` is an int64 tensor of `shape` (None: any matrix) beside `batch`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, not {value.dtype}")
    if shape is None and value.ndim != 2:
        raise ValueError(f"{name} must have shape [rows, positions], not {tuple(value.shape)}")
    if shape is not None and tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(value.shape)}")
    if value.device != batch.device:
        raise ValueError(f"{name} is on {value.device}, the rest on {batch.device}")


def pointer(values: Tensor | None) -> int:
    """Address for the compiled core; 0 where there is no tensor."""
    return 0 if values is None else values.data_ptr()
