"""`FirstHitting`: one position a call, exactly. `ParallelReveal`, `HighOrderReveal`: several, with a bias."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from driftmax import random
from driftmax.discrete.events import Events, advance, call_of_event, plan_events
from driftmax.discrete.problem import Problem, State
from driftmax.discrete.reveal import logits_at
from driftmax.ops.categorical import categorical

__all__ = ["FirstHitting", "HighOrderReveal", "ParallelReveal"]


def _random_order(problem: Problem, valid: Tensor) -> Tensor:
    """Place of each masked position in a uniformly random order of its row's masks, int64 [B, L]."""
    keys = random.uniform(problem.shape, rng=problem.streams, dtype=torch.float64, device=problem.device)
    return keys.masked_fill(~valid, 2.0).argsort(dim=1).argsort(dim=1)


def _hitting_times(problem: Problem, count: Tensor) -> Tensor:
    """Times of a row's reveals, falling, float64 [B, L]; `count` [B] masked positions each.

    With m left, the share of masked mass shrinks by u**(1/m): the largest of m uniforms.
    """
    length = problem.shape[1]
    u = random.uniform(
        problem.shape, rng=problem.streams.at(step=1), dtype=torch.float64, device=problem.device
    )
    left = (count[:, None] - torch.arange(length, device=count.device)).clamp(min=1)
    share = (u.log() / left).cumsum(1).exp()
    return problem.schedule.time_of_masked(share * problem.schedule.masked(1.0).to(u.device))


def _init(problem: Problem, together: int) -> State:
    valid = problem.start() == problem.mask_id
    return _plan(problem, _random_order(problem, valid), valid, together)


