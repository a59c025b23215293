"""Decoding rules against loops in float64 that follow the published rules, one row at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from driftmax import RowStreams
from driftmax.discrete import FirstHitting, Problem, sample
from driftmax.discrete.decoding import (
    Confidence,
    DreamPace,
    EntropyBounded,
    EntropyOrder,
    EvenPace,
    Factor,
    MarginOrder,
    MaskGitPlus,
    RandomOrder,
    Threshold,
)
from driftmax.discrete.rules import select
from torch import Tensor

from tests.discrete.published import (
    BANNED,
    KEYS,
    LENGTH,
    MASK,
    SEED,
    Drawn,
    Headed,
    Random,
    bounded_count,
    decode,
    dream_counts,
    factor_count,
    llada_counts,
    prompts,
    threshold_count,
)
from tests.statistics import LEVEL, assert_law, noncentrality

# --- rules --------------------------------------------------------------------------------------------------

COUNTED = [
    (Confidence, "confidence"),
    (EntropyOrder, "entropy"),
    (MarginOrder, "margin"),
    (MaskGitPlus, "maskgit"),
]
DRAWS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.5, "top_k": 3},
    {"temperature": 1.0, "top_p": 0.8},
]
IDS = ["greedy", "plain", "cold", "top_k", "top_p"]


def run(sampler: Any, model: Random, **options: Any) -> Any:
    rows = prompts()
    return sample(
        model,
        tuple(rows.shape),
        mask_id=MASK,
        sampler=sampler,
        prompt=rows,
        banned=BANNED,
        rng=SEED,
        **options,
    )


def check(result: Any, wanted: list[tuple[Tensor, int]]) -> None:
    torch.testing.assert_close(result.tokens, torch.stack([row for row, _ in wanted]), rtol=0, atol=0)
    assert result.row_nfe.tolist() == [calls for _, calls in wanted]
    assert result.nfe == max(calls for _, calls in wanted) == len(result.history)
    assert sum(call.rows for call in result.history) == sum(calls for _, calls in wanted)


@pytest.mark.parametrize("draw", DRAWS, ids=IDS)
@pytest.mark.parametrize(("block_length", "steps"), [(None, 5), (4, None), (4, 7)])
@pytest.mark.parametrize(("rule", "key"), COUNTED)
def test_counted_rules(rule, key, block_length, steps, draw):
    model = Random()
    result = run(rule(block_length=block_length), model, steps=steps, **draw)
    each = [
        decode(model, row, i, key, block_length=block_length, steps=steps, **draw)
        for i, row in enumerate(prompts())
    ]
    check(result, each)


@pytest.mark.parametrize("draw", DRAWS[:2], ids=IDS[:2])
@pytest.mark.parametrize(("rule", "key"), COUNTED)
def test_counted_rules_at_the_pace_of_dream(rule, key, draw):
    model = Random()
    result = run(rule(pace=DreamPace(), block_length=5), model, steps=9, **draw)
    each = [
        decode(model, row, i, key, block_length=5, steps=9, counts=dream_counts, **draw)
        for i, row in enumerate(prompts())
    ]
    check(result, each)


ADAPTIVE = [
    (Threshold(0.6), "confidence", lambda draws: threshold_count(draws, 0.6)),
    (Threshold(1.1), "confidence", lambda draws: 1),
    (Threshold(0.0), "confidence", len),
    (Factor(1.0), "confidence", lambda draws: factor_count(draws, 1.0)),
    (Factor(2.5), "confidence", lambda draws: factor_count(draws, 2.5)),
    (EntropyBounded(0.5), "entropy", lambda draws: bounded_count(draws, 0.5, "entropy")),
    (EntropyBounded(2.0), "entropy", lambda draws: bounded_count(draws, 2.0, "entropy")),
    (EntropyBounded(1.0, MarginOrder()), "margin", lambda draws: bounded_count(draws, 1.0, "margin")),
    (EntropyBounded(1.0, Confidence()), "confidence", lambda draws: bounded_count(draws, 1.0, "confidence")),
    (EntropyBounded(1.0, MaskGitPlus()), "maskgit", lambda draws: bounded_count(draws, 1.0, "maskgit")),
]

ADAPTIVE_IDS = [
    f"{type(rule).__name__}-{next(value for value in vars(rule).values() if isinstance(value, float))}-{key}"
    for rule, key, _ in ADAPTIVE
]


@pytest.mark.parametrize("draw", DRAWS, ids=IDS)
@pytest.mark.parametrize("block_length", [None, 4])
@pytest.mark.parametrize(("rule", "key", "count"), ADAPTIVE, ids=ADAPTIVE_IDS)
def test_adaptive_rules(rule, key, count, block_length, draw):
    model = Random()
    rule = type(rule)(**{**vars(rule), "block_length": block_length})
    result = run(rule, model, **draw)
    each = [
        decode(model, row, i, key, block_length=block_length, adaptive=count, **draw)
        for i, row in enumerate(prompts())
    ]
    check(result, each)
    if draw == {"temperature": 1.0} and 0 < getattr(rule, "threshold", 0.5) < 1:
        assert 1 < result.nfe < LENGTH  # neither everything at once nor one a call: the rule is at work


def test_factor_keeps_the_last_mask_where_the_published_code_does_not():
    """Two masks, the second a coin toss: (2 + 1) (1 - 0.5) = 1.5 > 1, so it has to wait for the next call."""

    def model(tokens: Tensor) -> Tensor:
        return torch.tensor([[20.0, 0.0, 0.0], [0.0, 0.0, -20.0]]).expand(len(tokens), -1, -1)

    model.time_independent = True
    assert sample(model, (1, 2), mask_id=3, sampler=Factor(1.0), rng=0).nfe == 2
    assert sample(model, (1, 2), mask_id=3, sampler=Factor(1.6), rng=0).nfe == 1


def test_factor_is_the_published_loop_but_for_the_last_mask():
    """Code: the first n > 1 with c_n < 1 - factor / (n + 1) ends the set; if that is the last, all go."""
    rows, masks, factor = 2000, 6, 0.8
    generator = torch.Generator().manual_seed(2)
    spread = torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    confidence = 1 - 0.5 * spread * torch.rand(rows, masks, generator=generator, dtype=torch.float64)
    logits = torch.stack([confidence, 1 - confidence], 2).log()

    def model(tokens: Tensor) -> Tensor:
        return logits[: len(tokens)]

    model.time_independent = True
    sampler = Factor(factor)
    state = sampler.init(Problem(model, (rows, masks), 2, rng=0, temperature=0.0))
    got = (~sampler.step(state).masked).sum(1).tolist()
    quirks, seen = 0, set()
    for row, number in zip(confidence.tolist(), got, strict=True):
        ordered = sorted(row, reverse=True)
        failing = [n for n in range(2, masks + 1) if ordered[n - 1] < 1 - factor / (n + 1)]
        ended = failing[0] - 1 if failing else masks
        quirks += ended == masks - 1  # where the published code reveals all
        seen.add(ended)
        assert number == ended
    assert seen == set(range(1, masks + 1))
    assert quirks > 0


def test_a_threshold_is_a_probability():
    """Confidences 0.5 and 0.8: a threshold below 0.5 takes both, one above the better alone."""

    def model(tokens: Tensor) -> Tensor:
        law = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]], dtype=torch.float64)
        return law.log().expand(len(tokens), -1, -1)

    model.time_independent = True
    for threshold, calls in ((0.0, 1), (0.499, 1), (0.501, 2), (0.9, 2), (1.0, 2), (2.0, 2)):
        sampler = Threshold(threshold)
        state = sampler.init(Problem(model, (1, 2), 3, rng=0, temperature=0.0))
        first = sampler.step(state).masked[0].tolist()
        assert first == ([False, False] if calls == 1 else [True, False])


# --- ties, counts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Confidence(), EntropyOrder(), MarginOrder(), MaskGitPlus()])
def test_ties_go_to_the_lower_position(rule):
    def model(tokens: Tensor) -> Tensor:
        return torch.arange(5.0).expand(*tokens.shape, 5)

    model.time_independent = True
    states = []
    sample(
        model,
        (2, 6),
        mask_id=5,
        sampler=rule,
        steps=3,
        temperature=0,
        callback=lambda s: states.append(s.masked),
    )
    assert [state[0].tolist() for state in states] == [
        [False] * 2 + [True] * 4,
        [False] * 4 + [True] * 2,
        [False] * 6,
    ]


def test_select_takes_the_best_eligible_ones():
    score = torch.tensor([[0.5, -torch.inf, 0.5, 0.7, 0.9], [1.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    eligible = torch.tensor([[True, True, True, True, False], [False, True, True, True, True]])
    counts = torch.tensor([4, 2])
    assert select(score, eligible, counts).tolist() == [
        [True, True, True, True, False],
        [False, True, True, False, False],
    ]
    assert select(score, eligible, torch.tensor([2, 0])).tolist() == [
        [True, False, False, True, False],
        [False] * 5,
    ]
    assert select(
        score, eligible, torch.tensor([2, 9]), first=torch.tensor([[False, False, True, False, True]] * 2)
    )[0].tolist() == [False, False, True, True, False]


def test_paces():
    for masks in range(1, 28):
        for steps in range(1, 31):
            assert EvenPace().counts(masks, steps) == llada_counts(masks, steps)
            assert DreamPace().counts(masks, steps) == dream_counts(masks, steps)


# --- random order -------------------------------------------------------------------------------------------


def test_random_order_without_steps_is_first_hitting():
    first, second = (run(sampler, Random()) for sampler in (RandomOrder(), FirstHitting()))
    assert torch.equal(first.tokens, second.tokens)
    assert first.history == second.history


def test_random_order_reveals_the_published_counts_block_by_block():
    model, states = Random(), []
    result = run(RandomOrder(block_length=4), model, steps=7, callback=lambda s: states.append(s.masked))
    before = prompts() == MASK
    for e, state in enumerate(states):
        # row 0: blocks of 4, 4, 4 in 3, 2, 2 steps; row 1: masks 5 .. 11, blocks of 4 and 3 in 4 and 3
        assert int((before ^ state)[0].sum()) == [2, 1, 1, 2, 2, 2, 2][e]
        assert int((before ^ state)[1].sum()) == 1
        before = state
    assert not bool(states[2][0, :4].any())
    assert bool(states[2][0, 4:].all())
    assert result.nfe == 7


def test_random_order_is_uniform():
    """The first of 6 positions, in 20000 rows; a law that favours one position by 2 % of it would be seen."""
    rows, length = 20_000, 6

    def model(tokens: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, 3)

    model.time_independent = True
    problem = Problem(model, (rows, length), 3, rng=1)
    sampler = RandomOrder()
    state = sampler.step(sampler.init(problem))
    assert_law((~state.masked).to(torch.int64).argmax(1), torch.full((length,), 1 / length))
    shift = rows * (0.25 / length) ** 2 * length  # one position at 1.25 / 6, the rest less
    assert shift > noncentrality(length - 1, LEVEL / 2)


# --- order temperature --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "key"),
    [
        (EntropyOrder(order_temperature=0.3), "entropy"),
        (MarginOrder(order_temperature=0.3), "margin"),
        (MaskGitPlus(order_temperature=0.3), "maskgit"),
    ],
)
def test_order_temperature_draws_positions_without_replacement(rule, key):
    """The ordered law of two positions at alg_temp 0.3, greedy tokens, 20000 rows.

    False alarms at 1e-9. Power: the same test rejects the law at temperature 0.4.
    """
    rows = 20_000
    logits = torch.tensor(
        [[2.0, 0.0, 0.0], [1.0, 0.0, 0.5], [0.0, 0.2, 0.1], [3.0, 2.0, 1.0]], dtype=torch.float64
    )

    def model(tokens: Tensor) -> Tensor:
        return logits.expand(len(tokens), -1, -1)

    model.time_independent = True
    sampler = type(rule)(order_temperature=rule.order_temperature)
    state = sampler.init(Problem(model, (rows, 4), 3, rng=5, temperature=0.0))
    chosen = []
    for _ in range(2):
        after = sampler.step(state)
        chosen.append((state.masked & ~after.masked).to(torch.int64).argmax(1))
        state = after
    draws = [Drawn(i, int(row.argmax()), row.softmax(0), row.softmax(0)) for i, row in enumerate(logits)]

    def wanted(temperature: float) -> Tensor:
        weight = torch.tensor([KEYS[key](draw) / temperature for draw in draws], dtype=torch.float64).exp()
        first = weight / weight.sum()
        pairs = first[:, None] * weight / (weight.sum() - weight[:, None])
        return pairs.fill_diagonal_(0.0).flatten()

    cells = chosen[0] * 4 + chosen[1]
    assert_law(cells, wanted(0.3))
    with pytest.raises(AssertionError):
        assert_law(cells, wanted(0.4))


# --- the law of one token a call ----------------------------------------------------------------------------

KERNEL = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]], dtype=torch.float64)


def one_a_call(sampler: Any) -> tuple[Tensor, Tensor]:
    """20000 chains of 4 tokens from the exact denoiser, numbered, and the chain's law."""
    sequences = torch.cartesian_prod(*[torch.arange(3)] * 4)
    law = torch.linalg.matrix_power(KERNEL, 200)[0][sequences[:, 0]]
    for i in range(1, 4):
        law = law * KERNEL[sequences[:, i - 1], sequences[:, i]]

    def model(tokens: Tensor) -> Tensor:
        known, place = tokens.unique(dim=0, return_inverse=True)
        weight = ((known[:, None] == 3) | (known[:, None] == sequences)).all(-1) * law
        each = [weight @ (sequences == v).double() for v in range(3)]
        return (torch.stack(each, -1) / weight.sum(1)[:, None, None]).log()[place]

    model.time_independent = True
    tokens = sample(model, (20_000, 4), mask_id=3, sampler=sampler, rng=4).tokens
    return (tokens * torch.tensor([27, 9, 3, 1])).sum(1), law


