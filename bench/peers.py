"""The usual ways to draw the same samples in torch, each at its best setting (and one as people write it).

Noise goes into a buffer made once, and every step that can runs in place, so that a peer is never slowed by
temporaries it could avoid. The filters follow the semantics of the common `transformers` logits processors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Draw = Callable[[], torch.Tensor]


def gumbel_argmax(logits: torch.Tensor, dtype: torch.dtype) -> Draw:
    """argmax(logits - log(-log U)), U made in ``dtype``; masked-diffusion codes use float64."""
    noise = torch.empty(logits.shape, dtype=dtype, device=logits.device)

    def draw() -> torch.Tensor:
        noise.uniform_().log_().neg_().log_()
        torch.sub(logits, noise, out=noise)
        return noise.argmax(-1)

    return draw


def gumbel_as_written(logits: torch.Tensor) -> Draw:
    """The line most code has: float32 uniforms that may be 0, and a temporary for every step."""
    return lambda: (logits - torch.log(-torch.log(torch.rand_like(logits)))).argmax(-1)


def exponential_race(logits: torch.Tensor) -> Draw:
    """argmax(softmax(logits) / E): one logarithm fewer than the Gumbel form."""
    noise = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)

    def draw() -> torch.Tensor:
        probability = torch.softmax(logits, -1, dtype=torch.float32)
        return probability.div_(noise.exponential_()).argmax(-1)

    return draw


def multinomial(logits: torch.Tensor) -> Draw:
    """torch.multinomial(softmax(logits))."""
    return lambda: torch.multinomial(torch.softmax(logits, -1, dtype=torch.float32), 1).squeeze(-1)


def inverse_cdf(logits: torch.Tensor) -> Draw:
    """searchsorted in the float32 cumulative sum: few random numbers; the sum's rounding hurts the tail."""

    def draw() -> torch.Tensor:
        cumulative = torch.softmax(logits, -1, dtype=torch.float32)
        torch.cumsum(cumulative, -1, out=cumulative)
        level = torch.rand(logits.shape[0], 1, device=logits.device) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, level, right=True).squeeze(-1).clamp_(max=logits.shape[1] - 1)

    return draw


def top_k_filter(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Everything below the k-th largest logit becomes -inf."""
    threshold = torch.topk(logits, k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def top_p_filter(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Sort the whole row, keep the smallest set of mass at least p."""
    ordered, order = torch.sort(logits, dim=-1)
    drop = torch.softmax(ordered, -1).cumsum_(-1) <= 1.0 - p
    drop[..., -1:] = False
    return logits.masked_fill(torch.empty_like(drop).scatter_(-1, order, drop), -torch.inf)


def min_p_filter(logits: torch.Tensor, min_p: float) -> torch.Tensor:
    """Drop tokens whose probability is below ``min_p`` times the largest."""
    probability = torch.softmax(logits, -1)
    return logits.masked_fill(probability < min_p * probability.amax(-1, keepdim=True), -torch.inf)


def filtered(logits: torch.Tensor, keep: Callable[[torch.Tensor], torch.Tensor]) -> Draw:
    """Filter, then the fastest torch draw for one row per draw: the exponential race."""

    def draw() -> torch.Tensor:
        probability = torch.softmax(keep(logits), -1)
        return probability.div_(torch.empty_like(probability).exponential_()).argmax(-1)

    return draw


def unfiltered_peers(logits: torch.Tensor) -> dict[str, Draw]:
    """Every unfiltered peer, by the name used in rows."""
    return {
        "torch gumbel fp32": gumbel_argmax(logits, torch.float32),
        "torch race fp32": exponential_race(logits),
        "torch gumbel fp64": gumbel_argmax(logits, torch.float64),
        "torch multinomial": multinomial(logits),
        "torch inverse cdf": inverse_cdf(logits),
    }