def _plan(problem: Problem, order: Tensor, valid: Tensor, together: int) -> State:
    """The state before the first call, which reveals the first `together` positions of each row's order."""
    times = None if problem.time_independent else _hitting_times(problem, valid.sum(1))[:, ::together]
    return plan_events(problem, order // together, valid, times=times)


@dataclass(frozen=True)
class FirstHitting:
    """The first-hitting sampler: jump to the next time at which a position unmasks, and unmask it.

    Exactly the law of the continuous-time process, in as many calls as there are masks (Zheng et al., "Masked
    Diffusion Models are Secretly Time-Agnostic Masked Models and Exploit Inaccurate Categorical Sampling",
    2024). Works for networks that depend on time: each row passes its own.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import FirstHitting, sample
    >>> def model(tokens, t): return torch.zeros(*tokens.shape, 5)
    >>> sample(model, (2, 8), mask_id=5, sampler=FirstHitting(), rng=0, cache=False).nfe
    8
    """

    def init(self, problem: Problem) -> State:
        """Draw the order of positions, and the times where the network asks for them."""
        return _init(problem, 1)

    def step(self, state: State) -> State:
        """Reveal one position of every row that has a mask left."""
        return advance(state)


@dataclass(frozen=True)
class ParallelReveal:
    """Reveal `k` random positions a call, independently of one another: fast, and biased for k > 1.

    Tokens revealed together do not see each other. `Plan` on a grid makes the same error, but it vanishes as
    the steps get finer.

    Parameters
    ----------
    k : int, default 1
        1 is `FirstHitting`.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import ParallelReveal, sample
    >>> def model(tokens, t): return torch.zeros(*tokens.shape, 5)
    >>> sample(model, (2, 8), mask_id=5, sampler=ParallelReveal(4), rng=0, cache=False).nfe
    2
    """

    k: int = 1

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, not {self.k}")

    def init(self, problem: Problem) -> State:
        """Draw the order of positions, and the times where the network asks for them."""
        return _init(problem, self.k)

    def step(self, state: State) -> State:
        """Reveal up to `k` positions of every row that has a mask left."""
        return advance(state)


class _Ahead(NamedTuple):
    """What `HighOrderReveal` keeps: the plan, how far to extrapolate, the laws seen by the last call."""

    events: Events
    weight: Tensor  # float64 [m]: of each reveal, in the order of the events
    before: Tensor | None  # float64 [reveals of the next event, V]


@dataclass(frozen=True)
class HighOrderReveal:
    """`ParallelReveal` with less bias at the same number of calls: the laws of two calls, extrapolated.

    Tokens revealed together should each see the ones before. `ParallelReveal` gives them all the law p of the
    state before the first; here a token gets (p + w (p - q))_+, where q is the law that the call before had
    for its position, and w says how far beyond its own call it lies. No call is added: which positions come
    next is known beforehand, so a call also evaluates those of the one after it.

    Parameters
    ----------
    k : int, default 2
        Reveals a call. 1 has `FirstHitting`'s exact law.
    method : {"correct", "extrapolate"}, default "correct"
        "extrapolate": token j of a call, j = 0, ..., k - 1, lies j reveals beyond it: w = j / k, linear in
        the number of masks. "correct", predictor-corrector: calls come in pairs, and the second one's tokens
        make up for the lag of both, (k - 1) / 2k each on average: w = (k - 1) / k. For large k that is the
        theta-trapezoidal rule at theta = 1/2 (Ren et al., "Fast Solvers for Discrete Diffusion Models: Theory
        and Applications of High-Order Algorithms", 2025), which has w = 1.

    Notes
    -----
    One of the high-order variants of first-hitting sampling, which reuse earlier predictions (Zheng et al.,
    2024). Temperature and filters act on the extrapolated law. Costs twice the head and the draw of
    `ParallelReveal`, in float64. The guide has its bias on the Markov chain of the tests, by enumeration; a
    chain whose neighbours depend less on one another gains more.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import HighOrderReveal, sample
    >>> def model(tokens, t): return torch.zeros(*tokens.shape, 5)
    >>> sample(model, (2, 8), mask_id=5, sampler=HighOrderReveal(2), rng=0, cache=False).nfe
    4
    """

    k: int = 2
    method: Literal["correct", "extrapolate"] = "correct"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, not {self.k}")
        if self.method not in ("correct", "extrapolate"):
            raise ValueError(f'method must be "correct" or "extrapolate", not {self.method!r}')

    def init(self, problem: Problem) -> State:
        """Draw the order of positions, and the times where the network asks for them."""
        valid = problem.start() == problem.mask_id
        order = _random_order(problem, valid)
        state = _plan(problem, order, valid, self.k)
        events: Events = state.memo
        place = order[events.rows, events.positions]
        lag = place % self.k if self.method == "extrapolate" else place // self.k % 2 * (self.k - 1)
        weight = lag / self.k
        first = place < self.k  # no call before
        return replace(state, memo=_Ahead(events, weight.double().masked_fill(first, 0.0), None))

    @torch.no_grad()
    def step(self, state: State) -> State:
        """One network call; reveal up to `k` positions of every row that has a mask left."""
        problem, (events, weight, before), e = state.problem, state.memo, state.step
        begin, end = events.bounds[e], events.bounds[e + 1]
        last = events.bounds[min(e + 2, len(events.bounds) - 1)]
        chosen, batch, t = call_of_event(replace(state, memo=events))
        logits = logits_at(problem, batch, t, events.local[begin:last], events.positions[begin:last])
        laws = torch.softmax(logits.double(), -1)
        now, ahead = laws[: end - begin], laws[end - begin :]
        if before is not None:
            now = (now + weight[begin:end, None] * (now - before)).clamp(min=0.0)
        drawn = categorical(
            now.log(), temperature=problem.temperature, rng=events.streams[begin:end], **problem.filters
        )
        tokens = state.tokens.clone()
        tokens[events.rows[begin:end], events.positions[begin:end]] = drawn
        after = state.after(tokens, chosen, end - begin)
        return replace(after, memo=_Ahead(events, weight, ahead))
