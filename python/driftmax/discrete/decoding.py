"""Decoding rules of masked diffusion language models: the network's output says which positions to reveal.

Most rules trade the law of the diffusion process for fewer calls or likelier sequences. What keeps it, for a
network that is exact: one token a call, at a position chosen without a look at the draws (`RandomOrder`,
`EntropyOrder`, `MarginOrder` with ``steps=None``). A score of the draw itself (`Confidence`, `MaskGitPlus`)
favours likely tokens even so. Several tokens in one call do not see each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from driftmax import random
from driftmax.discrete.events import advance, plan_events
from driftmax.discrete.outputs import Output, settled
from driftmax.discrete.problem import Problem, State
from driftmax.discrete.rules import (
    Adaptive,
    Counted,
    Draws,
    DreamPace,
    EvenPace,
    Pace,
    Prefix,
    Quota,
    block_numbers,
    check_block_length,
    first_mask,
    transfer_counts,
)
from driftmax.random import RowStreams

__all__ = [
    "Confidence",
    "DreamPace",
    "EntropyBounded",
    "EntropyOrder",
    "EvenPace",
    "Factor",
    "MarginOrder",
    "MaskGitPlus",
    "Pace",
    "RandomOrder",
    "Threshold",
]


def _most_confident(output: Output, streams: RowStreams) -> Draws:
    """Score a draw by the model's log-probability of it."""
    tokens, stats, log_prob = output.draw_with_confidence(streams)
    return Draws(tokens, settled(log_prob), settled(stats.entropy))


@dataclass(frozen=True)
class Confidence(Counted):
    """Reveal the draws to which the model gives the largest probability: LLaDA's ``low_confidence``.

    Nie et al., "Large Language Diffusion Models" (2025). The confidence of a draw is its probability under
    ``softmax(logits)``: before temperature and filters, which shape the draw only. (With temperature other
    than 0 and 1, or filters, that takes a second pass over the logits.) Ties go to the lower position;
    log-probabilities within 2**-20 of zero tie. Likely tokens come out more often than the model says, even
    at one token a call: choosing among draws is not drawing.

    The published code draws with ``exp(logits) / (-log u)**T`` in float64 at every position of the sequence.
    Its law is softmax(logits / T), but exp overflows for logits above 709. Here the draw is
    `driftmax.categorical`, at the masked positions of the current block only.

    Parameters
    ----------
    block_length : int or None, default None
        Reveal block after block (semi-autoregressive): blocks of that many positions, counted from the row's
        first mask. None: one block. The `steps` of `sample` are shared out evenly among the row's blocks
        that have masks, the first ones getting what is left over, and there must be one for each.
    pace : Pace, default EvenPace()
        How the tokens of a block are shared out among its steps. Steps that reveal nothing are left out.
        With ``steps=None``, one token a call.

    Raises
    ------
    ValueError
        From ``init``, if the model is not time-independent or there are fewer steps than blocks.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import Confidence, sample
    >>> def model(tokens, t=None): return torch.arange(5.0).expand(*tokens.shape, 5)
    >>> model.time_independent = True
    >>> result = sample(
    ...     model, (1, 8), mask_id=5, sampler=Confidence(block_length=4), steps=4, temperature=0
    ... )
    >>> result.nfe, result.tokens.tolist()
    (4, [[4, 4, 4, 4, 4, 4, 4, 4]])
    """

    def _draw(self, output: Output, streams: RowStreams) -> Draws:
        return _most_confident(output, streams)


@dataclass(frozen=True)
class _DreamOrder(Counted):
    """Dream's rules: the score is a property of the law drawn from, after temperature and filters."""

    order_temperature: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.order_temperature >= 0:
            raise ValueError(f"order_temperature must be at least 0, not {self.order_temperature}")

    def _preference(self, state: State, rows: Tensor, score: Tensor) -> Tensor:
        if self.order_temperature == 0:
            return score
        streams = state.problem.streams[rows].at(step=state.step)
        noise = random.gumbel(score.shape, rng=streams, dtype=torch.float64, device=score.device)
        return score / self.order_temperature + noise


@dataclass(frozen=True)
class EntropyOrder(_DreamOrder):
    """Reveal where the law drawn from has the least entropy: Dream's ``entropy`` (Ye et al., 2025).

    The published code adds 1e-10 inside the logarithm; here the entropy is exact to the rounding that
    `driftmax.categorical` states. Ties go to the lower position; entropies below 2**-20 tie.

    Parameters
    ----------
    block_length, pace
        As for `Confidence`. Dream's own pace is `DreamPace`.
    order_temperature : float, default 0.0
        Dream's ``alg_temp``: 0 takes the best positions; above, positions are drawn without replacement with
        weights exp(score / order_temperature), the score being minus the entropy in nats. Drawn by Gumbel
        top-k (Kool et al., 2019): the published softmax in the logits' dtype and ``multinomial`` fail once
        fewer weights than wanted are above zero.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import DreamPace, EntropyOrder, sample
    >>> def model(tokens, t=None): return torch.zeros(*tokens.shape, 5)
    >>> model.time_independent = True
    >>> sample(model, (2, 8), mask_id=5, sampler=EntropyOrder(pace=DreamPace()), steps=4, rng=0).nfe
    4
    """

    def _draw(self, output: Output, streams: RowStreams) -> Draws:
        tokens, stats = output.draw(streams)
        entropy = settled(stats.entropy)
        return Draws(tokens, -entropy, entropy)


