"""What the samplers of masked diffusion share: the problem, the state they step, the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from driftmax.discrete.schedules import Linear, Schedule
from driftmax.random import Rng, RowStreams

__all__ = ["Call", "Denoiser", "Problem", "SampleResult", "Sampler", "State"]


_LINEAR = Linear()


@runtime_checkable
class Denoiser(Protocol):
    """A network that predicts clean tokens: ``model(tokens, t=None) -> logits``.

    `tokens` is int64 ``[B, L]``, `t` None or float32 ``[B]`` times, logits ``[B, L, V]``. Two attributes are
    looked for. ``time_independent = True`` says that the output does not depend on `t`, which is then never
    passed: RADD, and every masked language model. A method ``features(tokens) -> [B, L, D]`` with ``head``, a
    pair of weight ``[V, D]`` and bias ``[V]`` or None, lets samplers run the head only where a token is
    drawn.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import Denoiser
    >>> isinstance(lambda tokens, t=None: torch.zeros(*tokens.shape, 5), Denoiser)
    True
    """

    def __call__(self, tokens: Tensor, t: Tensor | None = None) -> Tensor: ...


class Call(NamedTuple):
    """One call of the network: an entry of ``SampleResult.history``.

    Examples
    --------
    >>> from driftmax.discrete import Call
    >>> Call(step=0, rows=16, revealed=16).rows
    16
    """

    step: int  # of the sampler
    rows: int  # sequences in the batch
    revealed: int | Tensor  # tokens drawn from its output; a tensor where reading it would wait for a device
    ess: Tensor | None = None  # of guided sampling (`SVDD`): effective number of candidates, float64 [B]


@dataclass(frozen=True)
class Problem:
    """A sampling task, checked: what every sampler needs to know besides its own settings.

    Parameters
    ----------
    model : Denoiser
        See `Denoiser`.
    shape : (int, int)
        (B, L): sequences and their length.
    mask_id : int
        The mask token. Where the logits have a column for it, that column counts as -inf.
    schedule : Schedule, default Linear()
        Reading the noise level off a time. Samplers that only need an order of positions ignore it.
    steps : int or None, default None
        Steps of the time grid. None for samplers that need no grid.
    prompt : Tensor, optional
        int64 ``[B, L]`` or ``[L]``: tokens that are not `mask_id` are kept, masks are filled.
    lengths : Tensor or sequence of int, optional
        ``[B]``, each in [0, L]: positions of row b from ``lengths[b]`` on hold `pad_id`, whatever the prompt
        says there. The network sees them; what it makes of padding is its own affair.
    pad_id : int, optional
        The token behind a row's end. Needed with `lengths`.
    banned : sequence of int, optional
        Token ids never drawn.
    rng : int, RowStreams, torch.Generator or None, default None
        An int is the seed of rows 0, 1, ... A row's tokens depend on its stream and on nothing else of the
        batch.
    cache : bool, default True
        Call the network only for rows of which a token is revealed. Its output for the others is known not
        to be needed, if it does not depend on time. The tokens are the same, bitwise, with False.
    whole_batch : bool, default False
        Put all rows into every network call, whether needed or not, and run an exposed head on a fixed number
        of rows: for networks whose output for a row depends on the others' presence (through a matrix
        product's choice of kernel, say).
    temperature, top_k, top_p, min_p
        As in `driftmax.categorical`; scalars.
    device : torch.device or str, optional
        By default the prompt's, else that of the model's first parameter, else the CPU.

    Raises
    ------
    ValueError, TypeError
        On arguments that do not fit together.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import Plan, Problem
    >>> def model(tokens, t=None): return torch.zeros(*tokens.shape, 5)
    >>> model.time_independent = True
    >>> state = Plan().init(Problem(model, (2, 3), mask_id=5, rng=0))
    >>> while not state.done: state = Plan().step(state)
    >>> state.tokens.shape
    torch.Size([2, 3])
    """

    model: Any
    shape: tuple[int, int]
    mask_id: int
    schedule: Schedule = _LINEAR
    steps: int | None = None
    prompt: Tensor | None = None
    lengths: Tensor | Sequence[int] | None = None
    pad_id: int | None = None
    banned: Sequence[int] | None = None
    rng: Rng = None
    cache: bool = True
    whole_batch: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        if not callable(self.model):
            raise TypeError(f"model must be callable, not {type(self.model).__name__}")
        batch, length = self.shape
        if batch < 0 or length < 0:
            raise ValueError(f"shape must be (rows, length), not {self.shape}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if self.steps is not None and self.steps >= 2**24:
            raise ValueError(f"steps must be below 2**24, not {self.steps}")
        set_ = object.__setattr__
        set_(self, "shape", (int(batch), int(length)))
        set_(self, "device", self._device())
        set_(self, "prompt", self._padded(self._prompt()))
        set_(self, "lengths", None)  # they are in the prompt now
        set_(self, "pad_id", None)
        set_(self, "rng", self._streams())
        if self.banned is not None:
            set_(self, "banned", tuple(int(token) for token in self.banned))

    def _device(self) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        if self.prompt is not None:
            return self.prompt.device
        parameters = getattr(self.model, "parameters", None)
        first = next(iter(parameters()), None) if callable(parameters) else None
        return first.device if isinstance(first, Tensor) else torch.device("cpu")

    def _prompt(self) -> Tensor | None:
        if self.prompt is None:
            return None
        prompt = self.prompt
        if prompt.dtype != torch.int64:
            raise TypeError(f"prompt must be int64, not {prompt.dtype}")
        if prompt.ndim not in (1, 2) or tuple(prompt.shape) not in (self.shape, self.shape[1:]):
            raise ValueError(f"prompt of shape {tuple(prompt.shape)} does not fit shape {self.shape}")
        return prompt.to(torch.device(self.device or "cpu")).expand(self.shape)

    def _padded(self, prompt: Tensor | None) -> Tensor | None:
        """The prompt with the rows' ends in it."""
        if self.lengths is None:
            if self.pad_id is not None:
                raise ValueError("pad_id says what stands behind a row's end: it goes with lengths")
            return prompt
        if self.pad_id is None or self.pad_id == self.mask_id:
            raise ValueError("lengths needs pad_id, the token behind a row's end, other than the mask")
        batch, length = self.shape
        lengths = torch.as_tensor(self.lengths, device=self.device)
        if lengths.is_floating_point() or tuple(lengths.shape) != (batch,):
            raise ValueError(f"lengths must be {batch} integers, one per row, not {self.lengths}")
        if batch and not 0 <= int(lengths.min()) <= int(lengths.max()) <= length:
            raise ValueError(f"lengths must be in [0, {length}], not {lengths.tolist()}")
        kept = torch.full(self.shape, self.mask_id, device=self.device) if prompt is None else prompt
        behind = torch.arange(length, device=lengths.device) >= lengths[:, None]
        return kept.masked_fill(behind, self.pad_id)

    def _streams(self) -> RowStreams:
        rows = self.shape[0]
        rng = self.rng
        if isinstance(rng, RowStreams):
            if len(rng) != rows:
                raise ValueError(f"rng holds {len(rng)} rows, the batch has {rows}")
            if rng.positions is not None or not isinstance(rng.step, int) or rng.step != 0:
                raise ValueError("positions and steps of the streams are the sampler's to set")
            return rng
        if rng is None or isinstance(rng, torch.Generator):
            seed = torch.empty(1, dtype=torch.int64, device="cpu" if rng is None else rng.device)
            rng = int(seed.random_(-(2**63), None, generator=rng).item())
        return RowStreams(rng, rows)

    @property
    def streams(self) -> RowStreams:
        """One stream per row."""
        assert isinstance(self.rng, RowStreams)
        return self.rng

    @property
    def filters(self) -> dict[str, Any]:
        """The filters of each draw, as `driftmax.categorical` takes them."""
        return {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}

    @property
    def filtered(self) -> bool:
        """Whether any filter is given."""
        return any(value is not None for value in self.filters.values())

    @property
    def time_independent(self) -> bool:
        """Whether the model says that its output does not depend on time."""
        return bool(getattr(self.model, "time_independent", False))

    def start(self) -> Tensor:
        """The tokens to start from: masks, and what the prompt gives. int64 ``[B, L]``."""
        if self.prompt is not None:
            return self.prompt.clone()
        return torch.full(self.shape, self.mask_id, dtype=torch.int64, device=self.device)

    def need_steps(self, sampler: str) -> int:
        """`steps`, which `sampler` cannot do without."""
        if self.steps is None:
            raise ValueError(f"{sampler} needs a time grid: pass steps=")
        return self.steps

    def need_time_independence(self, what: str) -> None:
        """Raise unless the model's output is independent of time."""
        if not self.time_independent:
            raise ValueError(
                f"{what} needs a network whose output does not depend on time, and this model does not say "
                "so; set model.time_independent = True if it is one, else use Ancestral or FirstHitting with "
                "cache=False"
            )


