"""`Distinct`: a network that is asked about each distinct sequence once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Distinct", "Known"]


class Known(NamedTuple):
    """Sequences ``[n, L]`` and the network's output for them ``[n, L, ...]``."""

    tokens: Tensor
    output: Tensor


class Distinct:
    """A time-independent denoiser that runs the network on rows it has not seen, each once.

    Rows that are equal within a call, or equal to one of the last call that ran, have the same output. Worth
    it where rows are copies of one another, as candidates of one parent are.

    Parameters
    ----------
    model : Denoiser
        Time-independent; with features and head or without.
    known : Known, optional
        What an earlier one knew.

    Attributes
    ----------
    known : Known or None
        To hand on.
    ran : list of Tensor
        Per call, bool ``[n]``: the rows that went through the network.
    """

    time_independent = True

    def __init__(self, model: Any, known: Known | None = None) -> None:
        self.model, self.known = model, known
        self.ran: list[Tensor] = []
        self.head = getattr(model, "head", None) if callable(getattr(model, "features", None)) else None

    def __call__(self, tokens: Tensor, t: Tensor | None = None) -> Tensor:
        """Logits ``[B, L, V]``."""
        return self._look_up(self.model, tokens)

    def features(self, tokens: Tensor) -> Tensor:
        """Input of the head ``[B, L, D]``."""
        return self._look_up(self.model.features, tokens)

    def _look_up(self, network: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        known = self.known or Known(tokens[:0], tokens[:0])
        many = len(known.tokens)
        rows = torch.cat((known.tokens, tokens))
        equal = torch.unique(rows, dim=0, return_inverse=True)[1]
        index = torch.arange(len(rows), device=rows.device)
        first = torch.full_like(index, len(rows)).scatter_reduce_(0, equal, index, "amin")[equal]
        fresh = (first == index)[many:]
        self.ran.append(fresh)
        new = fresh.nonzero().flatten()
        if not new.numel():
            return known.output[first[many:]]
        output = network(tokens[new])
        output = torch.cat((known.output, output)) if many else output
        place = index.clone()
        place[new + many] = many + torch.arange(len(new), device=rows.device)
        used, back = torch.unique(place[first[many:]], return_inverse=True)
        kept = output[used]
        self.known = Known(torch.cat((known.tokens, tokens[new]))[used], kept)
        return kept[back]
