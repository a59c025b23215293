"""`transfer` in plain torch: sort the scores of each row, as docs/numerics.md section 5 states."""

from __future__ import annotations

import torch
from torch import Tensor

from driftmax.reference.categorical import per_draw


@torch.no_grad()
def transfer(
    tokens: Tensor,
    drawn: Tensor,
    scores: Tensor,
    moved: Tensor,
    mask_id: int,
    begin: int,
    end: int,
    eligible: Tensor | None,
    count: int,
    counts: Tensor | None,
    rule: int,
    threshold: float,
    thresholds: Tensor | None,
) -> None:
    """Write the best-scoring tokens. See ``driftmax.transfer``; arguments as in its op's schema."""
    rows, length = tokens.shape
    device = tokens.device
    position = torch.arange(length, device=device)
    may = (tokens == mask_id) & (position >= begin) & (position < end)
    if eligible is not None:
        may &= eligible
    score = scores.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    many = per_draw(count, counts, rows, torch.int64, device)
    if rule == 1:
        least = per_draw(threshold, thresholds, rows, torch.float64, device)
        many = torch.maximum(many, (may & (score >= least[:, None])).sum(1))
    # Stable sorts: by score, then what may move before what may not; ties stay in the order of positions.
    order = score.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, may.gather(1, order).to(torch.int8).argsort(dim=1, descending=True, stable=True))
    rank = torch.empty_like(order).scatter_(1, order, position.expand(rows, length))
    moved.copy_(may & (rank < many[:, None]))
    tokens.copy_(torch.where(moved, drawn, tokens))
