"""`Ancestral` and `Euler`: step down a time grid, unmask each position with the step's probability."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from driftmax import random
from driftmax.discrete.problem import Problem, State, first_state
from driftmax.discrete.reveal import checked_logits, drawn_tokens, draws_from_logits, position_streams
from driftmax.ops.unmask import unmask

__all__ = ["Ancestral", "Euler"]


@dataclass(frozen=True)
class _GridSampler(ABC):
    """Steps of a time grid; a subclass says how likely a masked position is unmasked in each."""

    @abstractmethod
    def probabilities(self, problem: Problem, times: Tensor) -> Tensor:
        """Unmasking probability of each step, float64 [steps], from the grid's times [steps + 1]."""

    def start(self, problem: Problem) -> State:
        """The state before the first step, all decisions still to be made."""
        steps = problem.need_steps(type(self).__name__)
        if problem.cache:
            problem.need_time_independence("cache=True")
        times = problem.schedule.grid(steps)
        probability = self.probabilities(problem, times).clamp(0.0, 1.0)
        probability[-1] = 1.0  # the last step leaves no mask
        forbidden = None if not problem.banned else torch.tensor(problem.banned, device=problem.device)
        return first_state(problem, steps, _Grid(times.tolist(), probability.tolist(), forbidden, None))

    def init(self, problem: Problem) -> State:
        """The state before the first step.

        Which positions unmask in which step does not depend on the network: for a device where reading it in
        every step would wait, it is drawn here.
        """
        state = self.start(problem)
        if _whole(problem) or not decides_ahead(problem):
            return state
        return replace(state, memo=replace(state.memo, reveals=_decided(state)))

    @torch.no_grad()
    def step(self, state: State) -> State:
        """Unmask the positions whose step this is; if there are any, or without a cache, call the network."""
        problem, grid, k = state.problem, state.memo, state.step
        if _whole(problem):
            return _whole_step(state)
        if grid.reveals is not None:
            call = served_as_decided(state)
        else:
            call = served(state, state.masked & (step_uniforms(problem, k) < grid.probability[k]))
        if call is None:
            return state.without_call()
        streams = position_streams(problem, call.row, call.position, k)
        tokens = state.tokens.clone()
        tokens[call.row, call.position] = drawn_tokens(
            problem, call.batch, grid.time(k, call.batch), call.local, call.position, streams
        )
        return state.after(tokens, call.chosen, call.row.numel())


def step_uniforms(problem: Problem, step: int) -> Tensor:
    """What decides in a step whether a position changes, float64 [B, L]."""
    streams = problem.streams.at(step=step)
    return random.uniform(problem.shape, rng=streams, dtype=torch.float64, device=problem.device)


def decides_ahead(problem: Problem) -> bool:
    """Whether ``init`` draws what the steps will ask for: everywhere but on the CPU, where reading costs
    nothing, and tokens changed by hand between steps are stepped as they are.
    """
    return torch.device(problem.device or "cpu").type != "cpu"


class Served(NamedTuple):
    """A network call: the rows it gets, and m positions that get a token from it."""

    batch: Tensor  # int64 [n, L]
    chosen: Tensor | None  # int64 [n]: rows of the state that these are; None: all
    local: Tensor  # int64 [m]: row of `batch`
    row: Tensor  # int64 [m]: row of the state
    position: Tensor  # int64 [m]


def served(state: State, reveal: Tensor) -> Served | None:
    """The call that a step needs to reveal the positions `reveal`, bool [B, L]; None if it needs none.

    Without a cache that is a call with all rows, whatever is revealed.
    """
    problem = state.problem
    row, position = reveal.nonzero(as_tuple=True)
    if problem.cache and not row.numel():
        return None
    if not problem.cache or problem.whole_batch:
        return Served(state.tokens, None, row, row, position)
    chosen, local = torch.unique_consecutive(row, return_inverse=True)
    return Served(state.tokens[chosen], chosen, local, row, position)


class Reveals(NamedTuple):
    """Decisions of all steps: step k reveals ``bounds[k]:bounds[k + 1]`` of m positions, in rows
    ``calls[k]:calls[k + 1]`` of `chosen`.
    """

    row: Tensor  # int64 [m]
    position: Tensor  # int64 [m]
    local: Tensor  # int64 [m]: the row's place among those of its step
    chosen: Tensor  # int64: rows of each step, ascending
    bounds: list[int]
    calls: list[int]


@dataclass(frozen=True)
class _Grid:
    """What the samplers on a grid keep."""

    times: list[float]
    probability: list[float]
    forbidden: Tensor | None
    reveals: Reveals | None

    def time(self, k: int, batch: Tensor) -> Tensor:
        """The time of step k, as networks take it."""
        return torch.full(batch.shape[:1], self.times[k], dtype=torch.float32, device=batch.device)


def _whole(problem: Problem) -> bool:
    """Whether a step goes through the logits of all positions, by the fused op."""
    return not problem.cache and draws_from_logits(problem)


