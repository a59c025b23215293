"""`unmask` in plain torch: the decision, then the categorical draw (docs/numerics.md, section 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from driftmax.errors import raise_status
from driftmax.reference.categorical import draw, per_draw, status_codes
from driftmax.reference.fill import PURPOSE, uniform
from driftmax.reference.philox import Streams, words64
from driftmax.reference.philox import streams as make_streams

_CHUNK = 1 << 20  # logits at a time: bounds the memory


def decided(streams: Streams, probability: Tensor) -> Tensor:
    """Which draws are unmasked: element `position` of the row's uniforms is below `probability`."""
    row = streams._replace(position=torch.zeros_like(streams.position))
    element = streams.position[:, None]
    hi, lo = (words.gather(1, element % 4) for words in words64(row, PURPOSE["uniform"], element // 4 * 4, 4))
    return uniform(hi, lo, torch.float64)[:, 0] < probability


def drawn(
    logits: Tensor, chosen: Tensor, columns: Tensor, temperature: Tensor, streams: Streams, n1: int
) -> Tensor:
    """Tokens of the draws `chosen` of `logits` [draws, V], with `columns` at -inf."""
    tokens = torch.empty_like(chosen)
    chunk = max(1, _CHUNK // logits.shape[1])
    for first in range(0, chosen.shape[0], chunk):
        part = chosen[first : first + chunk]
        y = logits[part].double()
        y[:, columns] = -torch.inf
        code = status_codes(y)
        if bool(code.any()):
            bad = int(code.ne(0).to(torch.int8).argmax())
            raise_status(int(code[bad]) | int(part[bad]) << 8, n1)
        own = Streams(*(field[part] for field in streams))
        tokens[first : first + chunk] = draw(y, temperature[part], None, own, 0)[0]
    return tokens


@torch.no_grad()
def unmask(
    logits: Tensor,
    tokens: Tensor,
    revealed: Tensor,
    mask_id: int,
    forbidden: Tensor | None,
    probability: float,
    probabilities: Tensor | None,
    seed: int,
    seeds: Tensor | None,
    rows: Tensor | None,
    positions: Tensor | None,
    step: int,
    steps: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
) -> None:
    """Unmask some positions. See ``driftmax.unmask``; arguments as in its op's schema."""
    n0, n1, vocab = logits.shape
    device = logits.device
    streams = make_streams(n0, n1, seed, seeds, rows, positions, step, steps, device)
    chance = per_draw(probability, probabilities, n0, torch.float64, device).repeat_interleave(n1)
    reveal = (tokens.view(-1) == mask_id) & decided(streams, chance)
    columns = torch.tensor([mask_id], device=device)
    if forbidden is not None:
        columns = torch.cat((columns, forbidden))
    columns = columns[(columns >= 0) & (columns < vocab)]
    scale = per_draw(temperature, temperatures, n0 * n1, torch.float64, device)
    chosen = reveal.nonzero()[:, 0]
    tokens.view(-1)[chosen] = drawn(logits.reshape(-1, vocab), chosen, columns, scale, streams, n1)
    revealed.copy_(reveal.view(n0, n1).sum(1))
