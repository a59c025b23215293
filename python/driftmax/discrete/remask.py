"""Samplers that take tokens back: `ReMDM` (remasking diffusion) and `P2` (path planning)."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from driftmax.discrete.ancestral import (
    Reveals,
    decides_ahead,
    grouped,
    served,
    served_as_decided,
    step_uniforms,
)
from driftmax.discrete.outputs import evaluate, settled
from driftmax.discrete.problem import Problem, State, first_state
from driftmax.discrete.reveal import position_streams
from driftmax.discrete.rules import select
from driftmax.discrete.schedules import Schedule

__all__ = ["P2", "Cap", "ConfidenceBased", "Loop", "ReMDM", "Remasking", "Rescale"]


class Remasking(ABC):
    """How likely `ReMDM` takes a token back: sigma, at most min(1, (1 - alpha_s) / alpha_t).

    Examples
    --------
    >>> from driftmax.discrete import Cap, Remasking
    >>> isinstance(Cap(0.01), Remasking)
    True
    """

    @abstractmethod
    def sigma(self, times: Tensor, bound: Tensor) -> Tensor:
        """Probability of each step from the times it starts at and its upper bound, float64 [steps]."""

    def levels(self, schedule: Schedule, times: Tensor) -> tuple[Tensor, Tensor]:
        """At the grid's times [steps + 1]: the time to tell the network, and 1 - alpha."""
        return times, schedule.masked(times)

    def spread(self, sigma: float, confidence: Tensor, held: Tensor) -> Tensor:
        """Probability at each position, from the step's; `held` [B, L]: tokens that may be taken back."""
        return torch.full_like(confidence, sigma)

    #: Whether masks are revealed as if sigma were zero.
    keeps_rate = False
    #: Whether `spread` may look at what the network said; where not, the steps are decided beforehand.
    looks = True


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], not {eta}")


@dataclass(frozen=True)
class Cap(Remasking):
    """sigma = min(eta, bound): ReMDM's capped schedule (Wang et al., 2025).

    Parameters
    ----------
    eta : float
        0 remasks nothing.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import Cap
    >>> Cap(0.5).sigma(torch.ones(2), torch.tensor([0.25, 1.0])).tolist()
    [0.25, 0.5]
    """

    eta: float
    looks = False

    def __post_init__(self) -> None:
        _check_eta(self.eta)

    def sigma(self, times: Tensor, bound: Tensor) -> Tensor:
        return bound.clamp(max=self.eta)


@dataclass(frozen=True)
class Rescale(Remasking):
    """sigma = eta * bound: ReMDM's rescaled schedule (Wang et al., 2025).

    Parameters
    ----------
    eta : float
        0 remasks nothing; 1 the most that leaves the forward marginals as they are.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import Rescale
    >>> Rescale(0.5).sigma(torch.ones(2), torch.tensor([0.25, 1.0])).tolist()
    [0.125, 0.5]
    """

    eta: float
    looks = False

    def __post_init__(self) -> None:
        _check_eta(self.eta)

    def sigma(self, times: Tensor, bound: Tensor) -> Tensor:
        return self.eta * bound


@dataclass(frozen=True)
class ConfidenceBased(Remasking):
    """The base's sigma, shared out among the tokens: the less likely one was when drawn, the more.

    A token's share is exp(-psi) over the sum of these, psi its probability under the law it was drawn from;
    masks are revealed as if sigma were 0 (Wang et al., 2025; their code). So at most one token
    a step is taken back on average, and, unlike for `Cap` and `Rescale`, the forward marginals are not kept:
    the number of masks lies above the schedule's.

    Parameters
    ----------
    base : Remasking, default Rescale(1.0)
        As published: the bound itself.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import ConfidenceBased
    >>> held = torch.tensor([[True, True, False]])
    >>> confidence = torch.tensor([[0.5, 0.5, 1.0]])
    >>> ConfidenceBased().spread(0.5, confidence, held).tolist()
    [[0.25, 0.25, 0.0]]
    """

    base: Remasking = Rescale(1.0)
    keeps_rate = True

    def sigma(self, times: Tensor, bound: Tensor) -> Tensor:
        return self.base.sigma(times, bound)

    def levels(self, schedule: Schedule, times: Tensor) -> tuple[Tensor, Tensor]:
        return self.base.levels(schedule, times)

    def spread(self, sigma: float, confidence: Tensor, held: Tensor) -> Tensor:
        weight = torch.exp(-confidence) * held
        return sigma * weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)


