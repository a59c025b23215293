"""How likely a masked-diffusion model finds data: the any-order autoregressive bound on the NLL.

A time-independent denoiser is an any-order autoregressive model (AO-ARM): reveal the tokens in an order π,
each by its conditional law. Averaged over uniform orders, the NLL is the bound that the losses of
`driftmax.discrete.losses` estimate (Ou et al. 2024, Theorem 2; Uria, Murray and Larochelle 2014). With k
tokens masked, S their set, it is

    E_π[−log p_π(x)] = Σ_{k=1}^L E_{|S| = k} [ (1/k) Σ_{i in S} −log p(x_i | x_{not S}) ].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from driftmax.discrete.losses import Network, masked_nll
from driftmax.random import Rng, uniform

__all__ = ["LikelihoodBound", "exact_nll_bound", "nll_bound"]

_MOST_EXACT = 20


@dataclass(frozen=True)
class LikelihoodBound:
    """Upper bounds on −log p(x), one per sequence.

    Attributes
    ----------
    nats : Tensor
        float64 ``[B]``: the bound of each sequence, or an unbiased estimate of it.
    standard_error : Tensor
        float64 ``[B]``: Monte-Carlo standard error of each; zero where the bound is exact.
    length : int
        Tokens per sequence.
    evaluations : int
        Rows that went through the network.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import exact_nll_bound
    >>> bound = exact_nll_bound(lambda x: torch.zeros(*x.shape, 2), torch.tensor([[0, 1]]), mask_id=2)
    >>> bound.length, bound.evaluations, round(float(bound.nats), 4)
    (2, 3, 1.3863)
    """

    nats: Tensor
    standard_error: Tensor
    length: int
    evaluations: int

    def bits_per_token(self) -> tuple[float, float]:
        """Mean over sequences in bits per token, and its standard error as an estimate for their source.

        The error is the spread of the rows over √B, which holds both the choice of the sequences and the
        masks; it takes them for independent, so windows of one document make it too small. NaN for one
        sequence.

        Examples
        --------
        >>> import torch
        >>> from driftmax.discrete.likelihood import LikelihoodBound
        >>> nats = torch.tensor([2.0, 4.0], dtype=torch.float64)
        >>> bound = LikelihoodBound(nats, torch.zeros(2), length=3, evaluations=2)
        >>> [round(value, 3) for value in bound.bits_per_token()]
        [1.443, 0.481]
        """
        bits = self.nats / (self.length * math.log(2.0))
        error = float(bits.std()) / math.sqrt(len(bits)) if len(bits) > 1 else math.nan
        return float(bits.mean()), error


@torch.no_grad()
def exact_nll_bound(
    model: Network, tokens: Tensor, *, mask_id: int, batch_size: int = 1024
) -> LikelihoodBound:
    """The bound by enumeration of all 2^L − 1 sets of masked tokens.

    Parameters
    ----------
    model : callable
        Time-independent denoiser, ``model(noisy) -> [N, L, V]``.
    tokens : Tensor
        int64 ``[B, L]``, clean; L at most 20.
    mask_id : int
        Id of the mask.
    batch_size : int, default 1024
        Rows per call of the network.

    Returns
    -------
    LikelihoodBound
        Exact, summed in float64; B (2^L − 1) evaluations.

    Raises
    ------
    ValueError
        If L is above 20 or tokens are not int64 ``[B, L]``.

    Notes
    -----
    A set S of k tokens has the weight 1 / (k C(L, k)) = ∫_0^1 λ^{k−1} (1 − λ)^{L−k} dλ: the two sides are the
    AO-ARM and the λ-DCE form of one bound. For a model whose conditionals belong to one joint law, every
    order gives the same NLL, and the bound is −log p(x) itself.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete.likelihood import exact_nll_bound
    >>> bound = exact_nll_bound(lambda x: torch.zeros(*x.shape, 4), torch.tensor([[0, 3, 1]]), mask_id=4)
    >>> round(float(bound.nats), 4), round(3 * 1.386294, 4)  # three tokens, log 4 each
    (4.1589, 4.1589)
    """
    length = _length(tokens)
    if length > _MOST_EXACT:
        raise ValueError(f"exact enumeration takes 2^L evaluations; L = {length} is above {_MOST_EXACT}")
    sets = torch.arange(1, 2**length, device=tokens.device)
    members = (sets[:, None] >> torch.arange(length, device=tokens.device)) & 1 == 1
    size = members.sum(1)
    binomials = torch.tensor([float(math.comb(length, k)) for k in range(length + 1)], dtype=torch.float64)
    weight = 1.0 / (size.double() * binomials.to(tokens.device)[size])
    nats = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
    for row, clean in enumerate(tokens):
        for part in range(0, len(members), batch_size):
            masked = members[part : part + batch_size]
            losses = _losses(model, clean.expand(len(masked), -1), masked, mask_id)
            nats[row] += losses @ weight[part : part + batch_size]
    return LikelihoodBound(nats, torch.zeros_like(nats), length, len(tokens) * len(sets))


@torch.no_grad()
def nll_bound(
    model: Network,
    tokens: Tensor,
    *,
    mask_id: int,
    samples: int = 32,
    rng: Rng = None,
    batch_size: int = 64,
) -> LikelihoodBound:
    """The bound by Monte Carlo, unbiased, with a standard error.

    Parameters
    ----------
    model : callable
        Time-independent denoiser, ``model(noisy) -> [N, L, V]``.
    tokens : Tensor
        int64 ``[B, L]``, clean.
    mask_id : int
        Id of the mask.
    samples : int, default 32
        Masks per sequence, an even number; the error falls at least as fast as its square root.
    rng : int, RowStreams, torch.Generator or None, default None
        Choice of the masks; with a `RowStreams` a row's estimate does not depend on the batch.
    batch_size : int, default 64
        Rows per call of the network.

    Returns
    -------
    LikelihoodBound
        B * samples evaluations. The standard errors are estimated from pairs, so a single row's is rough;
        their mean square over rows is unbiased.

    Raises
    ------
    ValueError
        If samples is odd or below 2, or tokens are not int64 ``[B, L]``.

    Notes
    -----
    Each mask hides k tokens, k uniform on 1..L, and estimates with (L/k) Σ_{i masked} −log p(x_i | x^UM):
    finite variance, unlike the λ-DCE weight 1/λ. The sizes are stratified, two masks to each of samples/2
    equal ranges of k, and the error comes from the differences of the two.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete.likelihood import nll_bound
    >>> tokens = torch.zeros(2, 300, dtype=torch.int64)
    >>> bound = nll_bound(lambda x: torch.zeros(*x.shape, 4), tokens, mask_id=4, rng=0)
    >>> round(bound.bits_per_token()[0], 6)
    2.0
    """
    length = _length(tokens)
    if samples < 2 or samples % 2:
        raise ValueError(f"samples must be even and at least 2, not {samples}")
    batch = len(tokens)
    draws = uniform((batch, samples, length + 1), rng=rng, dtype=torch.float64, device=tokens.device)
    stratum = torch.arange(samples, device=tokens.device) // 2
    size = (length * 2.0 * (stratum + draws[..., 0]) / samples).ceil().clamp(1, length)
    # The k smallest of L independent uniforms sit at a uniformly random set of k positions.
    masked = draws[..., 1:].argsort(-1).argsort(-1) < size[..., None]
    clean = tokens[:, None].expand(-1, samples, -1).reshape(-1, length)
    masked, weight = masked.reshape(-1, length), length / size.reshape(-1)
    parts = [
        _losses(model, clean[part : part + batch_size], masked[part : part + batch_size], mask_id)
        for part in range(0, len(clean), batch_size)
    ]
    estimates = (torch.cat(parts) * weight).view(batch, samples // 2, 2)
    spread = (estimates[..., 0] - estimates[..., 1]).square().sum(1).sqrt() / samples
    return LikelihoodBound(estimates.mean((1, 2)), spread, length, len(clean))


def _length(tokens: Tensor) -> int:
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or not tokens.numel():
        raise ValueError(f"tokens must be int64 [B, L], not {tokens.dtype} {list(tokens.shape)}")
    return tokens.shape[1]


def _losses(model: Network, clean: Tensor, masked: Tensor, mask_id: int) -> Tensor:
    """Sum of the masked tokens' losses, float64 ``[N]``."""
    logits = model(clean.masked_fill(masked, mask_id))
    return masked_nll(logits, clean, masked, mask_id=mask_id).double().sum(1)
