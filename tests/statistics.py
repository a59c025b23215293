"""Statistical assertions shared by the tests, and the faulty samplers that show that they can fail.

Every assertion takes its false-alarm rate `level` (default `LEVEL`). The suite makes fewer than 1000 of them,
so that by Bonferroni fresh seeds would turn a correct sampler red with probability below 1e-6. Seeds are
fixed: a green run stays green. `noncentrality` states the power: a law whose cells are off by d_i from p_i
moves Pearson's statistic by n * sum(d_i^2 / p_i), and is seen with the given power once that exceeds the
returned number.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy import optimize, stats
from torch import Tensor

LEVEL = 1e-9
#: Cells with a smaller expected count are pooled: Pearson's statistic is not chi-square there.
LEAST_EXPECTED = 10.0


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half the sum of absolute differences, in float64."""
    return 0.5 * float((p.double() - q.double()).abs().sum())


def noncentrality(freedom: int, level: float = LEVEL, power: float = 0.999) -> float:
    """Noncentrality at which a chi-square test of `level` with `freedom` degrees rejects with `power`."""
    threshold = stats.chi2.isf(level, freedom)

    def excess(shift: float) -> float:
        return float(stats.ncx2.cdf(threshold, freedom, shift)) - (1 - power)

    return float(optimize.brentq(excess, 1e-3, 1e5))


def chi_square(counts: Tensor, probability: Tensor) -> tuple[float, int]:
    """p-value of Pearson's test and its degrees of freedom; thin cells are pooled into one."""
    counts, probability = counts.double().flatten(), probability.double().flatten()
    expected = probability * counts.sum()
    thin = expected < LEAST_EXPECTED
    pool = torch.stack((counts[thin].sum(), expected[thin].sum()))
    counts, expected = counts[~thin], expected[~thin]
    if float(pool[1]) >= LEAST_EXPECTED:
        counts, expected = torch.cat((counts, pool[:1])), torch.cat((expected, pool[1:]))
    elif stats.poisson.sf(float(pool[0]) - 1, max(float(pool[1]), 1e-300)) < LEVEL:
        return 0.0, len(counts)  # draws where there should be next to none
    if len(counts) < 2:
        return 1.0, 0
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return float(stats.chi2.sf(statistic, len(counts) - 1)), len(counts) - 1


def runs_of_equal_mass(probability: Tensor, groups: int) -> Tensor:
    """Group of every token: tokens by decreasing probability, cut into at most `groups` runs of about equal
    mass.

    A few wide cells see a smooth error (a tail that is too light) far earlier than one cell per token.
    """
    order = probability.argsort(descending=True, stable=True)
    before = probability[order].cumsum(0) - probability[order]
    run = (before * groups / probability.sum()).long().clamp(max=groups - 1)
    group = torch.empty_like(order)
    group[order] = run
    return group


def assert_law(tokens: Tensor, probability: Tensor, *, level: float = LEVEL, groups: int = 24) -> None:
    """Independent draws follow `probability`: by token, and by runs of tokens of about equal mass (level / 2
    each).
    """
    tokens, probability = tokens.flatten().cpu(), probability.double().cpu()
    assert int(tokens.min()) >= 0, "a negative token"
    assert int(tokens.max()) < len(probability), "a token out of range"
    counts = torch.bincount(tokens, minlength=len(probability))
    drawn = counts[probability == 0].sum()
    assert int(drawn) == 0, f"{int(drawn)} draws of tokens of probability zero"
    group = runs_of_equal_mass(probability, groups)
    grouped = torch.zeros(2, groups, dtype=torch.float64)
    grouped[0].index_add_(0, group, counts.double())
    grouped[1].index_add_(0, group, probability)
    for seen, wanted, name in ((counts, probability, "tokens"), (*grouped, "runs")):
        p_value, freedom = chi_square(seen, wanted)
        assert p_value > level / 2, f"chi-square over {name} with {freedom} degrees: p = {p_value:.2e}"