@dataclass(frozen=True)
class Loop(Remasking):
    """Unmask to a level, hold it while tokens are taken back and drawn again, then unmask the rest.

    alpha rises to `alpha_on` until time `t_on`, stays until `t_off` with sigma = min(eta, bound), and rises
    to 1 at time 0; sigma is 0 outside (Wang et al., 2025). The schedule only says which time to
    tell a time-dependent network for a level. A step across `t_on` or `t_off` goes from the level at its
    start to that at its end (the published code lets the two sides of the kink disagree by a step).

    Parameters
    ----------
    eta : float, default 0.02
    t_on, t_off, alpha_on : float, default 0.55, 0.05, 0.9
        As published for 1024 steps. 1 > t_on >= t_off > 0.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import Linear, Loop
    >>> masked = Loop().levels(Linear(), torch.tensor([1.0, 0.55, 0.3, 0.05, 0.0], dtype=torch.float64))[1]
    >>> [round(level, 6) for level in masked.tolist()]
    [1.0, 0.1, 0.1, 0.1, 0.0]
    """

    eta: float = 0.02
    t_on: float = 0.55
    t_off: float = 0.05
    alpha_on: float = 0.9
    looks = False

    def __post_init__(self) -> None:
        _check_eta(self.eta)
        if not 1 > self.t_on >= self.t_off > 0:
            raise ValueError(f"need 1 > t_on >= t_off > 0, not {self.t_on} and {self.t_off}")
        if not 0 < self.alpha_on < 1:
            raise ValueError(f"alpha_on must be in (0, 1), not {self.alpha_on}")

    def sigma(self, times: Tensor, bound: Tensor) -> Tensor:
        inside = (times <= self.t_on) & (times > self.t_off)
        return bound.clamp(max=self.eta) * inside

    def levels(self, schedule: Schedule, times: Tensor) -> tuple[Tensor, Tensor]:
        before = 1.0 - (1.0 - times) * self.alpha_on / (1.0 - self.t_on)
        after = times * (1.0 - self.alpha_on) / self.t_off
        held = torch.full_like(times, 1.0 - self.alpha_on)
        masked = torch.where(times > self.t_on, before, torch.where(times > self.t_off, held, after))
        return schedule.time_of_masked(masked), masked


@dataclass(frozen=True)
class _ReMDMMemo:
    times: Tensor  # float32 [steps], for the network
    unmask: list[float]  # probability that a mask is revealed, of each step
    sigma: list[float]  # that a token is taken back
    fixed: Tensor  # bool [B, L]: the prompt
    confidence: Tensor  # float64 [B, L]: probability of a token when it was drawn
    reveals: Reveals | None  # positions of all steps' draws, where init can tell them


_CHUNK = 64  # steps whose reveals are listed together


def _listed(reveals: Iterator[Tensor], steps: int) -> Reveals:
    """The positions of each step, bool [B, L] each."""
    found: list[Tensor] = []
    for first in range(0, steps, _CHUNK):
        places = torch.stack(list(itertools.islice(reveals, _CHUNK))).nonzero()
        places[:, 0] += first
        found.append(places)
    step, row, position = torch.cat(found).unbind(1)
    return grouped(step, row, position, steps)


