"""`lm_head_categorical`: one draw per row of ``hidden @ weight.T + bias`` without storing the logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor

from driftmax.errors import raise_status
from driftmax.ops._arguments import (
    CategoricalStats,
    Options,
    PerRow,
    PerRowInt,
    check_floats,
    empty,
    empty_tokens,
    method_code,
    options,
    pointer,
    rows_first,
    sink,
)
from driftmax.ops._dispatch import Op, core
from driftmax.ops.categorical import run_core
from driftmax.random import Rng, StreamArguments, resolve
from driftmax.reference.lm_head_categorical import lm_head_categorical as reference

__all__ = ["lm_head_categorical"]

SCHEMA = (
    # hidden [rows, D] or [rows, positions, D], weight [V, D], bias [V]; tokens contiguous, one per draw;
    # stats contiguous [4, draws]: log_prob, log_z, entropy, margin
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor(a!) tokens, Tensor(b!)? stats, "
    "SymInt seed, Tensor? seeds, Tensor? rows, Tensor? positions, SymInt step, Tensor? steps, "
    "float temperature, Tensor? temperatures, SymInt top_k, Tensor? top_ks, float top_p, Tensor? top_ps, "
    "float min_p, Tensor? min_ps, int method"
)

_BLOCK = 1024  # of the block race: tiles are multiples of it
_TILE = 1 << 20  # logits in a tile: 4 MB of float32; smaller tiles cost the GEMM more than they save in cache
_MOST_ROWS = 256  # enough for a GEMM to run at full speed


@overload
def lm_head_categorical(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
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
def lm_head_categorical(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
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


def lm_head_categorical(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
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
    """Draw one token per row of the logits ``hidden @ weight.T + bias``, which are never stored.

    Parameters
    ----------
    hidden : Tensor
        ``[..., D]`` in float16, bfloat16, float32 or float64.
    weight : Tensor
        ``[V, D]``, the output embedding, of the same dtype and device.
    bias : Tensor, optional
        ``[V]``, of the same dtype and device.
    temperature, top_k, top_p, min_p, method, rng, out, return_stats, backend
        As for `driftmax.categorical`, with ``hidden.shape[:-1]`` as leading shape.

    Returns
    -------
    Tensor, or (Tensor, CategoricalStats)
        int64 tokens of shape ``hidden.shape[:-1]``: those of ``categorical(hidden @ weight.T + bias, ...)``
        with the same rng, but for the rounding of the matrix product. Stats are float32, or float64 for
        float64 inputs.

    Raises
    ------
    InvalidDistribution, ValueError, TypeError, BackendUnavailable
        As for `driftmax.categorical`.

    Notes
    -----
    On the CPU the vocabulary is cut into tiles of 2 MB that go through torch's GEMM and then, still in cache,
    through the block pass; extra memory is a few MB whatever V and the batch are. With top_k, top_p or min_p,
    and for float64, a few whole rows of logits at a time.

    Examples
    --------
    >>> import torch, driftmax
    >>> hidden, weight = torch.eye(3), 50.0 * torch.eye(3)
    >>> driftmax.lm_head_categorical(hidden, weight, rng=0)
    tensor([0, 1, 2])
    """
    _check(hidden, weight, bias)
    *lead, _ = hidden.shape
    code = method_code(method)
    chosen = options(temperature, top_k, top_p, min_p, lead, hidden)
    run = OP.runner(backend, hidden)
    tokens = (
        empty_tokens(lead, hidden, run is OP.cpp)
        if out is None
        else sink(out, lead, torch.int64, hidden.device)
    )
    stats = None
    if return_stats:
        kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        stats = empty((4, *lead), kind, hidden)
    draws = tokens.numel()
    streams = resolve(rng, lead[0] if lead else 1, draws, hidden)
    if draws:
        run(rows_first(hidden), weight, bias, tokens, stats, *streams, *chosen, code)
    if out is not None and out is not tokens:
        tokens = out.copy_(tokens)
    return tokens if stats is None else (tokens, CategoricalStats(*stats.unbind(0)))


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_floats("hidden", hidden)
    check_floats("weight", weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must have shape [V, {hidden.shape[-1]}], not {tuple(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError("weight has no token to draw")
    if weight.dtype != hidden.dtype or weight.device != hidden.device:
        raise ValueError(
            f"weight is {weight.dtype} on {weight.device}, hidden {hidden.dtype} on {hidden.device}"
        )
    if bias is not None:
        check_floats("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape [{weight.shape[0]}], not {tuple(bias.shape)}")
        if bias.dtype != hidden.dtype or bias.device != hidden.device:
            raise ValueError(
                f"bias is {bias.dtype} on {bias.device}, hidden {hidden.dtype} on {hidden.device}"
            )


@torch.no_grad()
def _cpp(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, stats: Tensor | None, *rest: Any
) -> None:
    streams, law, method = StreamArguments(*rest[:6]), Options(*rest[6:14]), rest[14]
    if streams.seeds is not None and streams.seeds.numel() == 1:
        streams = streams._replace(seed=int(streams.seeds), seeds=None)
    if streams.steps is not None:
        streams = streams._replace(step=int(streams.steps), steps=None)
    n1 = hidden.shape[1] if hidden.dim() == 3 else 1
    table = hidden.reshape(-1, hidden.shape[-1])
    if hidden.dtype == torch.float64 or law[2:] != Options(1.0, None, 0, None, 1.0, None, 0.0, None)[2:]:
        _whole_rows(table, weight, bias, tokens, stats, n1, streams, law, method)
    else:
        _tiles(table, weight, bias, tokens, stats, n1, streams, law, method)


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.addmm(bias, hidden, weight.T, out=out)


def _tiles(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    stats: Tensor | None,
    n1: int,
    streams: StreamArguments,
    law: Options,
    method: int,
) -> None:
    """Vocabulary tiles: GEMM into a cache-sized buffer, then the block pass on it."""
    draws, vocab, threads = hidden.shape[0], weight.shape[0], torch.get_num_threads()
    most_rows = min(draws, _MOST_ROWS)
    columns = min(max(_TILE // most_rows // _BLOCK, 1) * _BLOCK, vocab)
    product = torch.empty(most_rows * columns, dtype=hidden.dtype)
    tile = product if hidden.dtype == torch.float32 else torch.empty(most_rows * columns)
    state = torch.empty(most_rows * core.lm_head_state_bytes(), dtype=torch.uint8)
    seeding = (streams.seed & 0xFFFFFFFFFFFFFFFF, pointer(streams.seeds))
    stream = (*seeding, pointer(streams.rows), pointer(streams.positions), streams.step)
    scale = (law.temperature, pointer(law.temperatures))
    mode = (method, int(stats is not None), state.data_ptr(), threads)
    for first in range(0, draws, most_rows):
        part = hidden[first : first + most_rows]
        state.zero_()
        for begin in range(0, vocab, columns):
            width = min(columns, vocab - begin)
            sink = product[: part.shape[0] * width].view(-1, width)
            some_bias = None if bias is None else bias[begin : begin + width]
            _product(part, weight[begin : begin + width], some_bias, sink)
            if tile is not product:
                tile[: sink.numel()] = sink.view(-1)
            shape = (part.shape[0], width, begin, width, vocab, n1, first)
            raise_status(core.lm_head_tile(tile.data_ptr(), *shape, *stream, *scale, *mode), n1)
        where = (tokens.data_ptr() + 8 * first, 0 if stats is None else stats.data_ptr() + 4 * first)
        raise_status(core.lm_head_finish(state.data_ptr(), part.shape[0], first, *scale, *where, draws), n1)


def _whole_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    stats: Tensor | None,
    n1: int,
    streams: StreamArguments,
    law: Options,
    method: int,
) -> None:
    """A few rows of logits at a time through the unfused op: filters need a row twice."""
    draws, vocab = hidden.shape[0], weight.shape[0]
    most_rows = max(1, min(draws, 2 * _TILE // vocab))
    draw = torch.arange(draws)
    row = torch.div(draw, n1, rounding_mode="floor")
    rows = row if streams.rows is None else streams.rows[row]
    positions = draw % n1 if streams.positions is None else streams.positions.reshape(-1)
    product = torch.empty(most_rows * vocab, dtype=hidden.dtype)
    for first in range(0, draws, most_rows):
        part = slice(first, min(first + most_rows, draws))
        count = part.stop - first
        logits = product[: count * vocab].view(count, vocab)
        _product(hidden[part], weight, bias, logits)
        some = [v.reshape(-1)[part] if isinstance(v, Tensor) else v for v in law]
        drawn, kept = torch.empty(count, dtype=torch.int64), None
        if stats is not None:
            kept = torch.empty(4, count, dtype=stats.dtype)
        seeds = None if streams.seeds is None else streams.seeds[row[part]]
        stream = (streams.seed, seeds, rows[part], positions[part], streams.step, None)
        rest: list[Any] = [*stream, *some, method]
        run_core(logits, drawn, kept, *rest, first=first, per_row=n1)
        tokens.view(-1)[part] = drawn
        if stats is not None and kept is not None:
            stats.view(4, -1)[:, part] = kept


def _samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 16, generator=generator), torch.randn(2050, 16, generator=generator)
    bias = torch.randn(2050, generator=generator)
    stream = (5, None, None, None, 0, None)
    plain = (1.0, None, 0, None, 1.0, None, 0.0, None)
    yield (hidden, weight, None, torch.empty(5, dtype=torch.int64), None, *stream, *plain, 0)
    temperatures = torch.tensor([0.0, 0.5, 2.0, 1.0, 1.0], dtype=torch.float64)
    law = (1.0, temperatures, 50, None, 0.95, None, 0.0, None)
    tokens, stats = torch.empty(5, dtype=torch.int64), torch.empty(4, 5)
    yield (hidden, weight, bias, tokens, stats, *stream, *law, 1)


OP = Op("lm_head_categorical", SCHEMA, cpp=_cpp, reference=reference, samples=_samples)
