"""What bounds a workload here, measured in the same run: a bare read, a bare write, a matrix product."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from .. import _core
from .harness import Run, Settings


def bare_read(tensor: torch.Tensor, settings: Settings) -> Run:
    """One pass over the tensor's bytes that keeps a sum; on CPU the faster of the core's and torch's."""
    if tensor.device.type != "cpu":
        return lambda: tensor.sum(dtype=torch.float32)
    flat = tensor.view(-1).view(torch.int16) if tensor.element_size() == 2 else tensor.view(-1)
    words = flat[: flat.numel() // 2 * 2].view(torch.float32)
    nbytes, threads = words.numel() * 4, settings.threads

    def core() -> float:  # `words` and not its address: the caller may drop the tensor
        return _core.read_sum(words.data_ptr(), nbytes, threads)

    def plain() -> torch.Tensor:
        return words.sum()

    return min((core, plain), key=_best_of_three)


def _best_of_three(run: Run) -> float:
    run()
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def bare_write(tensor: torch.Tensor) -> Run:
    """One pass that writes the tensor."""
    return lambda: tensor.zero_()


def matrix_product(hidden: torch.Tensor, weight: torch.Tensor) -> Run:
    """hidden @ weight.T into a buffer made once."""
    out = hidden.new_empty(hidden.shape[0], weight.shape[0])
    return lambda: torch.matmul(hidden, weight.T, out=out)


def forced_isa(name: str) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """A context maker: the compiled core uses the named instruction set inside."""

    @contextlib.contextmanager
    def force() -> Iterator[None]:
        before = _core.isa()
        _core.set_isa(name)
        try:
            yield
        finally:
            _core.set_isa(before)

    return force


def current_isa(settings: Settings) -> str:
    """Instruction set the compiled core uses now; empty on devices where it does not run."""
    return _core.isa() if settings.device.type == "cpu" else ""