@dataclass(frozen=True)
class ReMDM:
    """Ancestral sampling that takes tokens back: the remasking diffusion model.

    Wang et al., "Remasking Discrete Diffusion Models with Inference-Time Scaling" (2025): from t to s
    a token goes back to the mask with probability sigma, and a mask is revealed with probability
    (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), where 0 <= sigma <= min(1, (1 - alpha_s) / alpha_t). For
    every such sigma the marginals of the forward process are kept, for as long as the network is exact. The
    prompt is never taken back. The last step reveals what is left, by draws (the published code takes the
    argmax there). With sigma 0 it is `Ancestral`, bitwise.

    Parameters
    ----------
    strategy : Remasking
        `Cap`, `Rescale`, `ConfidenceBased` or `Loop`.
    t_switch : float, default 1.0
        Take nothing back before this time (going down from 1).

    Notes
    -----
    With ``cache=True``, for time-independent networks, a call serves only rows in which a mask is revealed:
    taking tokens back needs no network. On a GPU all of that is drawn in ``init``, so that no step waits for
    the device to say whom its call serves; where the strategy looks at the network's output
    (`ConfidenceBased`), a step does wait with a cache, and without one draws wherever a mask may be revealed.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import Cap, ReMDM, sample
    >>> def model(tokens, t=None): return torch.zeros(*tokens.shape, 5)
    >>> model.time_independent = True
    >>> result = sample(model, (2, 8), mask_id=5, sampler=ReMDM(Cap(0.1)), steps=32, rng=0)
    >>> bool((result.tokens < 5).all()), result.nfe <= 32
    (True, True)
    """

    strategy: Remasking
    t_switch: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.strategy, Remasking):
            raise TypeError(f"strategy must be a Remasking, not {type(self.strategy).__name__}")
        if not 0 <= self.t_switch <= 1:
            raise ValueError(f"t_switch must be in [0, 1], not {self.t_switch}")

    def init(self, problem: Problem) -> State:
        """The state before the first step."""
        steps = problem.need_steps("ReMDM")
        if problem.cache:
            problem.need_time_independence("cache=True")
        times = problem.schedule.grid(steps)
        told, masked = self.strategy.levels(problem.schedule, times)
        before, after = masked[:-1], masked[1:]
        alpha = 1.0 - before
        bound = torch.where(alpha > 0, after / alpha, 1.0).clamp(0.0, 1.0)
        sigma = self.strategy.sigma(times[:-1], bound).clamp(0.0, 1.0).minimum(bound)
        sigma = sigma.masked_fill(times[:-1] > self.t_switch, 0.0)
        sigma[-1] = 0.0
        added = 0.0 if self.strategy.keeps_rate else sigma * alpha
        unmask = ((before - after + added) / before).nan_to_num(1.0).clamp(0.0, 1.0)
        unmask[-1] = 1.0  # the last step leaves no mask
        tokens = problem.start()
        confidence = torch.ones(problem.shape, dtype=torch.float64, device=tokens.device)
        memo = _ReMDMMemo(
            told[:-1].float().to(tokens.device),
            unmask.tolist(),
            sigma.tolist(),
            tokens != problem.mask_id,
            confidence,
            None,
        )
        state = first_state(problem, steps, memo)
        if not decides_ahead(problem) or (self.strategy.looks and problem.cache):
            return state
        decided = self._possible(state) if self.strategy.looks else self._decided(state)
        return replace(state, memo=replace(memo, reveals=decided))

    def _taken(self, state: State, u: Tensor, masked: Tensor) -> Tensor:
        """Tokens that go back to the mask in this step, bool [B, L]."""
        memo: _ReMDMMemo = state.memo
        held = ~masked & ~memo.fixed
        return held & (u < self.strategy.spread(memo.sigma[state.step], memo.confidence, held))

    def _decided(self, state: State) -> Reveals:
        """Run the masks ahead, without the network."""

        def reveals() -> Iterator[Tensor]:
            masked = state.masked
            for k in range(state.total):
                u = step_uniforms(state.problem, k)
                reveal = masked & (u < state.memo.unmask[k])
                masked = masked & ~reveal | self._taken(replace(state, step=k), u, masked)
                yield reveal

        return _listed(reveals(), state.total)

    def _possible(self, state: State) -> Reveals:
        """What each step reveals if it is masked by then."""
        problem, memo = state.problem, state.memo
        uniforms = (step_uniforms(problem, k) for k in range(state.total))
        reveals = (~memo.fixed & (u < unmask) for u, unmask in zip(uniforms, memo.unmask, strict=True))
        return _listed(reveals, state.total)

    @torch.no_grad()
    def step(self, state: State) -> State:
        """Take tokens back, reveal masks; if any is revealed, or without a cache, call the network."""
        problem, memo, k = state.problem, state.memo, state.step
        u = step_uniforms(problem, k)
        tokens = state.tokens.masked_fill(self._taken(state, u, state.masked), problem.mask_id)
        if memo.reveals is not None:
            call = served_as_decided(state)
        else:
            call = served(state, state.masked & (u < memo.unmask[k]))
        if call is None:
            return replace(state.without_call(), tokens=tokens)
        t = memo.times[k].expand(call.batch.shape[0])
        output = evaluate(problem, call.batch, t, call.local, call.position)
        drawn, stats = output.draw(position_streams(problem, call.row, call.position, k))
        probability = stats.log_prob.double().exp()
        confidence = memo.confidence.clone()
        revealed: int | Tensor = call.row.numel()
        if memo.reveals is not None and self.strategy.looks:  # not all of them need be masked
            held, before = tokens[call.row, call.position], confidence[call.row, call.position]
            new = state.masked[call.row, call.position]
            drawn, probability = torch.where(new, drawn, held), torch.where(new, probability, before)
            revealed = new.sum()
        tokens[call.row, call.position] = drawn
        confidence[call.row, call.position] = probability
        after = state.after(tokens, call.chosen, revealed)
        return replace(after, memo=replace(memo, confidence=confidence))


