"""Classifier-free guidance of a masked diffusion model: a network around the network, for every sampler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["ClassifierFreeGuidance"]


class ClassifierFreeGuidance:
    """A denoiser whose logits are u + (w + 1) (c - u): c given the prompt, u with the prompt masked.

    Nie et al., "Scaling up Masked Diffusion Models on Text" (2024), whose unsupervised guidance LLaDA uses:
    no network trained without prompts is needed. One call of the network on a doubled batch; it counts as one
    call. Tokens that are not of the prompt stay in both halves.

    Where the network exposes `features` and `head`, the features are combined, which is the same since the
    weights of c and u add up to one: the head runs once, and only where a token is drawn.

    Parameters
    ----------
    model : Denoiser
    scale : float
        w. 0 is the model itself, at twice the cost; LLaDA's ``cfg_scale``.
    mask_id : int
        As for `sample`.
    prompt : Tensor
        int64 ``[L]`` or ``[B, L]``, as for `sample`: what is not `mask_id` is the prompt. If its positions
        differ between rows, the network has to see all rows in order: pass ``whole_batch=True`` to `sample`,
        or pad prompts in front to one length.
    pad_id : int, optional
        Padding in the prompt, which stays in both halves.

    Raises
    ------
    ValueError
        On a scale that is not finite or below -1; when called, on tokens that do not hold the prompt.

    Notes
    -----
    Logits that are infinite in either half are taken from c: what the model rules out stays ruled out.
    float16 and bfloat16 are combined in float32.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import ClassifierFreeGuidance, Confidence, sample
    >>> def model(tokens, t=None): return torch.nn.functional.one_hot(tokens.roll(1, 1), 6).float()
    >>> model.time_independent = True
    >>> prompt = torch.tensor([2, 5, 5, 5])
    >>> guided = ClassifierFreeGuidance(model, 9.0, mask_id=5, prompt=prompt)
    >>> guided(prompt[None])[0, 1, 2].item()
    10.0
    >>> sample(guided, (1, 4), mask_id=5, sampler=Confidence(), prompt=prompt, rng=0).nfe
    3
    """

    def __init__(
        self, model: Any, scale: float, *, mask_id: int, prompt: Tensor, pad_id: int | None = None
    ) -> None:
        if not -1 <= scale < math.inf:
            raise ValueError(f"scale must be finite and at least -1, not {scale}")
        if prompt.ndim not in (1, 2) or prompt.dtype != torch.int64:
            raise ValueError(
                f"prompt must be int64 [L] or [B, L], not {prompt.dtype} of shape {tuple(prompt.shape)}"
            )
        self.model, self.scale, self.mask_id, self.pad_id = model, scale, mask_id, pad_id
        held = prompt != mask_id
        if held.ndim == 2 and bool((held == held[:1]).all()):
            held = held.any(0)
        self._held = held
        self._prompt = prompt if held.ndim == 2 else None

    @property
    def time_independent(self) -> bool:
        """Whether the network is."""
        return bool(getattr(self.model, "time_independent", False))

    @property
    def head(self) -> tuple[Tensor, Tensor | None] | None:
        """The network's head; None where it exposes none."""
        head: tuple[Tensor, Tensor | None] | None = getattr(self.model, "head", None)
        return head if callable(getattr(self.model, "features", None)) else None

    def parameters(self) -> Iterator[Tensor]:
        """The network's parameters."""
        parameters = getattr(self.model, "parameters", None)
        return iter(parameters()) if callable(parameters) else iter(())

    def __call__(self, tokens: Tensor, t: Tensor | None = None) -> Tensor:
        both = self._both(tokens)
        out = (
            self.model(both)
            if self.time_independent
            else self.model(both, None if t is None else t.repeat(2))
        )
        given, free = out.float().chunk(2) if out.element_size() < 4 else out.chunk(2)
        guided = torch.add(given, given - free, alpha=self.scale)
        return torch.where(given.isinf() | free.isinf(), given, guided)

    def features(self, tokens: Tensor) -> Tensor:
        """Features whose head's logits are the guided ones, ``[n, L, D]``."""
        out: Tensor = self.model.features(self._both(tokens))
        given, free = out.float().chunk(2) if out.element_size() < 4 else out.chunk(2)
        return torch.add(given, given - free, alpha=self.scale).to(out.dtype)

    def _both(self, tokens: Tensor) -> Tensor:
        """The batch with and without its prompt, ``[2 n, L]``."""
        held = self._held.to(tokens.device)
        if held.shape[-1] != tokens.shape[1]:
            raise ValueError(f"the prompt has {held.shape[-1]} positions, the tokens {tokens.shape[1]}")
        if self._prompt is not None:
            prompt = self._prompt.to(tokens.device)
            if tokens.shape != prompt.shape or not bool((~held | (tokens == prompt)).all()):
                raise ValueError(
                    "prompts at different positions in different rows need all rows in every call, in order: "
                    "pass whole_batch=True to sample"
                )
        hidden = held if self.pad_id is None else held & (tokens != self.pad_id)
        return torch.cat((tokens, tokens.masked_fill(hidden, self.mask_id)))
