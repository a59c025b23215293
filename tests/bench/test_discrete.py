"""The discrete case: its peers draw the law they are compared at, and its formula."""

from __future__ import annotations

import pytest
import torch
from driftmax.bench.cases import discrete

from tests.statistics import assert_law


@pytest.mark.parametrize("loop", [discrete.plain_ancestral, discrete.careful_ancestral])
def test_peers_draw_the_law(loop, monkeypatch) -> None:
    """8 x 500 draws of a law over 6 tokens; the mask is gone."""
    monkeypatch.setattr(discrete, "VOCABULARY", 6)
    torch.manual_seed(0)
    logits = torch.linspace(-1.5, 1.0, 6)
    tokens = loop(discrete.Null(logits), (8, 500), 7)
    assert_law(tokens.view(-1), torch.softmax(logits.double(), 0))


def test_expected_calls() -> None:
    """One step calls once; many steps call once a token; one token calls once; the published numbers."""
    assert [round(discrete.expected_calls(n, 1024)) for n in (1024, 2048, 4096)] == [647, 806, 906]
    assert discrete.expected_calls(1, 100) == 1
    assert discrete.expected_calls(10**9, 100) == pytest.approx(100, rel=1e-5)
    assert discrete.expected_calls(100, 1) == pytest.approx(1)
