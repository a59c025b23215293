"""`Plan`: draw every position's unmasking time first, then call the network only when a row has an event."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from driftmax import random
from driftmax.discrete.events import advance, dense_rank, plan_events
from driftmax.discrete.problem import Problem, State

__all__ = ["Plan"]


def _bins(problem: Problem, level: Tensor, steps: int) -> Tensor:
    """Step of the grid in which a position is unmasked whose share of the masked mass is `level` in (0, 1).

    From t_k to t_{k+1} go the levels in (g_{k+1}, g_k], g = masked(t) / masked(1); the last step takes all
    the rest.
    """
    masked = problem.schedule.masked(problem.schedule.grid(steps)).to(level.device)
    inner = (masked[1:-1] / masked[0]).flip(0)
    return steps - 1 - torch.searchsorted(inner, level)


@dataclass(frozen=True)
class Plan:
    """Unmasking times drawn up front, rows on their own clocks: ancestral sampling without needless calls.

    For a time-independent network a position's unmasking time does not depend on the tokens. Binned on the
    grid of ``steps`` steps, the law is exactly that of ancestral sampling (`Ancestral`) on that grid; with
    ``steps=None`` it is that of the continuous process (`FirstHitting`). The expected number of calls that a
    row of l masks needs is n (1 - (1 - 1/n)**l) for steps of equal probability (Ou et al., 2024), at most l;
    a batch needs the largest of its rows' numbers: a call serves each row's next event, whatever its time.

    Raises
    ------
    ValueError
        From ``init``, if the model is not time-independent.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import LogLinear, Plan, sample
    >>> def model(tokens, t=None): return torch.zeros(*tokens.shape, 5)
    >>> model.time_independent = True
    >>> result = sample(model, (2, 8), mask_id=5, sampler=Plan(), schedule=LogLinear(), steps=1000, rng=0)
    >>> result.nfe <= 8
    True
    """

    def init(self, problem: Problem) -> State:
        """Draw the plan. The number of calls, ``state.total``, is known from here on."""
        problem.need_time_independence("Plan")
        level = random.uniform(problem.shape, rng=problem.streams, dtype=torch.float64, device=problem.device)
        valid = problem.start() == problem.mask_id
        if problem.steps is None:
            # Falling levels: the time of a position falls with its level.
            event = level.masked_fill(~valid, -1.0).argsort(dim=1, descending=True).argsort(dim=1)
            return plan_events(problem, event, valid)
        step = _bins(problem, level, problem.steps)
        if not problem.cache:
            return plan_events(problem, step, valid, total=problem.steps)
        return plan_events(problem, dense_rank(step, valid), valid)

    def step(self, state: State) -> State:
        """One network call, for every row that has an event left."""
        return advance(state)
