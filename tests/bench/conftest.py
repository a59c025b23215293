"""Cases shrunk until a whole run takes a second: the same code on tiny shapes, and no language model."""

from __future__ import annotations

import pytest
import torch
from driftmax.bench import inputs, machine, real_logits, runner
from driftmax.bench.cases import categorical, decoding, fill, gumbel_topk, law, lm_head_categorical
from driftmax.bench.harness import Settings

VOCABULARY = 3000


class NoModel:
    """Stands in for the trained model where only its presence matters."""

    @staticmethod
    def summary() -> str:
        return "real logits: replaced by a test"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Every case on tiny shapes; returns the settings of a full run of three rounds."""
    for case in (categorical, gumbel_topk, lm_head_categorical):
        monkeypatch.setattr(case, "VOCABULARY", VOCABULARY)
    monkeypatch.setattr(categorical, "BATCH", 4)
    monkeypatch.setattr(categorical, "HUGE", 5000)
    monkeypatch.setattr(machine, "cache_bytes", lambda: 2**18)
    monkeypatch.setattr(fill, "ELEMENTS", 2**16)
    monkeypatch.setattr(decoding, "QUICK_SIZES", ((300, 16, 4),))
    small = law.zipf(300)
    monkeypatch.setattr(law, "zipf", lambda: small)

    def random_logits(n: int, quick: bool) -> torch.Tensor:
        return torch.randn(n, VOCABULARY, generator=torch.Generator().manual_seed(1)).mul_(3.0)

    monkeypatch.setattr(inputs, "real", random_logits)
    monkeypatch.setattr(real_logits, "real_model", lambda quick: NoModel())
    settings = Settings(rounds=3, budget_s=0.05, threads=torch.get_num_threads())
    monkeypatch.setattr(runner, "QUICK_ROUNDS", 3)
    monkeypatch.setattr(runner, "QUICK_BUDGET_S", 0.02)
    return settings
