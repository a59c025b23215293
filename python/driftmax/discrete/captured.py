"""`CapturedLoop`: adaptive decoding rules whose loop runs on the device alone."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from driftmax.discrete.problem import Problem, State
from driftmax.discrete.rules import Adaptive, first_mask
from driftmax.discrete.while_graph import WhileGraph
from driftmax.errors import BackendUnavailable
from driftmax.random import RowStreams

__all__ = ["CapturedLoop", "LoopResult"]


class LoopResult(NamedTuple):
    """What a `CapturedLoop` returns: tensors on its device, so that nothing waits before they are read.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import LoopResult
    >>> result = LoopResult(torch.zeros(2, 8), torch.tensor(3), torch.tensor([3, 2]))
    >>> int(result.nfe)
    3
    """

    tokens: Tensor  # int64 [B, L]
    nfe: Tensor  # int64 []: network calls
    row_nfe: Tensor  # int64 [B]: those before which the row had masks left


class Turns:
    """Steps of an adaptive rule in shapes that never change: all rows in each, on tensors of its own."""

    def __init__(self, sampler: Adaptive, problem: Problem) -> None:
        batch, length = problem.shape
        state = sampler.init(problem)
        self.sampler = sampler
        self.seeds = torch.zeros(batch, dtype=torch.int64, device=problem.device)
        self.rows = torch.zeros_like(self.seeds)
        self.problem = replace(problem, rng=RowStreams(self.seeds, self.rows), whole_batch=True)
        self.tokens = state.tokens
        self.first = state.memo.start  # int64 [B, 1]
        self.nfe = torch.zeros((), dtype=torch.int64, device=problem.device)
        self.row_nfe = torch.zeros_like(self.seeds)
        self.more = torch.zeros(1, dtype=torch.bool, device=problem.device)
        self._state = state
        self._local = torch.arange(batch, device=problem.device)
        self._eligible = batch * min(length, sampler.block_length or length)

    def start(self, streams: RowStreams, tokens: Tensor) -> None:
        """Begin anew with `tokens`, int64 [B, L]."""
        given = streams.arguments(self.seeds.device)
        if given.seeds is None:
            self.seeds.fill_(given.seed)
        else:
            self.seeds.copy_(given.seeds)
        if given.rows is None:
            torch.arange(len(streams), out=self.rows)
        else:
            self.rows.copy_(given.rows)
        self.tokens.copy_(tokens)
        masked = self.tokens == self.problem.mask_id
        self.first.copy_(first_mask(masked))
        self.nfe.zero_()
        self.row_nfe.zero_()
        self.more.copy_(masked.any())

    @torch.no_grad()
    def turn(self) -> None:
        """One network call, and what it reveals. `more` says whether there is another one."""
        mask_id, length = self.problem.mask_id, self.problem.shape[1]
        self.row_nfe.add_((self.tokens == mask_id).any(1))
        filled, _ = self.sampler.reveal(self._now(), self._local, self.tokens, self._eligible, self.nfe)
        self.tokens.copy_(filled)
        self.nfe.add_(1)
        # A call reveals a token of every row that has a mask, except where the network's output is no law.
        self.more.copy_((filled == mask_id).any() & (self.nfe < length))

    def _now(self) -> State:
        before = self._state
        return State(self.problem, self.tokens, 0, before.total, 0, self.row_nfe, None, before.memo)


class CapturedLoop:
    """The loop of an adaptive rule as one CUDA graph: the device decides whether there is another call.

    `Threshold`, `Factor` and `EntropyBounded` make as many calls as the network's output asks for. A host
    that steps them has to read that number; here a conditional node of the graph repeats the step while a
    mask is left, so that one launch runs the whole loop. Worth it where the network's kernels are short:
    launching them takes longer than running them.

    Parameters
    ----------
    sampler : Threshold, Factor or EntropyBounded
        Its `lookahead` has no meaning here.
    problem : Problem
        On a CUDA device. A graph can hold its model if the model reads nothing on the host and draws nothing
        from torch's generators. Every call has all rows, and an exposed head runs at as many positions of
        each as a block has (without blocks: as a sequence has).

    Raises
    ------
    TypeError
        If the sampler is another one. The calls of others do not depend on the network's output, or not in a
        way that a graph could follow: docs/discrete.md says which loops `torch.cuda.graph` can capture.
    BackendUnavailable
        Without a CUDA device, torch 2.8 or cuda-bindings (which torch's CUDA wheels bring along).

    Notes
    -----
    The tokens are those of `sample` with the same streams, prompt and ``whole_batch=True``. Bad logits do not
    raise: they leave masks, the loop ends after L calls at the latest, and `driftmax.check_status` names the
    row.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import CapturedLoop, Problem, Threshold
    >>> def model(tokens, t=None): return 9 * torch.eye(5)[:4].expand(len(tokens), -1, -1)
    >>> model.time_independent = True
    >>> problem = Problem(model, (1, 4), mask_id=5, rng=0)
    >>> CapturedLoop(Threshold(0.9), problem)
    Traceback (most recent call last):
        ...
    driftmax.errors.BackendUnavailable: a loop in a CUDA graph needs a CUDA device, not cpu
    """

    def __init__(self, sampler: Adaptive, problem: Problem) -> None:
        if not isinstance(sampler, Adaptive):
            raise TypeError(
                f"CapturedLoop takes Threshold, Factor or EntropyBounded, not {type(sampler).__name__}; "
                "docs/discrete.md says which other loops torch.cuda.graph can capture"
            )
        device = torch.device(problem.device or "cpu")
        if device.type != "cuda":
            raise BackendUnavailable(f"a loop in a CUDA graph needs a CUDA device, not {device}")
        self._turns = Turns(sampler, problem)
        self._streams = problem.streams
        self._prompt = problem.start()
        self._turns.start(self._streams, self._prompt)
        self._graph = WhileGraph(self._turns.turn, self._turns.more)

    def __call__(self, rng: int | RowStreams | None = None, prompt: Tensor | None = None) -> LoopResult:
        """Run it.

        Parameters
        ----------
        rng : int or RowStreams, optional
            By default the problem's. An int is the seed of rows 0, 1, ...
        prompt : Tensor, optional
            int64 ``[B, L]`` or ``[L]``, by default the problem's: any masks anywhere.

        Returns
        -------
        LoopResult
            Copies; the next call overwrites nothing of them.

        Notes
        -----
        Calls share the graph's memory: they must come from one stream, or wait for each other.
        """
        turns = self._turns
        batch, length = turns.problem.shape
        if isinstance(rng, int):
            rng = RowStreams(rng, batch)
        streams = self._streams if rng is None else rng
        if len(streams) != batch or streams.positions is not None or not isinstance(streams.step, int):
            raise ValueError(f"rng must be streams of {batch} rows, their positions and steps left alone")
        tokens = self._prompt if prompt is None else prompt
        if tokens.dtype != torch.int64 or tuple(tokens.shape) not in ((batch, length), (length,)):
            raise ValueError(
                f"prompt must be int64 of shape {(batch, length)}, not {tokens.dtype}, {tuple(tokens.shape)}"
            )
        turns.start(streams, tokens)
        self._graph.launch()
        return LoopResult(turns.tokens.clone(), turns.nfe.clone(), turns.row_nfe.clone())