def _starts(step: Tensor, steps: int) -> list[int]:
    """Where each of the steps begins in a sorted list of step numbers, and where the last one ends."""
    return [0, *torch.bincount(step, minlength=steps).cumsum(0).tolist()]


def grouped(step: Tensor, row: Tensor, position: Tensor, steps: int) -> Reveals:
    """Positions [m] by the step that reveals them; sorted by step, and by row within a step."""
    fresh = torch.ones_like(step, dtype=torch.bool)
    fresh[1:] = (step[1:] != step[:-1]) | (row[1:] != row[:-1])
    calls = _starts(step[fresh], steps)
    local = fresh.cumsum(0) - 1 - torch.tensor(calls, device=step.device)[step]
    return Reveals(row, position, local, row[fresh], _starts(step, steps), calls)


def _decided(state: State) -> Reveals:
    """In which step each masked position unmasks: the first whose uniform is below its probability."""
    problem, grid = state.problem, state.memo
    undecided = state.masked
    when = torch.full(problem.shape, -1, device=undecided.device)
    for k, probability in enumerate(grid.probability):
        hit = undecided & (step_uniforms(problem, k) < probability)
        when.masked_fill_(hit, k)
        undecided &= ~hit
    row, position = (when >= 0).nonzero(as_tuple=True)
    step, order = when[row, position].sort(stable=True)  # rows stay in order within a step
    return grouped(step, row[order], position[order], state.total)


def served_as_decided(state: State) -> Served | None:
    """As `served`, of what ``state.memo.reveals`` has for this step."""
    problem, reveals, k = state.problem, state.memo.reveals, state.step
    part = slice(reveals.bounds[k], reveals.bounds[k + 1])
    if problem.cache and part.start == part.stop:
        return None
    row, position = reveals.row[part], reveals.position[part]
    if not problem.cache or problem.whole_batch:
        return Served(state.tokens, None, row, row, position)
    chosen = reveals.chosen[reveals.calls[k] : reveals.calls[k + 1]]
    return Served(state.tokens[chosen], chosen, reveals.local[part], row, position)


@torch.no_grad()
def _whole_step(state: State) -> State:
    """The same step on the logits of all positions, by the fused op: nothing is read on the host."""
    problem, grid, k = state.problem, state.memo, state.step
    logits = checked_logits(problem, state.tokens, grid.time(k, state.tokens))
    tokens = state.tokens.clone()
    revealed = unmask(
        logits,
        tokens,
        grid.probability[k],
        mask_id=problem.mask_id,
        forbidden=grid.forbidden,
        temperature=problem.temperature,
        rng=problem.streams.at(step=k),
    ).sum()
    return state.after(tokens, None, int(revealed) if revealed.is_cpu else revealed)


@dataclass(frozen=True)
class Ancestral(_GridSampler):
    """Ancestral sampling (tau-leaping with the exact unmasking probability) on an equally spaced grid.

    A position masked at t is unmasked by s with probability (alpha_s - alpha_t) / (1 - alpha_t),
    independently of the others (Ou et al., 2024; Sahoo et al., 2024). The clock decides *whether*, a clean
    categorical draws *what*: the mask is never a category, so that no rounding of noise can favour it.

    With ``cache=True``, for time-independent networks, a call serves only the rows that reveal something; the
    expected number of those is n (1 - (1 - 1/n)**l) for each row of l masks. On a GPU the steps are then
    decided in ``init``: a mask put back by hand between steps stays (`ReMDM` takes tokens back).

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import Ancestral, Cosine, sample
    >>> def model(tokens, t): return torch.zeros(*tokens.shape, 5)
    >>> result = sample(
    ...     model, (2, 8), mask_id=5, sampler=Ancestral(), schedule=Cosine(), steps=4, rng=0, cache=False
    ... )
    >>> result.nfe
    4
    """

    def probabilities(self, problem: Problem, times: Tensor) -> Tensor:
        """(alpha_s - alpha_t) / (1 - alpha_t) of each step."""
        return problem.schedule.unmask_probability(times[1:], times[:-1])


@dataclass(frozen=True)
class Euler(_GridSampler):
    """Euler steps of the reverse process: probability dt sigma(t) alpha / (1 - alpha), at most 1.

    First-order where `Ancestral` is exact in the clock (Lou et al., 2024; Ou et al., 2024). For schedules
    whose alpha is linear in t the two agree.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import Euler, sample
    >>> def model(tokens, t): return torch.zeros(*tokens.shape, 5)
    >>> sample(model, (2, 8), mask_id=5, sampler=Euler(), steps=4, rng=0, cache=False).nfe
    4
    """

    def probabilities(self, problem: Problem, times: Tensor) -> Tensor:
        """dt sigma(t) e^{-sigma_bar} / (1 - e^{-sigma_bar}) at the start of each step."""
        start = times[:-1]
        # sigma alpha = -alpha', finite also where alpha is 0 and sigma is not
        return (start - times[1:]) * problem.schedule.masked_rate(start) / problem.schedule.masked(start)