@dataclass(frozen=True)
class MarginOrder(_DreamOrder):
    """Reveal where the two most probable tokens are furthest apart: Dream's ``topk_margin``.

    Kim et al., "Train for the Worst, Plan for the Best" (2025); Ye et al. (2025). The score is the
    difference of the two largest probabilities of the law drawn from, whichever token was drawn.

    Parameters
    ----------
    block_length, pace, order_temperature
        As for `EntropyOrder`; the score is the margin.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import MarginOrder, sample
    >>> def model(tokens, t=None): return torch.zeros(*tokens.shape, 5)
    >>> model.time_independent = True
    >>> sample(model, (2, 8), mask_id=5, sampler=MarginOrder(), steps=4, rng=0).nfe
    4
    """

    def _draw(self, output: Output, streams: RowStreams) -> Draws:
        tokens, stats = output.draw(streams)
        return Draws(tokens, stats.margin.double(), settled(stats.entropy))


@dataclass(frozen=True)
class MaskGitPlus(_DreamOrder):
    """Reveal the draws of largest probability under the law drawn from: Dream's ``maskgit_plus``.

    After Chang et al., "MaskGIT" (2022); Ye et al. (2025). It differs from `Confidence` in that temperature
    and filters count.

    Parameters
    ----------
    block_length, pace, order_temperature
        As for `EntropyOrder`; the score is the probability.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import MaskGitPlus, sample
    >>> def model(tokens, t=None): return torch.zeros(*tokens.shape, 5)
    >>> model.time_independent = True
    >>> sample(model, (2, 8), mask_id=5, sampler=MaskGitPlus(), steps=4, rng=0).nfe
    4
    """

    def _draw(self, output: Output, streams: RowStreams) -> Draws:
        tokens, stats = output.draw(streams)
        # exp in float64: near 1, float32 would tie what the log-probability still tells apart.
        return Draws(tokens, settled(stats.log_prob).exp(), settled(stats.entropy))


@dataclass(frozen=True)
class RandomOrder:
    """Reveal random positions, a fixed number a call: LLaDA's ``random`` (Nie et al., 2025).

    The order does not depend on the network, so it is drawn first, and the network's head runs only where a
    token is revealed. With ``steps=None`` and one block it is `FirstHitting`, bitwise.

    Parameters
    ----------
    block_length, pace
        As for `Confidence`.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import RandomOrder, sample
    >>> def model(tokens, t=None): return torch.zeros(*tokens.shape, 5)
    >>> model.time_independent = True
    >>> sample(model, (2, 8), mask_id=5, sampler=RandomOrder(block_length=4), steps=4, rng=0).nfe
    4
    """

    block_length: int | None = field(default=None, kw_only=True)
    pace: Pace = field(default=EvenPace(), kw_only=True)

    def __post_init__(self) -> None:
        check_block_length(self.block_length)

    def init(self, problem: Problem) -> State:
        """Draw the order. The number of calls, ``state.total``, is known from here on."""
        problem.need_time_independence("RandomOrder")
        valid = problem.start() == problem.mask_id
        start = first_mask(valid)
        done = transfer_counts(problem, start, self.block_length, self.pace)[0].cumsum(1)
        keys = random.uniform(problem.shape, rng=problem.streams, dtype=torch.float64, device=problem.device)
        keys = keys + block_numbers(start, problem.shape[1], self.block_length)
        place = keys.masked_fill(~valid, torch.inf).argsort(dim=1).argsort(dim=1)
        return plan_events(problem, torch.searchsorted(done, place, right=True), valid)

    def step(self, state: State) -> State:
        """One network call, for every row that has a mask left."""
        return advance(state)


