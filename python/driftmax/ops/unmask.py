"""`unmask`: one ancestral step of masked diffusion on stored logits: decision, draw and write in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from driftmax.errors import raise_status
from driftmax.ops._arguments import (
    DTYPES,
    PerRow,
    check_floats,
    check_tokens,
    empty,
    options,
    pointer,
    rows_first,
    scalar_or_rows,
)
from driftmax.ops._dispatch import Op, core
from driftmax.random import Rng, resolve
from driftmax.reference.unmask import unmask as reference

__all__ = ["unmask"]

SCHEMA = (
    # logits [rows, positions, V], unit last stride; tokens contiguous [rows, positions]; revealed [rows];
    # forbidden [k]; probabilities [rows]; temperatures [rows, positions]
    "Tensor logits, Tensor(a!) tokens, Tensor(b!) revealed, SymInt mask_id, Tensor? forbidden, "
    "float probability, Tensor? probabilities, "
    "SymInt seed, Tensor? seeds, Tensor? rows, Tensor? positions, SymInt step, Tensor? steps, "
    "float temperature, Tensor? temperatures"
)


def unmask(
    logits: Tensor,
    tokens: Tensor,
    probability: PerRow,
    *,
    mask_id: int,
    forbidden: Tensor | Sequence[int] | None = None,
    temperature: PerRow = 1.0,
    rng: Rng = None,
    backend: str = "auto",
) -> Tensor:
    """Reveal each masked position with a probability, by a token of ``softmax(logits / temperature)``.

    A position whose token is `mask_id` is revealed when its uniform, an element of the row's float64
    ``driftmax.random.uniform``, is below `probability`. Its token is that of
    ``driftmax.categorical(logits, method="block")`` with the same stream, position and step. Clock and token
    have separate random numbers: the mask is never a category, so that no rounding of noise can favour it.

    Parameters
    ----------
    logits : Tensor
        ``[B, L, V]`` in float16, bfloat16, float32 or float64, not modified. Only rows of revealed positions
        are read. Any strides; the last one should be 1, else a copy is made.
    tokens : Tensor
        int64 ``[B, L]``, written in place.
    probability : float or one per row
        In [0, 1]; ``[B]``.
    mask_id : int
        The mask token; may lie outside the vocabulary. Its column, where there is one, counts as -inf.
    forbidden : Tensor or sequence of int, optional
        Tokens whose columns count as -inf as well; those outside the vocabulary are ignored. A tensor on the
        device of the logits needs no copy, which CUDA graphs require.
    temperature : float or one per position, default 1.0
        0 takes the largest logit. Values broadcast to ``[B, L]``.
    rng : int, RowStreams, torch.Generator or None, default None
        As for `driftmax.categorical`; the step of a loop goes into it, ``streams.at(step=k)``. Positions of
        the streams, ``[B, L]``, tell which ones of longer rows these are.
    backend : str, default "auto"
        "reference", "cpp", "triton", or by device.

    Returns
    -------
    Tensor
        int64 ``[B]``: how many tokens were revealed.

    Raises
    ------
    InvalidDistribution
        A revealed row with NaN or +inf, or with no token of positive probability. `tokens` is then as it was
        (on a GPU, see `driftmax.check_status`: that position stays masked, and is not counted).
    ValueError, TypeError
        Arguments of wrong rank, dtype, device or range.
    BackendUnavailable
        The backend asked for cannot run here.

    Notes
    -----
    tau-leaping with the exact unmasking probability: Ou et al., "Your Absorbing Discrete Diffusion Secretly
    Models the Conditional Distributions of Clean Data" (2024); Sahoo et al. (2024). Zheng et al. (2024) show
    what the mask as a category in float32 does. One read of the logits of revealed positions, no host sync.

    Examples
    --------
    >>> import torch, driftmax
    >>> tokens = torch.tensor([[3, 9, 9], [9, 9, 9]])
    >>> logits = torch.full((2, 3, 5), float("-inf"))
    >>> logits[..., 2] = 0.0
    >>> driftmax.unmask(logits, tokens, [1.0, 0.0], mask_id=9, rng=0)
    tensor([2, 0])
    >>> tokens
    tensor([[3, 2, 2],
            [9, 9, 9]])
    """
    check_floats("logits", logits)
    if logits.ndim != 3 or logits.shape[2] == 0:
        raise ValueError(f"logits must have shape [B, L, V] with V >= 1, not {tuple(logits.shape)}")
    rows, length, _ = logits.shape
    check_tokens("tokens", tokens, (rows, length), logits)
    columns = _columns(forbidden, logits)
    chance = scalar_or_rows("probability", probability, (rows,), logits)
    heat = options(temperature, None, None, None, (rows, length), logits)[:2]
    streams = resolve(rng, rows, rows * length, logits)
    revealed = empty((rows,), torch.int64, logits)
    if rows * length == 0:
        return revealed.zero_()
    sink = tokens if tokens.is_contiguous() else tokens.contiguous()
    run = OP.runner(backend, logits)
    run(rows_first(logits), sink, revealed, mask_id, columns, *chance, *streams, *heat)
    if sink is not tokens:
        tokens.copy_(sink)
    return revealed


def _columns(forbidden: Tensor | Sequence[int] | None, logits: Tensor) -> Tensor | None:
    if forbidden is None:
        return None
    columns = forbidden if isinstance(forbidden, Tensor) else torch.tensor(list(forbidden), dtype=torch.int64)
    if columns.dtype != torch.int64 or columns.ndim != 1:
        raise TypeError(f"forbidden must be int64 [k], not {columns.dtype} {tuple(columns.shape)}")
    return columns.to(logits.device).contiguous() if columns.numel() else None


def _cpp(
    logits: Tensor,
    tokens: Tensor,
    revealed: Tensor,
    mask_id: int,
    forbidden: Tensor | None,
    probability: float,
    probabilities: Tensor | None,
    seed: int,
    seeds: Tensor | None,
    rows: Tensor | None,
    positions: Tensor | None,
    step: int,
    steps: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
) -> None:
    n0, n1, vocab = logits.shape
    if seeds is not None and seeds.numel() == 1:
        seed, seeds = int(seeds), None
    status = core.unmask(
        logits.data_ptr(),
        DTYPES[logits.dtype],
        n0,
        n1,
        logits.stride(0),
        logits.stride(1),
        vocab,
        tokens.data_ptr(),
        revealed.data_ptr(),
        mask_id,
        pointer(forbidden),
        0 if forbidden is None else forbidden.numel(),
        probability,
        pointer(probabilities),
        seed & 0xFFFFFFFFFFFFFFFF,
        pointer(seeds),
        pointer(rows),
        pointer(positions),
        step if steps is None else int(steps),
        temperature,
        pointer(temperatures),
        torch.get_num_threads(),
    )
    if status:
        raise_status(status, n1)


def _samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 2050, generator=generator)
    plain = (5, None, None, None, 0, None)
    yield (
        logits,
        torch.full((2, 5), -1),
        torch.empty(2, dtype=torch.int64),
        -1,
        None,
        0.5,
        None,
        *plain,
        1.0,
        None,
    )
    tokens = torch.tensor([[7, 7, 3], [7, 0, 7]])
    streams = (
        0,
        torch.tensor([1, -2]),
        torch.tensor([7, 2**32 - 1]),
        torch.tensor([[0, 1, 2], [9, 8, 7]]),
        0,
    )
    temperatures = torch.tensor([[1.0, 0.5, 1.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
    yield (
        torch.randn(2, 3, 100, generator=generator, dtype=torch.float64),
        tokens,
        torch.empty(2, dtype=torch.int64),
        7,
        torch.tensor([0, 99, 1000]),
        0.0,
        torch.tensor([0.9, 1.0], dtype=torch.float64),
        *streams,
        torch.tensor([3]),
        1.0,
        temperatures,
    )


OP = Op("unmask", SCHEMA, cpp=_cpp, reference=reference, samples=_samples)
