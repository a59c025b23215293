"""Logits that the cases share: Zipf and Gaussian rows, and a language model's."""

from __future__ import annotations

import functools
import math

import torch

from . import machine
from .harness import Settings
from .real_logits import real_logits

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def zipf(settings: Settings, n: int, v: int) -> torch.Tensor:
    """Log of a Zipf(1) law, ranks scattered over the vocabulary, plus 0.5 nats of noise per entry."""
    generator = settings.generator(1)
    rank = torch.randperm(v, generator=generator).float().add_(1.0)
    logits = torch.randn(n, v, generator=generator).mul_(0.5)
    return logits.sub_(rank.log()).to(settings.device)


def gaussian(settings: Settings, n: int, v: int) -> torch.Tensor:
    """Independent normal logits of standard deviation 2."""
    return torch.randn(n, v, generator=settings.generator(2)).mul_(2.0).to(settings.device)


class Ring:
    """A tensor and copies of it, handed out in turn.

    Attributes
    ----------
    copies : list of Tensor
        The tensor first.
    """

    def __init__(self, tensor: torch.Tensor, count: int = 1) -> None:
        self.copies = [tensor, *(tensor.clone() for _ in range(count - 1))]
        self._turn = 0

    @classmethod
    def beyond_caches(cls, tensor: torch.Tensor) -> Ring:
        """So many copies that together they are half as large again as the caches.

        Who works on the next copy finds it in memory and not in a cache, as the one before did.
        """
        nbytes = tensor.numel() * tensor.element_size()
        return cls(tensor, max(2, math.ceil(1.5 * machine.cache_bytes() / nbytes) + 1))

    def turn(self) -> int:
        """Index of the next copy."""
        self._turn = (self._turn + 1) % len(self.copies)
        return self._turn


@functools.lru_cache(maxsize=1)
def real(n: int, quick: bool) -> torch.Tensor:
    """Real next-token logits on the CPU (kept: several workloads use them)."""
    return real_logits(n, quick=quick)
