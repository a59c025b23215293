"""Draw tokens at chosen positions: one network call, then the head and the draw only where needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from driftmax.discrete.problem import Problem
from driftmax.ops.categorical import CategoricalStats, categorical
from driftmax.ops.lm_head_categorical import lm_head_categorical
from driftmax.random import RowStreams

__all__ = [
    "checked_logits",
    "drawn_tokens",
    "draws_from_logits",
    "exposed_head",
    "forbid",
    "from_head",
    "logits_at",
    "pick",
    "position_streams",
]


def position_streams(problem: Problem, rows: Tensor, positions: Tensor, step: int | Tensor = 0) -> RowStreams:
    """The streams of single positions: draw i belongs to row ``rows[i]``, position ``positions[i]``."""
    return problem.streams[rows].at(step=step, positions=positions)


def pick(values: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """``values[rows[i], positions[i]]`` of `values` [n, L, D], a copy [m, D]."""
    if not values.is_contiguous():
        return values[rows, positions]
    return values.flatten(0, 1).index_select(0, rows * values.shape[1] + positions)  # a third faster


def forbid(logits: Tensor, problem: Problem) -> Tensor:
    """`logits` [..., V] with -inf, in place, for the mask and for banned tokens."""
    vocab = logits.shape[-1]
    for token in {problem.mask_id, *(problem.banned or ())}:
        if 0 <= token < vocab:
            logits[..., token].fill_(-torch.inf)
    return logits


def exposed_head(problem: Problem) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of the model's head, forbidden tokens at -inf; None where it exposes none."""
    head = getattr(problem.model, "head", None)
    if head is None or not callable(getattr(problem.model, "features", None)):
        return None
    weight, bias = head
    vocab = weight.shape[0]
    forbidden = [token for token in {problem.mask_id, *(problem.banned or ())} if 0 <= token < vocab]
    if forbidden:
        bias = weight.new_zeros(vocab) if bias is None else bias.detach().clone()
        for token in forbidden:  # an assignment, or a list of them, would copy to the device and wait
            bias[token].fill_(-torch.inf)
    return weight, bias


_ROWS = 64  # rows of a head's matrix product, where their number must not vary


def _products(hidden: Tensor) -> Tensor:
    """Rows of `hidden` [m, D] in each matrix product, int64 [products, _ROWS], padded from the front."""
    many = hidden.shape[0]
    return (torch.arange(many + -many % _ROWS, device=hidden.device) % many).view(-1, _ROWS)


def from_head(
    problem: Problem,
    hidden: Tensor,
    head: tuple[Tensor, Tensor | None],
    *,
    rng: RowStreams | int,
    **options: Any,
) -> Any:
    """What `lm_head_categorical` gives for `hidden` [m, D].

    For a whole batch in products of one shape: which kernel computes a product, and so its rounding, may
    depend on the number of rows, and that is what differs between runs with and without a cache. (Triton's
    fused head sums in one order whatever the number of rows; in float64 the product is torch's.)
    """
    many = hidden.shape[0]
    if not problem.whole_batch or not many or (hidden.is_cuda and hidden.dtype != torch.float64):
        return lm_head_categorical(hidden, *head, rng=rng, **options)
    parts = [
        lm_head_categorical(
            hidden[part], *head, rng=rng[part] if isinstance(rng, RowStreams) else rng, **options
        )
        for part in _products(hidden)
    ]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)[:many]
    tokens, stats = zip(*parts, strict=True)
    return torch.cat(tokens)[:many], CategoricalStats(
        *(torch.cat(one)[:many] for one in zip(*stats, strict=True))
    )


def checked_logits(problem: Problem, batch: Tensor, t: Tensor | None) -> Tensor:
    """The network's logits ``[n, L, V]`` for `batch` [n, L] at times `t` [n]."""
    logits: Tensor = problem.model(batch) if problem.time_independent else problem.model(batch, t)
    if logits.ndim != 3 or logits.shape[:2] != batch.shape:
        raise ValueError(
            f"the model returned logits of shape {tuple(logits.shape)} for tokens of shape "
            f"{tuple(batch.shape)}; wanted [rows, length, vocabulary]"
        )
    return logits


def logits_at(problem: Problem, batch: Tensor, t: Tensor | None, rows: Tensor, positions: Tensor) -> Tensor:
    """Call the network on `batch` [n, L]; its logits at (``rows[i]``, ``positions[i]``), [m, V].

    Forbidden tokens are at -inf. An exposed head runs there only.
    """
    head = exposed_head(problem) if problem.time_independent else None
    if head is None:
        return forbid(pick(checked_logits(problem, batch, t), rows, positions), problem)
    hidden = pick(problem.model.features(batch), rows, positions)
    weight, bias = head
    if not problem.whole_batch or not len(hidden):
        return torch.nn.functional.linear(hidden, weight, bias)
    parts = [torch.nn.functional.linear(hidden[part], weight, bias) for part in _products(hidden)]
    return torch.cat(parts)[: len(hidden)]


def draws_from_logits(problem: Problem) -> bool:
    """Whether tokens are drawn from the network's stored logits, without filters."""
    return not problem.filtered and (not problem.time_independent or exposed_head(problem) is None)


@torch.no_grad()
def drawn_tokens(
    problem: Problem,
    batch: Tensor,
    t: Tensor | None,
    rows: Tensor,
    positions: Tensor,
    streams: RowStreams,
) -> Tensor:
    """Call the network on `batch` [n, L] and draw at (``rows[i]``, ``positions[i]``) from ``streams[i]``.

    Returns int64 [m]. `t` is [n] or None. With no position the network is called and its output dropped.
    """
    options: dict[str, Any] = {"temperature": problem.temperature, "rng": streams, **problem.filters}
    head = exposed_head(problem) if problem.time_independent else None
    if head is not None:
        hidden = problem.model.features(batch)
        if not rows.numel():
            return rows
        drawn: Tensor = from_head(problem, pick(hidden, rows, positions), head, **options)
        return drawn
    logits = checked_logits(problem, batch, t)
    if not rows.numel():
        return rows
    tokens: Tensor = categorical(forbid(pick(logits, rows, positions), problem), **options)
    return tokens