@pytest.mark.parametrize(
    "sampler",
    [
        RandomOrder(),
        RandomOrder(block_length=2),
        EntropyOrder(),
        EntropyOrder(order_temperature=0.2),
        MarginOrder(block_length=3),
        EntropyBounded(0.0),
    ],
    ids=str,
)
def test_an_order_that_does_not_look_at_the_draws_keeps_the_law(sampler):
    """False alarms at 1e-9; what the test sees: the next one."""
    assert_law(*one_a_call(sampler))


@pytest.mark.parametrize("sampler", [Confidence(), MaskGitPlus(), Threshold(2.0), Factor(0.0)], ids=str)
def test_an_order_by_the_draws_does_not(sampler):
    with pytest.raises(AssertionError):
        assert_law(*one_a_call(sampler))


# --- invariance, calls, head --------------------------------------------------------------------------------

EVERY = [
    (Confidence(block_length=5), 6),
    (RandomOrder(block_length=5), 6),
    (EntropyOrder(order_temperature=0.2), 4),
    (MarginOrder(), None),
    (MaskGitPlus(pace=DreamPace()), 6),
    (Threshold(0.5, block_length=5), None),
    (Factor(1.5), None),
    (EntropyBounded(1.0), None),
]


@pytest.mark.parametrize(("sampler", "steps"), EVERY, ids=lambda value: str(value)[:30])
def test_rows_do_not_depend_on_the_batch(sampler, steps):
    """Split, permuted, all rows in every call, head apart, by hand: bitwise the same tokens."""
    rows = prompts()
    options: dict[str, Any] = {
        "mask_id": MASK, "sampler": sampler, "steps": steps, "banned": BANNED, "temperature": 1.3
    }  # fmt: skip
    streams = RowStreams(SEED, len(rows))
    whole = sample(Random(), tuple(rows.shape), prompt=rows, rng=streams, **options)
    for part in (
        torch.tensor([2, 0]),
        torch.tensor([5, 4, 3, 2, 1, 0]),
        torch.tensor([1]),
        torch.tensor([4]),
    ):
        some = sample(Random(), (len(part), LENGTH), prompt=rows[part], rng=streams[part], **options)
        assert torch.equal(some.tokens, whole.tokens[part])
        assert torch.equal(some.row_nfe, whole.row_nfe[part])
    for settings in ({"whole_batch": True}, {"cache": False}):
        model = Random()
        full = sample(model, tuple(rows.shape), prompt=rows, rng=streams, **options, **settings)
        assert torch.equal(full.tokens, whole.tokens)
        assert model.batches == [len(rows)] * whole.nfe
        assert full.row_nfe.tolist() == [whole.nfe] * len(rows)
    headed = sample(Headed(), tuple(rows.shape), prompt=rows, rng=streams, **options)
    assert torch.equal(headed.tokens, whole.tokens)
    problem = Problem(
        Random(),
        tuple(rows.shape),
        MASK,
        prompt=rows,
        rng=streams,
        steps=steps,
        banned=BANNED,
        temperature=1.3,
    )
    state = sampler.init(problem)
    while not state.done:
        state = sampler.step(state)
    assert torch.equal(state.tokens, whole.tokens)