@dataclass(frozen=True)
class Threshold(Adaptive):
    """Reveal every draw to which the model gives at least `threshold`, and always the best: Fast-dLLM.

    Wu et al., "Fast-dLLM: Training-free Acceleration of Diffusion LLM" (2025), algorithm 1. Confidence as in
    `Confidence`: of the draw, as in the published code; the paper's, the largest probability, is the same at
    temperature 0. (The paper wants more than the threshold, its code at least that.) Each row makes as many
    calls as it needs, at most one for each mask.

    Parameters
    ----------
    threshold : float, default 0.9
        A probability. Above 1 is one token a call; 0 reveals a whole block.
    block_length : int or None, default None
        As for `Confidence`.
    lookahead : int, default 0
        On a GPU: give it up to that many further calls before hearing whether a mask is left. 0 waits for the
        device after each call, so that none is made in vain; with more it has the next call to go on with,
        and at most so many come to nothing at the end. The tokens are the same. The CPU ignores it. A
        `CapturedLoop` needs no hearing, and makes no call in vain.

    Raises
    ------
    ValueError
        From ``init``, if the model is not time-independent or `steps` is given.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import Threshold, sample
    >>> def model(tokens, t=None): return 9 * torch.eye(5)[:4].expand(len(tokens), -1, -1)
    >>> model.time_independent = True
    >>> result = sample(model, (1, 4), mask_id=5, sampler=Threshold(0.9), temperature=0)
    >>> result.nfe, result.tokens.tolist()
    (1, [[0, 1, 2, 3]])
    """

    threshold: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be at least 0, not {self.threshold}")

    def _draw(self, output: Output, streams: RowStreams) -> Draws:
        return _most_confident(output, streams)

    def _quota(self, state: State, rows: Tensor, eligible: Tensor, score: Tensor, draws: Draws) -> Quota:
        return Quota(threshold=math.log(self.threshold) if self.threshold > 0 else -math.inf)


@dataclass(frozen=True)
class Factor(Prefix):
    """Reveal the n most confident draws, n the largest with (n + 1) (1 - c_n) <= factor: Fast-dLLM.

    Wu et al. (2025), algorithm 1: c_n is the n-th largest confidence, and at least one token is revealed.
    (The paper has < for <=, its code <=.) The published code, once it finds that only the last of the
    block's masks fails, reveals that one too; here, as in the paper, it stays masked.

    Parameters
    ----------
    factor : float, default 1.0
        Larger is bolder. 0 takes one token a call, or those of probability 1.
    block_length : int or None, default None
        As for `Confidence`.
    lookahead : int, default 0
        As for `Threshold`.

    Raises
    ------
    ValueError
        From ``init``, if the model is not time-independent or `steps` is given.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import Factor, sample
    >>> def model(tokens, t=None): return torch.zeros(*tokens.shape, 5)
    >>> model.time_independent = True
    >>> sample(model, (1, 8), mask_id=5, sampler=Factor(1.0), rng=0).nfe
    8
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.factor >= 0:
            raise ValueError(f"factor must be at least 0, not {self.factor}")

    def _draw(self, output: Output, streams: RowStreams) -> Draws:
        return _most_confident(output, streams)

    def _allowed(self, score: Tensor, entropy: Tensor) -> Tensor:
        n = torch.arange(1, score.shape[1] + 1, device=score.device)
        return (n + 1) * -torch.expm1(score) <= self.factor


@dataclass(frozen=True)
class EntropyBounded(Prefix):
    """Reveal the most draws whose entropies add up to at most `gamma` beside the largest: the EB-sampler.

    Ben-Hamu et al., "Accelerated Sampling from Masked Diffusion Models via Entropy Bounded Unmasking" (2025):
    equation 2: positions by `order`; the largest set of first ones with sum H - max H <= gamma, at least one.
    The left side bounds the information that tokens drawn together have about each other. H is the entropy
    of the law drawn from, after temperature and filters; at temperature 0, of the model's.

    Parameters
    ----------
    gamma : float, default 0.1
        Nats. 0 reveals one token a call, or those already certain.
    order : rule, default EntropyOrder()
        Which rule's score orders the positions: `EntropyOrder`, `MarginOrder`, `MaskGitPlus` or
        `Confidence`, each with its settings at their defaults. The paper's confidence is the largest
        probability: at temperature 0, as in its experiments, that of the draw.
    block_length : int or None, default None
        As for `Confidence`.
    lookahead : int, default 0
        As for `Threshold`.

    Raises
    ------
    ValueError
        From ``init``, if the model is not time-independent or `steps` is given.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import EntropyBounded, sample
    >>> def model(tokens, t=None): return torch.zeros(*tokens.shape, 5)
    >>> model.time_independent = True
    >>> sample(model, (1, 8), mask_id=5, sampler=EntropyBounded(1.7), rng=0).nfe  # log 5 = 1.61 nats each
    4
    """

    gamma: float = 0.1
    order: EntropyOrder | MarginOrder | MaskGitPlus | Confidence = EntropyOrder()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gamma >= 0:
            raise ValueError(f"gamma must be at least 0, not {self.gamma}")
        if self.order != type(self.order)():
            raise ValueError("order gives the order of positions and nothing else: leave its settings alone")

    def _draw(self, output: Output, streams: RowStreams) -> Draws:
        return self.order._draw(output, streams)

    def _allowed(self, score: Tensor, entropy: Tensor) -> Tensor:
        return entropy.cumsum(1) - entropy.cummax(1).values <= self.gamma
