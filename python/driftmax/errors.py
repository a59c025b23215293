"""Exception types, and the status word through which kernels report bad values without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BackendUnavailable", "InvalidDistribution", "check_status", "raise_status", "status_word"]

_REASONS = {
    1: "a logit is NaN",
    2: "a logit is +inf",
    3: "no token has positive probability (every logit is -inf)",
    4: "fewer than k tokens have positive probability after filtering",
}

# One sticky word per device, as cudaGetLastError keeps one error: a check costs nothing until somebody asks.
_words: dict[torch.device, Tensor] = {}


class InvalidDistribution(ValueError):
    """Values that name no distribution: NaN or +inf logits, or a row without a token to draw.

    Attributes
    ----------
    draw : int or None
        Flat index of the first offending draw over the leading shape, where one is known.

    Examples
    --------
    >>> import torch, driftmax
    >>> driftmax.categorical(torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]))
    Traceback (most recent call last):
        ...
    driftmax.errors.InvalidDistribution: row 1: a logit is NaN
    """

    def __init__(self, message: str, draw: int | None = None) -> None:
        super().__init__(message)
        self.draw = draw


class BackendUnavailable(RuntimeError):
    """A backend asked for by name, or the only one of a device, is not there; the message says what to do.

    Examples
    --------
    >>> import torch, driftmax
    >>> driftmax.categorical(torch.zeros(1, 3, device="meta"), rng=0, backend="cpp")
    Traceback (most recent call last):
        ...
    driftmax.errors.BackendUnavailable: backend 'cpp' runs on cpu tensors, not on meta
    """


def raise_status(status: int, n1: int = 1) -> None:
    """Raise what a kernel's status (0, or ``code | draw << 8``) says; `n1`: positions per row."""
    if status == 0:
        return
    code, draw = status & 0xFF, status >> 8
    where = f"row {draw}" if n1 == 1 else f"row {draw // n1}, position {draw % n1}"
    raise InvalidDistribution(f"{where}: {_REASONS.get(code, f'unknown status code {code}')}", draw)


def status_word(device: torch.device) -> Tensor:
    """The int64[1] word of `device` into which kernels write ``code | draw << 8`` on bad values."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    word = _words.get(device)
    if word is None:
        word = _words[device] = torch.zeros(1, dtype=torch.int64, device=device)
    return word


def check_status() -> None:
    """Raise the `InvalidDistribution` that a kernel has reported since the last call, if any.

    GPU kernels cannot raise without a host sync; they leave a status word instead. This reads and clears it
    (one sync per device used so far). ``driftmax.set_debug(True)`` does it after every op. CPU ops raise at
    once.

    Raises
    ------
    InvalidDistribution
        Naming the row of the offending draw.

    Examples
    --------
    >>> import driftmax
    >>> driftmax.check_status()
    """
    for word in _words.values():
        status = int(word.item())
        if status:
            word.zero_()
            raise_status(status)
