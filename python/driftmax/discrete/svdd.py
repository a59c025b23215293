"""`SVDD`: guidance by a reward without its gradient. Propose candidates, value them, select or resample.

The target is the base sampler's law p tilted by the reward r: p(x) exp(r(x) / alpha) / Z. A value v(x_t)
estimates alpha log E[exp(r(x_0) / alpha) | x_t], and is r where no mask is left (Li et al., "Derivative-Free
Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding", 2024). `Argmax` and
`LocalSoftmax` select within a row as published; `SMC` weights whole histories, which is what converges to the
target with any value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from driftmax import random
from driftmax.discrete.ancestral import Ancestral, Euler
from driftmax.discrete.decoding import RandomOrder
from driftmax.discrete.distinct import Distinct, Known
from driftmax.discrete.events import Events
from driftmax.discrete.first_hitting import FirstHitting, ParallelReveal
from driftmax.discrete.plan import Plan
from driftmax.discrete.problem import Call, Log, Problem, Sampler, State
from driftmax.discrete.reveal import drawn_tokens, position_streams
from driftmax.discrete.uniform import UniformAnalytic, UniformEuler
from driftmax.errors import InvalidDistribution
from driftmax.ops.categorical import categorical
from driftmax.random import RowStreams

__all__ = ["SMC", "SVDD", "Argmax", "Completion", "LocalSoftmax", "Selected", "Selection"]

# Positions of the streams that no token has: the base sampler's draws use those of the sequence.
_SELECT, _SHUFFLE = 2**32 - 1, 2**32 - 2
_ON_A_GRID = (Ancestral, Euler, UniformAnalytic, UniformEuler)


class Selected(NamedTuple):
    """What a `Selection` decides, for groups of candidates; indices count within the group.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import Argmax
    >>> values = torch.tensor([[0.0, 3.0]], dtype=torch.float64)
    >>> Argmax().select(values, torch.zeros_like(values), 1.0, 1, None).parents
    tensor([[1, 1]])
    """

    parents: Tensor  # int64 [groups, n]: which candidate each one goes on from
    since: Tensor  # float64 [groups, n]: value of each one's ancestor when it was last selected
    outputs: Tensor  # int64 [groups, outputs]: candidates that stand for the group's rows
    ess: Tensor  # float64 [groups]: effective number of candidates under the weights


class Selection(Protocol):
    """Who goes on. ``shared`` makes one group of all rows; else each row's candidates are a group.

    ``select(values [groups, n], since [groups, n], alpha, outputs, streams)`` gets the new values, what
    `Selected.since` said last, and one stream per group.

    Examples
    --------
    >>> from driftmax.discrete import SMC, Selection
    >>> selection: Selection = SMC()
    """

    @property
    def shared(self) -> bool: ...

    def select(
        self, values: Tensor, since: Tensor, alpha: float, outputs: int, streams: RowStreams
    ) -> Selected: ...


def _effective(weights: Tensor) -> Tensor:
    """1 / sum w**2 of normalised weights [..., n]."""
    return 1.0 / weights.square().sum(-1)


@dataclass(frozen=True)
class Argmax:
    """All candidates go on from the one of largest value: the published default (its limit alpha -> 0).

    Climbs the reward: its law moves towards the sequences of largest reward, past the tilted law. On an
    enumerated one (V = 3, L = 3, first-hitting, exact value), total variation from the target is .37 for the
    base law, and .20, .26, .71, .86 for 2, 4, 16, 64 candidates; the limit is .87.

    Examples
    --------
    >>> from driftmax.discrete import Argmax
    >>> Argmax().shared
    False
    """

    @property
    def shared(self) -> bool:
        """Rows never mix."""
        return False

    def select(
        self, values: Tensor, since: Tensor, alpha: float, outputs: int, streams: RowStreams | None
    ) -> Selected:
        """The lowest index on ties."""
        winner = values.argmax(1, keepdim=True)
        return Selected(winner.expand_as(values), since, winner, _effective((values / alpha).softmax(1)))


@dataclass(frozen=True)
class LocalSoftmax:
    """All candidates go on from one drawn with probability proportional to exp(v / alpha): as published.

    Li et al. (2024), algorithm 1. As the number of candidates grows it converges to the tilted law if the
    value is exact, and to another law if it is not (on the law of `Argmax`, with the mean reward for a value,
    total variation .086): how much the candidates of a step are worth together is forgotten.

    Examples
    --------
    >>> from driftmax.discrete import LocalSoftmax
    >>> LocalSoftmax().shared
    False
    """

    @property
    def shared(self) -> bool:
        """Rows never mix."""
        return False

    def select(
        self, values: Tensor, since: Tensor, alpha: float, outputs: int, streams: RowStreams
    ) -> Selected:
        """One categorical draw a row."""
        logits = values / alpha
        winner = categorical(logits, rng=streams).unsqueeze(1)
        return Selected(winner.expand_as(values), since, winner, _effective(logits.softmax(1)))


@dataclass(frozen=True)
class SMC:
    """Sequential Monte Carlo: weights exp((v_new - v_old) / alpha), accumulated, and resampling when needed.

    The weights of a history multiply to exp(r / alpha), so that the law converges to the tilted one for any
    value; a better value only makes the weights more even.

    Parameters
    ----------
    threshold : float, default 0.5
        Resample a group (systematically) when its effective sample size falls below this share of its
        candidates. 0 never does: importance sampling. 1 does whenever the weights differ.
    shared : bool, default False
        False: each row has its own population, of which one member is drawn in the end; rows are independent,
        and converge as `candidates` grows. True: the rows' candidates are one population, and the rows are a
        systematic draw from it: their empirical law converges as rows times candidates grow, so that
        candidates=1 costs no more than unguided sampling, but the rows depend on each other.

    Notes
    -----
    Systematic resampling: Douc, Cappé and Moulines, "Comparison of resampling schemes for particle
    filtering" (2005). Before the last step the rows of ``state.tokens`` are draws from the weighted
    population too.

    Examples
    --------
    >>> from driftmax.discrete import SMC
    >>> SMC(threshold=0.3)
    SMC(threshold=0.3, shared=False)
    """

    threshold: float = 0.5
    shared: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], not {self.threshold}")

    def select(
        self, values: Tensor, since: Tensor, alpha: float, outputs: int, streams: RowStreams
    ) -> Selected:
        """Systematic resampling of the groups whose effective sample size is too small."""
        groups, n = values.shape
        weights = ((values - since) / alpha).softmax(1)
        ess = _effective(weights)
        u = random.uniform((groups, 3), rng=streams, dtype=torch.float64, device=values.device)
        again = (ess < self.threshold * n)[:, None]
        parents = torch.arange(n, device=values.device).expand(groups, n)
        parents = torch.where(again, _systematic(weights, n, u[:, :1]), parents)
        since = torch.where(again, values.gather(1, parents), since)
        drawn = _systematic(weights, outputs, u[:, 1:2])
        # Systematic draws come in the population's order; after a random turn each row has the whole law
        turn = (u[:, 2:] * outputs).long() + torch.arange(outputs, device=values.device)
        return Selected(parents, since, drawn.gather(1, turn % outputs), ess)


def _systematic(weights: Tensor, draws: int, u: Tensor) -> Tensor:
    """Indices, rising, at (0 ... draws - 1 + u) / draws of the cumulative weights; u [groups, 1]."""
    total = weights.cumsum(1)
    at = (torch.arange(draws, device=weights.device) + u) / draws * total[:, -1:]
    # An index of weight 0 has an empty interval; the last one must not catch what rounding puts at the end
    last = weights.shape[1] - 1 - (weights.flip(1) > 0).to(torch.int8).argmax(1, keepdim=True)
    return torch.minimum(torch.searchsorted(total, at, right=True), last)


@dataclass(frozen=True)
class Completion:
    """Value of a partly masked sequence: the reward of its one-shot completion by the network.

    Every mask gets the most probable token, in one call: the published estimate without training (SVDD-PM).
    It errs where the tokens depend on each other; `SMC` corrects for that.

    Parameters
    ----------
    reward : callable
        ``reward(tokens) -> [N]``, tokens int64 ``[N, L]`` without masks.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import SVDD, Completion, FirstHitting, sample
    >>> def model(tokens, t=None): return torch.zeros(*tokens.shape, 5)
    >>> model.time_independent = True
    >>> value = Completion(lambda tokens: (tokens == 3).sum(1))
    >>> sampler = SVDD(FirstHitting(), value, candidates=8, alpha=0.2)
    >>> result = sample(model, (2, 4), mask_id=5, sampler=sampler, rng=0)
    >>> int((result.tokens == 3).sum()) > 4, result.nfe  # one for the start, one for each value but the last
    (True, 4)
    """

    reward: Callable[[Tensor], Tensor]

    def complete(self, problem: Problem, tokens: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor]:
        """(tokens without masks, int64 indices of the rows that went through the network)."""
        row, position = (tokens == problem.mask_id).nonzero(as_tuple=True)
        if not row.numel():
            return tokens, row
        rows, local = torch.unique_consecutive(row, return_inverse=True)
        if problem.whole_batch:
            rows, local = torch.arange(len(tokens), device=tokens.device), row
        greedy = replace(problem, temperature=0.0, top_k=None, top_p=None, min_p=None)
        streams = position_streams(problem, row, position)  # not drawn from at temperature 0
        batch = tokens if len(rows) == len(tokens) else tokens[rows]
        times = None if t is None else t[rows]
        completed = tokens.clone()
        completed[row, position] = drawn_tokens(greedy, batch, times, local, position, streams)
        return completed, rows


Value: TypeAlias = Callable[[Tensor, Tensor | None], Tensor] | Completion


class _Plans(NamedTuple):
    """When a planned sampler (`Plan`, `FirstHitting`, ...) serves each position of each row."""

    event: Tensor  # int64 [N, L]; -1: never
    times: Tensor | None  # float64 [N, events]
    exchangeable: bool  # whether, given the past, the masked positions are all alike


class _Population(NamedTuple):
    inner: State  # of the base sampler, with rows * candidates rows
    since: Tensor  # float64 [groups, n]
    times: list[float] | None  # of the grid, where the base sampler has one
    known: Known | None  # the network's output for candidates


def _candidates(problem: Problem, m: int) -> Problem:
    """`problem` with m candidates a row: candidate j of row id i has row id i m + j."""
    streams = problem.streams
    rows = streams.rows.repeat_interleave(m) * m + torch.arange(m).repeat(len(streams)).to(streams.rows)
    seed = streams.seed
    if isinstance(seed, Tensor) and seed.numel() > 1:
        seed = seed.repeat_interleave(m)
    prompt = None if problem.prompt is None else problem.prompt.repeat_interleave(m, 0)
    shape = (problem.shape[0] * m, problem.shape[1])
    return replace(problem, shape=shape, prompt=prompt, rng=RowStreams(seed, rows))


def _with_plans(base: Sampler, inner: State) -> State:
    """Event lists, which belong to rows for good, as tables that can follow the rows around."""
    events = inner.memo
    if not isinstance(events, Events):
        return inner
    sizes = torch.tensor(events.bounds).diff().to(events.rows.device)
    table = torch.full_like(inner.tokens, -1)
    table[events.rows, events.positions] = torch.arange(len(sizes), device=sizes.device).repeat_interleave(
        sizes
    )
    alike = isinstance(base, (FirstHitting, ParallelReveal, Plan))
    if isinstance(base, RandomOrder):
        alike = base.block_length is None
    return replace(inner, memo=_Plans(table, events.times, alike))


def _propose(base: Sampler, inner: State) -> State:
    """One step of the base sampler for all candidates, with noise that no earlier step has used."""
    plans, problem, e = inner.memo, inner.problem, inner.step
    if not isinstance(plans, _Plans):
        return base.step(inner)
    row, position = (plans.event == e).nonzero(as_tuple=True)
    if problem.cache and not row.numel():
        return inner.without_call()
    order, local, active = None, row, len(inner.tokens)
    if problem.cache and not problem.whole_batch:
        order, local = torch.unique_consecutive(row, return_inverse=True)
        active = len(order)
    streams = position_streams(problem, row, position, e)
    bounds = [0] * (e + 1) + [row.numel()]
    events = Events(row, local, position, streams, bounds, order, [active] * (e + 1), plans.times)
    return replace(base.step(replace(inner, memo=events)), memo=plans)


def _inherit(inner: State, parents: Tensor) -> State:
    """The candidates go on from `parents` [N]; what a plan has ahead of it is dealt to the masks anew.

    Where, given the past, the masked positions are exchangeable, dealing them the events to come anew leaves
    the law as it is, and lets candidates of one parent differ in where they go next.
    """
    plans, problem, e = inner.memo, inner.problem, inner.step - 1
    tokens = inner.tokens[parents]
    if not isinstance(plans, _Plans) or inner.step >= inner.total:
        return replace(inner, tokens=tokens)
    event = plans.event[parents]
    times = None if plans.times is None else plans.times[parents]
    if not plans.exchangeable:
        return replace(inner, tokens=tokens, memo=_Plans(event, times, False))
    ahead = event > e
    streams = problem.streams.at(step=e, positions=torch.full((len(tokens),), _SHUFFLE))
    keys = random.uniform(event.shape, rng=streams, dtype=torch.float64, device=event.device)
    here = (~ahead).to(torch.int8).argsort(stable=True)
    there = keys.masked_fill(~ahead, 2.0).argsort(stable=True)
    event = event.scatter(1, there, event.gather(1, here))
    return replace(inner, tokens=tokens, memo=_Plans(event, times, True))


def _times(inner: State, grid: list[float] | None) -> Tensor | None:
    """Time of each candidate after the last step, float32 [N]; None where the base sampler has no clock."""
    memo = inner.memo
    if isinstance(memo, _Plans):
        return None if memo.times is None else memo.times[:, inner.step - 1].to(torch.float32)
    assert grid is not None
    return torch.full(
        inner.tokens.shape[:1], grid[inner.step], dtype=torch.float32, device=inner.tokens.device
    )


def _networked(before: Tensor, inner: State, valued: Tensor, network: Distinct | None) -> tuple[Tensor, int]:
    """(calls that each candidate was in, int64 [N]; calls) of this step; `before` is the count so far."""
    seen = inner.row_nfe - before
    calls = 1 + bool(valued.numel())
    if network is not None:
        proposed = seen.nonzero().flatten()
        seen = torch.zeros_like(seen).index_add(0, proposed, network.ran[0].to(seen.dtype))
        valued = valued[network.ran[1]] if valued.numel() else valued
        calls = sum(bool(ran.any()) for ran in network.ran)
    return seen.index_add(0, valued, torch.ones_like(valued)), calls


@dataclass(frozen=True)
class SVDD:
    """A sampler guided by a reward: M candidates a row and step from a base sampler, valued and selected.

    Parameters
    ----------
    base : Sampler
        `FirstHitting`, `ParallelReveal`, `Plan`, `RandomOrder`, `Ancestral`, `Euler`, `UniformAnalytic` or
        `UniformEuler`.
    value : callable or Completion
        ``value(tokens, t) -> [N]``, larger is better: tokens int64 ``[N, L]``, some masked, `t` float32
        ``[N]`` their times, or None where the base sampler has no clock. Where no mask is left it must be the
        reward. -inf forbids a sequence. Or a `Completion` of a reward.
    candidates : int
        M. Candidate j of row id i draws from row id i M + j, which must be below 2**32.
    alpha : float, default 1.0
        Temperature of the tilt: the target is p(x) exp(r(x) / alpha) / Z. `Argmax` uses it only to report.
    selection : Selection, default SMC()
        `SMC`, or the published `LocalSoftmax` or `Argmax`.

    Raises
    ------
    ValueError, TypeError
        On parameters out of range, a base sampler that cannot be stepped this way, a value of wrong shape,
        and a shared population for rows with different prompts.
    InvalidDistribution
        If a value is NaN or +inf, or all candidates of a group are forbidden; names the row.

    Notes
    -----
    Cost: M rows in every network call of the base sampler, and M more for each `Completion`, at most. With
    `cache` and a time-independent network, rows that are copies of one another go through it once, and those
    of a completion not again for the proposal that follows: with one parent for all candidates, a step needs
    no call but the completion's. ``row_nfe`` counts the candidates of a row that went through the network,
    ``nfe`` the calls. ``history`` has an entry for every step that selects: the rows that went through the
    network in it, and ``ess``, float64 ``[B]`` (``[1]`` if shared), the effective sample size of the
    candidates under the weights of that step.

    A row's tokens depend on its stream alone, however the batch is split, unless the population is shared.
    Candidates copied from one parent get new positions to reveal (what is ahead is exchangeable, so that the
    law is the same; within blocks they keep the parent's) but keep its times, where the network asks for
    times. With `cache` a step in which no candidate changes selects nothing; without, it does, and the tokens
    may differ. The values are looked at on the host.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import SVDD, Ancestral, sample
    >>> def model(tokens, t=None): return torch.zeros(*tokens.shape, 5)
    >>> model.time_independent = True
    >>> def threes(tokens, t): return (tokens == 3).sum(1)
    >>> sampler = SVDD(Ancestral(), threes, candidates=16, alpha=0.2)
    >>> result = sample(model, (2, 6), mask_id=5, sampler=sampler, steps=6, rng=0)
    >>> int((result.tokens == 3).sum()) > 6, result.history[0].ess.shape
    (True, torch.Size([2]))
    """

    base: Sampler
    value: Value
    candidates: int
    alpha: float = 1.0
    selection: Selection = SMC()

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError(f"candidates must be at least 1, not {self.candidates}")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be positive and finite, not {self.alpha}")
        if not callable(self.value) and not isinstance(self.value, Completion):
            raise TypeError(f"value must be callable or a Completion, not {type(self.value).__name__}")

    def init(self, problem: Problem) -> State:
        """The candidates before the first step."""
        prompt = problem.prompt
        if self.selection.shared and prompt is not None and not bool((prompt == prompt[:1]).all()):
            raise ValueError("a shared population needs one prompt for all rows")
        # Rows will change places, so what Ancestral and Euler decide must not be drawn beforehand.
        begin = self.base.start if isinstance(self.base, (Ancestral, Euler)) else self.base.init
        inner = _with_plans(self.base, begin(_candidates(problem, self.candidates)))
        # Rows of a plan can change places, and so can rows that share a grid and keep no memory of their own.
        if not isinstance(inner.memo, _Plans) and not isinstance(self.base, _ON_A_GRID):
            raise TypeError(f"SVDD cannot step {type(self.base).__name__}: its rows cannot change places")
        groups = 1 if self.selection.shared else problem.shape[0]
        since = inner.row_nfe.new_zeros(
            (groups, inner.row_nfe.numel() // max(groups, 1)), dtype=torch.float64
        )
        tokens = inner.tokens[:: self.candidates]
        count = inner.row_nfe[:: self.candidates]
        grid = None
        if not isinstance(inner.memo, _Plans):
            grid = inner.problem.schedule.grid(inner.total).tolist()
        return State(problem, tokens, 0, inner.total, 0, count, None, _Population(inner, since, grid, None))

    @torch.no_grad()
    def step(self, state: State) -> State:
        """Propose, value, select: one call of the network for all candidates, and what the value asks."""
        population: _Population = state.memo
        before, problem = population.inner, state.problem
        network = None
        if problem.cache and problem.time_independent and not problem.whole_batch:
            network = Distinct(problem.model, population.known)
            before = replace(before, problem=replace(before.problem, model=network))
        inner = _propose(self.base, before)
        if inner.nfe == before.nfe:  # no candidate has changed
            return replace(state.without_call(), memo=population._replace(inner=inner))
        values, valued = self._values(inner, population.times)
        groups, n = population.since.shape
        values = values.view(groups, n)
        streams = inner.problem.streams[:: max(n, 1)]
        streams = streams.at(step=state.step, positions=torch.full((groups,), _SELECT))
        outputs = problem.shape[0] // max(groups, 1)
        chosen = self.selection.select(values, population.since, self.alpha, outputs, streams)
        first = torch.arange(groups, device=values.device)[:, None] * n
        tokens = inner.tokens[(first + chosen.outputs).flatten()]
        seen, calls = _networked(before.row_nfe, inner, valued, network)
        assert inner.log is not None  # of the call just made
        call = inner.log.call
        after = _inherit(inner, (first + chosen.parents).flatten())
        return replace(
            state,
            tokens=tokens,
            step=state.step + 1,
            nfe=state.nfe + calls,
            row_nfe=state.row_nfe + seen.view(-1, self.candidates).sum(1),
            log=Log(Call(call.step, int(seen.sum()), call.revealed, chosen.ess), state.log),
            memo=_Population(
                after, chosen.since, population.times, None if network is None else network.known
            ),
        )

    def _values(self, inner: State, grid: list[float] | None) -> tuple[Tensor, Tensor]:
        """(float64 [N], rows that went through the network for it), checked."""
        tokens, t = inner.tokens, _times(inner, grid)
        rows = tokens.new_zeros(0)
        raw: Any
        if isinstance(self.value, Completion):
            completed, rows = self.value.complete(inner.problem, tokens, t)
            raw = self.value.reward(completed)
        else:
            raw = self.value(tokens, t)
        if not isinstance(raw, Tensor) or raw.shape != (len(tokens),):
            got = tuple(raw.shape) if isinstance(raw, Tensor) else type(raw).__name__
            raise ValueError(f"the value must be a tensor of shape {(len(tokens),)}, not {got}")
        values = raw.to(torch.float64)
        group = len(tokens) if self.selection.shared else self.candidates
        bad = (values.isnan() | values.isposinf()).view(-1, group).any(1)
        dead = values.isneginf().view(-1, group).all(1)
        wrong = (bad | dead).nonzero().flatten().tolist()
        if wrong:
            reason = "a value is NaN or +inf" if bool(bad[wrong[0]]) else "every candidate is forbidden"
            raise InvalidDistribution(f"row {wrong[0]}: {reason}", wrong[0])
        return values, rows