@pytest.mark.parametrize(("sampler", "steps"), EVERY, ids=lambda value: str(value)[:30])
def test_calls_serve_only_rows_with_masks(sampler, steps):
    model = Random()
    result = run(sampler, model, steps=steps)
    assert model.batches == [call.rows for call in result.history]
    assert model.batches[0] == 5  # one row has nothing to do
    assert model.batches == sorted(model.batches, reverse=True)
    assert sum(call.revealed for call in result.history) == int((prompts() == MASK).sum())
    kept = prompts() != MASK
    assert torch.equal(result.tokens[kept], prompts()[kept])
    assert not bool(torch.isin(result.tokens[~kept], torch.tensor([MASK, *BANNED])).any())


@pytest.mark.parametrize(("sampler", "steps"), EVERY, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("shape", [(0, LENGTH), (2, 0), (2, LENGTH)])
def test_nothing_to_do(sampler, steps, shape):
    model = Random()
    prompt = torch.zeros(shape, dtype=torch.int64)
    result = sample(model, shape, mask_id=MASK, sampler=sampler, steps=steps, prompt=prompt)
    assert torch.equal(result.tokens, prompt)
    assert result.nfe == 0
    assert model.batches == []


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "steps"), EVERY, ids=lambda value: str(value)[:30])
def test_a_network_that_depends_on_time_is_refused(sampler, steps):
    with pytest.raises(ValueError, match="does not depend on time"):
        sample(lambda tokens, t: tokens, (1, 4), mask_id=5, sampler=sampler, steps=steps)


@pytest.mark.parametrize("sampler", [Threshold(), Factor(), EntropyBounded()])
def test_steps_are_not_for_adaptive_rules(sampler):
    with pytest.raises(ValueError, match="leave steps out"):
        run(sampler, Random(), steps=4)


def test_fewer_steps_than_blocks():
    with pytest.raises(ValueError, match="3 blocks"):
        run(Confidence(block_length=4), Random(), steps=2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Confidence(block_length=0),
        lambda: RandomOrder(block_length=0),
        lambda: Threshold(-0.1),
        lambda: Threshold(math.nan),
        lambda: Factor(-1.0),
        lambda: EntropyBounded(-1.0),
        lambda: EntropyBounded(1.0, EntropyOrder(block_length=3)),
        lambda: EntropyOrder(order_temperature=-1.0),
        lambda: DreamPace(1.0),
    ],
)
def test_bad_settings(make):
    with pytest.raises(ValueError, match=r"must be|leave its settings"):
        make()
