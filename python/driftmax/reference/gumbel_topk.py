"""`gumbel_topk` in plain torch: sort the perturbed logits, as docs/numerics.md section 4 states."""

from __future__ import annotations

import torch
from torch import Tensor

from driftmax.errors import raise_status
from driftmax.reference.categorical import Filters, check, filters_of, per_draw, scaled, token_gumbels
from driftmax.reference.philox import Streams
from driftmax.reference.philox import streams as make_streams

TOKEN = 18
_CHUNK = 1 << 20  # logits at a time: bounds the memory


@torch.no_grad()
def gumbel_topk(
    logits: Tensor,
    k: int,
    tokens: Tensor,
    scores: Tensor | None,
    seed: int,
    seeds: Tensor | None,
    rows: Tensor | None,
    positions: Tensor | None,
    step: int,
    steps: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    top_k: int,
    top_ks: Tensor | None,
    top_p: float,
    top_ps: Tensor | None,
    min_p: float,
    min_ps: Tensor | None,
) -> None:
    """Write `k` tokens per row of `logits`. See ``driftmax.gumbel_topk``; arguments as in its op's schema."""
    n0, n1 = logits.shape[0], logits.shape[1] if logits.dim() == 3 else 1
    table, draws, device = logits.reshape(n0 * n1, -1), n0 * n1, logits.device
    streams = make_streams(n0, n1, seed, seeds, rows, positions, step, steps, device)
    scale = per_draw(temperature, temperatures, draws, torch.float64, device)
    filters = filters_of(top_k, top_ks, top_p, top_ps, min_p, min_ps, draws, device)
    chunk = max(1, _CHUNK // table.shape[1])
    for first in range(0, draws, chunk):
        part = slice(first, first + chunk)
        y = table[part].double()
        check(y, first, n1)
        some = None if filters is None else Filters(*(values[part] for values in filters))
        y = scaled(y, scale[part], some)
        few = (y > -torch.inf).sum(1) < k
        if bool(few.any()):
            raise_status(4 | (first + int(few.to(torch.int8).argmax())) << 8, n1)
        gumbels = token_gumbels(Streams(*(values[part] for values in streams)), TOKEN, 0, y.shape[1])
        race = torch.where(scale[part][:, None] == 0, y, y + gumbels)
        best = race.sort(dim=1, descending=True, stable=True)  # stable: ties by lower index
        tokens.view(draws, k)[part] = best.indices[:, :k]
        if scores is not None:
            scores.view(draws, k)[part] = best.values[:, :k]
