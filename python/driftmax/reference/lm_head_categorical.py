"""`lm_head_categorical` in plain torch: the product in float64, then the reference `categorical`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from driftmax.reference.categorical import categorical


@torch.no_grad()
def lm_head_categorical(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    """Write one token per row of `hidden`. See ``driftmax.lm_head_categorical``; arguments as in its op."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    stream: tuple[Any, ...] = (seed, seeds, rows, positions, step, steps)
    law: tuple[Any, ...] = (temperature, temperatures, top_k, top_ks, top_p, top_ps, min_p, min_ps, method)
    categorical(logits, tokens, stats, *stream, *law)