class Log(NamedTuple):
    """A history that costs the same to extend however long it is."""

    call: Call
    before: Log | None


@dataclass(frozen=True)
class State:
    """Where a sampler stands. `Sampler.step` returns the next one and leaves this as it is.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import Ancestral, Problem
    >>> def model(tokens, t=None): return torch.zeros(*tokens.shape, 5)
    >>> state = Ancestral().init(Problem(model, (1, 4), mask_id=5, steps=2, rng=0, cache=False))
    >>> state.masked.sum().item(), Ancestral().step(state).nfe
    (4, 1)
    """

    problem: Problem
    tokens: Tensor  # int64 [B, L]
    step: int  # steps done
    total: int  # steps in all
    nfe: int  # network calls so far
    row_nfe: Tensor  # int64 [B]: calls that a row was in
    log: Log | None  # the last entry of the history, which knows the one before
    memo: Any  # the sampler's own

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.total

    @property
    def history(self) -> tuple[Call, ...]:
        """One entry a call, in order."""
        calls, log = [], self.log
        while log is not None:
            calls.append(log.call)
            log = log.before
        return tuple(reversed(calls))

    @property
    def masked(self) -> Tensor:
        """bool ``[B, L]``: positions still masked."""
        return self.tokens == self.problem.mask_id

    def after(self, tokens: Tensor, rows: Tensor | None, revealed: int | Tensor) -> State:
        """The next state, when a call with `rows` (None: all) led to `tokens`."""
        batch = self.problem.shape[0]
        row_nfe = self.row_nfe + 1 if rows is None else self.row_nfe.index_add(0, rows, torch.ones_like(rows))
        call = Call(self.step, batch if rows is None else rows.numel(), revealed)
        return replace(
            self,
            tokens=tokens,
            step=self.step + 1,
            nfe=self.nfe + 1,
            row_nfe=row_nfe,
            log=Log(call, self.log),
        )

    def without_call(self) -> State:
        """The next state, when the network was not needed."""
        return replace(self, step=self.step + 1)


def first_state(problem: Problem, total: int, memo: Any) -> State:
    """State before the first step."""
    count = torch.zeros(problem.shape[0], dtype=torch.int64, device=problem.device)
    return State(problem, problem.start(), 0, total, 0, count, None, memo)


class Sampler(Protocol):
    """How tokens are unmasked: ``init`` makes a `State`, ``step`` the next one.

    Examples
    --------
    >>> from driftmax.discrete import FirstHitting, Sampler
    >>> sampler: Sampler = FirstHitting()
    """

    def init(self, problem: Problem) -> State: ...

    def step(self, state: State) -> State: ...


Callback = Callable[[State], object]


class SampleResult(NamedTuple):
    """What `sample` returns.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete import FirstHitting, sample
    >>> def model(tokens, t=None): return torch.zeros(*tokens.shape, 5)
    >>> result = sample(model, (2, 3), mask_id=5, sampler=FirstHitting(), rng=0, cache=False)
    >>> result.nfe, result.row_nfe.tolist(), len(result.history)
    (3, [3, 3], 3)
    """

    tokens: Tensor  # int64 [B, L]
    nfe: int  # network calls
    row_nfe: Tensor  # int64 [B]: calls that a row was in
    history: tuple[Call, ...]  # one entry a call
