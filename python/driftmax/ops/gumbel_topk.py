"""`gumbel_topk`: k draws per row without replacement, in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor

from driftmax.errors import raise_status
from driftmax.ops._arguments import (
    DTYPES,
    PerRow,
    PerRowInt,
    check_floats,
    empty,
    options,
    pointer,
    rows_first,
    sink,
)
from driftmax.ops._dispatch import Op, core
from driftmax.random import Rng, resolve
from driftmax.reference.gumbel_topk import gumbel_topk as reference

__all__ = ["gumbel_topk"]

SCHEMA = (
    # logits [rows, V] or [rows, positions, V], unit last stride; tokens int64 and scores float64 contiguous
    # [draws, k]
    "Tensor logits, SymInt k, Tensor(a!) tokens, Tensor(b!)? scores, "
    "SymInt seed, Tensor? seeds, Tensor? rows, Tensor? positions, SymInt step, Tensor? steps, "
    "float temperature, Tensor? temperatures, SymInt top_k, Tensor? top_ks, float top_p, Tensor? top_ps, "
    "float min_p, Tensor? min_ps"
)


@overload
def gumbel_topk(
    logits: Tensor,
    k: int,
    *,
    temperature: PerRow = ...,
    top_k: PerRowInt | None = ...,
    top_p: PerRow | None = ...,
    min_p: PerRow | None = ...,
    rng: Rng = ...,
    out: Tensor | None = ...,
    return_scores: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def gumbel_topk(
    logits: Tensor,
    k: int,
    *,
    temperature: PerRow = ...,
    top_k: PerRowInt | None = ...,
    top_p: PerRow | None = ...,
    min_p: PerRow | None = ...,
    rng: Rng = ...,
    out: Tensor | None = ...,
    return_scores: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


def gumbel_topk(
    logits: Tensor,
    k: int,
    *,
    temperature: PerRow = 1.0,
    top_k: PerRowInt | None = None,
    top_p: PerRow | None = None,
    min_p: PerRow | None = None,
    rng: Rng = None,
    out: Tensor | None = None,
    return_scores: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw `k` different tokens per row, one after the other without replacement, in the order drawn.

    Parameters
    ----------
    logits : Tensor
        ``[..., V]``, as for `driftmax.categorical`, and so are temperature, top_k, top_p, min_p, rng and
        backend. At temperature 0 the result is the `k` largest logits in decreasing order.
    k : int
        Draws per row, from 1 to V.
    out : Tensor, optional
        int64 of shape ``[..., k]``.
    return_scores : bool, default False
        Also return the perturbed logits ``logits / T + G`` of the tokens, float64 of the same shape, in
        decreasing order; they serve estimators that weigh draws without replacement.

    Returns
    -------
    Tensor, or (Tensor, Tensor)
        int64 tokens ``[..., k]``, and the scores. Bitwise the same on every backend where no filter is used.

    Raises
    ------
    InvalidDistribution
        A row with NaN or +inf, or with fewer than `k` tokens of positive probability after filtering.
    ValueError, TypeError, BackendUnavailable
        As for `driftmax.categorical`.

    Notes
    -----
    Kool, van Hoof and Welling, "Stochastic Beams and Where to Find Them" (2019), section 2.3.

    Examples
    --------
    >>> import torch, driftmax
    >>> driftmax.gumbel_topk(torch.tensor([0.0, 3.0, 2.0, 1.0]), 3, temperature=0)
    tensor([1, 2, 3])
    >>> sorted(driftmax.gumbel_topk(torch.zeros(5), 5, rng=0).tolist())
    [0, 1, 2, 3, 4]
    """
    check_floats("logits", logits)
    *lead, vocab = logits.shape
    if not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"k must be an int, not {type(k).__name__}")
    if not 1 <= k <= vocab:
        raise ValueError(f"k must be between 1 and the {vocab} tokens of logits, not {k}")
    chosen = options(temperature, top_k, top_p, min_p, lead, logits)
    shape = (*lead, k)
    tokens = (
        empty(shape, torch.int64, logits) if out is None else sink(out, shape, torch.int64, logits.device)
    )
    scores = empty(shape, torch.float64, logits) if return_scores else None
    draws = tokens.numel() // k
    streams = resolve(rng, lead[0] if lead else 1, draws, logits)
    if draws:
        OP.runner(backend, logits)(rows_first(logits), k, tokens, scores, *streams, *chosen)
    if out is not None and out is not tokens:
        tokens = out.copy_(tokens)
    return tokens if scores is None else (tokens, scores)


def _cpp(
    logits: Tensor,
    k: int,
    tokens: Tensor,
    scores: Tensor | None,
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
) -> None:
    n1, s1 = (logits.shape[1], logits.stride(1)) if logits.dim() == 3 else (1, 0)
    if seeds is not None and seeds.numel() == 1:
        seed, seeds = int(seeds), None
    status = core.gumbel_topk(
        logits.data_ptr(),
        DTYPES[logits.dtype],
        logits.shape[0],
        n1,
        logits.stride(0),
        s1,
        logits.shape[-1],
        seed & 0xFFFFFFFFFFFFFFFF,
        pointer(seeds),
        pointer(rows),
        pointer(positions),
        step if steps is None else int(steps),
        temperature,
        pointer(temperatures),
        top_k,
        pointer(top_ks),
        top_p,
        pointer(top_ps),
        min_p,
        pointer(min_ps),
        k,
        tokens.data_ptr(),
        pointer(scores),
        torch.get_num_threads(),
    )
    if status:
        raise_status(status, n1)


def _samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2050, generator=generator)
    stream = (5, None, None, None, 0, None)
    plain = (1.0, None, 0, None, 1.0, None, 0.0, None)
    yield (logits, 4, torch.empty(3, 4, dtype=torch.int64), None, *stream, *plain)
    tokens, scores = torch.empty(3, 2, dtype=torch.int64), torch.empty(3, 2, dtype=torch.float64)
    temperatures = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    yield (logits, 2, tokens, scores, *stream, 1.0, temperatures, 50, None, 0.95, None, 0.0, None)


OP = Op("gumbel_topk", SCHEMA, cpp=_cpp, reference=reference, samples=_samples)
