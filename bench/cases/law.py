"""The fault figure: what the noise's precision does to the law of a masked-diffusion sampler.

A masked position of vocabulary size K holds a categorical over K tokens *and* the mask. In a step that
unmasks with probability delta = 1/N, token v has probability delta pi_v. Gumbel-max draws it as a race of
exponentials, and a float32 uniform lies on a grid of spacing eps = 2^-24, so no exponential is below eps and
the rare tokens lose races that they should win. Counting grid points gives the law of what gets unmasked,

    q_v  proportional to  pi_v a / (e^a - 1),    a = eps (1 - delta) / (pi_v delta).

This is the fault behind published generative perplexities: Zheng et al., "Masked Diffusion Models are
Secretly Time-Agnostic Masked Models and Exploit Inaccurate Categorical Sampling" (2024), section 5. Here pi
is Zipf(1) over K = 50257 tokens. Lines are the analytic law; dots are measured with the samplers themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import driftmax
import numpy as np
import torch
from tqdm import tqdm

from .. import plots
from ..harness import Settings
from ..report import Finding, Row

VOCABULARY = 50257
STEPS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
EPS_FLOAT32 = 2.0**-24  # torch.rand in float32
EPS_FLOAT64 = 2.0**-53  # torch.rand in float64
EPS_DRIFTMAX = 2.0**-65  # the smallest exponential (docs/numerics.md, section 2)
BINS = 24  # of token rank, for the measured entropy
CHUNK = 256  # rows drawn at a time: 50 MB of noise
SIGMA = 6.0  # a measured driftmax law this far from the exact one fails the run


def zipf(vocabulary: int = VOCABULARY) -> np.ndarray:
    """Zipf(1): probability of rank r proportional to 1/r, most frequent first, float64 [vocabulary]."""
    weight = 1.0 / np.arange(1, vocabulary + 1)
    return np.asarray(weight / weight.sum())


def entropy(law: np.ndarray) -> float:
    """Shannon entropy in nats."""
    positive = law[law > 0]
    return float(-(positive * np.log(positive)).sum())


def total_variation(one: np.ndarray, other: np.ndarray) -> float:
    """Half the summed absolute difference."""
    return float(0.5 * np.abs(one - other).sum())


def mask_inside(pi: np.ndarray, delta: float, eps: float) -> np.ndarray:
    """Law of the unmasked token when the mask takes part in the race and exponentials lie on a grid.

    Parameters
    ----------
    pi : float64 array, shape [K]
        The law that should be drawn.
    delta : float
        Probability that the step unmasks, in (0, 1).
    eps : float
        Spacing of the uniforms' grid; 0 < eps << delta.

    Returns
    -------
    float64 array, shape [K]
        The law drawn, to first order in delta; tends to ``pi`` for eps -> 0.
    """
    a = eps * (1.0 - delta) / (pi * delta)
    factor = np.where(a < 1e-8, 1.0 - 0.5 * a, a / np.expm1(np.clip(a, 1e-8, 700.0)))
    law = pi * factor
    return np.asarray(law / law.sum())


def mask_outside(pi: np.ndarray, eps: float) -> np.ndarray:
    """Law of the token when a clock decides *whether* to unmask and only tokens race (a = eps / pi)."""
    return mask_inside(pi, 0.5, eps)


@dataclass(frozen=True)
class Draws:
    """Ranks of the tokens that got unmasked, and how many rows it took."""

    ranks: np.ndarray
    rows: int


@dataclass(frozen=True)
class Estimate:
    """A measured number with its standard error."""

    value: float
    error: float


def measured_variation(ranks: np.ndarray, pi: np.ndarray, favoured: np.ndarray) -> Estimate:
    """Mass of the set that float32 noise favours, beyond what ``pi`` gives it.

    The set is chosen before any draw, so the estimate is unbiased: its mean is the total variation for the
    float32 law, and zero for an exact sampler (negative values are chance).
    """
    count = max(1, ranks.size)
    share = float(favoured[ranks].mean()) if ranks.size else math.nan
    smoothed = (share * count + 1.0) / (count + 2.0)  # an error of zero would pretend certainty
    return Estimate(share - float(pi[favoured].sum()), math.sqrt(smoothed * (1.0 - smoothed) / count))


def measured_entropy(ranks: np.ndarray, pi: np.ndarray, bins: int = BINS) -> Estimate:
    """Entropy of the tokens drawn, from far fewer draws than tokens.

    Ranks fall into logarithmic bins; inside a bin tokens are taken as proportional to ``pi``, so the entropy
    is that of the bins (with Miller's and Madow's correction for finite counts) plus that of ``pi`` inside
    each. For a law whose ratio to ``pi`` changes slowly with rank, as here, the bins cost less than 0.02 nats
    (a test holds this).
    """
    count = ranks.size
    edges = np.unique(np.round(np.geomspace(1, pi.size + 1, bins + 1)).astype(int)) - 1
    index = np.searchsorted(edges, np.arange(pi.size), side="right") - 1
    size = edges.size - 1
    mass = np.bincount(index, weights=pi, minlength=size)
    inside = np.log(mass) - np.bincount(index, weights=pi * np.log(pi), minlength=size) / mass
    share = np.bincount(index[ranks], minlength=size) / max(1, count)
    seen = share > 0
    information = np.zeros(size)
    information[seen] = inside[seen] - np.log(share[seen])
    value = float((share * information).sum()) + (int(seen.sum()) - 1) / (2.0 * max(1, count))
    variance = float((share * information**2).sum()) - float((share * information).sum()) ** 2
    return Estimate(value, math.sqrt(max(variance, 0.0) / max(1, count)))


def torch_gumbel(
    pi: np.ndarray, rows: int, dtype: torch.dtype, seed: int, steps: tuple[int, ...]
) -> dict[int, Draws]:
    """argmax(logits - log(-log U)) over tokens and mask, as masked-diffusion codes write it.

    A row's noise serves every N: only the mask's logit depends on it. So the numbers of different N are
    correlated with each other, and each is what a run at that N alone would give.
    """
    logits = torch.from_numpy(np.log(pi)).to(dtype)
    mask_logits = torch.tensor([math.log(n - 1.0) for n in steps], dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.empty(CHUNK, pi.size + 1, dtype=dtype)
    found: dict[int, list[torch.Tensor]] = {n: [] for n in steps}
    for _ in tqdm(
        range(rows // CHUNK), desc=f"torch {dtype}".replace("torch.", ""), unit="chunk", leave=False
    ):
        torch.rand(noise.shape, dtype=dtype, generator=generator, out=noise)
        noise.log_().neg_().log_().neg_()
        noise[:, :-1] += logits
        best, token = noise[:, :-1].max(-1)
        for i, n in enumerate(steps):
            found[n].append(token[best >= noise[:, -1] + mask_logits[i]])
    return {n: Draws(torch.cat(found[n]).numpy(), rows) for n in steps}


def driftmax_draws(pi: np.ndarray, rows: int, seed: int, steps: tuple[int, ...]) -> dict[int, Draws]:
    """driftmax.categorical in float32 over tokens and mask: one expanded row, no copy."""
    found: dict[int, Draws] = {}
    for n in tqdm(steps, desc="driftmax", unit="N", leave=False):
        logits = torch.from_numpy(np.append(np.log(pi), math.log(n - 1.0))).float()
        tokens = driftmax.categorical(logits.expand(rows, -1), rng=seed + n)
        found[n] = Draws(tokens[tokens < pi.size].numpy(), rows)
    return found


def _analytic_rows(pi: np.ndarray) -> Iterator[Row]:
    for sampler, eps in (("fp32", EPS_FLOAT32), ("fp64", EPS_FLOAT64), ("driftmax", EPS_DRIFTMAX)):
        for n in STEPS:
            law = mask_inside(pi, 1.0 / n, eps)
            yield _row("analytic", sampler, "inside", n, entropy(law), total_variation(law, pi))
        law = mask_outside(pi, eps)
        yield _row("analytic", sampler, "outside", 0, entropy(law), total_variation(law, pi))


def _row(kind: str, sampler: str, mask: str, n: int, nats: float, variation: float) -> Row:
    return {
        "kind": kind,
        "sampler": sampler,
        "mask": mask,
        "N": n,
        "K": VOCABULARY,
        "entropy": float(f"{nats:.6g}"),
        "entropy_error": "",
        "tv": float(f"{variation:.4g}"),
        "tv_error": "",
        "draws": "",
        "rows": "",
    }


def _measured_row(sampler: str, n: int, draws: Draws, pi: np.ndarray) -> Row:
    favoured = mask_inside(pi, 1.0 / n, EPS_FLOAT32) > pi
    variation, nats = measured_variation(draws.ranks, pi, favoured), measured_entropy(draws.ranks, pi)
    row = _row("measured", sampler, "inside", n, nats.value, variation.value)
    row |= {"entropy_error": float(f"{nats.error:.2g}"), "tv_error": float(f"{variation.error:.2g}")}
    return row | {"draws": draws.ranks.size, "rows": draws.rows}


def _measurements(quick: bool, pi: np.ndarray, seed: int) -> Iterator[tuple[str, dict[int, Draws]]]:
    """Each sampler's draws; a full run gives fp32 about 200 unmasked tokens at N = 1024."""
    steps = (16, 64) if quick else (16, 64, 256, 1024)
    samplers: tuple[tuple[str, int, Callable[[int], dict[int, Draws]]], ...] = (
        ("fp32", 2048 if quick else 204_800, lambda rows: torch_gumbel(pi, rows, torch.float32, seed, steps)),
        ("fp64", 1024 if quick else 102_400, lambda rows: torch_gumbel(pi, rows, torch.float64, seed, steps)),
        ("driftmax", 16_384 if quick else 409_600, lambda rows: driftmax_draws(pi, rows, seed, steps)),
    )
    for name, rows, draw in samplers:
        yield name, draw(rows)


