"""`driftmax.categorical`: one draw per row of logits, by method, dtype, batch size and filter.

The limit is a bare read of the same logits, tuned for that alone; torch's `x.sum(-1)` is timed beside it. Of
logits that a cache holds both come from there, perhaps with twice the memory's bandwidth; in the rows "from
memory" every call works on logits that no cache holds.

The gate draws thousands of times from the workload's first row and holds the tokens to its softmax, compares
a few rows with the reference backend, and checks the by-products in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import driftmax
import torch

from ... import _core
from .. import gates, inputs, limits, peers
from ..harness import Run, Settings, Workload

VOCABULARY = 50257
BATCH = 1024
HUGE = 2**24 + 1024  # beyond torch.multinomial's cap of 2^24 categories
REFERENCE_ROWS = 4
STATS_TOLERANCE = 2e-5


def kept_law(
    logits: torch.Tensor, top_k: int | None, top_p: float | None, min_p: float | None
) -> torch.Tensor:
    """The law of one row in float64 after the filters, by sorting: the gate's oracle."""
    order = torch.argsort(logits, descending=True, stable=True)
    mass = torch.softmax(logits.double()[order], 0)
    if top_k is not None:
        mass[top_k:] = 0.0
    if top_p is not None:
        mass = mass / mass.sum()
        mass[torch.cumsum(mass, 0) - mass >= top_p] = 0.0
    if min_p is not None:
        mass[mass < min_p * mass[0]] = 0.0
    law = torch.zeros_like(mass)
    law[order] = mass / mass.sum()
    return law


def gate(
    logits: torch.Tensor, settings: Settings, options: Mapping[str, Any], what: str
) -> Callable[[], None]:
    """The correctness gate of one workload."""
    filters = {key: options.get(key) for key in ("top_k", "top_p", "min_p")}
    plain = {key: value for key, value in options.items() if key != "return_stats"}
    draws = settings.gate_draws if logits.shape[1] < 2**20 else 32

    def check() -> None:
        row = logits[0]
        law = kept_law(row.float().cpu(), **filters)
        gates.law_gate(
            lambda many: driftmax.categorical(many, rng=settings.seed, **plain),
            row,
            law,
            f"{what} law",
            draws,
        )
        few = logits[: 2 if settings.quick else REFERENCE_ROWS]
        got, stats = driftmax.categorical(few, rng=settings.seed, **{**plain, "return_stats": True})
        wanted = driftmax.categorical(few, rng=settings.seed, backend="reference", **plain)
        gates.check_equal_tokens(got, wanted, 0, what)
        if not any(filters.values()):
            log_law = torch.log_softmax(few.double(), -1)
            chosen = log_law.gather(1, got[:, None]).squeeze(1)
            gates.check_close(stats.log_prob, chosen, STATS_TOLERANCE, f"{what} log_prob")
            gates.check_close(
                stats.log_z, torch.logsumexp(few.double(), -1), STATS_TOLERANCE, f"{what} log_z"
            )
            entropy = -(log_law.exp() * log_law).sum(-1)
            gates.check_close(stats.entropy, entropy, STATS_TOLERANCE, f"{what} entropy")

    return check


def torch_reads(ring: inputs.Ring) -> dict[str, Run]:
    """Torch's own plain read of the logits; of 16-bit ones, which it converts, also of their bytes alone."""
    copies, turn = ring.copies, ring.turn
    reads: dict[str, Run] = {"torch's x.sum(-1)": lambda: copies[turn()].sum(-1)}
    rows, vocab = copies[0].shape
    if copies[0].element_size() == 2 and rows % 2 == 0:
        floats = [copy.view(-1).view(torch.float32).view(-1, vocab) for copy in copies]
        reads["torch's sum of the same bytes"] = lambda: floats[turn()].sum(-1)
    return reads


def workload(
    settings: Settings,
    variant: str,
    logits: torch.Tensor,
    against: Mapping[str, Run],
    *,
    isa: str | None = None,
    ring: inputs.Ring | None = None,
    **options: Any,
) -> Workload:
    """One row of the case: `options` go to :func:`driftmax.categorical`.

    With a ring of the logits torch's reads of them are timed as well.
    """
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    forced: dict[str, Any] = {"around": limits.forced_isa(isa), "isa": isa} if isa else {}
    beside = torch_reads(ring) if ring else {}
    ring = ring or inputs.Ring(logits)
    copies, turn = ring.copies, ring.turn
    reads = [limits.bare_read(copy, settings) for copy in copies]

    def subject() -> object:
        return driftmax.categorical(copies[turn()], rng=settings.seed, out=out, **options)

    def read() -> object:
        return reads[turn()]()

    return Workload(
        case="categorical",
        variant=variant,
        dtype=str(logits.dtype).removeprefix("torch."),
        n=logits.shape[0],
        v=logits.shape[1],
        subject=subject,
        gate=gate(logits, settings, options, variant),
        peers=against,
        limit=read,
        limit_name="bare read",
        beside=beside,
        **forced,
    )


