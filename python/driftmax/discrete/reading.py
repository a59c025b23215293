"""Numbers on their way from a device to the host: copied when asked for, waited for when needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Reading"]


class Reading:
    """A copy of `values` on the host, begun now. What the device is given afterwards does not wait for it."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if not values.is_cuda:
            self._values = values.cpu()
            return
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._values.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch annotates its instances only
        self._event.record(torch.cuda.current_stream(values.device))

    def get(self) -> Any:
        """The numbers, as nested lists; waits until the device has come to them."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()
