"""`sample`: the one entry point of masked diffusion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from driftmax.discrete.plan import Plan
from driftmax.discrete.problem import Callback, Problem, Sampler, SampleResult
from driftmax.discrete.schedules import LogLinear, Schedule
from driftmax.random import Rng

__all__ = ["sample"]

_PLAN, _LOG_LINEAR = Plan(), LogLinear()


def sample(
    model: object,
    shape: tuple[int, int],
    *,
    mask_id: int,
    sampler: Sampler = _PLAN,
    schedule: Schedule = _LOG_LINEAR,
    steps: int | None = None,
    rng: Rng = None,
    prompt: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    pad_id: int | None = None,
    banned: Sequence[int] | None = None,
    cache: bool = True,
    callback: Callback | None = None,
    progress: bool = False,
    whole_batch: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    device: torch.device | str | None = None,
) -> SampleResult:
    """Sample sequences from a masked diffusion model.

    Parameters
    ----------
    model : Denoiser
        ``model(tokens, t=None) -> logits``; see `Denoiser` for the two attributes that save work.
    shape : (int, int)
        (B, L).
    mask_id : int
        The mask token, inside the logits' last dimension or beyond it. For uniform-state diffusion it only
        marks what is to be filled.
    sampler : Sampler, default Plan()
        `Plan`, `Ancestral`, `Euler`, `FirstHitting`, `ParallelReveal`, `HighOrderReveal`; decoding rules
        (`Confidence`, `RandomOrder`, `EntropyOrder`, `MarginOrder`, `MaskGitPlus`, `Threshold`, `Factor`,
        `EntropyBounded`); remasking (`ReMDM`, `P2`); `UniformEuler` and `UniformAnalytic`; or `SVDD` around
        one of them.
    schedule : Schedule, default LogLinear()
        Of the samplers that have a clock.
    steps : int or None, default None
        Steps of the time grid; None for `FirstHitting`, and for `Plan` without bins (exact).
    rng : int, RowStreams, torch.Generator or None, default None
        A row depends on its own stream alone: split or permute the batch with its `RowStreams`, and the
        tokens stay.
    prompt : Tensor, optional
        int64 ``[B, L]`` or ``[L]``; what is not `mask_id` is kept, masks are filled.
    lengths : Tensor or sequence of int, optional
        ``[B]``: row b ends before position ``lengths[b]``, and `pad_id` stands from there on.
    pad_id : int, optional
        Needed with `lengths`. A network of transformers that must not attend to padding takes the same
        ``pad_id`` in `from_transformers`.
    banned : sequence of int, optional
        Token ids never drawn.
    cache : bool, default True
        Call the network only for rows that reveal a token; same tokens as False. Needs
        ``model.time_independent`` for samplers on a grid.
    callback : callable, optional
        Called with the `State` after every step.
    progress : bool, default False
        Show a progress bar on stderr.
    whole_batch : bool, default False
        Put all rows into every call. For networks whose output for a row depends on which others are there.
    temperature, top_k, top_p, min_p
        Of each draw, as in `driftmax.categorical`.
    device : torch.device or str, optional
        By default the prompt's, else the model's, else the CPU.

    Returns
    -------
    SampleResult
        tokens int64 ``[B, L]``, nfe (network calls), row_nfe ``[B]`` (calls a row was in), history.

    Raises
    ------
    ValueError, TypeError
        On arguments that do not fit, and where `sampler` needs a time-independent network and has none.
    InvalidDistribution
        If the network's logits are NaN or +inf, or leave no token.

    Notes
    -----
    Bitwise the same for any split, permutation, compaction and for `cache` on or off, if the network's output
    for a row does not depend on the other rows; where it does (matrix products may choose their kernel by the
    batch), `whole_batch=True` keeps every call's batch the same.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import sample
    >>> def model(tokens, t=None): return torch.zeros(*tokens.shape, 5)
    >>> model.time_independent = True
    >>> result = sample(model, (2, 8), mask_id=5, rng=0)
    >>> result.tokens.shape, result.nfe
    (torch.Size([2, 8]), 8)
    """
    problem = Problem(
        model,
        shape,
        mask_id,
        schedule=schedule,
        steps=steps,
        prompt=prompt,
        lengths=lengths,
        pad_id=pad_id,
        banned=banned,
        rng=rng,
        cache=cache,
        whole_batch=whole_batch,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        device=device,
    )
    state = sampler.init(problem)
    with tqdm(total=state.total, disable=not progress, unit="step") as bar:
        while not state.done:
            before = state.step
            state = sampler.step(state)
            bar.update(state.step - before)
            if callback is not None:
                callback(state)
    return SampleResult(state.tokens, state.nfe, state.row_nfe, state.history)
