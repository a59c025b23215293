"""Noise schedules of absorbing diffusion: alpha(t), the probability that a token is still clean at time t.

Time runs from 0 (data) to 1 (all masked, or nearly). Everything is float64: near t = 0 the probability that
a token is masked, 1 - alpha, is small, and the samplers need its ratios, so schedules define that number and
its inverse, and alpha follows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Cosine", "Geometric", "Linear", "LogLinear", "Polynomial", "Schedule"]

Time = float | Tensor


def _float64(value: Time) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _times(t: Time) -> Tensor:
    times = _float64(t)
    # A time on a device cannot be looked into without a sync.
    if times.device.type == "cpu" and not bool(((times >= 0) & (times <= 1)).all()):
        raise ValueError("times must be in [0, 1]")
    return times


class Schedule(ABC):
    """A noise schedule. Subclasses define `masked`, `masked_rate` and `time_of_masked`.

    Every method takes a float or a tensor of any shape and returns a float64 tensor of that shape.

    Raises
    ------
    ValueError
        On times outside [0, 1], where they are on the CPU.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import Schedule
    >>> class Quadratic(Schedule):
    ...     def masked(self, t): return torch.as_tensor(t, dtype=torch.float64) ** 2
    ...     def masked_rate(self, t): return 2 * torch.as_tensor(t, dtype=torch.float64)
    ...     def time_of_masked(self, masked): return torch.as_tensor(masked, dtype=torch.float64).sqrt()
    >>> float(Quadratic().unmask_probability(0.0, 0.5)), float(Quadratic().sigma(0.5))
    (1.0, 1.3333333333333333)
    """

    @abstractmethod
    def masked(self, t: Time) -> Tensor:
        """1 - alpha(t): the probability that a token is masked at time t."""

    @abstractmethod
    def masked_rate(self, t: Time) -> Tensor:
        """-d alpha / dt at time t."""

    @abstractmethod
    def time_of_masked(self, masked: Time) -> Tensor:
        """The time at which `masked` is the probability of being masked; clamped to [0, 1]."""

    def alpha(self, t: Time) -> Tensor:
        """alpha(t): the probability that a token is still clean at time t."""
        return 1.0 - self.masked(t)

    def alpha_prime(self, t: Time) -> Tensor:
        """d alpha / dt."""
        return -self.masked_rate(t)

    def sigma_bar(self, t: Time) -> Tensor:
        """Total noise -log alpha(t); infinite where alpha is 0."""
        return -torch.log1p(-self.masked(t))

    def sigma(self, t: Time) -> Tensor:
        """Rate of absorption d sigma_bar / dt = -alpha' / alpha; infinite where alpha is 0."""
        return self.masked_rate(t) / self.alpha(t)

    def inverse(self, alpha: Time) -> Tensor:
        """The time t with alpha(t) = alpha, clamped to [0, 1]."""
        return self.time_of_masked(1.0 - _float64(alpha))

    def unmask_probability(self, s: Time, t: Time) -> Tensor:
        """(alpha_s - alpha_t) / (1 - alpha_t): probability that a token masked at t is clean at s <= t.

        The ancestral (Tweedie) step of Ou et al. (2024) and Sahoo et al. (2024).

        Examples
        --------
        >>> from driftmax.discrete import Linear
        >>> float(Linear().unmask_probability(0.25, 0.5))
        0.5
        """
        masked = self.masked(t)
        return ((masked - self.masked(s)) / masked).clamp(0.0, 1.0)

    def grid(self, steps: int) -> Tensor:
        """The `steps` + 1 equally spaced times from 1 down to 0.

        Examples
        --------
        >>> from driftmax.discrete import Linear
        >>> Linear().grid(2).tolist()
        [1.0, 0.5, 0.0]
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        return 1.0 - torch.arange(steps + 1, dtype=torch.float64) / steps


@dataclass(frozen=True)
class Polynomial(Schedule):
    """alpha = 1 - t**power (Shi et al., "Simplified and generalized masked diffusion", 2024).

    Parameters
    ----------
    power : float, default 2.0
        1 is `Linear`. Larger powers unmask more towards the end of sampling.

    Examples
    --------
    >>> from driftmax.discrete import Polynomial
    >>> float(Polynomial(2.0).alpha(0.5))
    0.75
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.power < math.inf:
            raise ValueError(f"power must be positive and finite, not {self.power}")

    def masked(self, t: Time) -> Tensor:
        return _times(t) ** self.power

    def masked_rate(self, t: Time) -> Tensor:
        return self.power * _times(t) ** (self.power - 1.0)

    def time_of_masked(self, masked: Time) -> Tensor:
        return _float64(masked).clamp(0.0, 1.0) ** (1.0 / self.power)


