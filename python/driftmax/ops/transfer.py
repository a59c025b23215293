"""`transfer`: which of the tokens drawn for every position are written, by their scores (dLLM decoding)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from driftmax.ops._arguments import (
    DTYPES,
    PerRow,
    PerRowInt,
    check_tokens,
    empty,
    int_or_rows,
    pointer,
    scalar_or_rows,
)
from driftmax.ops._dispatch import Op, core
from driftmax.reference.transfer import transfer as reference

__all__ = ["transfer"]

SCHEMA = (
    # all contiguous [rows, positions]; scores float32 or float64, moved and eligible bool; counts int64
    # [rows], thresholds float64 [rows]; rule 0: by count; 1: also every score that reaches the threshold
    "Tensor(a!) tokens, Tensor drawn, Tensor scores, Tensor(b!) moved, SymInt mask_id, SymInt begin, "
    "SymInt end, Tensor? eligible, SymInt count, Tensor? counts, int rule, float threshold, "
    "Tensor? thresholds"
)


def transfer(
    tokens: Tensor,
    drawn: Tensor,
    scores: Tensor,
    count: PerRowInt | None = None,
    *,
    mask_id: int,
    threshold: PerRow | None = None,
    begin: int = 0,
    end: int | None = None,
    eligible: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Write the drawn tokens with the best scores, of those whose positions are masked and eligible.

    Parameters
    ----------
    tokens : Tensor
        int64 ``[B, L]``, written in place.
    drawn : Tensor
        int64 ``[B, L]``: a token for every position; looked at only where one is written.
    scores : Tensor
        ``[B, L]`` in any floating dtype, higher is better, ties go to the lower position. NaN ranks with
        -inf, which is last but may be written.
    count : int or one per row, optional
        How many to write in each row; all that are eligible, where they are fewer.
    mask_id : int
        The mask token.
    threshold : float or one per row, optional
        Write every token whose score is at least this, and in any case the `count` best (1, if not given).
    begin, end : int
        Only positions in [begin, end) are eligible, by default all: a semi-autoregressive block.
    eligible : Tensor, optional
        bool, broadcasts to ``[B, L]``: only positions where it holds are eligible.
    backend : str, default "auto"
        "reference", "cpp", "triton", or by device.

    Returns
    -------
    Tensor
        bool ``[B, L]``: where a token was written.

    Raises
    ------
    ValueError, TypeError
        Arguments of wrong rank, dtype, device or range; neither `count` nor `threshold`.
    BackendUnavailable
        The backend asked for cannot run here.

    Notes
    -----
    The same positions on every backend. By count: low-confidence remasking (Nie et al., "Large Language
    Diffusion Models", 2025, algorithm 5); by threshold: Wu et al., "Fast-dLLM" (2025), algorithm 1. Linear
    time in L on the CPU; on a GPU a program per row bisects the scores. No host sync.

    Examples
    --------
    >>> import torch, driftmax
    >>> tokens, drawn = torch.tensor([[9, 5, 9, 9]]), torch.tensor([[1, 2, 3, 4]])
    >>> driftmax.transfer(tokens, drawn, torch.tensor([[0.2, 0.9, 0.7, 0.7]]), 1, mask_id=9)
    tensor([[False, False,  True, False]])
    >>> tokens
    tensor([[9, 5, 3, 9]])
    """
    check_tokens("tokens", tokens, None, tokens)
    rows, length = tokens.shape
    check_tokens("drawn", drawn, (rows, length), tokens)
    scores = _scores(scores, tokens)
    many = _counts(count, threshold, tokens)
    rule = 0
    least: tuple[float, Tensor | None] = (0.0, None)
    if threshold is not None:
        rule, least = 1, scalar_or_rows("threshold", threshold, (rows,), tokens)
    end = length if end is None else end
    if not 0 <= begin <= end <= length:
        raise ValueError(f"[begin, end) must lie in [0, {length}], not [{begin}, {end})")
    where = _eligible(eligible, tokens)
    moved = empty((rows, length), torch.bool, tokens)
    if rows * length == 0:
        return moved
    sink = tokens if tokens.is_contiguous() else tokens.contiguous()
    window = (mask_id, begin, end, where)
    OP.runner(backend, tokens)(sink, drawn.contiguous(), scores, moved, *window, *many, rule, *least)
    if sink is not tokens:
        tokens.copy_(sink)
    return moved


def _scores(scores: Tensor, tokens: Tensor) -> Tensor:
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores must be a torch.Tensor, not {type(scores).__name__}")
    if not scores.is_floating_point():
        raise TypeError(f"scores must be floating-point, not {scores.dtype}")
    if scores.shape != tokens.shape:
        raise ValueError(f"scores must have shape {tuple(tokens.shape)}, not {tuple(scores.shape)}")
    if scores.device != tokens.device:
        raise ValueError(f"scores are on {scores.device}, tokens on {tokens.device}")
    return (scores if scores.dtype == torch.float64 else scores.float()).contiguous()


def _counts(count: PerRowInt | None, threshold: PerRow | None, tokens: Tensor) -> tuple[int, Tensor | None]:
    if count is None:
        if threshold is None:
            raise ValueError("pass a count, a threshold, or both")
        return 1, None
    return int_or_rows("count", count, tokens.shape[:1], tokens)


def _eligible(eligible: Tensor | None, tokens: Tensor) -> Tensor | None:
    if eligible is None:
        return None
    if not isinstance(eligible, Tensor) or eligible.dtype != torch.bool:
        raise TypeError(f"eligible must be a bool tensor, not {getattr(eligible, 'dtype', type(eligible))}")
    if eligible.device != tokens.device:
        raise ValueError(f"eligible is on {eligible.device}, tokens on {tokens.device}")
    try:
        return eligible.expand(tokens.shape).contiguous()
    except RuntimeError:
        raise ValueError(
            f"eligible of shape {tuple(eligible.shape)} does not broadcast to {tuple(tokens.shape)}"
        ) from None


def _cpp(
    tokens: Tensor,
    drawn: Tensor,
    scores: Tensor,
    moved: Tensor,
    mask_id: int,
    begin: int,
    end: int,
    eligible: Tensor | None,
    count: int,
    counts: Tensor | None,
    rule: int,
    threshold: float,
    thresholds: Tensor | None,
) -> None:
    core.transfer(
        tokens.data_ptr(),
        drawn.data_ptr(),
        scores.data_ptr(),
        DTYPES[scores.dtype],
        moved.data_ptr(),
        tokens.shape[0],
        tokens.shape[1],
        mask_id,
        begin,
        end,
        pointer(eligible),
        rule,
        count,
        pointer(counts),
        threshold,
        pointer(thresholds),
        torch.get_num_threads(),
    )


def _samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 40, generator=generator)
    drawn = torch.randint(0, 9, (3, 40), generator=generator)
    moved = torch.empty(3, 40, dtype=torch.bool)
    yield torch.full((3, 40), 9), drawn, scores, moved, 9, 0, 40, None, 7, None, 0, 0.0, None
    tokens = torch.where(scores < 0.7, 9, 1)
    eligible = torch.rand(3, 40, generator=generator) < 0.5
    counts, thresholds = torch.tensor([0, 3, 50]), torch.tensor([0.5, 0.9, -1.0], dtype=torch.float64)
    window = (9, 5, 30, eligible)
    yield tokens, drawn, scores.double(), moved.clone(), *window, 0, counts, 1, 0.0, thresholds


OP = Op("transfer", SCHEMA, cpp=_cpp, reference=reference, samples=_samples)
