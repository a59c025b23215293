"""What the decoding rules share: paces, selection of positions, blocks, and the step.

One step of every rule: call the network, draw a token at each masked position of the row's current block,
score the draws, keep the best.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from driftmax.discrete.outputs import Output, evaluate
from driftmax.discrete.problem import Problem, State, first_state
from driftmax.discrete.reading import Reading
from driftmax.discrete.reveal import position_streams
from driftmax.ops.transfer import transfer
from driftmax.random import RowStreams

__all__ = [
    "Adaptive",
    "Counted",
    "Draws",
    "DreamPace",
    "EvenPace",
    "Pace",
    "Prefix",
    "Quota",
    "Rule",
    "block_numbers",
    "check_block_length",
    "first_mask",
    "ranking",
    "select",
    "transfer_counts",
]


class Pace(Protocol):
    """How many tokens each of a block's steps reveals.

    Examples
    --------
    >>> from driftmax.discrete import EvenPace, Pace
    >>> pace: Pace = EvenPace()
    """

    def counts(self, masks: int, steps: int) -> list[int]:
        """`steps` numbers that add up to `masks`."""
        ...


@dataclass(frozen=True)
class EvenPace:
    """As even as can be, the larger numbers first: LLaDA's (Nie et al., 2025).

    Examples
    --------
    >>> from driftmax.discrete import EvenPace
    >>> EvenPace().counts(10, 4)
    [3, 3, 2, 2]
    """

    def counts(self, masks: int, steps: int) -> list[int]:
        """Tokens of each step."""
        base, more = divmod(masks, steps)
        return [base + 1] * more + [base] * (steps - more)


@dataclass(frozen=True)
class DreamPace:
    """Of the masks left at time t, the whole part of the share 1 - s / t; the last step takes the rest.

    Dream's (Ye et al., 2025), on `steps` equal steps from 1 down to `eps`; in float64, for each row by
    itself. (The published code rounds in float32 and takes the mean number of masks of the batch.)

    Parameters
    ----------
    eps : float, default 1e-3
        The last time.

    Examples
    --------
    >>> from driftmax.discrete import DreamPace
    >>> DreamPace().counts(10, 4)
    [2, 2, 2, 4]
    """

    eps: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.eps < 1:
            raise ValueError(f"eps must be in [0, 1), not {self.eps}")

    def counts(self, masks: int, steps: int) -> list[int]:
        """Tokens of each step."""
        times = [1.0 - (1.0 - self.eps) * k / steps for k in range(steps + 1)]
        counts, left = [], masks
        for k in range(steps - 1):
            counts.append(int(left * (1.0 - times[k + 1] / times[k])))
            left -= counts[-1]
        return [*counts, left]


def ranking(score: Tensor, eligible: Tensor, first: Tensor | None = None) -> Tensor:
    """Positions of each row by falling score, int64 [n, L]: eligible ones first.

    Ties go to the positions in `first`, if given, then to the lower position.
    """
    # An eligible score of -inf must still come before what is not eligible.
    score = score.clamp(min=torch.finfo(score.dtype).min).masked_fill(~eligible, -torch.inf)
    if first is None:
        return score.argsort(dim=1, descending=True, stable=True)
    before = first.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return before.gather(1, score.gather(1, before).argsort(dim=1, descending=True, stable=True))


def select(score: Tensor, eligible: Tensor, count: Tensor, first: Tensor | None = None) -> Tensor:
    """The `count[i]` eligible positions of row i with the largest scores, bool [n, L]; ties as in `ranking`.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete.rules import select
    >>> score = torch.tensor([[0.1, 0.9, 0.9, 0.5]])
    >>> select(score, torch.tensor([[True, True, True, False]]), torch.tensor([1]))
    tensor([[False,  True, False, False]])
    """
    order = ranking(score, eligible, first)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return eligible & (rank < count[:, None])


class Draws(NamedTuple):
    """A token for each of m positions, how much to prefer it, and the entropy of the law it is from."""

    tokens: Tensor  # int64 [m]
    score: Tensor  # float64 [m]
    entropy: Tensor  # float64 [m], nats


class Quota(NamedTuple):
    """How many of the best draws of each row to reveal, as `driftmax.transfer` takes it."""

    number: Tensor | None = None  # int64 [n]
    threshold: float | None = None  # all draws with at least this score, and always the best


def spread(values: Tensor, where: Tensor, fill: float) -> Tensor:
    """`values` [m] at the m positions of `where` [n, L], in their order, and `fill` elsewhere."""
    full = torch.full(where.shape, fill, dtype=values.dtype, device=where.device)
    return full.masked_scatter_(where, values)


@dataclass(frozen=True)
class _Memo:
    """What a rule keeps: where blocks are counted from; if counted, how many tokens each call reveals."""

    start: Tensor  # int64 [B, 1]: the row's first mask
    counts: Tensor | None = None  # int64 [B, calls], 0 after a row's last
    order: Tensor | None = None  # int64 [B]: rows by falling number of calls; None: all rows in every call
    active: tuple[int, ...] = ()  # rows of each call
    eligible: tuple[int, ...] = ()  # if counted: masks of the current blocks before each call
    revealed: tuple[int, ...] = ()  # if counted: tokens that each call reveals
    waiting: tuple[Reading, ...] = ()  # if adaptive: masks left after the last steps, oldest first
    left: tuple[int, ...] = ()  # if adaptive: masks of each row when last heard of


def true_positions(where: Tensor, many: int | None) -> tuple[Tensor, Tensor]:
    """Rows and positions at which `where` [n, L] holds, in order.

    `many` is how many there are, and then nothing is read on the host; None if that has to be looked at. If
    it is too large, they come again from the first one on.
    """
    if many is None or where.is_cpu:
        row, position = where.nonzero(as_tuple=True)
        return row, position
    flat = where.flatten().to(torch.uint8).argsort(descending=True, stable=True)[:many]
    flat = flat[torch.arange(many, device=flat.device) % where.sum().clamp(min=1)]
    return flat // where.shape[1], flat % where.shape[1]


def check_block_length(block_length: int | None) -> None:
    """Raise unless it is None or at least 1."""
    if block_length is not None and block_length < 1:
        raise ValueError(f"block_length must be at least 1, not {block_length}")


def first_mask(masked: Tensor) -> Tensor:
    """The first masked position of each row, int64 [n, 1]; 0 where there is none."""
    if masked.shape[1] == 0:
        return torch.zeros(masked.shape[0], 1, dtype=torch.int64, device=masked.device)
    return masked.to(torch.uint8).argmax(1, keepdim=True)


def block_numbers(start: Tensor, length: int, block_length: int | None) -> Tensor:
    """Number of the block that each position is in, int64 [n, L]; blocks are counted from `start`."""
    position = torch.arange(length, device=start.device) - start
    return (
        torch.zeros_like(position)
        if block_length is None
        else torch.div(position, block_length, rounding_mode="floor")
    )


def _current_block(masked: Tensor, start: Tensor, block_length: int | None) -> Tensor:
    """Masked positions of the first block that has any, bool [n, L]."""
    if block_length is None or masked.shape[1] == 0:
        return masked
    block = block_numbers(start, masked.shape[1], block_length)
    return masked & (block == block.gather(1, first_mask(masked)))


def _lefts(part: Sequence[int]) -> list[tuple[int, int]]:
    """(what is left before it, itself) of each number of a list."""
    lefts = itertools.accumulate(reversed(part))
    return list(zip(reversed(list(lefts)), part, strict=True))


def transfer_counts(
    problem: Problem, start: Tensor, block_length: int | None, pace: Pace
) -> tuple[Tensor, Tensor]:
    """Tokens that each call of each row reveals, and the masks its block has before: int64 [B, calls] each.

    None is 0 before the row's last.
    """
    valid = problem.start() == problem.mask_id
    block = block_numbers(start, problem.shape[1], block_length).clamp(min=0)
    blocks = int(block.max()) + 1 if block.numel() else 0
    masks = torch.zeros(problem.shape[0], blocks, dtype=torch.int64, device=block.device)
    masks.scatter_add_(1, block, valid.to(torch.int64))
    counts = functools.cache(pace.counts)
    rows, before = [], []
    for row in masks.tolist():
        filled = [number for number in row if number]
        if problem.steps is not None and problem.steps < len(filled):
            raise ValueError(
                f"{len(filled)} blocks with masks need at least as many steps, not {problem.steps}"
            )
        shares = filled  # one token a call
        if problem.steps is not None and filled:
            shares = EvenPace().counts(problem.steps, len(filled))
        # A step that reveals nothing changes nothing: its call is left out.
        paced = [counts(number, steps) for number, steps in zip(filled, shares, strict=True)]
        rows.append([number for part in paced for number in part if number])
        before.append([left for part in paced for left, number in _lefts(part) if number])
    calls = max(map(len, rows), default=0)

    def padded(lists: list[list[int]]) -> Tensor:
        equal = [row + [0] * (calls - len(row)) for row in lists]
        return torch.tensor(equal, dtype=torch.int64, device=block.device).view(problem.shape[0], calls)

    return padded(rows), padded(before)


@dataclass(frozen=True)
class Rule(ABC):
    """A decoding rule: a subclass scores draws and says how many of the best to reveal."""

    block_length: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_block_length(self.block_length)

    @abstractmethod
    def _draw(self, output: Output, streams: RowStreams) -> Draws:
        """Draw at every position of `output` and score what came."""

    @abstractmethod
    def _rows(self, state: State) -> Tensor | None:
        """Rows of the next call, int64; None: all."""

    def _preference(self, state: State, rows: Tensor, score: Tensor) -> Tensor:
        """What orders the positions, float64 [n, L], from the scores of the draws."""
        return score

    @abstractmethod
    def _quota(self, state: State, rows: Tensor, eligible: Tensor, score: Tensor, draws: Draws) -> Quota:
        """How many of the `eligible` positions [n, L] to reveal, by falling `score` [n, L]."""

    def _expected(self, state: State) -> tuple[int | None, int | None]:
        """(eligible positions at most, tokens that will be revealed) of the next call, where known before."""
        return None, None

    def _finish(self, state: State) -> State:
        return state

    @torch.no_grad()
    def step(self, state: State) -> State:
        """One network call, for the rows that have masks left, and the tokens it reveals."""
        chosen = self._rows(state)
        batch = state.tokens if chosen is None else state.tokens[chosen]
        rows = torch.arange(batch.shape[0], device=batch.device) if chosen is None else chosen
        many, revealed = self._expected(state)
        filled, moved = self.reveal(state, rows, batch, many, state.step)
        tokens = filled if chosen is None else state.tokens.index_copy(0, chosen, filled)
        came = moved.sum() if revealed is None else revealed
        if moved.is_cpu:
            came = int(came)
        return self._finish(state.after(tokens, chosen, came))

    def reveal(
        self, state: State, rows: Tensor, batch: Tensor, many: int | None, step: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """One network call on `batch` [n, L], the tokens of `rows`: (tokens after it, where they are new).

        At most `many` positions are eligible, if that is known; `step` is that of the streams.
        """
        problem = state.problem
        eligible = _current_block(batch == problem.mask_id, state.memo.start[rows], self.block_length)
        many = None if many is None else min(many, eligible.numel())
        local, position = true_positions(eligible, many)
        output = evaluate(problem, batch, None, local, position)
        draws = self._draw(output, position_streams(problem, rows[local], position, step))
        score = self._preference(state, rows, spread(draws.score, eligible, -torch.inf))
        quota = self._quota(state, rows, eligible, score, draws)
        filled = batch.clone()
        moved = transfer(
            filled,
            spread(draws.tokens, eligible, problem.mask_id),
            score,
            quota.number,
            mask_id=problem.mask_id,
            threshold=quota.threshold,
            eligible=eligible,
        )
        return filled, moved


@dataclass(frozen=True)
class Counted(Rule):
    """A rule that reveals a number of tokens fixed beforehand by `steps`, so that the calls are known."""

    pace: Pace = field(default=EvenPace(), kw_only=True)

    def init(self, problem: Problem) -> State:
        """The state before the first call. The number of calls, ``state.total``, is known from here on."""
        problem.need_time_independence(type(self).__name__)
        start = first_mask(problem.start() == problem.mask_id)
        counts, left = transfer_counts(problem, start, self.block_length, self.pace)
        calls = (counts > 0).sum(1)
        sizes = tuple(left.sum(0).tolist()), tuple(counts.sum(0).tolist())
        if problem.cache and not problem.whole_batch:
            order = calls.argsort(descending=True, stable=True)
            active = tuple((counts > 0).sum(0).tolist())
        else:
            order, active = None, ()
        return first_state(problem, counts.shape[1], _Memo(start, counts, order, active, *sizes))

    def _rows(self, state: State) -> Tensor | None:
        order: Tensor | None = state.memo.order
        return None if order is None else order[: state.memo.active[state.step]]

    def _quota(self, state: State, rows: Tensor, eligible: Tensor, score: Tensor, draws: Draws) -> Quota:
        return Quota(number=state.memo.counts[rows, state.step])

    def _expected(self, state: State) -> tuple[int | None, int | None]:
        return state.memo.eligible[state.step], state.memo.revealed[state.step]


@dataclass(frozen=True)
class Adaptive(Rule):
    """A rule that reveals as many tokens as the network's output allows, at least one.

    Whether there is another call is known when the last one's tokens are. That is the one thing read on the
    host in a step: how many masks each row has left.
    """

    lookahead: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lookahead < 0:
            raise ValueError(f"lookahead must be at least 0, not {self.lookahead}")

    def init(self, problem: Problem) -> State:
        """The state before the first call. ``state.total`` is the most calls there can be."""
        name = type(self).__name__
        problem.need_time_independence(name)
        if problem.steps is not None:
            raise ValueError(f"{name} finds out itself how many calls to make: leave steps out")
        masked = problem.start() == problem.mask_id
        left = tuple(masked.sum(1).tolist())
        return first_state(problem, max(left, default=0), _Memo(first_mask(masked), left=left))

    def _rows(self, state: State) -> Tensor | None:
        if not state.problem.cache or state.problem.whole_batch:
            return None
        idle = ~state.masked.any(1)
        if idle.is_cpu:
            return (~idle).nonzero()[:, 0]
        active = sum(number > 0 for number in state.memo.left)
        return idle.to(torch.uint8).argsort(stable=True)[:active]

    def _expected(self, state: State) -> tuple[int | None, int | None]:
        most = state.problem.shape[1] if self.block_length is None else self.block_length
        return sum(min(number, most) for number in state.memo.left), None

    def _finish(self, state: State) -> State:
        memo: _Memo = state.memo
        waiting = (*memo.waiting, Reading(state.masked.sum(1)))
        behind = 0 if state.tokens.is_cpu else self.lookahead  # nothing to gain where nothing waits
        left = memo.left
        while len(waiting) > behind:
            left, waiting = tuple(waiting[0].get()), waiting[1:]
        total = state.total if any(left) else state.step
        return replace(state, total=total, memo=replace(memo, waiting=waiting, left=left))


@dataclass(frozen=True)
class Prefix(Adaptive):
    """An adaptive rule that looks at the draws by falling score and stops at the first it does not allow."""

    @abstractmethod
    def _allowed(self, score: Tensor, entropy: Tensor) -> Tensor:
        """For positions by falling score, [n, L]: may the best be revealed, up to and with this one?"""

    def _quota(self, state: State, rows: Tensor, eligible: Tensor, score: Tensor, draws: Draws) -> Quota:
        order = ranking(score, eligible)
        entropy = spread(draws.entropy, eligible, 0.0).gather(1, order)
        allowed = self._allowed(score.gather(1, order), entropy) & eligible.gather(1, order)
        return Quota(number=allowed.to(torch.int64).cumprod(1).sum(1).clamp(min=1))