@dataclass(frozen=True)
class LogLinear(Schedule):
    """sigma_bar = -log1p(-(1 - eps) t), so that alpha = 1 - (1 - eps) t (Lou et al., 2024; Ou et al., 2024).

    Parameters
    ----------
    eps : float, default 1e-3
        alpha at t = 1. Samplers start from all masks whatever it is.

    Examples
    --------
    >>> from driftmax.discrete import LogLinear
    >>> round(float(LogLinear().alpha(1.0)), 6)
    0.001
    """

    eps: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.eps < 1:
            raise ValueError(f"eps must be in [0, 1), not {self.eps}")

    def masked(self, t: Time) -> Tensor:
        return (1.0 - self.eps) * _times(t)

    def masked_rate(self, t: Time) -> Tensor:
        return torch.full_like(_times(t), 1.0 - self.eps)

    def time_of_masked(self, masked: Time) -> Tensor:
        return (_float64(masked) / (1.0 - self.eps)).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Linear(LogLinear):
    """alpha = 1 - t.

    Examples
    --------
    >>> from driftmax.discrete import Linear
    >>> float(Linear().alpha(0.25))
    0.75
    """

    eps: float = 0.0


@dataclass(frozen=True)
class Cosine(Schedule):
    """alpha = 1 - cos(pi / 2 (1 - t)) (Chang et al., "MaskGIT", 2022; Shi et al., 2024).

    Few tokens are unmasked in the first steps, when little is known.

    Examples
    --------
    >>> from driftmax.discrete import Cosine
    >>> round(float(Cosine().masked(0.5)), 6)
    0.707107
    """

    def masked(self, t: Time) -> Tensor:
        return torch.sin(0.5 * math.pi * _times(t))  # cos(pi/2 - x) without its rounding near t = 0

    def masked_rate(self, t: Time) -> Tensor:
        return 0.5 * math.pi * torch.cos(0.5 * math.pi * _times(t))

    def time_of_masked(self, masked: Time) -> Tensor:
        return torch.asin(_float64(masked).clamp(0.0, 1.0)) / (0.5 * math.pi)


@dataclass(frozen=True)
class Geometric(Schedule):
    """sigma_bar = sigma_min**(1 - t) sigma_max**t (Lou et al., 2024).

    Parameters
    ----------
    sigma_min, sigma_max : float, default 1e-4 and 20
        Total noise at t = 0 and t = 1. A token is masked with probability of about sigma_min even at t = 0;
        the samplers' last step unmasks everything.

    Examples
    --------
    >>> from driftmax.discrete import Geometric
    >>> round(float(Geometric().sigma_bar(0.5)), 6)
    0.044721
    """

    sigma_min: float = 1e-4
    sigma_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"need 0 < sigma_min < sigma_max, not {self.sigma_min} and {self.sigma_max}")

    def sigma_bar(self, t: Time) -> Tensor:
        t = _times(t)
        return torch.exp((1.0 - t) * math.log(self.sigma_min) + t * math.log(self.sigma_max))

    def sigma(self, t: Time) -> Tensor:
        return math.log(self.sigma_max / self.sigma_min) * self.sigma_bar(t)

    def alpha(self, t: Time) -> Tensor:
        return torch.exp(-self.sigma_bar(t))

    def masked(self, t: Time) -> Tensor:
        return -torch.expm1(-self.sigma_bar(t))

    def masked_rate(self, t: Time) -> Tensor:
        return self.sigma(t) * self.alpha(t)

    def time_of_masked(self, masked: Time) -> Tensor:
        noise = -torch.log1p(-_float64(masked))
        span = math.log(self.sigma_max / self.sigma_min)
        return ((noise.log() - math.log(self.sigma_min)) / span).clamp(0.0, 1.0)
