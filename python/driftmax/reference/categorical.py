"""`categorical` in plain torch: softmax in float64, filters by sorting, races as in docs/numerics.md."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from driftmax.errors import raise_status
from driftmax.reference import fill as noise
from driftmax.reference.philox import Streams, words64
from driftmax.reference.philox import streams as make_streams

TOKEN, BLOCK_NOISE = 16, 17
BLOCK = 1024
_CHUNK = 1 << 20  # logits at a time: bounds the memory


class Filters(NamedTuple):
    """One value per draw."""

    top_k: Tensor  # int64; 0: off
    top_p: Tensor
    min_p: Tensor


def per_draw(
    scalar: float, values: Tensor | None, draws: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """An op's (scalar, tensor or None) pair as a tensor of one value per draw."""
    if values is None:
        return torch.full((draws,), scalar, dtype=dtype, device=device)
    return values.reshape(-1)


def status_codes(logits: Tensor) -> Tensor:
    """0 for each good draw of `logits` [draws, V]: NaN is 1, +inf 2, no token of positive probability 3."""
    code = torch.where((logits == -torch.inf).all(1), 3, 0)
    code = torch.where((logits == torch.inf).any(1), 2, code)
    return torch.where(logits.isnan().any(1), 1, code)


def check(logits: Tensor, first: int, n1: int) -> None:
    """Raise `InvalidDistribution` for the first bad draw of `logits` [draws, V]."""
    code = status_codes(logits)
    if bool(code.any()):
        draw = int(code.ne(0).to(torch.int8).argmax())
        raise_status(int(code[draw]) | (first + draw) << 8, n1)


def kept(y: Tensor, filters: Filters) -> Tensor:
    """Mask of the tokens that survive top-k, then top-p, then min-p, in rows of scaled logits `y`."""
    order = y.argsort(dim=1, descending=True, stable=True)  # stable: ties by lower index
    ranked = y.gather(1, order)
    rank = torch.arange(y.shape[1], device=y.device)
    keep = ranked > -torch.inf
    keep &= (filters.top_k[:, None] == 0) | (rank < filters.top_k[:, None])
    mass = ranked.masked_fill(~keep, -torch.inf).softmax(1)
    before = mass.cumsum(1) - mass
    keep &= (before < filters.top_p[:, None]) | (rank == 0) | (filters.top_p[:, None] >= 1)
    keep &= (ranked - ranked[:, :1]).exp() >= filters.min_p[:, None]
    return torch.zeros_like(keep).scatter(1, order, keep)


def token_gumbels(streams: Streams, purpose: int, start: Tensor | int, count: int) -> Tensor:
    """Float64 Gumbels of tokens start .. start + count."""
    return noise.gumbel(*words64(streams, purpose, start, count))


def block_race(y: Tensor, streams: Streams) -> Tensor:
    """Choose a block of 1024 tokens by its mass, then a token inside it by Gumbels."""
    draws, vocab = y.shape
    blocks = torch.nn.functional.pad(y, (0, -vocab % BLOCK), value=-torch.inf).view(draws, -1, BLOCK)
    mass = (blocks - y.amax(1)[:, None, None]).exp().sum(2)
    clock = (
        noise.exponential(*words64(streams, BLOCK_NOISE, 0, mass.shape[1])) / mass
    )  # inf where the mass is 0
    winner = clock.argmin(1)
    inside = blocks[torch.arange(draws, device=y.device), winner]
    return winner * BLOCK + (inside + token_gumbels(streams, TOKEN, winner * BLOCK, BLOCK)).argmax(1)


def statistics(y: Tensor, tokens: Tensor) -> Tensor:
    """Rows log_prob, log_z, entropy, margin, [4, draws], of softmax(y); -inf in `y` is probability zero."""
    top = y.amax(1)
    above = (y - top[:, None]).logsumexp(1)  # log Z - top: kept apart, or a top of 1e30 would swallow it
    log_z = top + above
    log_p = y - top[:, None] - above[:, None]
    p = log_p.exp()
    entropy = -(p * log_p).masked_fill(p == 0, 0.0).sum(1)
    best = p.topk(min(2, p.shape[1]), dim=1).values
    margin = best[:, 0] - best[:, 1] if best.shape[1] == 2 else torch.ones_like(log_z)
    return torch.stack((log_p.gather(1, tokens[:, None])[:, 0], log_z, entropy, margin))


def scaled(logits: Tensor, temperature: Tensor, filters: Filters | None) -> Tensor:
    """Logits over temperature, -inf where filtered out; at temperature 0 the logits as they are."""
    greedy = (temperature == 0)[:, None]
    y = logits / torch.where(greedy, 1.0, temperature[:, None])
    return y if filters is None else y.masked_fill(~kept(y, filters) & ~greedy, -torch.inf)


def draw(
    y: Tensor, temperature: Tensor, filters: Filters | None, streams: Streams, method: int
) -> tuple[Tensor, Tensor]:
    """Tokens of float64 logits [draws, V], and the scaled and filtered logits they were drawn from."""
    y = scaled(y, temperature, filters)
    if method == 0 and filters is None and y.shape[1] > BLOCK:
        tokens = block_race(y, streams)
    else:
        tokens = (y + token_gumbels(streams, TOKEN, 0, y.shape[1])).argmax(1)
    return torch.where(temperature == 0, y.argmax(1), tokens), y


@torch.no_grad()
def categorical(
    logits: Tensor,
    tokens: Tensor,
    stats: Tensor | None,
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
    method: int,
) -> None:
    """Write one token per row of `logits`. See ``driftmax.categorical``; arguments as in its op's schema."""
    n0, n1 = logits.shape[0], logits.shape[1] if logits.dim() == 3 else 1
    table, draws, device = logits.reshape(n0 * n1, -1), n0 * n1, logits.device
    streams = make_streams(n0, n1, seed, seeds, rows, positions, step, steps, device)
    scale = per_draw(temperature, temperatures, draws, torch.float64, device)
    filters = filters_of(top_k, top_ks, top_p, top_ps, min_p, min_ps, draws, device)
    flat_tokens, flat_stats = tokens.view(-1), None if stats is None else stats.view(4, -1)
    chunk = max(1, _CHUNK // table.shape[1])
    for first in range(0, draws, chunk):
        part = slice(first, first + chunk)
        y = table[part].double()
        check(y, first, n1)
        some = None if filters is None else Filters(*(values[part] for values in filters))
        drawn, y = draw(y, scale[part], some, Streams(*(values[part] for values in streams)), method)
        flat_tokens[part] = drawn
        if flat_stats is not None:
            flat_stats[:, part] = statistics(y, drawn).to(flat_stats.dtype)


def filters_of(
    top_k: int,
    top_ks: Tensor | None,
    top_p: float,
    top_ps: Tensor | None,
    min_p: float,
    min_ps: Tensor | None,
    draws: int,
    device: torch.device,
) -> Filters | None:
    """The filters of every draw, or None where none is on."""
    if top_ks is None and top_ps is None and min_ps is None and top_k == 0 and top_p == 1 and min_p == 0:
        return None
    return Filters(
        per_draw(top_k, top_ks, draws, torch.int64, device),
        per_draw(top_p, top_ps, draws, torch.float64, device),
        per_draw(min_p, min_ps, draws, torch.float64, device),
    )