def _text(rows: list[Row], exact: float) -> str:
    """The table: analytic and measured side by side."""
    lines = [
        f"law: masked diffusion, mask state inside the categorical, Zipf(1), K = {VOCABULARY}; "
        f"exact entropy {exact:.3f}",
        f"{'sampler':<10}{'N':>6}  {'entropy':>9}  {'TV':>8}   {'measured entropy':>18}  {'measured TV':>18}"
        f" {'draws':>8}",
    ]
    measured = {(row["sampler"], row["N"]): row for row in rows if row["kind"] == "measured"}
    for row in rows:
        if row["kind"] != "analytic" or row["mask"] != "inside":
            continue
        exact_here = float(row["tv"]) < 1e-6
        if exact_here and (row["sampler"], row["N"]) not in measured and row["N"] != STEPS[-1]:
            continue  # one line says it for all N
        line = f"{row['sampler']:<10}{row['N']:>6}  {row['entropy']:>9.3f}  {row['tv']:>8.4f}"
        dot = measured.get((row["sampler"], row["N"]))
        if dot is not None:
            line += f"   {dot['entropy']:>9.3f} +- {dot['entropy_error']:<6.2g}"
            line += f"  {dot['tv']:>9.4f} +- {dot['tv_error']:<6.2g} {dot['draws']:>8}"
        lines.append(line)
    for row in rows:
        if row["mask"] == "outside":
            lines.append(f"{row['sampler']:<10} mask outside the categorical: TV {row['tv']:.4f}")
    return "\n".join(lines)


def report(settings: Settings) -> Finding:
    """The analytic law, the measured one, and whether driftmax's is the exact one."""
    pi = zipf()
    rows = list(_analytic_rows(pi))
    failure = None
    for name, by_steps in _measurements(settings.quick, pi, settings.seed + 1):
        for n, draws in by_steps.items():
            row = _measured_row(name, n, draws, pi)
            rows.append(row)
            if name == "driftmax" and not abs(float(row["tv"])) < SIGMA * float(row["tv_error"]):
                failure = f"law: driftmax at N = {n} is {row['tv']} +- {row['tv_error']} from the exact law"
    return Finding(_text(rows, entropy(pi)), rows, "law.csv", "fp32_fault.png", plots.law, failure)
