"""What a device decides in `init` and what the CPU decides as it goes are one and the same."""

from __future__ import annotations

import pytest
import torch
from driftmax.discrete import (
    P2,
    Ancestral,
    Cap,
    ConfidenceBased,
    Euler,
    Loop,
    Problem,
    ReMDM,
    Rescale,
    SampleResult,
    ancestral,
    remask,
    sample,
)

from tests.discrete.test_no_sync import LENGTH, VOCAB, Plain, WithHead

STEPS = 70  # more than remasking lists at a time


def drawn(sampler: object, model: object, **options: object) -> SampleResult:
    prompt = torch.full((3, LENGTH), VOCAB)
    prompt[1, :4] = 2
    return sample(
        model,
        (3, LENGTH),
        mask_id=VOCAB,
        sampler=sampler,
        steps=STEPS,
        rng=5,
        prompt=prompt,
        banned=[1],
        **options,
    )


@pytest.mark.parametrize("model", [Plain(), WithHead()], ids=["logits", "head"])
@pytest.mark.parametrize(
    "options", [{}, {"whole_batch": True}, {"cache": False}, {"cache": False, "top_k": 3}], ids=str
)
@pytest.mark.parametrize(
    "sampler",
    [
        Ancestral(),
        Euler(),
        ReMDM(Cap(0.3)),
        ReMDM(Rescale(0.5)),
        ReMDM(Loop(0.3)),
        ReMDM(ConfidenceBased()),
    ],
    ids=str,
)
def test_tokens_and_calls_are_the_same(
    sampler: object, options: dict[str, object], model: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = drawn(sampler, model, **options)
    for module in (ancestral, remask):
        monkeypatch.setattr(module, "decides_ahead", lambda problem: True)
    found = drawn(sampler, model, **options)
    assert torch.equal(found.tokens, wanted.tokens)
    assert found.nfe == wanted.nfe
    assert torch.equal(found.row_nfe, wanted.row_nfe)
    assert [call[:3] for call in found.history] == [call[:3] for call in wanted.history]
    if isinstance(sampler, ReMDM):
        assert sum(int(call.revealed) for call in wanted.history) > 3 * LENGTH - 4  # tokens were taken back


def test_with_a_cache_what_looks_at_the_network_is_not_decided_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remask, "decides_ahead", lambda problem: True)
    for cache in (True, False):
        problem = Problem(Plain(), (3, LENGTH), VOCAB, steps=STEPS, rng=5, cache=cache)
        assert (ReMDM(ConfidenceBased()).init(problem).memo.reveals is None) == cache
        assert ReMDM(Cap(0.3)).init(problem).memo.reveals is not None


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_path_planning_knows_how_many_masks_each_step_finds(eta: float) -> None:
    prompt = torch.full((3, LENGTH), VOCAB)
    prompt[1, :4], prompt[2] = 2, 3
    sampler = P2(eta)
    state = sampler.init(Problem(Plain(), (3, LENGTH), VOCAB, steps=9, rng=5, prompt=prompt))
    while not state.done:
        assert state.memo.masks[state.step] == int(state.masked.sum())
        state = sampler.step(state)
    assert len(state.memo.masks) == 9
