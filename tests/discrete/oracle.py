"""A Markov chain small enough to enumerate: its perfect denoiser, and the exact law of each sampler on it."""

from __future__ import annotations

import itertools
from functools import cached_property

import numpy as np
import torch


class MarkovOracle:
    """Sequences of `length` tokens out of `vocab`, from a chain that likes to stay where it is."""

    def __init__(self, vocab: int = 3, length: int = 6, stay: float = 0.75) -> None:
        self.vocab, self.length, self.mask_id = vocab, length, vocab
        move = np.linspace(1.0, 2.0, vocab)
        step = (1 - stay) * np.tile(move / move.sum(), (vocab, 1)) + stay * np.eye(vocab)
        start = np.linspace(2.0, 1.0, vocab) / np.linspace(2.0, 1.0, vocab).sum()
        self.sequences = np.array(list(itertools.product(range(vocab), repeat=length)))
        law = start[self.sequences[:, 0]]
        for i in range(1, length):
            law = law * step[self.sequences[:, i - 1], self.sequences[:, i]]
        self.law = law

    def code(self, tokens: torch.Tensor) -> torch.Tensor:
        """Index of a partly masked sequence in base vocab + 1."""
        weight = (self.vocab + 1) ** torch.arange(self.length - 1, -1, -1)
        return (tokens * weight).sum(-1)

    @cached_property
    def partial(self) -> np.ndarray:
        """Every partly masked sequence, in the order of `code`."""
        return np.array(list(itertools.product(range(self.vocab + 1), repeat=self.length)))

    @cached_property
    def conditionals(self) -> np.ndarray:
        """p(x_i = v | unmasked) of every partly masked sequence, [codes, length, vocab]."""
        table = np.zeros((len(self.partial), self.length, self.vocab))
        for code, seen in enumerate(self.partial):
            fits = ((seen == self.mask_id) | (seen == self.sequences)).all(1)
            weight = self.law * fits
            for i, v in itertools.product(range(self.length), range(self.vocab)):
                table[code, i, v] = weight[self.sequences[:, i] == v].sum()
            table[code] /= weight.sum()
        return table

    @cached_property
    def transitions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(from, to, revealed, probability of the tokens) of every reveal of any set of masks at once."""
        rows = []
        weight = (self.vocab + 1) ** np.arange(self.length - 1, -1, -1)
        for code, seen in enumerate(self.partial):
            masks = np.flatnonzero(seen == self.mask_id)
            for size in range(len(masks) + 1):
                for chosen in itertools.combinations(masks, size):
                    for tokens in itertools.product(range(self.vocab), repeat=size):
                        after = seen.copy()
                        after[list(chosen)] = tokens
                        p = np.prod(
                            [self.conditionals[code, i, v] for i, v in zip(chosen, tokens, strict=True)]
                        )
                        rows.append((code, int(after @ weight), size, float(p)))
        source, target, size, p = (np.array(column) for column in zip(*rows, strict=True))
        return source, target, size, p

    @cached_property
    def _masks(self) -> np.ndarray:
        return (self.partial == self.mask_id).sum(1)

    def _run(self, steps: list, start: np.ndarray | None = None) -> np.ndarray:
        """Law over complete sequences after the steps; a step gives P(this set of `size` | m masks)."""
        state = np.zeros(len(self.partial))
        state[-1] = 1.0
        source, target, size, p = self.transitions
        for step in steps:
            flow = state[source] * p * step(self._masks[source], size)
            state = np.bincount(target, weights=flow, minlength=len(state))
        complete = self.code(torch.from_numpy(self.sequences)).numpy()
        return state[complete]

    def grid_law(self, probabilities: list[float]) -> np.ndarray:
        """Exact law of a sampler that unmasks each position with these probabilities, step by step."""
        return self._run([lambda m, s, r=r: r**s * (1 - r) ** (m - s) for r in probabilities])

    def parallel_law(self, k: int) -> np.ndarray:
        """Exact law of revealing k random positions at a time."""
        from scipy.special import comb

        def step(m, s):
            return np.where(s == np.minimum(k, m), 1 / comb(m, np.minimum(k, m)), 0.0)

        return self._run([step] * -(-self.length // k))

    def high_order_law(self, k: int, method: str) -> np.ndarray:
        """Exact law of `HighOrderReveal`: k a call, laws extrapolated from the call before."""
        weight = (self.vocab + 1) ** np.arange(self.length - 1, -1, -1)
        start = len(self.partial) - 1
        states = {(start, start): 1.0}  # (seen by the call before, now) -> probability
        for call in range(-(-self.length // k)):
            after: dict[tuple[int, int], float] = {}
            for (before, now), mass in states.items():
                masks = np.flatnonzero(self.partial[now] == self.mask_id)
                orders = list(itertools.permutations(masks, min(k, len(masks))))
                for chosen in orders:
                    laws = []
                    for j, i in enumerate(chosen):
                        w = 0.0 if call == 0 else j / k if method == "extrapolate" else call % 2 * (k - 1) / k
                        p, q = self.conditionals[now, i], self.conditionals[before, i]
                        law = np.maximum(p + w * (p - q), 0.0)
                        laws.append(law / law.sum())
                    for tokens in itertools.product(range(self.vocab), repeat=len(chosen)):
                        p = np.prod([law[v] for law, v in zip(laws, tokens, strict=True)])
                        target = now + int((np.array(tokens) - self.mask_id) @ weight[list(chosen)])
                        key = (now, target)
                        after[key] = after.get(key, 0.0) + mass * p / len(orders)
            states = after
        law = np.zeros(len(self.partial))
        for (_, now), mass in states.items():
            law[now] += mass
        return law[self.code(torch.from_numpy(self.sequences)).numpy()]

    def model(self, time_independent: bool = True):
        """The perfect denoiser."""
        logits = torch.from_numpy(self.conditionals).log()

        def denoiser(tokens, t=None):
            return logits[self.code(tokens)]

        denoiser.time_independent = time_independent
        return denoiser

    def histogram(self, tokens: torch.Tensor) -> np.ndarray:
        """Relative frequency of each sequence."""
        weight = self.vocab ** torch.arange(self.length - 1, -1, -1)
        counts = torch.bincount((tokens * weight).sum(-1), minlength=len(self.sequences))
        return (counts / tokens.shape[0]).numpy()


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    return 0.5 * float(np.abs(p - q).sum())


def floor(law: np.ndarray, draws: int, repeats: int = 200) -> float:
    """A level that the total variation of `draws` exact samples exceeds about once in 10^7 times."""
    generator = np.random.default_rng(0)
    law = law / law.sum()
    distances = [total_variation(generator.multinomial(draws, law) / draws, law) for _ in range(repeats)]
    return float(np.mean(distances) + 5.5 * np.std(distances))  # sums of many terms: close to normal
