"""Ratios of probabilities (concrete scores), and what they have to do with denoisers.

A score network estimates log p_t(y) / p_t(x) for every y that differs from the noisy sequence x at one
position. Everything here is in logarithms, as score-entropy networks are trained: the ratios run over many
orders of magnitude, and near t = 0 they overflow. With sigma_bar the total noise, alpha = e**-sigma_bar:

* absorbing noise (Ou et al., 2024, equation 3.1), position i masked:
  p_t(x, x_i = v) / p_t(x) = alpha / (1 - alpha) p(x0_i = v | unmasked), where 1 / (e**sigma_bar - 1) is the
  factor;
* uniform noise, q the law of x0_i given the whole of x, V tokens, a = alpha + b, b = (1 - alpha) / V:
  p_t(x, x_i = y) / p_t(x) = 1 - (1 - b / a) q(x_i) + (a / b - 1) q(y) for y other than x_i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from driftmax.discrete.schedules import Schedule

__all__ = [
    "NoiseConditioned",
    "ScoreDenoiser",
    "ScoreModel",
    "absorbing_log_scores",
    "denoiser_logits",
    "uniform_log_scores",
]


@runtime_checkable
class ScoreModel(Protocol):
    """A network of log-ratios: ``log_scores = model(tokens, t)``.

    `tokens` is int64 ``[B, L]``, `t` float32 ``[B]`` times, and entry [b, i, v] of the result ``[B, L, V]``
    is log p_t(y) / p_t(x), y being row b with token v at position i. The entry of the token that is there is
    not looked at; its value is 0. -inf says that y cannot be. Score-entropy networks are conditioned on the
    total noise instead of the time: see `NoiseConditioned`.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import ScoreModel
    >>> isinstance(lambda tokens, t: torch.zeros(*tokens.shape, 5), ScoreModel)
    True
    """

    def __call__(self, tokens: Tensor, t: Tensor) -> Tensor: ...


def _log_odds(sigma_bar: float | Tensor, like: Tensor) -> Tensor:
    """log(e**sigma_bar - 1) in float64, shaped to go with `like`, without overflow for large noise."""
    noise = torch.as_tensor(sigma_bar, dtype=torch.float64, device=like.device)
    odds = noise + torch.log(-torch.expm1(-noise))
    return odds.reshape(*odds.shape, *(1,) * (like.ndim - odds.ndim))


def absorbing_log_scores(logits: Tensor, sigma_bar: float | Tensor) -> Tensor:
    """Log-scores of absorbing diffusion from a denoiser's logits: log p(x0_i | unmasked) - log(e**s - 1).

    Parameters
    ----------
    logits : Tensor
        ``[B, L, V]``, floating point. Normalised here; a column for the mask has to be -inf.
    sigma_bar : float or Tensor
        Total noise, one or ``[B]``, positive and finite.

    Returns
    -------
    Tensor
        ``[B, L, V]`` in the dtype of `logits`. Ratios at masked positions; at others they mean nothing, for
        the reverse process never leaves a clean token.

    Notes
    -----
    Ou et al., "Your Absorbing Discrete Diffusion Secretly Models the Conditional Distributions of Clean Data"
    (RADD, 2024), theorem 1. One pass over the logits.

    Examples
    --------
    >>> import math, torch
    >>> from driftmax.discrete import absorbing_log_scores
    >>> absorbing_log_scores(torch.zeros(1, 1, 4), math.log(2.0)).exp().flatten().tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    return logits.log_softmax(-1) - _log_odds(sigma_bar, logits).to(logits.dtype)


def denoiser_logits(log_scores: Tensor, sigma_bar: float | Tensor) -> Tensor:
    """Logits of a denoiser from log-scores of absorbing diffusion: the inverse of `absorbing_log_scores`.

    Parameters
    ----------
    log_scores : Tensor
        ``[B, L, V]``, floating point.
    sigma_bar : float or Tensor
        Total noise, one or ``[B]``, positive and finite.

    Returns
    -------
    Tensor
        ``[B, L, V]`` in the dtype of `log_scores`. Exact scores give log-probabilities. A network's need not
        sum to one; log-sum-exp over the clean tokens then says by how much they miss it.

    Notes
    -----
    A sampler that normalises these logits and takes unmasking times from the schedule corrects that miss: in
    the score's own samplers it changes how likely a position is unmasked, never to which token.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import absorbing_log_scores, denoiser_logits
    >>> logits = torch.tensor([[[0.5, 0.25, 0.25]]]).log()
    >>> denoiser_logits(absorbing_log_scores(logits, 3.0), 3.0).exp().flatten().tolist()
    [0.5, 0.25, 0.25]
    """
    return log_scores + _log_odds(sigma_bar, log_scores).to(log_scores.dtype)


