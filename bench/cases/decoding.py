"""Decoding rules of masked diffusion language models against their plain torch forms, with a free network.

The network's output is one stored tensor, sure of some positions and not of others, so that all time is the
rule's: draw, score, choose, write, until no mask is left. Two torch forms. *As published*: for LLaDA's and
Fast-dLLM's rules a float64 race exp(logits) / (-log u)**T and a float64 softmax at every position of the
sequence, whether masked or not; for Dream's softmax, `Categorical`, sort and logarithm in float32 at the
masks; positions by topk, row by row. *Best*: float32, the masks of the current block alone, positions chosen
before the draw where the score allows it, all rows at once. There is no prompt, at which the published loops
would draw too.

The gate wants, at temperature 0, the same tokens after every call from all three, and at temperature 1 tokens
by the network's law where one call reveals them all. The limit is a bare read of the logits that the rule has
to see. Rules without fixed steps may need another number of calls at temperature 1: the draws differ.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from driftmax.discrete import (
    Confidence,
    EntropyBounded,
    EntropyOrder,
    Factor,
    MarginOrder,
    MaskGitPlus,
    RandomOrder,
    Sampler,
    Threshold,
    sample,
)
from torch import Tensor

from .. import gates, inputs, limits, plots
from ..harness import LIMIT, SUBJECT, GateFailed, Run, Settings, Timing, measure
from ..report import Finding, Row, duration

SIZES = ((50257, 64, 8), (126464, 32, 4))  # vocabulary, length, steps: eight tokens a step
QUICK_SIZES = ((5000, 32, 4),)
BLOCK = 32
GATE_VOCABULARY = 3000  # beyond one block of the core's draws
PUBLISHED, BEST = "torch, as published", "torch, best"
ROUNDS, BUDGET_S = 5, 0.6


class Stored:
    """A network that costs nothing: stored logits ``[L, V]``, whatever the tokens."""

    time_independent = True

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self, tokens: Tensor, t: Tensor | None = None) -> Tensor:
        return self.logits.expand(*tokens.shape, -1)


def stored_logits(settings: Settings, length: int, vocab: int) -> Tensor:
    """Logits ``[length, vocab]``: one likely token at each position, of probability 0.5 to 0.999.

    Seven positions in eight are nearly sure. The other tokens follow Zipf laws between flat and steep, so
    that probability, entropy and margin order the positions differently.
    """
    generator = settings.generator(3)
    steep = torch.linspace(0.5, 3.0, length)[torch.randperm(length, generator=generator)]
    logits = inputs.zipf(settings, length, vocab).cpu() * steep[:, None]
    likely = torch.randint(vocab, (length, 1), generator=generator)
    logits.scatter_(1, likely, -torch.inf)
    unsure = max(1, length // 8)
    miss = torch.cat((torch.logspace(-3, -1.1, length - unsure), torch.linspace(0.15, 0.5, unsure)))
    miss = miss[torch.randperm(length, generator=generator)]
    odds = torch.log((1.0 - miss) / miss)
    best = torch.logsumexp(logits.double(), 1) + odds
    return logits.scatter_(1, likely, best[:, None].float()).to(settings.device)


@dataclass(frozen=True)
class Seen:
    """What a published rule reads off the network's output, at every position: each ``[B, L]``."""

    tokens: Tensor
    score: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class Rule:
    """A rule in all its forms.

    Attributes
    ----------
    name : str
        Class of :mod:`driftmax.discrete`.
    sampler : callable
        Makes it: ``sampler(bound, block_length)``.
    score : {"probability", "entropy", "margin", "random"}
        What orders the positions.
    everywhere : bool
        Published for all positions in float64; else for the masks in float32.
    bound : float or None
        Of a rule that finds the number of tokens itself: its threshold, factor or bound.
    allowed : callable or None
        ``allowed(score, entropy, bound)`` for positions by falling score ``[n]``: may this one be revealed?
    loosest : float
        The bound at which one call reveals everything.
    blocks : bool
        Decoded block by block.
    """

    name: str
    sampler: Callable[[Any, int | None], Sampler]
    score: str
    everywhere: bool
    bound: float | None = None
    allowed: Callable[[Tensor, Tensor, float], Tensor] | None = None
    loosest: float = 0.0
    blocks: bool = False

    def block_length(self, length: int) -> int | None:
        """Length of a block; None for one block."""
        return min(BLOCK, length // 2) if self.blocks else None

    def in_one_call(self) -> Rule:
        """The rule with a bound that reveals everything at once, in one block."""
        return dataclasses.replace(self, bound=self.bound and self.loosest, blocks=False)


def _reaches(score: Tensor, entropy: Tensor, bound: float) -> Tensor:
    return score >= bound


def _factor(score: Tensor, entropy: Tensor, bound: float) -> Tensor:
    return torch.arange(2, score.numel() + 2, device=score.device) * (1.0 - score) <= bound


def _entropy_bounded(score: Tensor, entropy: Tensor, bound: float) -> Tensor:
    return entropy.cumsum(0) - entropy.cummax(0).values <= bound


RULES = (
    Rule("Confidence", lambda _, b: Confidence(block_length=b), "probability", True, blocks=True),
    Rule("RandomOrder", lambda _, b: RandomOrder(block_length=b), "random", True, blocks=True),
    Rule("EntropyOrder", lambda _, b: EntropyOrder(block_length=b), "entropy", False),
    Rule("MarginOrder", lambda _, b: MarginOrder(block_length=b), "margin", False),
    Rule("MaskGitPlus", lambda _, b: MaskGitPlus(block_length=b), "probability", False),
    Rule("Threshold", lambda x, b: Threshold(x, block_length=b), "probability", True, 0.9, _reaches, 0, True),
    Rule("Factor", lambda x, b: Factor(x, block_length=b), "probability", True, 1.0, _factor, 1e9, True),
    Rule(
        "EntropyBounded", lambda x, _: EntropyBounded(x), "entropy", True, 2.0, _entropy_bounded, loosest=1e9
    ),
)


def _everywhere(logits: Tensor, rule: Rule, temperature: float) -> Seen:
    """Float64 at every position: the race, the softmax, and what the rule scores by."""
    wide = logits.double()
    if temperature > 0:
        clock = (-torch.rand(wide.shape, dtype=torch.float64, device=wide.device).log()) ** temperature
        tokens = (wide.exp() / clock).argmax(-1)
    else:
        tokens = wide.argmax(-1)
    if rule.score == "random":
        score = torch.rand(tokens.shape, dtype=torch.float64, device=wide.device)
        return Seen(tokens, score, torch.zeros_like(score))
    law = torch.softmax(wide, -1)
    if rule.score == "entropy":
        entropy = -(law * law.clamp(min=1e-300).log()).sum(-1)
        return Seen(tokens, -entropy, entropy)
    score = law.gather(-1, tokens[..., None])[..., 0]
    return Seen(tokens, score, torch.zeros_like(score))


def _at_masks(logits: Tensor, eligible: Tensor, rule: Rule, temperature: float) -> Seen:
    """Float32 at the masks: softmax, `Categorical`, and what the rule scores by."""
    rows = logits[eligible]
    law = torch.softmax(rows / temperature if temperature > 0 else rows, -1)
    if temperature > 0:
        tokens = torch.distributions.Categorical(probs=law).sample()  # type: ignore[no-untyped-call]  # torch's
        score = law.gather(-1, tokens[:, None])[:, 0]
    else:
        score, tokens = law.max(-1)
    if rule.score == "margin":
        ordered = law.sort(-1, descending=True).values
        score = ordered[:, 0] - ordered[:, 1]
    elif rule.score == "entropy":
        score = (law * torch.log(law + 1e-10)).sum(-1)
    drawn = torch.zeros(eligible.shape, dtype=torch.int64, device=logits.device)
    scores = torch.zeros(eligible.shape, dtype=score.dtype, device=logits.device)
    drawn[eligible], scores[eligible] = tokens, score
    return Seen(drawn, scores, torch.zeros_like(scores))


def published_step(
    logits: Tensor, tokens: Tensor, eligible: Tensor, rule: Rule, temperature: float, count: int
) -> Tensor:
    """One step as published code has it; tokens and eligible are ``[B, L]``, logits ``[B, L, V]``."""
    seen = (
        _everywhere(logits, rule, temperature)
        if rule.everywhere
        else _at_masks(logits, eligible, rule, temperature)
    )
    confidence = torch.where(eligible, seen.score, -torch.inf)
    moved = torch.zeros_like(eligible)
    for row in range(tokens.shape[0]):
        masks = int(eligible[row].sum())
        if not masks:
            continue
        number = min(count, masks)
        if rule.allowed is not None:
            score, order = confidence[row].topk(masks)
            allowed = rule.allowed(score, seen.entropy[row, order], float(rule.bound or 0.0))
            number = 1
            while number < masks and bool(allowed[number]):
                number += 1
        moved[row, confidence[row].topk(number).indices] = True
    return torch.where(moved, seen.tokens, tokens)


def _race(rows: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens ``[m]`` and their probabilities."""
    if temperature == 0:
        best, tokens = rows.max(-1)
        return tokens, torch.exp(best - torch.logsumexp(rows, -1))
    law = torch.softmax(rows if temperature == 1 else rows / temperature, -1)
    tokens = (law / torch.empty_like(law).exponential_()).argmax(-1)
    return tokens, law.gather(-1, tokens[:, None])[:, 0]


def _score_without_draw(rows: Tensor, rule: Rule, temperature: float) -> tuple[Tensor, Tensor]:
    """Score and entropy ``[m]`` where the order of positions does not depend on the draws."""
    rows = rows if temperature in (0, 1) else rows / temperature
    if rule.score == "margin":
        best = torch.exp(rows.topk(2, -1).values - torch.logsumexp(rows, -1, keepdim=True))
        score = best[:, 0] - best[:, 1]
        return score, torch.zeros_like(score)
    entropy = torch.special.entr(torch.softmax(rows, -1)).sum(-1)
    return -entropy, entropy


def _leading(score: Tensor, entropy: Tensor, eligible: Tensor, rule: Rule, count: int) -> Tensor:
    """Which positions to reveal, bool ``[B, L]``; all rows at once."""
    order = score.argsort(dim=1, descending=True, stable=True)
    number = eligible.sum(1).clamp(max=count)
    if rule.allowed is not None:
        bound = float(rule.bound or 0.0)
        rows = zip(score.gather(1, order), entropy.gather(1, order), strict=True)
        allowed = torch.stack([rule.allowed(one, other, bound) for one, other in rows])
        number = (allowed & eligible.gather(1, order)).long().cumprod(1).sum(1).clamp(min=1)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return eligible & (torch.empty_like(order).scatter_(1, order, place) < number[:, None])


def best_step(
    logits: Tensor, tokens: Tensor, eligible: Tensor, rule: Rule, temperature: float, count: int
) -> Tensor:
    """The same step by the best plain torch: nothing is computed that is not used."""
    full = torch.full(tokens.shape, -torch.inf, device=logits.device)
    result = tokens.clone()
    if rule.score == "probability":
        drawn, chance = _race(logits[eligible], temperature)
        score = full.masked_scatter(eligible, chance)
        moved = _leading(score, full, eligible, rule, count)
        result[moved] = drawn[moved[eligible]]
        return result
    if rule.score == "random":
        rows = None
        score, entropy = torch.where(eligible, torch.rand_like(full), full), full
    else:
        rows = logits[eligible]
        score, entropy = (
            full.masked_scatter(eligible, value) for value in _score_without_draw(rows, rule, temperature)
        )
        entropy = entropy.clamp(min=0.0)
    moved = _leading(score, entropy, eligible, rule, count)
    wanted = logits[moved] if rows is None else rows[moved[eligible]]
    result[moved] = wanted.argmax(-1) if temperature == 0 else _race(wanted, temperature)[0]
    return result


@torch.no_grad()
def torch_decode(
    step: Callable[..., Tensor],
    model: Stored,
    rule: Rule,
    shape: tuple[int, int],
    steps: int,
    temperature: float,
) -> list[Tensor]:
    """Decode by a torch form from all masks; the tokens after every call. `steps` divides the length."""
    vocab, device = model.logits.shape[-1], model.logits.device
    length = shape[1]
    tokens = torch.full(shape, vocab, device=device)
    block = rule.block_length(length) or length
    seen = []
    for begin in range(0, length, block):
        inside = torch.zeros(length, dtype=torch.bool, device=device)
        inside[begin : begin + block] = True
        eligible = (tokens == vocab) & inside
        while bool(eligible.any()):
            tokens = step(model(tokens), tokens, eligible, rule, temperature, length // steps)
            seen.append(tokens)
            eligible = (tokens == vocab) & inside
    return seen


def driftmax_decode(
    model: Stored, rule: Rule, shape: tuple[int, int], steps: int, temperature: float, seed: int
) -> list[Tensor]:
    """Decode by driftmax; the tokens after every call."""
    seen: list[Tensor] = []
    sample(
        model,
        shape,
        mask_id=model.logits.shape[-1],
        sampler=rule.sampler(rule.bound, rule.block_length(shape[1])),
        steps=None if rule.allowed is not None else steps,
        temperature=temperature,
        rng=seed,
        callback=lambda state: seen.append(state.tokens),
        device=model.logits.device,
    )
    return seen


Decode = Callable[[float], list[Tensor]]


def check_same_choices(rule: Rule, ways: dict[str, Decode], mask_id: int) -> None:
    """Refuse ways that differ at temperature 0: after every call, or for random orders in how many and what.

    Raises
    ------
    GateFailed
        Naming the first call that differs.
    """
    runs = {name: way(0.0) for name, way in ways.items()}
    wanted = runs[PUBLISHED]
    for name, seen in runs.items():
        if len(seen) != len(wanted):
            raise GateFailed(f"{rule.name}: {name} made {len(seen)} calls, {PUBLISHED} {len(wanted)}")
        for call, (got, want) in enumerate(zip(seen, wanted, strict=True)):
            same = bool((got == want).all())
            if rule.score == "random":
                same = int((got == mask_id).sum()) == int((want == mask_id).sum())
                same &= call + 1 < len(seen) or bool((got == want).all())
            if not same:
                raise GateFailed(f"{rule.name}: {name} differs from {PUBLISHED} at call {call}")


def check_law(rule: Rule, settings: Settings) -> None:
    """Refuse a rule whose draws, all of one call, do not follow the network's law.

    Raises
    ------
    GateFailed
        From the chi-square test.
    """
    row = inputs.zipf(settings, 1, GATE_VOCABULARY)[0]

    def draw(many: Tensor) -> Tensor:
        shape = (8, many.shape[0] // 8)
        seen = driftmax_decode(Stored(row), rule.in_one_call(), shape, 1, 1.0, settings.seed)
        if len(seen) != 1:
            raise GateFailed(f"{rule.name}: {len(seen)} calls where one is enough")
        return seen[0].view(-1)

    gates.law_gate(draw, row, torch.softmax(row.double(), 0), rule.name, settings.gate_draws)


def _reads(logits: Tensor, run: list[Tensor], rule: Rule, mask_id: int, settings: Settings) -> Run:
    """A bare read of the logits that each call of `run` had to see: its block's masks, or the revealed."""
    length = logits.shape[0]
    block = rule.block_length(length) or length
    before, counts = torch.ones(length, dtype=torch.bool), []
    for tokens in run:
        after = (tokens[0] == mask_id).cpu()
        first = int(before.int().argmax()) // block * block
        seen = before & ~after if rule.score == "random" else before[first : first + block]
        counts.append(int(seen.sum()))
        before = after
    reads = {count: limits.bare_read(logits[:count], settings) for count in set(counts)}
    return lambda: [reads[count]() for count in counts]


def _rows(
    settings: Settings, rule: Rule, model: Stored, steps: int, temperature: float, ways: dict[str, Decode]
) -> Iterator[Row]:
    """Timings of one rule, gated."""
    length, vocab = model.logits.shape
    calls: dict[str, list[int]] = {name: [] for name in ways}

    def timed(name: str) -> Run:
        return lambda: calls[name].append(len(ways[name](temperature)))

    contenders: dict[str, Run] = {name: timed(name) for name in ways}
    contenders[LIMIT] = _reads(model.logits, ways[SUBJECT](temperature), rule, vocab, settings)
    short = dataclasses.replace(
        settings,
        rounds=min(settings.rounds, ROUNDS),
        budget_s=min(settings.budget_s, BUDGET_S),
        least_rounds=1,
    )
    timings = measure(contenders, short)
    for name, timing in timings.items():
        mean = statistics.fmean(calls[name]) if calls.get(name) else ""
        yield _row(rule, length, vocab, steps, temperature, name, timing, timings[SUBJECT], mean)


def _row(
    rule: Rule,
    length: int,
    vocab: int,
    steps: int,
    temperature: float,
    name: str,
    timing: Timing,
    own: Timing,
    calls: float | str,
) -> Row:
    return {
        "rule": rule.name,
        "bound": "" if rule.bound is None else rule.bound,
        "L": length,
        "block": rule.block_length(length) or length,
        "V": vocab,
        "n": steps if rule.bound is None else "",
        "temperature": temperature,
        "contender": name,
        "calls": calls if isinstance(calls, str) else float(f"{calls:.3g}"),
        "median_ms": float(f"{timing.median_ms:.4g}"),
        "iqr_ms": float(f"{timing.iqr_ms:.4g}"),
        "samples": timing.samples,
        "ratio": float(f"{timing.median_ms / own.median_ms:.4g}"),
    }


def _ways(model: Stored, rule: Rule, steps: int, seed: int) -> dict[str, Decode]:
    shape = (1, model.logits.shape[0])
    return {
        SUBJECT: lambda temperature: driftmax_decode(model, rule, shape, steps, temperature, seed),
        BEST: lambda temperature: torch_decode(best_step, model, rule, shape, steps, temperature),
        PUBLISHED: lambda temperature: torch_decode(published_step, model, rule, shape, steps, temperature),
    }


def _text(rows: list[Row]) -> str:
    lines = [
        "decoding: a whole sequence by each rule, network for free; times, and multiples of driftmax's\n"
        f"{'rule':<16}{'V':>8}{'T':>4}{'calls':>7}{SUBJECT:>12}{'torch, best':>22}{PUBLISHED:>24}{'read':>9}"
    ]
    for own, best, published, limit in zip(*(rows[i::4] for i in range(4)), strict=True):
        lines.append(
            f"{own['rule']:<16}{own['V']:>8}{own['temperature']:>4g}{own['calls']:>7}"
            f"{duration(float(own['median_ms'])):>12}"
            f"{duration(float(best['median_ms'])):>14}{best['ratio']:>7.3g}x"
            f"{duration(float(published['median_ms'])):>16}{published['ratio']:>7.3g}x{limit['ratio']:>8.2g}x"
        )
    return "\n".join(lines)


def report(settings: Settings) -> Finding:
    """Every rule at every size; where a gate fails, the rule is not timed at that size."""
    rows: list[Row] = []
    failures = []
    for vocab, length, steps in QUICK_SIZES if settings.quick else SIZES:
        model = Stored(stored_logits(settings, length, vocab))
        for rule in RULES:
            ways = _ways(model, rule, steps, settings.seed)
            try:
                check_law(rule, settings)
                check_same_choices(rule, ways, vocab)
            except GateFailed as failure:
                failures.append(str(failure))
                continue
            for temperature in (0.0, 1.0):
                rows += _rows(settings, rule, model, steps, temperature, ways)
    return Finding(
        _text(rows),
        rows,
        "decoding.csv",
        "decoding.png",
        plots.decoding,
        "; ".join(failures) or None,
    )
