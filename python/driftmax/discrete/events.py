"""Reveals known in advance: which positions of which rows the e-th network call serves.

When the network does not decide *when* a position is revealed, everything but the tokens is known before
the first call. Rows advance on their own clocks: call e serves each row's e-th event, finished rows drop out,
and the number of calls is the largest number of events of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from driftmax.discrete.problem import Problem, State, first_state
from driftmax.discrete.reveal import drawn_tokens, position_streams
from driftmax.random import RowStreams

__all__ = ["Events", "advance", "call_of_event", "dense_rank", "plan_events"]


@dataclass(frozen=True)
class Events:
    """Reveals sorted by event: those of event e are the slice ``bounds[e]:bounds[e + 1]``."""

    rows: Tensor  # int64 [m]: row of the batch
    local: Tensor  # int64 [m]: row within the call's batch
    positions: Tensor  # int64 [m]
    streams: RowStreams  # [m]
    bounds: list[int]
    order: Tensor | None  # int64 [B]: rows by falling number of events; None: every call gets all rows
    active: list[int]  # rows of each call
    times: Tensor | None  # float64 [B, events], for networks that depend on time


def dense_rank(keys: Tensor, valid: Tensor) -> Tensor:
    """Rank of each valid key among the distinct valid keys of its row, from 0; [B, L] to int64 [B, L]."""
    if keys.shape[1] == 0:
        return torch.zeros_like(keys, dtype=torch.int64)
    keys = keys.masked_fill(~valid, torch.iinfo(torch.int64).max)
    ranked, order = keys.sort(dim=1)
    fresh = torch.ones_like(ranked, dtype=torch.int64)
    fresh[:, 0] = 0
    fresh[:, 1:] = (ranked[:, 1:] != ranked[:, :-1]).to(torch.int64)
    return torch.empty_like(fresh).scatter_(1, order, fresh.cumsum(1))


def plan_events(
    problem: Problem, event: Tensor, valid: Tensor, *, total: int | None = None, times: Tensor | None = None
) -> State:
    """The state before the first call, from the event number of every valid position, int64 [B, L].

    `total` is the number of calls where there are calls without reveals (no cache).
    """
    batch = problem.shape[0]
    row, position = valid.nonzero(as_tuple=True)
    number = event[row, position]
    counts = torch.zeros(batch, dtype=torch.int64, device=event.device)
    counts.scatter_reduce_(0, row, number + 1, "amax")
    compact = problem.cache and not problem.whole_batch
    order = counts.argsort(descending=True, stable=True) if compact else None
    local = row
    if order is not None:
        place = torch.empty_like(order)
        place[order] = torch.arange(batch, device=order.device)
        local = place[row]
    # nonzero() lists positions in order, which the stable sort keeps within a row of an event.
    sorting = (number * max(batch, 1) + local).argsort(stable=True)
    row, position, local = row[sorting], position[sorting], local[sorting]
    calls = int(counts.max()) if total is None and batch else total or 0
    sizes = torch.bincount(number, minlength=calls)
    bounds = [0, *sizes.cumsum(0).tolist()]
    late = torch.bincount(counts, minlength=calls + 1).cumsum(0).tolist()  # rows with at most e events
    active = [batch - late[e] if compact else batch for e in range(calls)]
    events = Events(
        row, local, position, position_streams(problem, row, position), bounds, order, active, times
    )
    return first_state(problem, calls, events)


def call_of_event(state: State) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Of the next call: its rows (None: all), its tokens [n, L], its times [n] (None: without time)."""
    problem, events, e = state.problem, state.memo, state.step
    chosen = None if events.order is None else events.order[: events.active[e]]
    batch = state.tokens if chosen is None else state.tokens[chosen]
    t = None
    if events.times is not None and not problem.time_independent:
        t = (events.times[:, e] if chosen is None else events.times[chosen, e]).float()
    return chosen, batch, t


def advance(state: State) -> State:
    """One network call, and the draws of its event."""
    problem, events, e = state.problem, state.memo, state.step
    part = slice(events.bounds[e], events.bounds[e + 1])
    chosen, batch, t = call_of_event(state)
    row, position = events.rows[part], events.positions[part]
    drawn = drawn_tokens(problem, batch, t, events.local[part], position, events.streams[part])
    tokens = state.tokens.clone()
    tokens[row, position] = drawn
    return state.after(tokens, chosen, part.stop - part.start)