def uniform_log_scores(logits: Tensor, tokens: Tensor, sigma_bar: float | Tensor) -> Tensor:
    """Log-scores of uniform diffusion from a denoiser of uniform noise, the law of x0_i given all of x.

    Parameters
    ----------
    logits : Tensor
        ``[B, L, V]``, floating point. Normalised here.
    tokens : Tensor
        int64 ``[B, L]``, noisy.
    sigma_bar : float or Tensor
        Total noise, one or ``[B]``, positive and finite.

    Returns
    -------
    Tensor
        float64 ``[B, L, V]``, 0 at the tokens that are there. The way back is a `UniformAnalytic` step that
        removes all noise.

    Notes
    -----
    The formula of the module, by Bayes; it makes a ScoreModel of a network trained to predict clean tokens
    (D3PM, Austin et al., 2021, with uniform transitions).

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import uniform_log_scores
    >>> scores = uniform_log_scores(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64), 0.7)
    >>> [round(value, 4) for value in scores.exp().flatten().tolist()]
    [1.0, 1.6546]
    """
    vocab = logits.shape[-1]
    noise = torch.as_tensor(sigma_bar, dtype=torch.float64, device=logits.device)
    noise = noise.reshape(*noise.shape, *(1,) * (logits.ndim - noise.ndim))
    alpha, other = torch.exp(-noise), -torch.expm1(-noise) / vocab
    law = logits.double().softmax(-1)
    own = tokens.unsqueeze(-1)
    here = law.gather(-1, own)
    ratio = (1.0 - here) + here * other / (alpha + other) + law * alpha / other
    return ratio.log().scatter(-1, own, 0.0)


@dataclass(frozen=True)
class NoiseConditioned:
    """A ScoreModel of a network that is conditioned on the total noise, as score-entropy networks are.

    Parameters
    ----------
    network : callable
        ``network(tokens, sigma_bar) -> log-scores [B, L, V]``, `sigma_bar` float32 ``[B]``.
    schedule : Schedule
        Says sigma_bar at a time.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import Geometric, NoiseConditioned
    >>> model = NoiseConditioned(lambda tokens, noise: noise, Geometric(1e-4, 20.0))
    >>> round(float(model(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1))), 4)
    20.0
    """

    network: Callable[[Tensor, Tensor], Tensor]
    schedule: Schedule

    def __call__(self, tokens: Tensor, t: Tensor) -> Tensor:
        """Log-scores at times `t` ``[B]``."""
        return self.network(tokens, self.schedule.sigma_bar(t).to(torch.float32))

    def parameters(self) -> Iterator[Tensor]:
        """The network's parameters, none where it has none: samplers read the device off them."""
        return _parameters(self.network)


@dataclass(frozen=True)
class ScoreDenoiser:
    """A denoiser made of an absorbing score network, for every sampler of this package that takes times.

    Parameters
    ----------
    scores : ScoreModel
        Log-scores ``[B, L, V]`` of absorbing diffusion. A column for the mask is dropped by the sampler, as
        it drops every denoiser's.
    schedule : Schedule
        The noise the network was trained with; has to be the sampler's too. alpha(1) must be positive.

    Raises
    ------
    ValueError
        If sigma_bar is infinite at t = 1: no score is finite there.

    Notes
    -----
    See `denoiser_logits`: unmasking times come from the schedule, not from the sum of the scores. The result
    depends on time, so that there is no cache; RADD is the network without that dependence.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import FirstHitting, LogLinear, ScoreDenoiser, sample
    >>> model = ScoreDenoiser(lambda tokens, t: torch.zeros(*tokens.shape, 5), LogLinear())
    >>> sample(model, (2, 8), mask_id=5, sampler=FirstHitting(), schedule=LogLinear(), rng=0).nfe
    8
    """

    scores: ScoreModel
    schedule: Schedule

    def __post_init__(self) -> None:
        if not bool(torch.isfinite(self.schedule.sigma_bar(1.0))):
            raise ValueError(f"{self.schedule} has infinite noise at t = 1, where no score is finite")

    def __call__(self, tokens: Tensor, t: Tensor | None = None) -> Tensor:
        """Logits ``[B, L, V]`` at times `t` ``[B]``."""
        if t is None:
            raise ValueError("a score network needs the time")
        return denoiser_logits(self.scores(tokens, t), self.schedule.sigma_bar(t))

    def parameters(self) -> Iterator[Tensor]:
        """The network's parameters, none where it has none: samplers read the device off them."""
        return _parameters(self.scores)


def _parameters(network: object) -> Iterator[Tensor]:
    parameters = getattr(network, "parameters", None)
    return iter(parameters() if callable(parameters) else ())
