"""`FirstHitting`: one position a call, exactly. `ParallelReveal`: several, with a bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from driftmax import random
from driftmax.discrete.events import advance, plan_events
from driftmax.discrete.problem import Problem, State

__all__ = ["FirstHitting", "ParallelReveal"]


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
    times = None if problem.time_independent else _hitting_times(problem, valid.sum(1))[:, ::together]
    return plan_events(problem, _random_order(problem, valid) // together, valid, times=times)


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
