"""`from_transformers`: masked and diffusion language models of Hugging Face's transformers as denoisers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TransformersDenoiser", "from_transformers"]

_PROBE = 8  # tokens that the head is tried on
_LARGE = 50.0  # logits of that size show what a head does besides the matrix product: caps, scales


class _Reached(Exception):
    """Carries the input of the output embedding out of the network's forward pass."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


class TransformersDenoiser:
    """What `from_transformers` returns: a time-independent `Denoiser`.

    Attributes
    ----------
    model : torch.nn.Module
    head : (Tensor, Tensor or None) or None
        Weight ``[V, D]`` and bias ``[V]`` of the output embedding, if the logits are
        ``features(tokens) @ weight.T + bias`` and nothing else; else None, and samplers use the logits.

    Examples
    --------
    See `from_transformers`.
    """

    time_independent = True

    def __init__(
        self,
        model: nn.Module,
        attention_mask: Tensor | None,
        pad_id: int | None,
        shift: bool,
        tokenizer: Any,
        options: dict[str, Any],
    ) -> None:
        self.model: Any = model
        self._attention_mask, self._pad_id, self._shift = attention_mask, pad_id, shift
        self._tokenizer, self._options = tokenizer, options
        self._output = _output_embedding(model)
        self.head: tuple[Tensor, Tensor | None] | None = None
        if self._output is not None and self._logits_are_linear(self._output):
            self.head = self._output.weight, self._output.bias

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The special tokens, for ``banned=`` of `sample`, in rising order.

        The tokenizer's, if one was given; else those that the model's configuration names, which for many
        models leaves some out ([CLS] and [SEP] of BERT, for example).
        """
        if self._tokenizer is not None:
            return tuple(sorted(set(self._tokenizer.all_special_ids)))
        config = getattr(self.model, "config", None)
        found: set[int] = set()
        for name in ("pad", "bos", "eos", "cls", "sep", "mask", "unk"):
            value = getattr(config, f"{name}_token_id", None)
            found.update([] if value is None else [value] if isinstance(value, int) else value)
        return tuple(sorted(token for token in found if token >= 0))

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's parameters."""
        parameters: Iterator[nn.Parameter] = self.model.parameters()
        return parameters

    def __call__(self, tokens: Tensor, t: Tensor | None = None) -> Tensor:
        """Logits ``[B, L, V]`` for tokens ``[B, L]``, in the dtype the model gives. `t` is not used."""
        return self._shifted(self._logits(tokens))

    def features(self, tokens: Tensor) -> Tensor:
        """What the head is applied to, ``[B, L, D]``.

        Raises
        ------
        ValueError
            If the model's logits are not a plain matrix product, so that `head` is None.
        """
        if self.head is None or self._output is None:
            raise ValueError("this model's logits are not a plain matrix product of features: it has no head")
        return self._shifted(self._input_of(self._output, tokens))

    def _logits(self, tokens: Tensor) -> Tensor:
        logits = getattr(self.model(input_ids=tokens, **self._arguments(tokens)), "logits", None)
        if not isinstance(logits, Tensor):
            raise TypeError(f"{type(self.model).__name__} returns no logits: not a language model")
        return logits

    def _arguments(self, tokens: Tensor) -> dict[str, Any]:
        if self._pad_id is not None:
            return {**self._options, "attention_mask": (tokens != self._pad_id).to(torch.int64)}
        if self._attention_mask is None:
            return self._options
        if self._attention_mask.shape[0] != tokens.shape[1]:
            raise ValueError(
                f"attention_mask has {self._attention_mask.shape[0]} positions, the tokens {tokens.shape[1]}"
            )
        return {
            **self._options,
            "attention_mask": self._attention_mask.to(tokens.device).expand(tokens.shape),
        }

    def _shifted(self, values: Tensor) -> Tensor:
        return torch.cat((values[:, :1], values[:, :-1]), 1) if self._shift else values

    def _input_of(self, output: nn.Linear, tokens: Tensor) -> Tensor:
        """Run the model up to its output embedding."""

        def stop(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            raise _Reached(arguments[0])

        hook = output.register_forward_pre_hook(stop)
        try:
            self.model(input_ids=tokens, **self._arguments(tokens))
        except _Reached as reached:
            return reached.features
        finally:
            hook.remove()
        raise ValueError("the model did not run its output embedding")

    @torch.no_grad()
    def _logits_are_linear(self, output: nn.Linear) -> bool:
        """Whether the model's logits are the output embedding's values, whatever their size."""
        embedding = self.model.get_input_embeddings()
        length = _PROBE if self._attention_mask is None else self._attention_mask.shape[0]
        ids = torch.arange(length, device=embedding.weight.device) % embedding.weight.shape[0]
        features = self._input_of(output, ids[None])
        plain = nn.functional.linear(features, output.weight, output.bias)
        features = features * (_LARGE / plain.abs().max().clamp(min=1e-6))
        hook = output.register_forward_pre_hook(lambda module, arguments: (features,))
        try:
            got = self._logits(ids[None])
        finally:
            hook.remove()
        wanted = nn.functional.linear(features, output.weight, output.bias)
        if got.shape != wanted.shape:
            return False
        error = float((got.double() - wanted.double()).abs().max())
        # The same product is the same to the bit; the model may convert its logits afterwards.
        return error <= _LARGE * max(torch.finfo(got.dtype).eps, torch.finfo(wanted.dtype).eps)


def _output_embedding(model: nn.Module) -> nn.Linear | None:
    """The layer that makes logits from features, if it is a plain one in floating point."""
    get = getattr(model, "get_output_embeddings", None)
    layer = get() if callable(get) else None
    plain = isinstance(layer, nn.Linear) and layer.weight.dtype.is_floating_point
    return layer if plain and callable(getattr(model, "get_input_embeddings", None)) else None


def from_transformers(
    model: nn.Module,
    *,
    attention_mask: Tensor | None = None,
    pad_id: int | None = None,
    shift: bool = False,
    tokenizer: Any = None,
    **options: Any,
) -> TransformersDenoiser:
    """A Hugging Face masked language model or diffusion LM as a denoiser, for every sampler.

    Parameters
    ----------
    model : torch.nn.Module
        Called as ``model(input_ids=tokens, ...)`` and giving ``.logits``: ``AutoModelForMaskedLM`` of
        transformers, LLaDA, Dream and their like. In evaluation mode.
    attention_mask : Tensor, optional
        ``[L]``: the same positions for every row, 1 where attended to. (Samplers leave rows out of calls and
        sort them, so that a mask for each row would meet the wrong rows: see `pad_id`.)
    pad_id : int, optional
        Attend to positions that do not hold this token, row by row: for prompts of different lengths. Ban
        the token, so that it is not drawn.
    shift : bool, default False
        The model's logits at a position are those of the next one, as in Dream, which grew from an
        autoregressive model: move them by one; the first position keeps its own.
    tokenizer : optional
        For `TransformersDenoiser.special_ids` only.
    **options
        Passed to every call of the model.

    Returns
    -------
    TransformersDenoiser
        With `head` and `features` where the logits are the output embedding's values and nothing else, so
        that samplers run the head only where they draw. Whether they are is tried out here, on a few tokens
        whose features are scaled until the logits are large, so that a cap would show.

    Raises
    ------
    ValueError
        If the model is in training mode (dropout would be on), or arguments do not fit.

    Notes
    -----
    `features` leaves the model's forward pass at the output embedding, by a hook and an exception, so that
    the product is not made. Two threads must not share the model while one samples.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import Plan, from_transformers, sample
    >>> from types import SimpleNamespace
    >>> class Tiny(torch.nn.Module):  # as transformers' models are called
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.embed, self.out = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9)
    ...     def get_input_embeddings(self): return self.embed
    ...     def get_output_embeddings(self): return self.out
    ...     def forward(self, input_ids): return SimpleNamespace(logits=self.out(self.embed(input_ids)))
    >>> model = from_transformers(Tiny().eval())
    >>> model.head[0].shape
    torch.Size([9, 4])
    >>> sample(model, (2, 6), mask_id=4, sampler=Plan(), steps=100, rng=0).tokens.shape
    torch.Size([2, 6])
    """
    if model.training:
        raise ValueError("the model is in training mode, with dropout on: call model.eval() first")
    if attention_mask is not None and pad_id is not None:
        raise ValueError("give attention_mask or pad_id, not both")
    if attention_mask is not None and attention_mask.ndim != 1:
        raise ValueError(
            f"attention_mask must have shape [L], the same for all rows, not {tuple(attention_mask.shape)}; "
            "for rows of different lengths use pad_id"
        )
    return TransformersDenoiser(model, attention_mask, pad_id, shift, tokenizer, options)
