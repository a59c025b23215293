"""Who owns randomness: `RowStreams`, what `rng=` may be, fills of noise. Counters: docs/numerics.md."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["Rng", "RowStreams", "bits", "exponential", "gumbel", "normal", "uniform"]

_MAX_ROW = 2**32
_MAX_STEP = 2**24


class StreamArguments(NamedTuple):
    """Streams as the ops take them: plain integers where possible; None means "the default"."""

    seed: int
    seeds: Tensor | None  # int64, one or one per row; overrides seed
    rows: Tensor | None  # int64 row ids, one per row; None: 0, 1, ...
    positions: Tensor | None  # int64, one per draw; None: the index within the row's draws
    step: int
    steps: Tensor | None  # int64, one element; overrides step


class RowStreams:
    """One random stream per row of a batch: a row keeps its randomness wherever it goes.

    Draw `i` of a row uses (seed, row id, position, step) and nothing else, so slicing, permuting, compacting
    or sharding a batch together with its `RowStreams` leaves every row's draws as they were.

    Parameters
    ----------
    seed : int or Tensor
        64-bit seed in [-2**63, 2**64); negative values mean their two's complement. A tensor (int64 or
        uint64) holds one seed for all rows (one element) or one per row, and may live on the device: nothing
        is read on the host.
    rows : int or Tensor or sequence of int
        The number of rows, with ids 0, 1, ..., or the ids themselves, each in [0, 2**32).
    step : int or Tensor, default 0
        Which call of a loop this is, in [0, 2**24). A one-element tensor keeps CUDA graphs and
        ``torch.compile`` from baking the number in.
    positions : Tensor or sequence of int, optional
        One per draw, shape ``[len(rows)]`` or ``[len(rows), *P]`` for logits of shape ``[len(rows), *P, V]``;
        each in [0, 2**32). By default the flat index in `P`.

    Raises
    ------
    ValueError, TypeError
        On values out of range (tensors are looked into only on the CPU, outside ``torch.compile``) and wrong
        shapes.

    Examples
    --------
    >>> import torch, driftmax
    >>> logits = torch.zeros(4, 1000)
    >>> streams = driftmax.RowStreams(seed=7, rows=4)
    >>> tokens = driftmax.categorical(logits, rng=streams)
    >>> keep = torch.tensor([3, 1])
    >>> bool((driftmax.categorical(logits[keep], rng=streams[keep]) == tokens[keep]).all())
    True
    """

    __slots__ = ("_count", "_positions", "_rows", "_seed", "_seeds", "_step", "_steps")

    def __init__(
        self,
        seed: int | Tensor,
        rows: int | Tensor | Sequence[int],
        *,
        step: int | Tensor = 0,
        positions: Tensor | Sequence[int] | None = None,
    ) -> None:
        self._rows: Tensor | None = None
        if isinstance(rows, (Tensor, Sequence)):
            self._rows = _ids("rows", rows)
            if self._rows.dim() != 1:
                raise ValueError(
                    f"rows must be a count or one-dimensional ids, not of shape {tuple(self._rows.shape)}"
                )
            self._count: int = self._rows.shape[0]
        else:
            self._count = operator.index(rows)
            if not 0 <= self._count <= _MAX_ROW:
                raise ValueError(f"rows must be in [0, 2**32], not {self._count}")
        self._seed, self._seeds = _seed(seed, self._count)
        self._step, self._steps = _step(step)
        self._positions: Tensor | None = None
        if positions is not None:
            self._positions = _ids("positions", positions)
            if self._positions.dim() == 0 or self._positions.shape[0] != self._count:
                raise ValueError(
                    f"positions must have shape [{self._count}, ...], one per draw of the rows, not "
                    f"{tuple(self._positions.shape)}"
                )

    @property
    def seed(self) -> int | Tensor:
        """The seed: an int in [-2**63, 2**63), or an int64 tensor of one element or one per row."""
        return self._seed if self._seeds is None else self._seeds

    @property
    def rows(self) -> Tensor:
        """The row ids, int64 ``[len(self)]``."""
        return torch.arange(self._count) if self._rows is None else self._rows

    @property
    def positions(self) -> Tensor | None:
        """The positions, int64 with leading dimension ``len(self)``, or None for the default ones."""
        return self._positions

    @property
    def step(self) -> int | Tensor:
        """The step: an int, or an int64 tensor of one element."""
        return self._step if self._steps is None else self._steps

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        parts = [f"seed={self.seed!r}", f"rows={self._count if self._rows is None else self._rows!r}"]
        if self._steps is not None or self._step != 0:
            parts.append(f"step={self.step!r}")
        if self._positions is not None:
            parts.append(f"positions={self._positions!r}")
        return f"RowStreams({', '.join(parts)})"

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> RowStreams:
        """Streams of the chosen rows: by int (one row), slice, index tensor or boolean mask."""
        chosen: slice | Tensor
        if isinstance(index, slice):
            chosen = index
        elif isinstance(index, (Tensor, Sequence)):
            chosen = index if isinstance(index, Tensor) else torch.as_tensor(index)
            if chosen.dim() != 1 or chosen.dtype.is_floating_point:
                raise IndexError(
                    "RowStreams takes an int, a slice, a 1-d integer tensor or a 1-d boolean mask"
                )
            if chosen.dtype == torch.bool and chosen.shape[0] != self._count:
                raise IndexError(f"a mask of {chosen.shape[0]} rows does not fit {self._count} rows")
        else:
            number = operator.index(index)
            if not -self._count <= number < self._count:
                raise IndexError(f"row {number} is out of range for {self._count} rows")
            number %= self._count
            chosen = slice(number, number + 1)
        rows = self._rows
        if rows is None:  # made where they are indexed: nothing to copy
            rows = torch.arange(self._count, device=None if isinstance(chosen, slice) else chosen.device)
        per_row = self._seeds is not None and self._seeds.shape[0] == self._count
        return RowStreams(
            self._seeds[chosen] if per_row and self._seeds is not None else self.seed,
            rows[chosen],
            step=self.step,
            positions=None if self._positions is None else self._positions[chosen],
        )

    def at(
        self, *, step: int | Tensor | None = None, positions: Tensor | Sequence[int] | None = None
    ) -> RowStreams:
        """The same rows at another step, at other positions, or both; what is not given stays.

        Examples
        --------
        >>> import driftmax
        >>> driftmax.RowStreams(0, rows=2).at(step=5)
        RowStreams(seed=0, rows=2, step=5)
        """
        return RowStreams(
            self.seed,
            self._count if self._rows is None else self._rows,
            step=self.step if step is None else step,
            positions=self._positions if positions is None else positions,
        )

    def to(self, device: torch.device | str) -> RowStreams:
        """The same streams with their tensors on `device`.

        Examples
        --------
        >>> import driftmax
        >>> len(driftmax.RowStreams(0, rows=2).to("cpu"))
        2
        """
        seed, step = self.seed, self.step
        return RowStreams(
            seed.to(device) if isinstance(seed, Tensor) else seed,
            self._count if self._rows is None else self._rows.to(device),
            step=step.to(device) if isinstance(step, Tensor) else step,
            positions=None if self._positions is None else self._positions.to(device),
        )

    def arguments(self, device: torch.device) -> StreamArguments:
        """The streams as an op on `device` takes them (driftmax's own use)."""
        return StreamArguments(
            self._seed,
            _on(self._seeds, device),
            _on(self._rows, device),
            _on(self._positions, device),
            self._step,
            _on(self._steps, device),
        )


Rng: TypeAlias = int | RowStreams | torch.Generator | None


def resolve(rng: Rng, rows: int, draws: int, batch: Tensor) -> tuple[Any, ...]:
    """Turn an `rng` argument into the fields of `StreamArguments` for `draws` draws in `rows` rows.

    A Generator, and None (torch's default generator of the device), only supply the seed. On other devices
    than the CPU, and under ``torch.compile``, that seed stays a tensor: no host sync, and CUDA graphs replay
    with fresh seeds.
    """
    if type(rng) is int:
        return _wrap(rng), None, None, None, 0, None
    device = batch.device
    if isinstance(rng, RowStreams):
        if len(rng) != rows:
            raise ValueError(f"rng holds {len(rng)} rows, the batch has {rows}")
        arguments = rng.arguments(device)
        if arguments.positions is not None and arguments.positions.numel() != draws:
            raise ValueError(
                f"rng holds {arguments.positions.numel()} positions, the batch has {draws} draws"
            )
        return arguments
    if rng is None or isinstance(rng, torch.Generator):
        source = device if rng is None else rng.device
        if source.type == "cpu" and not torch.compiler.is_compiling():
            seeds = torch.empty(1, dtype=torch.int64, device=source).random_(-(2**63), None, generator=rng)
            return int(seeds.item()), None, None, None, 0, None
        seeds = torch.randint(-(2**63), 2**63 - 1, (1,), generator=rng, device=source, dtype=torch.int64)
        return 0, _on(seeds, device), None, None, 0, None
    try:
        return _wrap(operator.index(rng)), None, None, None, 0, None
    except TypeError:
        raise TypeError(
            f"rng must be an int, RowStreams, torch.Generator or None, not {type(rng).__name__}"
        ) from None


def _wrap(seed: int) -> int:
    """A 64-bit seed as the signed number of the same bits."""
    if -(2**63) <= seed < 2**63:
        return seed
    if 0 < seed < 2**64:
        return seed - 2**64
    raise ValueError(f"seed must fit in 64 bits, in [-2**63, 2**64), not {seed}")


def _seed(seed: int | Tensor, rows: int) -> tuple[int, Tensor | None]:
    if not isinstance(seed, Tensor):
        return _wrap(operator.index(seed)), None
    if seed.dtype == torch.uint64:
        seed = seed.view(torch.int64)
    elif seed.dtype != torch.int64:
        raise TypeError(f"a seed tensor must be int64 or uint64, not {seed.dtype}")
    if seed.dim() > 1 or (seed.dim() == 1 and seed.shape[0] not in (1, rows)):
        raise ValueError(f"seed must be one or one per row ({rows}), not of shape {tuple(seed.shape)}")
    return 0, seed.reshape(-1)


def _step(step: int | Tensor) -> tuple[int, Tensor | None]:
    if not isinstance(step, Tensor):
        step = operator.index(step)
        if not 0 <= step < _MAX_STEP:
            raise ValueError(f"step must be in [0, 2**24), not {step}")
        return step, None
    if step.numel() != 1 or step.dtype.is_floating_point or step.dtype == torch.bool:
        raise ValueError(f"a step tensor must hold one integer, not {tuple(step.shape)} of {step.dtype}")
    if _readable(step) and not bool((step >= 0) & (step < _MAX_STEP)):
        raise ValueError(f"step must be in [0, 2**24), not {int(step)}")
    return 0, step.reshape(1).to(torch.int64)


def _ids(name: str, values: Tensor | Sequence[int]) -> Tensor:
    ids = values if isinstance(values, Tensor) else torch.tensor(list(values), dtype=torch.int64)
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype in (torch.bool, torch.uint64):
        raise TypeError(f"{name} must be integers, not {ids.dtype}")
    ids = ids.to(torch.int64)
    if _readable(ids) and ids.numel() and not bool(((ids >= 0) & (ids < _MAX_ROW)).all()):
        raise ValueError(f"{name} must be in [0, 2**32)")
    return ids


def _readable(values: Tensor) -> bool:
    """Whether looking at the values costs no device sync and breaks no graph."""
    return not torch.compiler.is_compiling() and values.device.type == "cpu"


def _on(values: Tensor | None, device: torch.device) -> Tensor | None:
    return None if values is None else values.to(device).contiguous()


def bits(
    shape: int | Sequence[int],
    *,
    rng: Rng = None,
    dtype: torch.dtype = torch.int32,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Independent uniform 32-bit words.

    Parameters are those of `uniform`, except `dtype`: int32 is the only one; view it as uint32 for the
    unsigned words.

    Examples
    --------
    >>> import driftmax
    >>> driftmax.random.bits(4, rng=0).shape
    torch.Size([4])
    """
    return _fill("bits", shape, rng, dtype, device, out, backend)


def uniform(
    shape: int | Sequence[int],
    *,
    rng: Rng = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Independent uniforms on the open interval (0, 1).

    Parameters
    ----------
    shape : int or sequence of int
        Shape of the result. With a `RowStreams` of length B it starts with B, and row `b` is stream `b`.
    rng : int, RowStreams, torch.Generator or None, default None
        The seed of one stream, or one stream per row. A Generator, or None for torch's default one, supplies
        a seed.
    dtype : torch.dtype, default torch.float32
        float32 (multiples of 2**-24, 23 random bits) or float64 (52 random bits).
    device : torch.device or str, optional
        By default that of `out`, else the CPU.
    out : Tensor, optional
        Where to put the result, of that `shape` and `dtype`.
    backend : str, default "auto"
        "reference", "cpp", "triton", or by device.

    Returns
    -------
    Tensor
        Bitwise the same on every backend, for any thread count and any split into rows.

    Raises
    ------
    TypeError, ValueError
        On a dtype, shape or rng that does not fit.
    BackendUnavailable
        If the backend is not there.

    Notes
    -----
    Philox4x32-10 (Salmon et al., SC 2011), one word per float32 and two per float64.

    Examples
    --------
    >>> import driftmax
    >>> u = driftmax.random.uniform((2, 3), rng=0)
    >>> bool(((u > 0) & (u < 1)).all())
    True
    """
    return _fill("uniform", shape, rng, dtype, device, out, backend)


def normal(
    shape: int | Sequence[int],
    *,
    rng: Rng = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Independent standard normals with full tails: |z| reaches 9.49, as 64-bit draws allow, also in float32.

    Parameters, errors and promises are those of `uniform`. Box–Muller (1958) on pairs of elements.

    Examples
    --------
    >>> import driftmax
    >>> driftmax.random.normal((2, 3), rng=0).shape
    torch.Size([2, 3])
    """
    return _fill("normal", shape, rng, dtype, device, out, backend)


def exponential(
    shape: int | Sequence[int],
    *,
    rng: Rng = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Independent exponentials of mean 1, resolved at both ends (about 2**-65 to 45), also in float32.

    Parameters, errors and promises are those of `uniform`.

    Examples
    --------
    >>> import driftmax
    >>> bool((driftmax.random.exponential(1000, rng=0) > 0).all())
    True
    """
    return _fill("exponential", shape, rng, dtype, device, out, backend)


def gumbel(
    shape: int | Sequence[int],
    *,
    rng: Rng = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Independent standard Gumbels, -log E of an exponential E: from about -3.8 to 45, also in float32.

    Parameters, errors and promises are those of `uniform`.

    Examples
    --------
    >>> import driftmax
    >>> driftmax.random.gumbel((2,), rng=0, dtype=torch.float64).dtype
    torch.float64
    """
    return _fill("gumbel", shape, rng, dtype, device, out, backend)


def _fill(
    kind: str,
    shape: int | Sequence[int],
    rng: Rng,
    dtype: torch.dtype,
    device: torch.device | str | None,
    out: Tensor | None,
    backend: str,
) -> Tensor:
    # Imported on call: the op sits above this module, which everything else builds on.
    from driftmax.ops.fill import fill

    return fill(kind, shape, rng=rng, dtype=dtype, device=device, out=out, backend=backend)
