"""A minimal training loop for denoisers: warm-up, cool-down, clipping, averages, checkpoints.

Every random choice of step n is a function of the seed and n (batches, masks, dropout), so a run that was cut
off resumes to the bits it would have had.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from driftmax.discrete._files import atomic
from driftmax.discrete.losses import Loss, lambda_dce
from driftmax.random import RowStreams, bits

__all__ = ["RandomWindows", "TrainConfig", "TrainInfo", "TrainResult", "TrainState", "init", "step", "train"]

# A resumed run may go on longer, and look and save more or less often. All else must be as it was.
_MAY_CHANGE = ("steps", "cooldown", "checkpoint_every", "check_every")


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Defaults, but for `steps`, are those of the published RADD models.

    Parameters
    ----------
    steps : int
        Optimiser steps in total, below 2**24.
    learning_rate : float, default 3e-4
        Peak rate of AdamW.
    warmup : int, default 2500
        Steps over which the rate rises from 0.
    cooldown : int, default 0
        Steps at the end over which it falls to 0. Before them nothing depends on `steps`, so that a run can
        be resumed with another end.
    betas : (float, float), default (0.9, 0.999)
        AdamW's averages.
    weight_decay : float, default 0.0
        AdamW's decay of matrices; vectors are never decayed.
    clip : float, default 1.0
        Largest norm of the gradient.
    ema_decay : float, default 0.9999
        Of the averaged weights; in step n at most n / (n + 9), so that the start is forgotten.
    seed : int, default 0
        Of masks and dropout.
    precision : {"float32", "bfloat16"}, default "float32"
        "bfloat16" runs the network under autocast; weights and losses stay float32.
    checkpoint_every : int, default 1000
        Steps between checkpoints, where a path is given; the last step is saved in any case.
    check_every : int, default 50
        Steps between looks at the losses, which are kept, shown, and must be finite.

    Raises
    ------
    ValueError
        On numbers out of range.

    Examples
    --------
    >>> from driftmax.discrete.train import TrainConfig
    >>> config = TrainConfig(steps=100, warmup=10, cooldown=50)
    >>> [round(config.rate(step) / config.learning_rate, 2) for step in (0, 4, 9, 49, 50, 99)]
    [0.1, 0.5, 1.0, 1.0, 1.0, 0.02]
    """

    steps: int
    learning_rate: float = 3e-4
    warmup: int = 2500
    cooldown: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    ema_decay: float = 0.9999
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: int = 1000
    check_every: int = 50

    def __post_init__(self) -> None:
        if not 1 <= self.steps < 2**24:
            raise ValueError(f"steps must be in [1, 2**24), not {self.steps}")
        for name in ("checkpoint_every", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("warmup", "cooldown", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must be in [0, 1), not {self.ema_decay}")
        if not (self.learning_rate > 0.0 and self.clip > 0.0):
            raise ValueError(
                f"learning_rate and clip must be positive, not {self.learning_rate}, {self.clip}"
            )
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f'precision must be "float32" or "bfloat16", not {self.precision!r}')

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0.

        Examples
        --------
        >>> from driftmax.discrete.train import TrainConfig
        >>> TrainConfig(steps=10, warmup=0, learning_rate=0.5).rate(3)
        0.5
        """
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        fall = min(1.0, (self.steps - step) / self.cooldown) if self.cooldown else 1.0
        return self.learning_rate * rise * fall


@dataclass
class TrainState:
    """A run between two steps. `init` makes it, `step` moves it on in place.

    Attributes
    ----------
    model : nn.Module
        Being trained.
    average : dict of Tensor
        Averaged parameters by name, float32.
    optimizer : torch.optim.Optimizer
        With its moments.
    done : int
        Steps done.
    losses : list of float
        Loss of each step that was looked at so far.
    """

    model: nn.Module
    average: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    done: int = 0
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class TrainInfo:
    """What one step did: loss and norm of the gradient (tensors, not yet looked at), learning rate."""

    loss: Tensor
    norm: Tensor
    rate: float


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes
    ----------
    model : nn.Module
        The network that was given, with the last weights, in evaluation mode.
    average : dict of Tensor
        Averaged parameters by name.
    losses : list of float
        One per step.
    """

    model: nn.Module
    average: dict[str, Tensor]
    losses: list[float]

    def averaged(self) -> nn.Module:
        """A copy of the model with the averaged weights.

        Examples
        --------
        >>> import torch
        >>> from driftmax.discrete.train import TrainResult
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> result = TrainResult(net, {"weight": torch.full((1, 1), 5.0)}, [])
        >>> float(result.averaged().weight.detach())
        5.0
        """
        net = copy.deepcopy(self.model)
        net.load_state_dict(self.average, strict=False)  # buffers are not averaged
        return net


@dataclass(frozen=True)
class RandomWindows:
    """Batches of windows at uniformly random places of one long text; batch n depends on seed and n only.

    Parameters
    ----------
    text : Tensor
        Integers ``[N]`` of any type, N below 2**31.
    length : int
        Tokens per window.
    batch_size : int
        Windows per batch.
    seed : int, default 0
        Of the places.

    Raises
    ------
    ValueError
        If the text is not one row or shorter than a window.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete.train import RandomWindows
    >>> data = RandomWindows(torch.arange(100, dtype=torch.uint8), length=8, batch_size=2)
    >>> data(0).shape, bool(torch.equal(data(7), data(7)))
    (torch.Size([2, 8]), True)
    """

    text: Tensor
    length: int
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.text.dim() != 1 or not 1 <= self.length <= len(self.text) < 2**31:
            raise ValueError(f"no windows of {self.length} in a text of shape {list(self.text.shape)}")

    def __call__(self, step: int) -> Tensor:
        """Batch of a step: int64 ``[batch_size, length]``."""
        words = (
            bits(self.batch_size, rng=RowStreams(self.seed, self.batch_size, step=step)).long() & 0xFFFFFFFF
        )
        first = (words * (len(self.text) - self.length + 1)) >> 32
        return self.text[first[:, None] + torch.arange(self.length)].long()


Optimizer: TypeAlias = Callable[[nn.Module, TrainConfig], torch.optim.Optimizer]


def _adamw(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        fused=fused,
    )


def init(model: nn.Module, config: TrainConfig, optimizer: Optimizer = _adamw) -> TrainState:
    """The state before the first step. `optimizer` is as for `train`.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete.train import TrainConfig, init
    >>> init(torch.nn.Linear(1, 1), TrainConfig(steps=10)).done
    0
    """
    average = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    made = optimizer(model, config)
    for group in made.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return TrainState(model, average, made)


def step(
    state: TrainState, tokens: Tensor, config: TrainConfig, *, mask_id: int, loss: Loss = lambda_dce
) -> TrainInfo:
    """One optimiser step on a batch of clean tokens ``[B, L]``; moves `state` on in place.

    Randomness comes from the seed and ``state.done``: masks from `RowStreams`, dropout from torch's
    generators, which are left as they were.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete.network import RADD, RADDConfig
    >>> from driftmax.discrete.train import TrainConfig, init, step
    >>> config = TrainConfig(steps=1)
    >>> state = init(RADD(RADDConfig(vocab_size=4, hidden_size=8, blocks=1, heads=2)), config)
    >>> info = step(state, torch.zeros(2, 6, dtype=torch.int64), config, mask_id=4)
    >>> state.done
    1
    """
    rate = config.rate(state.done)
    for group in state.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * (rate / config.learning_rate)
    streams = RowStreams(config.seed, len(tokens), step=state.done)
    device = tokens.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed * 2**24 + state.done & 2**63 - 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            value = loss(state.model, tokens, mask_id=mask_id, rng=streams, reduction="mean")
        state.optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]  # torch's own annotation is missing
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.clip)
    state.optimizer.step()
    state.done += 1
    decay = min(config.ema_decay, state.done / (state.done + 9.0))
    with torch.no_grad():
        for name, parameter in state.model.named_parameters():
            state.average[name].lerp_(parameter.float(), 1.0 - decay)
    return TrainInfo(value.detach(), norm, rate)


