"""An interpolated n-gram language model over packed token ids: the counted half of the real-logits model.

Absolute discounting with lower orders built from continuation counts (Kneser and Ney, 1995; the interpolated
form of Chen and Goodman, 1999). An n-gram of order up to four is one 64-bit key, so counting is one sort per
order and a lookup one binary search.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

ORDER = 4
ID_BITS = 15  # four ids below 2^15 fit into 60 bits


def _pack(tokens: np.ndarray, order: int) -> np.ndarray:
    """Key of every run of ``order`` tokens: earlier tokens in the higher bits."""
    count = tokens.size - order + 1
    keys = np.zeros(count, dtype=np.int64)
    for i in range(order):
        keys = (keys << ID_BITS) | tokens[i : i + count]
    return keys


@dataclass(frozen=True)
class _Order:
    """Sorted n-gram keys of one order, their (continuation) counts, and the discount."""

    keys: np.ndarray
    counts: np.ndarray
    discount: float

    def followers(self, context: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids seen after a packed context, and their counts."""
        low, high = np.searchsorted(self.keys, [context << ID_BITS, (context + 1) << ID_BITS])
        return self.keys[low:high] & ((1 << ID_BITS) - 1), self.counts[low:high]


@dataclass(frozen=True)
class NGram:
    """Counts of every order from two up, and the smoothed unigram that ends the recursion.

    Attributes
    ----------
    unigram : float64 array, shape [V]
        Continuation probabilities of single tokens, never zero.
    orders : list
        Orders 2, 3, ...
    """

    unigram: np.ndarray
    orders: list[_Order]

    def state(self) -> dict[str, torch.Tensor]:
        """Everything as tensors, for :func:`torch.save`; :func:`from_state` reads it back."""
        stored = {"unigram": torch.from_numpy(self.unigram)}
        for order, level in enumerate(self.orders, start=2):
            stored[f"keys{order}"] = torch.from_numpy(level.keys)
            stored[f"counts{order}"] = torch.from_numpy(level.counts)
            stored[f"discount{order}"] = torch.tensor(level.discount, dtype=torch.float64)
        return stored

    def probabilities(self, contexts: np.ndarray) -> torch.Tensor:
        """Next-token law after each context.

        Parameters
        ----------
        contexts : int64 array, shape [n, ORDER - 1]
            The preceding ids, oldest first.

        Returns
        -------
        float32 tensor, shape [n, V]
        """
        result = np.empty((len(contexts), self.unigram.size), dtype=np.float32)
        for row, context in zip(result, contexts, strict=True):
            law = self.unigram.copy()
            for order, level in enumerate(self.orders, start=2):
                key = 0
                for token in context[len(context) - order + 1 :]:
                    key = (key << ID_BITS) | int(token)
                ids, counts = level.followers(key)
                if not ids.size:
                    break
                total = float(counts.sum())
                law *= level.discount * ids.size / total
                law[ids] += (counts - level.discount) / total
            row[:] = law
        return torch.from_numpy(result)


def fit(tokens: np.ndarray, vocabulary: int) -> NGram:
    """Count a token sequence (ids below ``vocabulary`` <= 2^15), in one sort per order."""
    if vocabulary > 1 << ID_BITS:
        raise ValueError(f"ids of {ID_BITS} bits cannot hold a vocabulary of {vocabulary}")
    tokens = tokens.astype(np.int64)
    orders: list[_Order] = []
    grams = np.empty(0, dtype=np.int64)
    for order in range(ORDER, 1, -1):
        if order == ORDER:
            grams, counts = np.unique(_pack(tokens, order), return_counts=True)
        else:  # below the top, a gram counts once for each different token seen before it
            suffixes = np.sort(grams & ((1 << (ID_BITS * order)) - 1))
            grams, counts = np.unique(suffixes, return_counts=True)
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        orders.append(_Order(grams, counts, once / max(1.0, once + 2.0 * twice)))
    before = np.bincount(grams & ((1 << ID_BITS) - 1), minlength=vocabulary) + 0.1
    return NGram(before / before.sum(), orders[::-1])


def from_state(stored: dict[str, torch.Tensor]) -> NGram:
    """The inverse of :meth:`NGram.state`."""
    orders = [
        _Order(stored[f"keys{n}"].numpy(), stored[f"counts{n}"].numpy(), float(stored[f"discount{n}"]))
        for n in range(2, ORDER + 1)
    ]
    return NGram(stored["unigram"].numpy(), orders)