@dataclass(frozen=True)
class _P2Memo:
    fixed: Tensor  # bool [B, L]: the prompt
    keep: Tensor  # int64 [steps, B]: tokens in place after each step, besides the prompt
    rows: Tensor | None  # int64: rows with anything to do; None: all
    local: Tensor  # int64 [m]: row, within `rows`, of each position outside the prompt
    position: Tensor  # int64 [m]
    masks: tuple[int, ...]  # how many of them are masked before each step
    planner: Problem | None


@dataclass(frozen=True)
class P2:
    """Path planning: each call draws all masks, and the positions that look worst are (re)masked.

    Peng et al., "Path Planning for Masked Diffusion Model Sampling" (2025), algorithm 1. In step i of n, of
    the N positions outside the prompt floor(N (1 - kappa(i / n))) are masked: those with the smallest score.
    A mask's score is `eta` times the model's probability of the token drawn there (equation 7); a token's is
    the probability, given the sequence as it is, of that token (self-planning). Ties go to tokens in place,
    then to the lower position. The last step leaves no mask.

    The published code differs. There the *log*-probability of a token in place is multiplied by eta: the same
    for 0 and 1, but else a token of probability 1 is never taken back. It scores a position that holds a
    token by another token, drawn there afresh and then dropped, with the temperature and the noise of the
    draw in the score, and lets ties mask fewer positions than wanted. Here, as in the paper, the score is of
    the token that is in place, without noise, and counts hold.

    Parameters
    ----------
    eta : float, default 1.0
        Weight of the scores of masks: larger takes back more. 0 is the limit that never takes a token back
        (`Confidence` at the pace of kappa).
    kappa : callable, optional
        Share of tokens in place at progress 0 <= u <= 1: non-decreasing, 1 at 1. By default alpha of the
        schedule; with `Linear`, kappa(u) = u, the published default.
    planner : Denoiser, optional
        A time-independent network that scores the tokens in place, given the sequence with all masks filled
        by the draws (BERT-planning). One more call a step, of that network, which nfe does not count.

    Raises
    ------
    ValueError
        From ``init``, without `steps`, if a network depends on time, or on an unusable kappa.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import Linear, P2, sample
    >>> def model(tokens, t=None): return torch.arange(5.0).expand(*tokens.shape, 5)
    >>> model.time_independent = True
    >>> result = sample(model, (2, 8), mask_id=5, sampler=P2(), schedule=Linear(), steps=4, rng=0)
    >>> bool((result.tokens < 5).all()), result.nfe
    (True, 4)
    """

    eta: float = 1.0
    kappa: Callable[[float], float] | None = None
    planner: Any = None

    def __post_init__(self) -> None:
        if not 0 <= self.eta < math.inf:
            raise ValueError(f"eta must be at least 0 and finite, not {self.eta}")

    def _masked_shares(self, problem: Problem, steps: int) -> Tensor:
        """1 - kappa after each step, float64 [steps]."""
        if self.kappa is None:
            shares = problem.schedule.masked(problem.schedule.grid(steps)[1:]).clone()
            shares[-1] = 0.0
            return shares
        shares = 1.0 - torch.tensor([self.kappa((i + 1) / steps) for i in range(steps)], dtype=torch.float64)
        falling = bool((shares[1:] <= shares[:-1]).all())
        if not falling or not bool(((shares >= 0) & (shares <= 1)).all()) or float(shares[-1]) != 0.0:
            raise ValueError("kappa must be non-decreasing, in [0, 1], and 1 at 1")
        return shares

    def init(self, problem: Problem) -> State:
        """The state before the first call."""
        steps = problem.need_steps("P2")
        problem.need_time_independence("P2")
        planner = None
        if self.planner is not None:
            planner = replace(problem, model=self.planner)
            planner.need_time_independence("planner")
        fixed = problem.start() != problem.mask_id
        number = (~fixed).sum(1)
        shares = self._masked_shares(problem, steps).to(number.device)
        # A share such as 1 - 0.7 times ten falls short of 3 by rounding alone.
        keep = number - (number * shares[:, None] + 1e-9).floor().to(torch.int64)
        compact = problem.cache and not problem.whole_batch
        rows = number.nonzero()[:, 0] if compact and not bool(number.all()) else None
        idle = problem.cache and not bool(number.any())
        local, position = (~fixed if rows is None else ~fixed[rows]).nonzero(as_tuple=True)
        every = position.numel()
        masks = (every, *(every - kept for kept in keep[:-1].sum(1).tolist()))
        memo = _P2Memo(fixed, keep, rows, local, position, masks, planner)
        return first_state(problem, 0 if idle else steps, memo)

    @torch.no_grad()
    def step(self, state: State) -> State:
        """One network call; reveal and mask again."""
        problem, memo, k = state.problem, state.memo, state.step
        batch = state.tokens if memo.rows is None else state.tokens[memo.rows]
        rows = torch.arange(batch.shape[0], device=batch.device) if memo.rows is None else memo.rows
        masked, loose = batch == problem.mask_id, ~memo.fixed[rows]
        local, position = memo.local, memo.position
        # How many are masked is known, so that nothing is read on a device to tell them apart.
        empty = masked[local, position]
        parted = (~empty).to(torch.uint8).argsort(stable=True)
        many = int(empty.sum()) if empty.is_cpu else memo.masks[k]
        new, old = parted[:many], parted[many:]
        output = evaluate(problem, batch, None, local, position)
        streams = position_streams(problem, rows[local[new]], position[new], k)
        drawn, log_prob = output[new].draw_comparably(streams)
        filled = batch.clone()
        filled[local[new], position[new]] = drawn
        held = batch[local[old], position[old]]
        if memo.planner is None:
            belief = output[old].log_prob(held)
        else:
            belief = evaluate(memo.planner, filled, None, local[old], position[old]).log_prob(held)
        score = torch.zeros(batch.shape, dtype=torch.float64, device=batch.device)
        if self.eta > 0:
            score[local[new], position[new]] = settled(log_prob) + math.log(self.eta)
            score[local[old], position[old]] = settled(belief)
        else:  # tokens in place, at zero, win even ties
            score[local[new], position[new]] = settled(log_prob)
        keep = select(score, loose, memo.keep[k, rows], first=~masked)
        tokens = torch.where(keep | ~loose, filled, problem.mask_id)
        if memo.rows is not None:
            tokens = state.tokens.index_copy(0, memo.rows, tokens)
        revealed = (keep & masked).sum()
        return state.after(tokens, memo.rows, int(revealed) if revealed.is_cpu else revealed)
