"""Uniform-state diffusion: `UniformEuler` and `UniformAnalytic` go from uniform noise to data by ratios.

The forward process replaces tokens by uniform ones: rate matrix Q = sigma(t) (11^T / V - I), transitions
e**(noise Q) = e**-noise I + (1 - e**-noise) 11^T / V (Lou et al., "Discrete Diffusion Modeling by Estimating
the Ratios of the Data Distribution", SEDD, 2024). No token is a mask, and every position may change in every
step. The network is a `ScoreModel`. All positions step at once and independently, from float64 probabilities.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from driftmax import random
from driftmax.discrete.problem import Problem, State, first_state
from driftmax.discrete.reveal import forbid
from driftmax.discrete.schedules import Schedule
from driftmax.ops.categorical import categorical

__all__ = ["UniformAnalytic", "UniformEuler", "analytic_log_probabilities", "euler_log_probabilities"]

# Entries of a float64 table of probabilities at a time: 128 MiB, and a few of them live at once.
_ENTRIES = 2**24


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def euler_log_probabilities(log_scores: Tensor, tokens: Tensor, noise: float) -> Tensor:
    """Law of each position after an Euler step: noise / V times the ratio to go, the rest to stay.

    Parameters
    ----------
    log_scores : Tensor
        ``[..., L, V]``: log p_t(y) / p_t(x); the entry of the present token is not looked at.
    tokens : Tensor
        int64 ``[..., L]``.
    noise : float
        dt sigma(t), not negative.

    Returns
    -------
    Tensor
        float64 ``[..., L, V]``: log-probabilities, up to a constant where the clamp acts.

    Notes
    -----
    Lou et al. (2024), algorithm 2. Where the probabilities to go sum to more than 1, the one to stay is
    clamped at 0 and the others are taken relative to each other, as published.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete.uniform import euler_log_probabilities
    >>> law = euler_log_probabilities(torch.zeros(1, 4), torch.tensor([2]), 0.4).exp()
    >>> [round(p, 12) for p in law.flatten().tolist()]
    [0.1, 0.1, 0.7, 0.1]
    """
    own = tokens.unsqueeze(-1)
    go = log_scores.to(torch.float64, copy=True).add_(_log(noise / log_scores.shape[-1]))
    go.scatter_(-1, own, -math.inf)
    total = go.logsumexp(-1, keepdim=True).exp()
    return go.scatter_(-1, own, torch.log1p(-total.clamp(max=1.0)))


def analytic_log_probabilities(log_scores: Tensor, tokens: Tensor, noise: float) -> Tensor:
    """Law of each position after `noise` is taken away: the staggered score times the forward transition.

    Parameters
    ----------
    log_scores : Tensor
        ``[..., L, V]``: log p_t(y) / p_t(x); the entry of the present token is not looked at.
    tokens : Tensor
        int64 ``[..., L]``.
    noise : float
        sigma_bar(t) - sigma_bar(s), not negative.

    Returns
    -------
    Tensor
        float64 ``[..., L, V]``: log-probabilities up to a constant per position.

    Notes
    -----
    Tweedie's formula: p(y) is proportional to (e**(-noise Q) score)_y (e**(noise Q))_{xy} (Lou et al., 2024,
    theorem 4.2 and section 4.2). For uniform noise the first factor is e**noise (score_y - (1 - e**-noise)
    mean(score)). With exact scores it is a ratio of probabilities; an approximate network's may be negative,
    and is clamped at 0, as published. Exact for one position, whatever the noise.
    Rounding: about 2**-52 e**noise of a probability, 1e-7 for the longest step of `Geometric()`.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete.uniform import analytic_log_probabilities
    >>> law = analytic_log_probabilities(torch.zeros(1, 4), torch.tensor([2]), 0.4).softmax(-1)
    >>> [round(p, 4) for p in law.flatten().tolist()]
    [0.0824, 0.0824, 0.7527, 0.0824]
    """
    keep, vocab = math.exp(-noise), log_scores.shape[-1]
    move = -math.expm1(-noise) / vocab
    own = tokens.unsqueeze(-1)
    score = log_scores.to(torch.float64, copy=True).scatter_(-1, own, 0.0)
    score.sub_(score.amax(-1, keepdim=True)).exp_()  # all relative to the largest: nothing overflows
    earlier = score.div_(score.mean(-1, keepdim=True)).sub_(1.0 - keep).clamp_(min=0.0).log_()
    stay = earlier.gather(-1, own) + math.log(keep + move)
    return earlier.add_(_log(move)).scatter_(-1, own, stay)


@dataclass(frozen=True)
class _UniformSampler(ABC):
    """Steps down a time grid; a subclass says how much noise each takes, and by which kernel."""

    vocab_size: int

    def __post_init__(self) -> None:
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size must be at least 2, not {self.vocab_size}")

    @abstractmethod
    def noises(self, schedule: Schedule, times: Tensor) -> Tensor:
        """Noise of each step, float64 [steps], from the grid's times [steps + 1]."""

    @abstractmethod
    def transition(self, state: State, tokens: Tensor, log_scores: Tensor) -> Tensor:
        """The law that the step from `state` draws each position from, given scores at its time.

        float64 ``[B, L, V]`` log-probabilities up to a constant per position.
        """

    def init(self, problem: Problem) -> State:
        """Uniform noise wherever the prompt gives no token."""
        name = type(self).__name__
        steps = problem.need_steps(name)
        if problem.time_independent:
            raise ValueError(
                f"{name} needs a ScoreModel: ratios of uniform noise depend on time, and this model "
                "says that its output does not"
            )
        if 0 <= problem.mask_id < self.vocab_size:
            raise ValueError(
                f"{name} has no mask: mask_id only marks the positions of a prompt that are to be filled, so "
                f"it must be outside 0 ... {self.vocab_size - 1}, not {problem.mask_id}"
            )
        if (problem.temperature, problem.top_k, problem.top_p, problem.min_p) != (1.0, None, None, None):
            raise ValueError(f"{name} draws moves, not tokens: it takes no temperature and no filters")
        times = problem.schedule.grid(steps)
        noises = self.noises(problem.schedule, times)
        if not bool(torch.isfinite(noises).all()):
            raise ValueError(f"{name} needs finite noise at t = 1, which {problem.schedule} does not have")
        prompt = problem.prompt
        free = (
            problem.shape[0] * problem.shape[1] if prompt is None else int((prompt == problem.mask_id).sum())
        )
        state = first_state(problem, steps, (times.tolist(), noises.tolist(), free))
        u = random.uniform(problem.shape, rng=problem.streams, dtype=torch.float64, device=problem.device)
        banned = set(problem.banned or ())
        allowed = torch.tensor([v for v in range(self.vocab_size) if v not in banned], device=u.device)
        if not len(allowed):
            raise ValueError("every token is banned")
        noise = allowed[(u * len(allowed)).long().clamp(max=len(allowed) - 1)]
        return self._with_prompt(state, noise)

    def _with_prompt(self, state: State, tokens: Tensor) -> State:
        prompt = state.problem.prompt
        if prompt is not None:
            tokens = torch.where(prompt == state.problem.mask_id, tokens, prompt)
        return replace(state, tokens=tokens)

    @torch.no_grad()
    def step(self, state: State) -> State:
        """One network call; every position that the prompt leaves open is drawn anew."""
        problem, k = state.problem, state.step
        times, _, free = state.memo
        batch, length = problem.shape
        t = torch.full((batch,), times[k], dtype=torch.float32, device=state.tokens.device)
        log_scores = problem.model(state.tokens, t)
        if log_scores.shape != (batch, length, self.vocab_size):
            raise ValueError(
                f"the model returned log-scores of shape {tuple(log_scores.shape)}; wanted "
                f"{(batch, length, self.vocab_size)}"
            )
        streams, tokens = problem.streams.at(step=k), torch.empty_like(state.tokens)
        rows = torch.arange(batch, device=tokens.device)  # a slice of streams would come from the host
        together = max(1, _ENTRIES // max(1, length * self.vocab_size))
        for first in range(0, batch, together):
            part = slice(first, first + together)
            law = forbid(self.transition(state, state.tokens[part], log_scores[part]), problem)
            tokens[part] = categorical(law, rng=streams[rows[part]])
        return self._with_prompt(state.after(tokens, None, free), tokens)


@dataclass(frozen=True)
class UniformAnalytic(_UniformSampler):
    """Analytic (Tweedie) steps of uniform-state diffusion on an equally spaced grid.

    Parameters
    ----------
    vocab_size : int
        V. Tokens are 0 ... V - 1. `mask_id` of `sample` is no token: it marks the positions of a prompt that
        are to be filled, and must lie outside (V, or -1).

    Raises
    ------
    ValueError
        From ``init``: without `steps`, with a mask_id inside the vocabulary, a time-independent model, a
        temperature or filters (the draws are moves, not tokens), or a schedule whose noise at t = 1 is
        infinite.

    Notes
    -----
    Each step multiplies the staggered score with the forward transition, `analytic_log_probabilities`; the
    last one goes to no noise at all, whatever sigma_bar(0) is (the published denoising step, not counted
    extra). Positions of a step do not see each other: with exact scores the error falls as 1 / steps, and for
    a single position there is none. The start is uniform, not p_1: that costs at most L e**-sigma_bar(1) in
    total variation: L / 1000 for `LogLinear()`, L 2e-9 for `Geometric()`, with which the published uniform
    models are trained.

    A prompt's tokens are put back after each step, as published. Unlike with masks this is an approximation:
    the score then takes them for noisy tokens that happen to be these, not for the clean ones. On enumerated
    laws (V = 3, L = 2) the total variation from the conditional law is .03 to .16, at any number of steps.

    `banned` tokens are never drawn, `cache` and `whole_batch` make no difference: each call needs all rows.
    One network call and a few passes over ``[B, L, V]`` a step, in float64, by parts of 2**24 entries.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import Geometric, UniformAnalytic, sample
    >>> def model(tokens, t): return torch.zeros(*tokens.shape, 5)
    >>> sampler = UniformAnalytic(vocab_size=5)
    >>> result = sample(model, (2, 8), mask_id=-1, sampler=sampler, schedule=Geometric(), steps=4, rng=0)
    >>> result.nfe, int(result.tokens.max()) < 5
    (4, True)
    """

    def noises(self, schedule: Schedule, times: Tensor) -> Tensor:
        """sigma_bar(t) - sigma_bar(s) of each step; s = 0 counts as no noise."""
        level = schedule.sigma_bar(times)
        level[-1] = 0.0
        return level[:-1] - level[1:]

    def transition(self, state: State, tokens: Tensor, log_scores: Tensor) -> Tensor:
        """`analytic_log_probabilities` with the step's noise."""
        return analytic_log_probabilities(log_scores, tokens, state.memo[1][state.step])


@dataclass(frozen=True)
class UniformEuler(_UniformSampler):
    """Euler steps of the reverse rates of uniform-state diffusion, the last one analytic.

    Parameters, errors, prompts and costs are those of `UniformAnalytic`.

    Notes
    -----
    A position moves to token y with probability dt sigma(t) / V score_y (`euler_log_probabilities`; where
    these sum to more than 1 it certainly moves, as published). The last step is Tweedie's: it removes all
    noise left, as the published sampler's denoising step does. First-order, like `UniformAnalytic`: on an
    enumerated law (V = 3, L = 2, exact scores, `Geometric()`) the total variation is .190, .047, .0114 after
    4, 16, 64 steps, the analytic steps' .137, .036, .0087. With `LogLinear` the two differ by less than a
    tenth, and with many steps either may be ahead.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import LogLinear, UniformEuler, sample
    >>> def model(tokens, t): return torch.zeros(*tokens.shape, 5)
    >>> sampler = UniformEuler(vocab_size=5)
    >>> sample(model, (2, 8), mask_id=-1, sampler=sampler, schedule=LogLinear(), steps=4, rng=0).nfe
    4
    """

    def noises(self, schedule: Schedule, times: Tensor) -> Tensor:
        """dt sigma(t) at the start of each step; of the last one all that is left."""
        start = times[:-1]
        noise = (start - times[1:]) * schedule.sigma(start)
        noise[-1] = schedule.sigma_bar(start[-1])
        return noise

    def transition(self, state: State, tokens: Tensor, log_scores: Tensor) -> Tensor:
        """`euler_log_probabilities` with the step's noise, `analytic_log_probabilities` in the last step."""
        kernel = euler_log_probabilities if state.step < state.total - 1 else analytic_log_probabilities
        return kernel(log_scores, tokens, state.memo[1][state.step])
