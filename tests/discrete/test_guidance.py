"""Classifier-free guidance: the published formula, one call for both halves, every sampler."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from driftmax import RowStreams
from driftmax.discrete import Ancestral, FirstHitting, Linear, Plan, sample
from driftmax.discrete.decoding import Confidence, EntropyBounded, RandomOrder, Threshold
from driftmax.discrete.guidance import ClassifierFreeGuidance
from driftmax.discrete.remask import P2, Cap, ReMDM
from torch import Tensor

V, MASK, LENGTH = 7, 4, 6


class Random:
    """Random logits that depend on all tokens of the row and, bitwise, on nothing else of the batch."""

    time_independent = True

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.embed = torch.randn(V, LENGTH, 8, generator=generator, dtype=torch.float64)
        self.weight = 2.0 * torch.randn(V, 8, generator=generator, dtype=torch.float64)
        self.bias = torch.randn(V, generator=generator, dtype=torch.float64)
        self.batches: list[int] = []

    def row(self, tokens: Tensor) -> Tensor:
        each = self.embed[tokens, torch.arange(len(tokens))]
        return torch.tanh(each + each.roll(1, 0) + each.mean(0))

    def __call__(self, tokens: Tensor) -> Tensor:
        self.batches.append(len(tokens))
        return torch.stack([self.row(each) @ self.weight.T + self.bias for each in tokens])


class Headed(Random):
    """The same network, with its head apart."""

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.bias

    def features(self, tokens: Tensor) -> Tensor:
        self.batches.append(len(tokens))
        return torch.stack([self.row(each) for each in tokens])


class Prompted:
    """Not a wrapper of a batch but of a row: the formula as LLaDA writes it, in a loop."""

    time_independent = True

    def __init__(self, scale: float, held: Tensor) -> None:
        self.model, self.scale, self.held = Random(), scale, held

    def __call__(self, tokens: Tensor) -> Tensor:
        out = []
        for row in tokens:
            bare = row.clone()
            bare[self.held] = MASK
            given, free = (self.model(each[None])[0] for each in (row, bare))
            out.append(free + (self.scale + 1) * (given - free))
        return torch.stack(out)


PROMPT = torch.tensor([2, 6, MASK, MASK, 1, MASK])
SAMPLERS = [
    (Plan(), 20),
    (Ancestral(), 5),
    (FirstHitting(), None),
    (Confidence(), 2),
    (RandomOrder(), None),
    (Threshold(0.7), None),
    (EntropyBounded(0.5), None),
    (ReMDM(Cap(0.3)), 8),
    (P2(), 6),
]


def run(model: Any, sampler: Any, steps: int | None, **options: Any) -> Any:
    options = {"prompt": PROMPT, "rng": 1, **options}
    return sample(
        model, (3, LENGTH), mask_id=MASK, sampler=sampler, steps=steps, schedule=Linear(), **options
    )


@pytest.mark.parametrize("network", [Random, Headed])
@pytest.mark.parametrize(("sampler", "steps"), SAMPLERS, ids=lambda value: str(value)[:20])
def test_every_sampler(sampler, steps, network):
    model = network()
    guided = ClassifierFreeGuidance(model, 1.5, mask_id=MASK, prompt=PROMPT)
    result = run(guided, sampler, steps)
    assert torch.equal(result.tokens, run(Prompted(1.5, PROMPT != MASK), sampler, steps).tokens)
    assert model.batches == [2 * call.rows for call in result.history]
    assert len(model.batches) == result.nfe
    assert bool((result.tokens[:, PROMPT != MASK] == PROMPT[PROMPT != MASK]).all())


@pytest.mark.parametrize("network", [Random, Headed])
@pytest.mark.parametrize(("sampler", "steps"), SAMPLERS, ids=lambda value: str(value)[:20])
def test_scale_zero_is_no_guidance(sampler, steps, network):
    guided = ClassifierFreeGuidance(network(), 0.0, mask_id=MASK, prompt=PROMPT)
    got, wanted = run(guided, sampler, steps), run(network(), sampler, steps)
    assert torch.equal(got.tokens, wanted.tokens)
    assert got.history == wanted.history


def test_guidance_changes_the_samples():
    tokens = [
        sample(
            ClassifierFreeGuidance(Random(), scale, mask_id=MASK, prompt=PROMPT),
            (50, LENGTH), mask_id=MASK, prompt=PROMPT, rng=1,
        ).tokens
        for scale in (0.0, 3.0, -1.0)
    ]  # fmt: skip
    assert not torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])


@pytest.mark.parametrize("scale", [-1.0, 0.5, 4.0])
def test_features_give_the_guided_logits(scale):
    guided = ClassifierFreeGuidance(Headed(), scale, mask_id=MASK, prompt=PROMPT)
    tokens = PROMPT.repeat(2, 1)
    tokens[:, 2] = torch.tensor([3, 5])
    logits = guided.features(tokens) @ guided.head[0].T + guided.head[1]
    torch.testing.assert_close(logits, guided(tokens), rtol=0, atol=1e-12)
    torch.testing.assert_close(logits, Prompted(scale, PROMPT != MASK)(tokens), rtol=0, atol=1e-12)


def test_infinite_logits_are_the_given_ones():
    inf = math.inf

    def model(tokens: Tensor) -> Tensor:
        given, free = [1.0, -inf, -inf, 2.0], [0.0, -inf, 3.0, -inf]
        return torch.tensor([given, free])[(tokens == MASK).to(torch.int64)]

    guided = ClassifierFreeGuidance(model, 1.0, mask_id=MASK, prompt=torch.tensor([1]))
    model.time_independent = True
    assert guided(torch.tensor([[1]])).tolist() == [[[2.0, -inf, -inf, 2.0]]]


def test_sixteen_bit_logits_are_combined_in_float32():
    def model(tokens: Tensor) -> Tensor:  # numbers of bfloat16, whose neighbours are 2 apart
        return torch.where(tokens == MASK, 300.0, 302.0)[..., None].to(torch.bfloat16)

    model.time_independent = True
    guided = ClassifierFreeGuidance(model, 0.25, mask_id=MASK, prompt=torch.tensor([1]))
    assert guided(torch.tensor([[1]])).item() == 302.5


def test_time_goes_to_both_halves():
    def model(tokens: Tensor, t: Tensor | None) -> Tensor:
        assert t is not None
        return (tokens + t[:, None])[..., None]

    guided = ClassifierFreeGuidance(model, 1.0, mask_id=MASK, prompt=torch.tensor([1]))
    assert not guided.time_independent
    assert guided(torch.tensor([[1], [1]]), torch.tensor([0.0, 0.5])).flatten().tolist() == [-2.0, -1.5]


def test_prompts_at_different_positions_need_all_rows_in_every_call():
    prompt = torch.tensor([[1, MASK, MASK, MASK], [1, 2, MASK, MASK]])

    class Table(Random):
        def row(self, tokens: Tensor) -> Tensor:
            return super().row(torch.cat((tokens, tokens[:2])))[:4]

    guided = ClassifierFreeGuidance(Table(), 1.0, mask_id=MASK, prompt=prompt)
    options: dict[str, Any] = {"mask_id": MASK, "prompt": prompt, "rng": 0}
    whole = sample(guided, (2, 4), whole_batch=True, **options)
    for i in range(2):
        alone = ClassifierFreeGuidance(Table(), 1.0, mask_id=MASK, prompt=prompt[i])
        one = sample(alone, (1, 4), mask_id=MASK, prompt=prompt[i], rng=RowStreams(0, [i]))
        assert torch.equal(one.tokens[0], whole.tokens[i])
    with pytest.raises(ValueError, match="whole_batch"):
        sample(guided, (2, 4), **options)
    with pytest.raises(ValueError, match="whole_batch"):
        guided(prompt.flip(0))


def test_padding_stays_in_both_halves():
    seen = []

    def model(tokens: Tensor) -> Tensor:
        seen.append(tokens)
        return torch.zeros(*tokens.shape, V)

    model.time_independent = True
    prompt = torch.tensor([[0, 1, MASK], [2, 1, MASK]])
    ClassifierFreeGuidance(model, 1.0, mask_id=MASK, prompt=prompt, pad_id=0)(prompt)
    assert seen[0][2:].tolist() == [[0, MASK, MASK], [MASK, MASK, MASK]]


def test_the_device_is_found_through_the_wrapper():
    layer = torch.nn.Linear(2, 2)
    guided = ClassifierFreeGuidance(layer, 1.0, mask_id=MASK, prompt=PROMPT)
    assert next(guided.parameters()) is layer.weight
    assert list(ClassifierFreeGuidance(Random(), 1.0, mask_id=MASK, prompt=PROMPT).parameters()) == []
    assert guided.head is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: ClassifierFreeGuidance(Random(), -1.5, mask_id=MASK, prompt=PROMPT),
        lambda: ClassifierFreeGuidance(Random(), math.inf, mask_id=MASK, prompt=PROMPT),
        lambda: ClassifierFreeGuidance(Random(), 1.0, mask_id=MASK, prompt=PROMPT[None, None]),
        lambda: ClassifierFreeGuidance(Random(), 1.0, mask_id=MASK, prompt=PROMPT.float()),
        lambda: ClassifierFreeGuidance(Random(), 1.0, mask_id=MASK, prompt=PROMPT)(PROMPT[None, :-1]),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(ValueError, match=r"scale|prompt"):
        make()