def train(
    model: nn.Module,
    data: Callable[[int], Tensor],
    config: TrainConfig,
    *,
    mask_id: int,
    loss: Loss = lambda_dce,
    optimizer: Optimizer = _adamw,
    checkpoint: str | Path | None = None,
    callback: Callable[[TrainState, TrainInfo], None] | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train a denoiser, from the start or from its checkpoint.

    Parameters
    ----------
    model : nn.Module
        ``model(tokens) -> logits``; trained in place, where its parameters are.
    data : callable
        ``data(n)``: clean tokens int64 ``[B, L]`` of step n = 0, 1, ...; always the same for the same n, or a
        resumed run is another one. `RandomWindows` is one.
    config : TrainConfig
        Steps, rates, averages, seed.
    mask_id : int
        Id of the mask.
    loss : callable, default lambda_dce
        ``loss(model, tokens, mask_id=, rng=, reduction="mean")``; options by ``functools.partial``. `rng` is
        a `RowStreams` whose ``step`` is the number of the step.
    optimizer : callable, optional
        ``optimizer(model, config)`` returns a torch optimizer; by default AdamW as `config` says. Each of its
        groups keeps its own learning rate, which rises and falls as the configuration's does.
    checkpoint : str or Path, optional
        File for model, averages, optimiser and losses. If it is there, the run goes on from it. Written
        beside and renamed, so that a run cut off at any time leaves a whole one.
    callback : callable, optional
        Called with (state, info) after each step.
    progress : bool, default True
        Show a bar.

    Returns
    -------
    TrainResult

    Raises
    ------
    ValueError
        If the checkpoint belongs to another run (other settings or another network).
    RuntimeError
        If a loss is not finite; the last checkpoint is from before.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete.network import RADD, RADDConfig
    >>> from driftmax.discrete.train import RandomWindows, TrainConfig, train
    >>> net = RADD(RADDConfig(vocab_size=4, hidden_size=16, blocks=1, heads=2))
    >>> data = RandomWindows(torch.tensor([0, 1, 2, 3] * 20), length=8, batch_size=16)
    >>> config = TrainConfig(steps=40, learning_rate=1e-2, warmup=5)
    >>> result = train(net, data, config, mask_id=4, progress=False)
    >>> result.losses[-1] < result.losses[0]
    True
    """
    state = init(model, config, optimizer)
    device = next(model.parameters()).device
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        _restore(state, path, config)
    pending: list[Tensor] = []
    model.train()
    with tqdm(total=config.steps, initial=state.done, disable=not progress, unit="step") as bar:
        while state.done < config.steps:
            info = step(state, data(state.done).to(device), config, mask_id=mask_id, loss=loss)
            pending.append(info.loss)
            save = path is not None and (
                state.done % config.checkpoint_every == 0 or state.done == config.steps
            )
            if save or state.done % config.check_every == 0 or state.done == config.steps:
                _look(state, pending)
                bar.set_postfix(loss=f"{state.losses[-1]:.3f}", refresh=False)
            if save and path is not None:
                _save(state, path, config)
            if callback is not None:
                callback(state, info)
            bar.update()
    model.eval()
    return TrainResult(model, state.average, state.losses)


def _look(state: TrainState, pending: list[Tensor]) -> None:
    """Move the losses since the last look to the host; they must be finite."""
    values = torch.stack(pending).float().tolist()
    pending.clear()
    for value in values:
        if not math.isfinite(value):
            raise RuntimeError(f"the loss of step {len(state.losses)} is {value}; lower the learning rate")
        state.losses.append(value)


def _save(state: TrainState, path: Path, config: TrainConfig) -> None:
    stored = {
        "model": state.model.state_dict(),
        "average": state.average,
        "optimizer": state.optimizer.state_dict(),
        "done": state.done,
        "losses": torch.tensor(state.losses),
        "config": _plain(config),
    }
    with atomic(path) as partial:
        torch.save(stored, partial)


def _restore(state: TrainState, path: Path, config: TrainConfig) -> None:
    """Load a checkpoint into a fresh state."""
    device = next(state.model.parameters()).device
    stored: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    ours, theirs = _plain(config), stored["config"]
    other = [name for name in ours if name not in _MAY_CHANGE and ours[name] != theirs.get(name)]
    if other:
        listed = ", ".join(f"{name} {theirs.get(name)} (now {ours[name]})" for name in other)
        raise ValueError(f"checkpoint {path} is of a run with another {listed}")
    try:
        state.model.load_state_dict(stored["model"])
    except RuntimeError as error:
        raise ValueError(f"checkpoint {path} is of another network: {error}") from error
    state.optimizer.load_state_dict(stored["optimizer"])
    state.average = stored["average"]
    state.done = stored["done"]
    state.losses = stored["losses"].tolist()


def _plain(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain values that torch.load reads without pickled classes."""
    return {**asdict(config), "betas": list(config.betas)}
