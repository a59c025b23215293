"""`categorical`: one draw per row of logits, fused with temperature, filters and by-products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor, get_num_threads

from driftmax.errors import raise_status
from driftmax.ops._arguments import (
    DTYPES,
    CategoricalStats,
    PerRow,
    PerRowInt,
    check_floats,
    empty,
    empty_tokens,
    method_code,
    options,
    rows_first,
    sink,
)
from driftmax.ops._dispatch import Op, core
from driftmax.random import Rng, resolve
from driftmax.reference.categorical import categorical as reference

__all__ = ["CategoricalStats", "categorical"]

SCHEMA = (
    # logits [rows, V] or [rows, positions, V], unit last stride; tokens contiguous, one per draw;
    # stats contiguous [4, draws]: log_prob, log_z, entropy, margin
    "Tensor logits, Tensor(a!) tokens, Tensor(b!)? stats, "
    "SymInt seed, Tensor? seeds, Tensor? rows, Tensor? positions, SymInt step, Tensor? steps, "
    "float temperature, Tensor? temperatures, SymInt top_k, Tensor? top_ks, float top_p, Tensor? top_ps, "
    "float min_p, Tensor? min_ps, int method"
)


@overload
def categorical(
    logits: Tensor,
    *,
    temperature: PerRow = ...,
    top_k: PerRowInt | None = ...,
    top_p: PerRow | None = ...,
    min_p: PerRow | None = ...,
    method: str = ...,
    rng: Rng = ...,
    out: Tensor | None = ...,
    return_stats: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def categorical(
    logits: Tensor,
    *,
    temperature: PerRow = ...,
    top_k: PerRowInt | None = ...,
    top_p: PerRow | None = ...,
    min_p: PerRow | None = ...,
    method: str = ...,
    rng: Rng = ...,
    out: Tensor | None = ...,
    return_stats: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, CategoricalStats]: ...


def categorical(
    logits: Tensor,
    *,
    temperature: PerRow = 1.0,
    top_k: PerRowInt | None = None,
    top_p: PerRow | None = None,
    min_p: PerRow | None = None,
    method: str = "auto",
    rng: Rng = None,
    out: Tensor | None = None,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, CategoricalStats]:
    """Draw one token per row from ``softmax(logits / temperature)``, exactly.

    Parameters
    ----------
    logits : Tensor
        ``[..., V]`` in float16, bfloat16, float32 or float64. -inf means probability zero. Any strides; the
        last one should be 1, and the dimensions between first and last should be collapsible, else a copy is
        made.
    temperature : float or one per row, default 1.0
        0 takes the largest logit, the lowest index on ties, whatever the filters. Per-row values broadcast to
        ``logits.shape[:-1]``.
    top_k : int or one per row, optional
        Keep the k largest logits (ties by lower index).
    top_p : float or one per row, optional
        Then keep the smallest set of most probable tokens whose mass, of what top_k kept, is at least top_p.
    min_p : float or one per row, optional
        Then keep tokens at least min_p times as probable as the most probable one.
    method : {"auto", "block", "gumbel"}, default "auto"
        "gumbel" gives each token its own Gumbel: ``argmax(logits / T + G)``, with G as `driftmax.random`
        promises (for couplings and replay). "block" (which "auto" is) draws a block of 1024 tokens by its
        mass, then the token inside by Gumbels: the same law from V / 1024 + 1024 random numbers.
    rng : int, RowStreams, torch.Generator or None, default None
        An int is the seed of rows 0, 1, ...; a Generator, or None for torch's default one, supplies that
        seed.
    out : Tensor, optional
        int64 of shape ``logits.shape[:-1]``.
    return_stats : bool, default False
        Also return `CategoricalStats`: log-probability of the token, log normaliser, entropy, top-2 margin.
    backend : str, default "auto"
        "reference", "cpp", "triton", or by device.

    Returns
    -------
    Tensor, or (Tensor, CategoricalStats)
        int64 tokens of shape ``logits.shape[:-1]``.

    Raises
    ------
    InvalidDistribution
        A row with NaN or +inf, or with no token of positive probability (on a GPU: see
        `driftmax.check_status`).
    ValueError, TypeError
        Arguments of wrong rank, dtype, device or range.
    BackendUnavailable
        The backend asked for cannot run here.

    Notes
    -----
    Gumbel-max: Gumbel (1954); Maddison et al., "A* Sampling" (2014), section 2. The total variation distance
    between the law drawn and the softmax is at most ``2**-19 * (1 + r / 16)`` for "block", with r the largest
    difference of scaled logits that matters, and ``2**-44`` for "gumbel", for every input dtype and every V
    up to 2**32; the noise reaches 45, so tokens down to e**-45 are drawn (docs/numerics.md, section 3). One
    read of the logits.

    Examples
    --------
    >>> import torch, driftmax
    >>> logits = torch.tensor([[0.0, 5.0, float("-inf")], [9.0, 0.0, 0.0]])
    >>> driftmax.categorical(logits, temperature=0)
    tensor([1, 0])
    >>> tokens, stats = driftmax.categorical(logits, top_p=0.9, rng=0, return_stats=True)
    >>> tokens.tolist(), stats.margin.tolist()
    ([1, 0], [1.0, 1.0])
    """
    check_floats("logits", logits)
    *lead, vocab = logits.shape
    if vocab == 0:
        raise ValueError(f"logits of shape {tuple(logits.shape)} have no token to draw")
    code = method_code(method)
    run = OP.runner(backend, logits)
    # Where nothing is given but a seed, the core is called straight away: drawing a few tokens takes about a
    # microsecond, and passing on arguments that are all absent would take another.
    if (
        run is OP.cpp
        and type(rng) is int
        and type(temperature) is float
        and top_k is top_p is min_p is None
        and not return_stats
        and logits.is_contiguous()
        and len(lead) == 1
        and lead[0] > 0
        and 0.0 <= temperature < math.inf
    ):
        tokens = (
            empty_tokens(lead, logits, True) if out is None else sink(out, lead, torch.int64, logits.device)
        )
        _plain_core(logits, tokens, lead[0], vocab, resolve(rng, 0, 0, logits)[0], temperature, code)
        return tokens if out is None or out is tokens else out.copy_(tokens)
    chosen = options(temperature, top_k, top_p, min_p, lead, logits)
    tokens = (
        empty_tokens(lead, logits, run is OP.cpp)
        if out is None
        else sink(out, lead, torch.int64, logits.device)
    )
    stats = None
    if return_stats:
        kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
        stats = empty((4, *lead), kind, logits)
    draws = tokens.numel()
    streams = resolve(rng, lead[0] if lead else 1, draws, logits)
    if draws:
        rows = logits if logits.ndim == 2 and logits.is_contiguous() else rows_first(logits)
        run(rows, tokens, stats, *streams, *chosen, code)
    if out is not None and out is not tokens:
        tokens = out.copy_(tokens)
    return tokens if stats is None else (tokens, CategoricalStats(*stats.unbind(0)))


def _plain_core(
    logits: Tensor, tokens: Tensor, rows: int, vocab: int, seed: int, temperature: float, method: int
) -> None:
    """`run_core` for contiguous rows 0, 1, ... of one seed, without filters and by-products."""
    seed &= 0xFFFFFFFFFFFFFFFF
    status = core.categorical(
        logits.data_ptr(), DTYPES[logits.dtype], rows, 1, vocab, vocab, vocab, seed, 0, 0, 0, 0,
        temperature, 0, 0, 0, 1.0, 0, 0.0, 0, method, tokens.data_ptr(), 0, get_num_threads(),
    )  # fmt: skip
    if status:
        raise_status(status, 1)


def run_core(
    logits: Tensor,
    tokens: Tensor,
    stats: Tensor | None,
    seed: int,
    seeds: Tensor | None,
    rows: Tensor | None,
    positions: Tensor | None,
    step: int,
    steps: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    top_k: int,
    top_ks: Tensor | None,
    top_p: float,
    top_ps: Tensor | None,
    min_p: float,
    min_ps: Tensor | None,
    method: int,
    *,
    first: int = 0,
    per_row: int = 0,
) -> None:
    """The compiled core. Where `logits` are a part, errors count draws from `first`, `per_row` to a row."""
    shape, strides = logits.shape, logits.stride()
    n1, s1 = (shape[1], strides[1]) if len(shape) == 3 else (1, 0)
    if seeds is not None and seeds.numel() == 1:
        seed, seeds = int(seeds), None
    status = core.categorical(
        logits.data_ptr(),
        DTYPES[logits.dtype],
        shape[0],
        n1,
        strides[0],
        s1,
        shape[-1],
        seed & 0xFFFFFFFFFFFFFFFF,
        0 if seeds is None else seeds.data_ptr(),
        0 if rows is None else rows.data_ptr(),
        0 if positions is None else positions.data_ptr(),
        step if steps is None else int(steps),
        temperature,
        0 if temperatures is None else temperatures.data_ptr(),
        top_k,
        0 if top_ks is None else top_ks.data_ptr(),
        top_p,
        0 if top_ps is None else top_ps.data_ptr(),
        min_p,
        0 if min_ps is None else min_ps.data_ptr(),
        method,
        tokens.data_ptr(),
        0 if stats is None else stats.data_ptr(),
        get_num_threads(),
    )
    if status:
        raise_status(status + (first << 8), per_row or n1)


def _samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2050, generator=generator)
    plain = (1.0, None, 0, None, 1.0, None, 0.0, None)
    yield (logits, torch.empty(3, dtype=torch.int64), None, 5, None, None, None, 0, None, *plain, 0)
    cube = torch.randn(2, 2, 100, generator=generator, dtype=torch.float64)
    yield (
        cube,
        torch.empty(2, 2, dtype=torch.int64),
        torch.empty(4, 2, 2, dtype=torch.float64),
        0,
        torch.tensor([1, -2]),
        torch.tensor([7, 2**32 - 1]),
        torch.tensor([[0, 1], [5, 6]]),
        0,
        torch.tensor([3]),
        1.0,
        torch.tensor([[1.0, 0.5], [0.0, 2.0]], dtype=torch.float64),
        0,
        torch.tensor([[100, 5], [1, 7]]),
        0.9,
        None,
        0.01,
        None,
        1,
    )


OP = Op("categorical", SCHEMA, cpp=run_core, reference=reference, samples=_samples)
