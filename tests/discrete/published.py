"""The published decoding rules as loops in float64, one row at a time, and networks to run them on."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import driftmax
import torch
from driftmax import RowStreams
from torch import Tensor

V, MASK, LENGTH, SEED = 11, 7, 12, 3
BANNED = (0, 4)


class Random:
    """Random logits that depend on all tokens of the row and, bitwise, on nothing else of the batch."""

    time_independent = True

    def __init__(self, scale: float = 3.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.embed = torch.randn(V, LENGTH, 8, generator=generator, dtype=torch.float64)
        self.weight = scale * torch.randn(V, 8, generator=generator, dtype=torch.float64)
        self.batches: list[int] = []

    def row(self, tokens: Tensor) -> Tensor:
        each = self.embed[tokens, torch.arange(len(tokens))]
        return torch.tanh(each + each.roll(1, 0) + each.mean(0))

    def log_probs(self, tokens: Tensor) -> Tensor:
        """Of a row, forbidden tokens at -inf."""
        logits = self.row(tokens) @ self.weight.T
        logits[:, [MASK, *BANNED]] = -math.inf
        return logits.log_softmax(1)

    def __call__(self, tokens: Tensor) -> Tensor:
        self.batches.append(len(tokens))
        return torch.stack([self.row(each) @ self.weight.T for each in tokens])


class Headed(Random):
    """The same network, with its head apart."""

    @property
    def head(self) -> tuple[Tensor, None]:
        return self.weight, None

    def features(self, tokens: Tensor) -> Tensor:
        self.batches.append(len(tokens))
        return torch.stack([self.row(each) for each in tokens])

    def __call__(self, tokens: Tensor) -> Tensor:
        raise AssertionError("the head is to be run at the masked positions only")


def prompts() -> Tensor:
    """All masks; a prompt in front; masks in the middle, with holes, nowhere; one mask at the end."""
    prompt = torch.full((6, LENGTH), MASK)
    prompt[1, :5] = torch.tensor([1, 2, 3, 2, 1])
    prompt[2, :2], prompt[2, 9:] = 5, 6
    prompt[3, ::3] = 8
    prompt[4] = 9
    prompt[5, :-1] = 10
    return prompt


# --- the published rules, written again ---------------------------------------------------------------------


def law(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """softmax(logits / temperature) on what the filters keep; at temperature 0 softmax(logits)."""
    if temperature == 0:
        return logits.softmax(0)
    p = (logits / temperature).softmax(0)
    order = p.argsort(descending=True, stable=True).tolist()
    kept, mass = [], 0.0
    for token in order:
        if (top_k is not None and len(kept) >= top_k) or (top_p is not None and mass >= top_p):
            break
        kept.append(token)
        mass += float(p[token])
    out = torch.zeros_like(p)
    out[kept] = p[kept]
    return out / out.sum()


class Drawn:
    """A masked position, the token drawn there, the model's law and the law drawn from."""

    def __init__(self, position: int, token: int, model: Tensor, drawn: Tensor) -> None:
        self.position, self.token, self.drawn = position, token, drawn
        self.confidence = float(model[token])
        positive = drawn[drawn > 0]
        self.entropy = -float((positive * positive.log()).sum())
        first, second = drawn.sort(descending=True).values[:2].tolist()
        self.margin = first - second
        self.probability = float(drawn[token])


def best(draws: list[Drawn], key: Callable[[Drawn], float]) -> list[Drawn]:
    return sorted(draws, key=lambda draw: (-key(draw), draw.position))


KEYS: dict[str, Callable[[Drawn], float]] = {
    "confidence": lambda draw: draw.confidence,
    "entropy": lambda draw: -draw.entropy,
    "margin": lambda draw: draw.margin,
    "maskgit": lambda draw: draw.probability,
}


def threshold_count(draws: list[Drawn], threshold: float) -> int:
    return max(1, sum(draw.confidence >= threshold for draw in draws))


def factor_count(draws: list[Drawn], factor: float) -> int:
    fits = [
        n
        for n, draw in enumerate(best(draws, KEYS["confidence"]), 1)
        if (n + 1) * (1 - draw.confidence) <= factor
    ]
    return max(fits, default=1)


def bounded_count(draws: list[Drawn], gamma: float, key: str) -> int:
    entropies = [draw.entropy for draw in best(draws, KEYS[key])]
    fits = [n for n in range(1, len(entropies) + 1) if sum(entropies[:n]) - max(entropies[:n]) <= gamma]
    return max(fits)


def llada_counts(masks: int, steps: int) -> list[int]:
    counts = [masks // steps] * steps
    for k in range(masks % steps):
        counts[k] += 1
    return counts


def dream_counts(masks: int, steps: int, eps: Fraction = Fraction(1, 1000)) -> list[int]:
    counts = []
    for k in range(steps):
        t, s = (1 - (1 - eps) * Fraction(j, steps) for j in (k, k + 1))
        counts.append(math.floor(masks * (1 - s / t)) if k < steps - 1 else masks)
        masks -= counts[-1]
    return counts


def decode(
    model: Random,
    row: Tensor,
    index: int,
    key: str,
    *,
    block_length: int | None = None,
    steps: int | None = None,
    counts: Callable[[int, int], list[int]] = llada_counts,
    adaptive: Callable[[list[Drawn]], int] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, int]:
    """Tokens and calls of one row under a rule."""
    x, calls = row.clone(), 0
    masked = (x == MASK).nonzero()[:, 0].tolist()
    if not masked:
        return x, 0
    size = LENGTH if block_length is None else block_length
    starts = [
        start for start in range(masked[0], LENGTH, size) if any(start <= i < start + size for i in masked)
    ]
    shares = llada_counts(steps, len(starts)) if steps is not None else [LENGTH] * len(starts)
    for start, share in zip(starts, shares, strict=True):
        todo = [i for i in masked if start <= i < start + size]
        pace = iter(counts(len(todo), share if steps is not None else len(todo)))
        while todo:
            number = next(pace) if adaptive is None else 1
            if number == 0:
                continue
            logits = model.row(x) @ model.weight.T
            logits[:, [MASK, *BANNED]] = -math.inf
            streams = RowStreams(SEED, [index] * len(todo), step=calls, positions=todo)
            filters: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
            tokens = driftmax.categorical(logits[todo], rng=streams, **filters).tolist()
            draws = [
                Drawn(i, token, logits[i].softmax(0), law(logits[i], **filters))
                for i, token in zip(todo, tokens, strict=True)
            ]
            number = number if adaptive is None else adaptive(draws)
            for draw in best(draws, KEYS[key])[:number]:
                x[draw.position] = draw.token
                todo.remove(draw.position)
            calls += 1
    return x, calls
