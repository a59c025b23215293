"""The device of the Triton suite, the CPU, interpreted, or CUDA with ``DRIFTMAX_TEST_DEVICE=cuda``; and a
watch on what the interpreter stores.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """Where the kernels of ``suite.py`` run."""
    return torch.device(os.environ.get("DRIFTMAX_TEST_DEVICE", "cpu"))


def check_width(pointers: Any, value: Any) -> None:
    """Fail unless numpy's elements are as wide as those that `pointers` point to."""
    width = max(8, pointers.get_element_ty().primitive_bitwidth)  # a truth value is a byte
    found = 8 * value.data.dtype.itemsize
    assert found == width, f"a store of {found} bits to an element of {width} writes over its neighbour"


@pytest.fixture(autouse=True)
def _stores_stay_in_their_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter stores all bytes of numpy's type, and Triton 3.2 lets it be wider than Triton's own.

    Nothing need fail then: the neighbour may be unused, or written later. Newer ones look themselves.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime.interpreter import InterpreterBuilder

    store: Callable[..., Any] = InterpreterBuilder.create_masked_store

    def checked(builder: Any, pointers: Any, value: Any, *rest: Any) -> Any:
        check_width(pointers, value)
        return store(builder, pointers, value, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", checked)