def assert_mass(hits: int, draws: int, probability: float, *, level: float = LEVEL) -> None:
    """The number of hits is binomial(draws, probability): exact, two-sided."""
    below, above = stats.binom.cdf(hits, draws, probability), stats.binom.sf(hits - 1, draws, probability)
    assert 2 * min(below, above) > level, f"{hits} hits, expected {draws * probability:.1f}"


def assert_independent(first: Tensor, second: Tensor, cells: int, *, level: float = LEVEL) -> None:
    """Pairs of values in [0, cells) are independent: Pearson's test on the table of pairs, margins as
    observed.
    """
    table = torch.bincount(first.flatten() * cells + second.flatten(), minlength=cells * cells)
    p_value = stats.chi2_contingency(table.view(cells, cells).numpy(), correction=False).pvalue
    assert p_value > level, f"pairs are dependent: p = {p_value:.2e}"


def softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The law, in float64."""
    return (logits.double() / temperature).softmax(-1)


def fp32_gumbel_argmax(logits: Tensor, draws: int, seed: int, rows: int = 64) -> Tensor:
    """The usual sampler: argmax of logits - log(-log U), U on the 24-bit float32 grid. Ceiling 16.64."""
    generator = torch.Generator().manual_seed(seed)
    logits = logits.float()
    parts = []
    for first in range(0, draws, rows):
        u = torch.rand(min(rows, draws - first), len(logits), generator=generator)
        parts.append((u.log_().neg_().log_().neg_().add_(logits)).argmax(1))
    return torch.cat(parts)


def fp32_tail_hits(tail: int, gap: float, draws: int, seed: int) -> int:
    """How often that sampler draws one of `tail` tokens that lie `gap` below a single top one.

    The tail's best uniform is the maximum of `tail` draws from the grid {0, 1, ..., 2^24 - 1} / 2^24, which
    is floor(2^24 V^(1 / tail)) / 2^24 in law: the faulty sampler itself, without its cost.
    """
    generator = np.random.default_rng(seed)
    top = np.floor(generator.random(draws) * 2**24) / 2**24
    best = np.floor(2**24 * generator.random(draws) ** (1.0 / tail)) / 2**24
    with np.errstate(divide="ignore"):
        score = [-np.log(-np.log(u)) for u in (top, best)]
    return int((score[1] - gap > score[0]).sum())


def race_gap(logits: Tensor, temperature: float, streams: tuple[int, int, int, int]) -> float:
    """Relative gap of the two best E_b / S_b of the block race of one row, as docs/numerics.md section 3
    writes it.

    `streams` is (seed, row, position, step) of the draw.
    """
    from driftmax.reference.categorical import BLOCK, BLOCK_NOISE
    from driftmax.reference.fill import exponential
    from driftmax.reference.philox import Streams, words64

    y = logits.double() / temperature
    blocks = torch.nn.functional.pad(y, (0, -len(y) % BLOCK), value=-math.inf).view(-1, BLOCK)
    mass = (blocks - y.max()).exp().sum(1)
    stream = Streams(*(torch.tensor([field]) for field in streams))
    clock = exponential(*words64(stream, BLOCK_NOISE, 0, len(mass)))[0] / mass
    best = clock.sort().values
    return float((best[1] - best[0]) / best[0]) if len(best) > 1 and best[1] < math.inf else math.inf


#: Where the two best blocks lie closer than this, backends may choose differently (docs/numerics.md, section
#: 3).
NEAR_TIE = 2.0**-18


def assert_same_tokens(got: Tensor, wanted: Tensor, gap_of: Callable[[int], float]) -> int:
    """Tokens are equal except at near ties of the block race; returns how many of those differ.

    `gap_of(draw)` is `race_gap` of that draw, or 0-argument-like infinity where no block race is run.
    """
    assert got.shape == wanted.shape
    differ = (got != wanted).flatten().nonzero().flatten().tolist()
    for draw in differ:
        gap = gap_of(draw)
        pair = int(got.flatten()[draw]), int(wanted.flatten()[draw])
        assert gap <= NEAR_TIE, f"draw {draw}: tokens {pair}, but the best blocks are {gap:.2e} apart"
    return len(differ)