def _headline(settings: Settings) -> Iterator[Workload]:
    """N = 1024, V = 50257 in float32, every instruction set, and the half dtypes."""
    logits = inputs.zipf(settings, BATCH, VOCABULARY)
    everyone = peers.unfiltered_peers(logits)
    if settings.quick:  # a second a call each, and in the other rows
        del everyone["torch gumbel fp64"], everyone["torch race fp32"]
    else:
        everyone["torch gumbel fp32, as usually written"] = peers.gumbel_as_written(logits)
    yield workload(settings, "block, stats", logits, everyone, ring=inputs.Ring(logits), return_stats=True)
    race = {"torch gumbel fp32": everyone["torch gumbel fp32"]}
    yield workload(settings, "block", logits, {} if settings.quick else race)
    yield workload(settings, "gumbel", logits, race, method="gumbel")
    if settings.device.type == "cpu":
        for isa in _core.available_isas():
            if isa != _core.isa():
                yield workload(settings, "block, stats", logits, {}, isa=isa, return_stats=True)
                yield workload(settings, "gumbel", logits, {}, isa=isa, method="gumbel")
    del everyone, race
    for dtype in (torch.bfloat16,) if settings.quick else (torch.float16, torch.bfloat16, torch.float64):
        other = logits.to(dtype)
        against = {} if settings.quick else {"torch race fp32": peers.exponential_race(other)}
        yield workload(settings, "block, stats", other, against, ring=inputs.Ring(other), return_stats=True)


def _from_memory(settings: Settings) -> Iterator[Workload]:
    """The headline's draws where no cache holds the logits."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        logits = inputs.zipf(settings, BATCH, VOCABULARY).to(dtype)
        ring = inputs.Ring.beyond_caches(logits)
        yield workload(settings, "block, stats, from memory", logits, {}, ring=ring, return_stats=True)


def _batches(settings: Settings) -> Iterator[Workload]:
    """Small batches, where latency counts, and one row beyond torch.multinomial's cap."""
    for n in (1, 16):
        logits = inputs.zipf(settings, n, VOCABULARY)
        yield workload(settings, "block, stats", logits, peers.unfiltered_peers(logits), return_stats=True)
    if not settings.quick:
        logits = inputs.zipf(settings, 1, HUGE)
        against = {"torch race fp32": peers.exponential_race(logits)}
        yield workload(settings, "huge vocabulary", logits, against)


def _shapes(settings: Settings) -> Iterator[Workload]:
    """Other shapes of law: normal logits, and a language model's over real text."""
    n = 128 if settings.quick else BATCH
    if not settings.quick:
        logits = inputs.gaussian(settings, n, VOCABULARY)
        yield workload(settings, "gaussian", logits, peers.unfiltered_peers(logits), return_stats=True)
    logits = inputs.real(n, settings.quick).to(settings.device)
    yield workload(settings, "real logits", logits, peers.unfiltered_peers(logits), return_stats=True)


def _filters(settings: Settings) -> Iterator[Workload]:
    """top-k, top-p and min-p on real logits."""
    logits = inputs.real(128 if settings.quick else BATCH, settings.quick)[: 128 if settings.quick else 256]
    logits = logits.to(settings.device)
    for variant, options, keep in (
        ("top_k=50", {"top_k": 50}, lambda x: peers.top_k_filter(x, 50)),
        ("top_p=0.9", {"top_p": 0.9}, lambda x: peers.top_p_filter(x, 0.9)),
        ("min_p=0.05", {"min_p": 0.05}, lambda x: peers.min_p_filter(x, 0.05)),
    ):
        against = {"torch filter + race": peers.filtered(logits, keep)}
        yield workload(settings, f"real, {variant}", logits, against, **options)


def workloads(settings: Settings) -> Iterator[Workload]:
    """All workloads of the case, made one after the other so that only one's buffers are alive."""
    yield from _headline(settings)
    if settings.device.type == "cpu" and not settings.quick:
        yield from _from_memory(settings)
    yield from _batches(settings)
    yield from _shapes(settings)
    yield from _filters(settings)
