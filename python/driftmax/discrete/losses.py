"""Training losses of absorbing diffusion: weighted cross-entropies on masked tokens that bound the NLL.

λ is the probability that a token is masked, λ(t) = 1 − α(t). Both losses here estimate the same bound without
bias,

    −log p(x) ≤ ∫_0^1 (1/λ) E[ Σ_{i masked} −log p(x_i | x^UM) ] dλ,

where each position is masked independently with probability λ and x^UM are the tokens left (Ou et al. 2024,
"Your Absorbing Discrete Diffusion Secretly Models the Conditional Distributions of Clean Data", Theorem 2).
`driftmax.discrete.likelihood` computes the bound itself, exactly or with a standard error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from driftmax.discrete.schedules import Schedule
from driftmax.random import Rng, uniform

__all__ = ["Loss", "Reduction", "lambda_dce", "masked_nll", "t_dce"]

Network: TypeAlias = Callable[[Tensor], Tensor]  # noisy tokens [B, L] to logits [B, L, V]
Reduction: TypeAlias = Literal["tokens", "rows", "mean"]


class Loss(Protocol):
    """What `driftmax.discrete.train` minimises: a scalar from a network and clean tokens."""

    def __call__(
        self, model: Network, tokens: Tensor, *, mask_id: int, rng: Rng, reduction: Reduction
    ) -> Tensor:
        """The loss of a batch."""


def masked_nll(logits: Tensor, tokens: Tensor, masked: Tensor, *, mask_id: int) -> Tensor:
    """−log p(x_i | x^UM) in nats at masked positions, zero at others.

    Parameters
    ----------
    logits : Tensor
        ``[..., V]`` of any float type; a column for `mask_id` counts as −inf.
    tokens : Tensor
        int64 ``[...]``, the clean tokens.
    masked : Tensor
        bool ``[...]``.
    mask_id : int
        Id of the mask.

    Returns
    -------
    Tensor
        ``[...]``, float32 (float64 for float64 logits). The soft maximum is taken at masked positions only.

    Raises
    ------
    ValueError
        On shapes that differ.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete.losses import masked_nll
    >>> masked_nll(torch.zeros(1, 2, 4), torch.tensor([[3, 1]]), torch.tensor([[True, False]]), mask_id=4)
    tensor([[1.3863, 0.0000]])
    """
    if logits.shape[:-1] != tokens.shape or tokens.shape != masked.shape:
        shapes = [list(x.shape) for x in (logits, tokens, masked)]
        raise ValueError(f"logits, tokens and masked must agree on their leading shape, not {shapes}")
    chosen = logits[masked]
    chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
    if 0 <= mask_id < chosen.shape[-1]:
        never = torch.arange(chosen.shape[-1], device=chosen.device) == mask_id
        chosen = chosen.masked_fill(never, -torch.inf)
    losses = torch.nn.functional.cross_entropy(chosen, tokens[masked], reduction="none")
    return losses.new_zeros(tokens.shape).masked_scatter(masked, losses)


def _uniforms(tokens: Tensor, rng: Rng, stratified: bool, least: float) -> tuple[Tensor, Tensor]:
    """Uniforms in (least, 1) for the noise levels, ``[B]``, and in (0, 1) for the masks, ``[B, L]``.

    Stratified: row b's level lies in the b-th of B equal intervals, so that a batch covers them all.
    """
    if not 0.0 <= least < 1.0:
        raise ValueError(f"least must be in [0, 1), not {least}")
    batch, length = tokens.shape
    draws = uniform((batch, length + 1), rng=rng, device=tokens.device)
    level, noise = draws[:, 0], draws[:, 1:]
    if stratified:
        level = (torch.arange(batch, device=tokens.device) + level) / batch
    return least + (1.0 - least) * level, noise


def _reduce(losses: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "tokens":
        return losses
    if reduction == "rows":
        return losses.sum(1)
    if reduction == "mean":
        return losses.mean()
    raise ValueError(f'reduction must be "tokens", "rows" or "mean", not {reduction!r}')


def _check(tokens: Tensor, mask_id: int) -> None:
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or not tokens.numel():
        raise ValueError(f"tokens must be int64 [B, L], not {tokens.dtype} {list(tokens.shape)}")
    if tokens.device.type == "cpu" and bool((tokens == mask_id).any()):
        raise ValueError(f"tokens must be clean, but hold the mask {mask_id}")


def lambda_dce(
    model: Network,
    tokens: Tensor,
    *,
    mask_id: int,
    rng: Rng = None,
    reduction: Reduction = "rows",
    stratified: bool = True,
    least: float = 0.0,
) -> Tensor:
    """λ-denoising cross-entropy: mask each token with probability λ ~ U(0, 1), weigh the losses with 1/λ.

    Parameters
    ----------
    model : callable
        Called as ``model(noisy)``, once; logits ``[B, L, V]``.
    tokens : Tensor
        int64 ``[B, L]``, clean.
    mask_id : int
        Id of the mask.
    rng : int, RowStreams, torch.Generator or None, default None
        Noise levels and masks. With a `RowStreams` a row keeps its mask uniforms in any batch; its level also
        depends on its place in the batch when `stratified`.
    reduction : {"rows", "tokens", "mean"}, default "rows"
        ``[B]`` nats per sequence; ``[B, L]`` each position's share, zero where not masked; or the scalar mean
        over positions, which a training step minimises.
    stratified : bool, default True
        Spread the levels of a batch evenly over (0, 1): same expectation, less variance.
    least : float, default 0.0
        Take the integral over λ from (least, 1) only. The weight 1/λ gives a logarithmically infinite
        variance at 0; a training run cuts it there, and leaves out the losses of tokens with nearly all
        others known.

    Returns
    -------
    Tensor
        float32, or float64 for float64 logits, differentiable. At ``least=0`` the expectation of every row is
        the bound exactly.

    Raises
    ------
    ValueError
        If tokens are not int64 ``[B, L]`` or hold the mask (looked for on the CPU only), or on a bad option.

    Notes
    -----
    The λ-DCE loss of Ou et al. (2024), with L_λ = ∫_0^1 (1/λ) E[Σ_{i masked} −log p(x_i | x^UM)] dλ. Given
    the number k of masked tokens, λ integrates out to the weight (L + 1)/k: this is the expected NLL of an
    any-order autoregressive model, from one term of it.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete.losses import lambda_dce
    >>> def uniform_law(tokens):
    ...     return torch.zeros(*tokens.shape, 4)
    >>> tokens = torch.zeros(4000, 3, dtype=torch.int64)
    >>> nats = lambda_dce(uniform_law, tokens, mask_id=4, rng=0)  # each of 3 tokens costs log 4 = 1.386
    >>> abs(float(nats.mean()) - 3 * 1.386) < 0.2
    True
    """
    _check(tokens, mask_id)
    level, noise = _uniforms(tokens, rng, stratified, least)
    masked = noise < level[:, None]
    logits = model(tokens.masked_fill(masked, mask_id))
    losses = masked_nll(logits, tokens, masked, mask_id=mask_id)
    return _reduce(losses * ((1.0 - least) / level)[:, None], reduction)


def t_dce(
    model: Callable[..., Tensor],
    tokens: Tensor,
    *,
    mask_id: int,
    schedule: Schedule,
    rng: Rng = None,
    reduction: Reduction = "rows",
    stratified: bool = True,
    least: float = 0.0,
) -> Tensor:
    """t-denoising cross-entropy: mask at a time t ~ U(0, 1), weigh the losses with −α′(t) / (1 − α(t)).

    Parameters
    ----------
    model : callable
        Called as ``model(noisy)`` if it says ``time_independent = True``, else as ``model(noisy, t)``, t
        float32 ``[B]``.
    schedule : Schedule
        Gives α(t) and its derivative.
    tokens, mask_id, rng, reduction, stratified
        As for `lambda_dce`.
    least : float, default 0.0
        Take the integral over t from (least, 1) only; see `lambda_dce`.

    Returns
    -------
    Tensor
        As for `lambda_dce`.

    Raises
    ------
    ValueError
        As for `lambda_dce`.

    Notes
    -----
    The t-DCE loss of Ou et al. (2024), L_t = ∫_0^1 σ(t) e^{−σ̄(t)} / (1 − e^{−σ̄(t)}) E[Σ_{i masked} −log
    p(x_i | x^UM)] dt, α = e^{−σ̄}. The substitution λ = 1 − α(t) makes it the λ-DCE loss up to α(1): a
    schedule that ends at α(1) = ε > 0 (log-linear: 1e-3) leaves out the levels above 1 − ε, and the bound
    then needs the NLL of what is still masked at t = 1, which λ-DCE includes.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete.losses import t_dce
    >>> from driftmax.discrete.schedules import Linear
    >>> def uniform_law(tokens, t):
    ...     return torch.zeros(*tokens.shape, 4)
    >>> tokens = torch.zeros(4000, 3, dtype=torch.int64)
    >>> nats = t_dce(uniform_law, tokens, mask_id=4, schedule=Linear(), rng=0)
    >>> abs(float(nats.mean()) - 3 * 1.386) < 0.2
    True
    """
    _check(tokens, mask_id)
    time, noise = _uniforms(tokens, rng, stratified, least)
    level = 1.0 - schedule.alpha(time.double())
    weight = -(1.0 - least) * schedule.alpha_prime(time.double()) / level
    masked = noise < level[:, None]
    noisy = tokens.masked_fill(masked, mask_id)
    independent = getattr(model, "time_independent", False)
    logits = model(noisy) if independent else model(noisy, time)
    losses = masked_nll(logits, tokens, masked, mask_id=mask_id)
    return _reduce(losses * weight.to(losses.dtype)[:, None], reduction)
