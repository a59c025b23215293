"""One network call, read at single positions: draws with statistics, and the model's own probabilities.

For the samplers that look at the network's output before they choose: decoding rules, ReMDM, P2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from driftmax.discrete.problem import Problem
from driftmax.discrete.reveal import checked_logits, exposed_head, forbid, from_head, pick
from driftmax.ops.categorical import CategoricalStats, categorical
from driftmax.random import RowStreams

__all__ = ["RESOLUTION", "Output", "evaluate", "settled"]

# Entropies and log-probabilities of certain draws come out within 2e-7 of zero, differently on each backend.
RESOLUTION = 2.0**-20


def settled(values: Tensor) -> Tensor:
    """Statistics in float64, zero where they are within rounding of it: certain draws tie exactly."""
    values = values.double()
    return values.masked_fill(values.abs() < RESOLUTION, 0.0)


@dataclass(frozen=True)
class Output:
    """Output of the network at m positions, forbidden tokens at -inf.

    Logits ``[m, V]``, or features ``[m, D]`` and a head where the model exposes them.
    """

    problem: Problem
    values: Tensor  # logits, or features where there is a head
    head: tuple[Tensor, Tensor | None] | None

    def __getitem__(self, index: Tensor) -> Output:
        """The output at some of the positions, by number or by a mask."""
        return Output(self.problem, self.values[index], self.head)

    def draw(self, streams: RowStreams) -> tuple[Tensor, CategoricalStats]:
        """A token for each position, int64 [m], and the statistics of the law drawn from."""
        problem = self.problem
        return self._categorical(rng=streams, temperature=problem.temperature, **problem.filters)

    def draw_with_confidence(self, streams: RowStreams) -> tuple[Tensor, CategoricalStats, Tensor]:
        """As `draw`, and the model's log-probability of each token: before temperature and filters.

        One pass where the law drawn from is the model's or the draw is greedy, else two.
        """
        tokens, stats = self.draw(streams)
        return tokens, stats, stats.log_prob if self._plain else self.log_prob(tokens)

    def draw_comparably(self, streams: RowStreams) -> tuple[Tensor, Tensor]:
        """Tokens and their log-probabilities, which tie exactly with `log_prob` of the same token under the
        same law.
        """
        tokens, stats = self.draw(streams)
        return tokens, self._under(stats.log_z, tokens) if self._plain else self.log_prob(tokens)

    def log_prob(self, tokens: Tensor) -> Tensor:
        """The model's log-probability of `tokens` [m], before temperature and filters: a further pass."""
        _, stats = self._categorical(rng=0, temperature=0.0)
        return self._under(stats.log_z, tokens)

    @property
    def _plain(self) -> bool:
        """Whether a draw's statistics are those of the model's law; at temperature 0 they always are."""
        problem = self.problem
        return problem.temperature == 0 or (problem.temperature == 1 and not problem.filtered)

    @torch.no_grad()
    def _under(self, log_z: Tensor, tokens: Tensor) -> Tensor:
        dtype = log_z.dtype
        if self.head is None:
            logit = self.values.gather(1, tokens[:, None])[:, 0].to(dtype)
        else:
            weight, bias = self.head
            logit = (self.values.to(dtype) * weight[tokens].to(dtype)).sum(1)
            logit = logit if bias is None else logit + bias[tokens].to(dtype)
        return logit - log_z

    def _categorical(self, **options: Any) -> tuple[Tensor, CategoricalStats]:
        if self.head is None:
            drawn: tuple[Tensor, CategoricalStats] = categorical(self.values, return_stats=True, **options)
            return drawn
        drawn = from_head(self.problem, self.values, self.head, return_stats=True, **options)
        return drawn


@torch.no_grad()
def evaluate(problem: Problem, batch: Tensor, t: Tensor | None, rows: Tensor, positions: Tensor) -> Output:
    """Call the network on `batch` [n, L]; its output at (``rows[i]``, ``positions[i]``), i < m.

    `t` is [n] or None, and not passed to a network that is independent of time.
    """
    head = exposed_head(problem) if problem.time_independent else None
    if head is not None:
        return Output(problem, pick(problem.model.features(batch), rows, positions), head)
    logits = checked_logits(problem, batch, t)
    return Output(problem, forbid(pick(logits, rows, positions), problem), None)
