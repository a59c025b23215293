"""`SVDD`: guidance by a reward without its gradient. Propose candidates, value them, select or resample.

The target is the base sampler's law p tilted by the reward r: p(x) exp(r(x) / alpha) / Z. A value v(x_t)
estimates alpha log E[exp(r(x_0) / alpha) | x_t], and is r where no mask is left (Li et al., "Derivative-Free
Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding", 2024). `Argmax` and
`LocalSoftmax` select within a row as published; `SMC` weights whole histories, which is what converges to the
target with any value.
"""

from __future__ import annotations

import itertools
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
from driftmax.discrete.reading import Reading
from driftmax.discrete.reveal import drawn_tokens, position_streams
from driftmax.discrete.rules import true_positions
from driftmax.discrete.uniform import UniformAnalytic, UniformEuler
from driftmax.errors import InvalidDistribution
from driftmax.ops.categorical import categorical
from driftmax.random import RowStreams

__all__ = ["SMC", "SVDD", "Argmax", "Completion", "LocalSoftmax", "Selected", "Selection"]

# Positions of the streams that no token has: the base sampler's draws use those of the sequence.
_SELECT, _SHUFFLE = 2**32 - 1, 2**32 - 2
_ON_A_GRID = (Ancestral, Euler, UniformAnalytic, UniformEuler)
_NO_NUMBER, _ALL_FORBIDDEN = 1, 2  # what can be wrong with a group's values
_REASONS = {_NO_NUMBER: "a value is NaN or +inf", _ALL_FORBIDDEN: "every candidate is forbidden"}


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

    def complete(
        self, problem: Problem, tokens: Tensor, t: Tensor | None, most: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(tokens without masks, int64 indices of the rows that went through the network).

        Without a cache all rows do, unless there cannot be a mask: there are `most` at most, where given.
        """
        masked = tokens == problem.mask_id
        row, position = true_positions(masked, None if problem.cache else most)
        if not row.numel() and (problem.cache or not most):
            return tokens, row
        if problem.whole_batch or not problem.cache:
            rows, local = torch.arange(len(tokens), device=tokens.device), row
        else:
            rows, local = torch.unique_consecutive(row, return_inverse=True)
        greedy = replace(problem, temperature=0.0, top_k=None, top_p=None, min_p=None)
        streams = position_streams(problem, row, position)  # not drawn from at temperature 0
        batch = tokens if len(rows) == len(tokens) else tokens[rows]
        times = None if t is None else t[rows]
        completed = tokens.clone()
        completed[row, position] = drawn_tokens(greedy, batch, times, local, position, streams)
        # Of fewer masks than `most`, some come again; of none, a position without one.
        return torch.where(masked, completed, tokens), rows


Value: TypeAlias = Callable[[Tensor, Tensor | None], Tensor] | Completion


class _Plans(NamedTuple):
    """When a planned sampler (`Plan`, `FirstHitting`, ...) serves each position of each row."""

    event: Tensor  # int64 [N, L]; -1: never
    times: Tensor | None  # float64 [N, events]
    exchangeable: bool  # whether, given the past, the masked positions are all alike
    sizes: tuple[int, ...] | None  # positions of each event in all rows, if no change of rows changes that


class _Population(NamedTuple):
    inner: State  # of the base sampler, with rows * candidates rows
    since: Tensor  # float64 [groups, n]
    times: list[float] | None  # of the grid, where the base sampler has one
    known: Known | None  # the network's output for candidates
    loose: int  # positions outside the prompt, in all rows
    waiting: tuple[Reading, ...]  # what is wrong with the values of steps that the host has not looked at


def _candidates(problem: Problem, m: int) -> Problem:
    """`problem` with m candidates a row: candidate j of row id i has row id i m + j."""
    streams = problem.streams
    ids = streams.rows.to(problem.device)
    rows = ids.repeat_interleave(m) * m + torch.arange(m, device=ids.device).repeat(len(streams))
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
    sizes = [end - begin for begin, end in itertools.pairwise(events.bounds)]
    number = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
    table = torch.full_like(inner.tokens, -1)
    table[events.rows, events.positions] = number.to(table.device)
    alike = isinstance(base, (FirstHitting, ParallelReveal, Plan))
    if isinstance(base, RandomOrder):
        alike = base.block_length is None
    # Rows of as many masks have as many positions in each event; only a plan in bins draws how many.
    fixed = not (isinstance(base, Plan) and inner.problem.steps is not None)
    return replace(inner, memo=_Plans(table, events.times, alike, tuple(sizes) if fixed else None))


def _propose(base: Sampler, inner: State) -> State:
    """One step of the base sampler for all candidates, with noise that no earlier step has used."""
    plans, problem, e = inner.memo, inner.problem, inner.step
    if not isinstance(plans, _Plans):
        return base.step(inner)
    many = None if problem.cache or plans.sizes is None else plans.sizes[e]
    row, position = true_positions(plans.event == e, many)
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
        return replace(inner, tokens=tokens, memo=plans._replace(event=event, times=times))
    ahead = event > e
    streams = problem.streams.at(step=e, positions=_at(_SHUFFLE, len(tokens), tokens.device))
    keys = random.uniform(event.shape, rng=streams, dtype=torch.float64, device=event.device)
    here = (~ahead).to(torch.int8).argsort(stable=True)
    there = keys.masked_fill(~ahead, 2.0).argsort(stable=True)
    event = event.scatter(1, there, event.gather(1, here))
    return replace(inner, tokens=tokens, memo=plans._replace(event=event, times=times))


def _at(position: int, rows: int, device: torch.device) -> Tensor:
    """A position of each row's stream."""
    return torch.full((rows,), position, device=device)


def _most_masks(inner: State, loose: int) -> int:
    """How many masks the candidates have at most, from what the host knows."""
    if inner.step >= inner.total:
        return 0
    if isinstance(inner.memo, _Plans) and inner.memo.sizes is not None:
        return sum(inner.memo.sizes[inner.step :])
    return loose


def _times(inner: State, grid: list[float] | None) -> Tensor | None:
    """Time of each candidate after the last step, float32 [N]; None where the base sampler has no clock."""
    memo = inner.memo
    if isinstance(memo, _Plans):
        return None if memo.times is None else memo.times[:, inner.step - 1].to(torch.float32)
    assert grid is not None
    return torch.full(
        inner.tokens.shape[:1], grid[inner.step], dtype=torch.float32, device=inner.tokens.device
    )


def _networked(
    before: Tensor, inner: State, valued: Tensor, network: Distinct | None
) -> tuple[Tensor, int, int]:
    """(calls that each candidate was in, int64 [N]; their sum; calls) of this step, after `before`."""
    seen = inner.row_nfe - before
    calls = 1 + bool(valued.numel())
    if network is None:
        assert inner.log is not None  # of the call just made
        total = inner.log.call.rows + valued.numel()
    else:
        proposed = seen.nonzero().flatten()
        seen = torch.zeros_like(seen).index_add(0, proposed, network.ran[0].to(seen.dtype))
        valued = valued[network.ran[1]] if valued.numel() else valued
        calls = sum(bool(ran.any()) for ran in network.ran)
        total = int(seen.sum()) + valued.numel()
    return seen.index_add(0, valued, torch.ones_like(valued)), total, calls


def _checked(values: Tensor, waiting: tuple[Reading, ...], late: bool) -> tuple[Tensor, tuple[Reading, ...]]:
    """`values` [groups, n] that can be selected by, and what the host has still to look at.

    Where `late`, that is this step's: it has been given the next one when it looks.
    """
    bad = (values.isnan() | values.isposinf()).any(1)
    wrong = bad * _NO_NUMBER + (values.isneginf().all(1) & ~bad) * _ALL_FORBIDDEN
    waiting = (*waiting, Reading(wrong))
    while len(waiting) > late:
        for row, code in enumerate(waiting[0].get()):
            if code:
                raise InvalidDistribution(f"row {row}: {_REASONS[code]}", row)
        waiting = waiting[1:]
    return values.masked_fill((wrong > 0)[:, None], 0.0), waiting


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
    may differ.

    With a cache the host reads which rows its next call has. Without one, on a GPU, it only looks whether the
    values are numbers, one step later and after the last one, unless the base sampler is `Plan` in bins, or
    `Ancestral` or `Euler` with a network that exposes a head: there it reads which positions they reveal.

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
        loose = int((inner.tokens == problem.mask_id).sum())
        population = _Population(inner, since, grid, None, loose, ())
        return State(problem, tokens, 0, inner.total, 0, count, None, population)

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
        values, valued = self._values(inner, population)
        groups, n = population.since.shape
        late = not (values.is_cpu or problem.cache or inner.done)
        values, waiting = _checked(values.view(groups, n), population.waiting, late)
        streams = inner.problem.streams[:: max(n, 1)]
        streams = streams.at(step=state.step, positions=_at(_SELECT, groups, values.device))
        outputs = problem.shape[0] // max(groups, 1)
        chosen = self.selection.select(values, population.since, self.alpha, outputs, streams)
        first = torch.arange(groups, device=values.device)[:, None] * n
        tokens = inner.tokens[(first + chosen.outputs).flatten()]
        seen, total, calls = _networked(before.row_nfe, inner, valued, network)
        assert inner.log is not None  # of the call just made
        call = inner.log.call
        after = _inherit(inner, (first + chosen.parents).flatten())
        return replace(
            state,
            tokens=tokens,
            step=state.step + 1,
            nfe=state.nfe + calls,
            row_nfe=state.row_nfe + seen.view(-1, self.candidates).sum(1),
            log=Log(Call(call.step, total, call.revealed, chosen.ess), state.log),
            memo=population._replace(
                inner=after,
                since=chosen.since,
                known=None if network is None else network.known,
                waiting=waiting,
            ),
        )

    def _values(self, inner: State, population: _Population) -> tuple[Tensor, Tensor]:
        """(float64 [N], rows that went through the network for it)."""
        tokens, t = inner.tokens, _times(inner, population.times)
        rows = tokens.new_zeros(0)
        raw: Any
        if isinstance(self.value, Completion):
            most = _most_masks(inner, population.loose)
            completed, rows = self.value.complete(inner.problem, tokens, t, most)
            raw = self.value.reward(completed)
        else:
            raw = self.value(tokens, t)
        if not isinstance(raw, Tensor) or raw.shape != (len(tokens),):
            got = tuple(raw.shape) if isinstance(raw, Tensor) else type(raw).__name__
            raise ValueError(f"the value must be a tensor of shape {(len(tokens),)}, not {got}")
        return raw.to(torch.float64), rows
