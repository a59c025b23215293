"""ReMDM: its posterior keeps the forward law; P2: against a loop that follows the rule, one row at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import driftmax
import pytest
import torch
from driftmax import RowStreams
from driftmax.discrete import Ancestral, Cosine, Geometric, Linear, LogLinear, Problem, Schedule, sample
from driftmax.discrete.decoding import Confidence
from driftmax.discrete.remask import P2, Cap, ConfidenceBased, Loop, Remasking, ReMDM, Rescale
from torch import Tensor

from tests.discrete.published import BANNED, LENGTH, MASK, SEED, Headed, Random, V
from tests.statistics import LEVEL, assert_law, assert_mass, noncentrality


def prompts() -> Tensor:
    prompt = torch.full((5, LENGTH), MASK)
    prompt[1, :5] = torch.tensor([1, 2, 3, 2, 1])
    prompt[2, ::3] = 8
    prompt[3] = 9
    prompt[4, :-1] = 10
    return prompt


def run(sampler: Any, model: Any = None, *, steps: int = 9, **options: Any) -> Any:
    rows = prompts()
    options = {"prompt": rows, "rng": SEED, "banned": BANNED, "schedule": Linear(), **options}
    model = Random() if model is None else model
    shape = tuple(options["prompt"].shape)
    return sample(model, shape, mask_id=MASK, sampler=sampler, steps=steps, **options)


# --- ReMDM --------------------------------------------------------------------------------------------------

STRATEGIES = [Cap(0.3), Rescale(0.7), ConfidenceBased(), ConfidenceBased(Cap(0.4)), Loop(0.3, 0.6, 0.2, 0.7)]
STILL = [Cap(0.0), Rescale(0.0), ConfidenceBased(Cap(0.0))]


@pytest.mark.parametrize("schedule", [Linear(), LogLinear(), Cosine(), Geometric()])
@pytest.mark.parametrize("strategy", STILL)
def test_without_remasking_it_is_ancestral_sampling(strategy, schedule):
    got, wanted = (run(sampler, schedule=schedule) for sampler in (ReMDM(strategy), Ancestral()))
    assert torch.equal(got.tokens, wanted.tokens)
    assert got.history == wanted.history


def test_it_is_ancestral_sampling_for_networks_that_depend_on_time():
    def model(tokens: Tensor, t: Tensor) -> Tensor:
        return torch.sin(torch.arange(V) * 3.0 * t[:, None, None]).expand(*tokens.shape, V)

    got, wanted = (
        run(sampler, model, cache=False, schedule=Cosine()) for sampler in (ReMDM(Cap(0)), Ancestral())
    )
    assert torch.equal(got.tokens, wanted.tokens)
    assert got.nfe == 9


def published(strategy: Remasking, t: float, s: float) -> tuple[float, float]:
    """(reveal, take back) probabilities of a step as published, for alpha = 1 - t."""
    alpha_t, alpha_s = 1 - t, 1 - s
    bound = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0
    if isinstance(strategy, Cap):
        sigma = min(strategy.eta, bound)
    elif isinstance(strategy, Rescale):
        sigma = strategy.eta * bound
    elif isinstance(strategy, ConfidenceBased):
        return (alpha_s - alpha_t) / (1 - alpha_t), bound
    else:
        assert isinstance(strategy, Loop)
        on = strategy.alpha_on
        if t > strategy.t_on:
            moved = [1 - (1 - time) * on / (1 - strategy.t_on) for time in (t, s)]
            return (moved[0] - moved[1]) / moved[0], 0.0
        if t <= strategy.t_off:
            moved = [time * (1 - on) / strategy.t_off for time in (t, s)]
            return (moved[0] - moved[1]) / moved[0], 0.0
        return on * strategy.eta / (1 - on), strategy.eta
    return (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t), sigma


@pytest.mark.parametrize(
    "strategy", [Cap(0.02), Cap(0.9), Rescale(0.3), ConfidenceBased(), Loop(0.05, 0.5, 0.25, 0.8)]
)
def test_probabilities_are_the_published_ones(strategy):
    """Steps of 1/16: t_on and t_off lie on the grid, where the published kinks are in order."""
    memo = ReMDM(strategy).init(Problem(Random(), (1, LENGTH), MASK, Linear(), steps=16)).memo
    for k in range(15):
        reveal, back = published(strategy, 1 - k / 16, 1 - (k + 1) / 16)
        assert memo.unmask[k] == pytest.approx(reveal, abs=1e-14)
        assert memo.sigma[k] == pytest.approx(back, abs=1e-14)
    assert (memo.unmask[15], memo.sigma[15]) == (1.0, 0.0)


def test_confidence_shares_the_probability_out():
    psi = torch.tensor([[0.9, 0.2, 0.5, 1.0]], dtype=torch.float64)
    held = torch.tensor([[True, True, False, True]])
    weights = [math.exp(-0.9), math.exp(-0.2), 0.0, math.exp(-1.0)]
    wanted = [[0.6 * weight / sum(weights) for weight in weights]]
    torch.testing.assert_close(
        ConfidenceBased().spread(0.6, psi, held),
        torch.tensor(wanted, dtype=torch.float64),
        rtol=1e-14,
        atol=0,
    )
    assert ConfidenceBased().spread(0.6, psi, held & False).tolist() == [[0.0] * 4]


def test_confidence_is_the_probability_when_drawn():
    model, sampler = Random(), ReMDM(ConfidenceBased())
    state = sampler.init(
        Problem(model, (5, LENGTH), MASK, Linear(), steps=9, prompt=prompts(), banned=BANNED, rng=SEED)
    )
    while not state.done:
        before, state = state, sampler.step(state)
        for row, position in (before.masked & ~state.masked).nonzero().tolist():
            law = model.log_probs(before.tokens[row])[position].exp()
            drawn = law[state.tokens[row, position]]
            torch.testing.assert_close(state.memo.confidence[row, position], drawn, rtol=1e-5, atol=1e-6)


KERNEL = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]], dtype=torch.float64)


class Enumerated:
    """The exact denoiser of a Markov chain of 3 tokens (mask 3) and given length."""

    time_independent = True

    def __init__(self, length: int) -> None:
        self.sequences = torch.tensor(list(itertools.product(range(3), repeat=length)))
        self.law = torch.linalg.matrix_power(KERNEL, 200)[0][self.sequences[:, 0]]
        for i in range(1, length):
            self.law = self.law * KERNEL[self.sequences[:, i - 1], self.sequences[:, i]]

    def __call__(self, tokens: Tensor) -> Tensor:
        known, place = tokens.unique(dim=0, return_inverse=True)
        fits = ((known[:, None] == 3) | (known[:, None] == self.sequences)).all(-1)
        weight = fits * self.law
        each = [weight @ (self.sequences == v).double() for v in range(3)]
        return (torch.stack(each, -1) / weight.sum(1)[:, None, None]).log()[place]


class Oracle:
    """A network that knows the clean sequences: the posterior given x itself. Needs the whole batch."""

    time_independent = True

    def __init__(self, clean: Tensor) -> None:
        self.clean = clean

    def __call__(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(self.clean, 3).double().log()


def noised(clean: Tensor, masked: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return clean.masked_fill(torch.rand(clean.shape, generator=generator, dtype=torch.float64) < masked, 3)


def one_step(
    strategy: Remasking, schedule: Schedule, rows: int, k: int, oracle: bool
) -> tuple[Tensor, Tensor, float]:
    """Clean and stepped sequences, and 1 - alpha after step k of 8 from the forward law at its start."""
    length = 4
    chain = Enumerated(length)
    generator = torch.Generator().manual_seed(0)
    clean = chain.sequences[torch.multinomial(chain.law, rows, replacement=True, generator=generator)]
    model = Oracle(clean) if oracle else chain
    problem = Problem(model, (rows, length), 3, schedule, steps=8, rng=2, whole_batch=True)
    sampler = ReMDM(strategy)
    _, masked = strategy.levels(schedule, schedule.grid(8))
    state = replace(sampler.init(problem), tokens=noised(clean, float(masked[k]), 1), step=k)
    return clean, sampler.step(state).tokens, float(masked[k + 1])


KEEPING = [
    (Cap(0.2), 3),
    (Rescale(1.0), 2),
    (Rescale(0.5), 6),
    (Loop(0.1, 0.7, 0.2, 0.6), 4),
    (Loop(0.1, 0.7, 0.2, 0.6), 2),
]


@pytest.mark.parametrize("schedule", [Linear(), Cosine()])
@pytest.mark.parametrize(("strategy", "k"), KEEPING)
def test_one_step_keeps_the_forward_law_given_the_clean_sequence(strategy, k, schedule):
    """q(z_s | x): the 16 patterns of masks of 40000 rows, and never a wrong token. False alarms at 1e-9.

    Power .999 against a probability of masks that is off by .03, which is what leaving sigma out of the
    posterior would do (the next test).
    """
    rows = 40_000
    clean, tokens, masked = one_step(strategy, schedule, rows, k, oracle=True)
    assert bool(((tokens == clean) | (tokens == 3)).all())
    patterns = ((tokens == 3) * torch.tensor([1, 2, 4, 8])).sum(1)
    p = torch.tensor([masked, 1 - masked], dtype=torch.float64)
    law = torch.stack([p[[1 - (i >> j & 1) for j in range(4)]].prod() for i in range(16)])
    assert_law(patterns, law)
    off = torch.tensor([masked - 0.03, 1 - masked + 0.03], dtype=torch.float64)
    other = torch.stack([off[[1 - (i >> j & 1) for j in range(4)]].prod() for i in range(16)])
    assert rows * float(((other - law) ** 2 / law).sum()) > noncentrality(15, LEVEL / 2)


def test_the_law_test_sees_a_posterior_without_sigma():
    """`ConfidenceBased` reveals masks as if nothing were taken back: too many masks, as its page says."""
    _, tokens, masked = one_step(ConfidenceBased(), Linear(), 40_000, 4, oracle=True)
    with pytest.raises(AssertionError):
        assert_mass(int((tokens == 3).sum()), tokens.numel(), masked)


@pytest.mark.parametrize(("strategy", "k"), KEEPING)
def test_one_step_keeps_the_marginals_with_an_exact_denoiser(strategy, k):
    """Each position of 60000 rows of a Markov chain: a token by its marginal, a mask by 1 - alpha.

    False alarms at 1e-9 each; power .999 against a mask probability off by .02.
    """
    rows = 60_000
    _, tokens, masked = one_step(strategy, Linear(), rows, k, oracle=False)
    stationary = torch.linalg.matrix_power(KERNEL, 200)[0]
    law = torch.cat([(1 - masked) * stationary, torch.tensor([masked], dtype=torch.float64)])
    for position in range(4):
        assert_law(tokens[:, position], law)
    off = torch.cat([(1 - masked + 0.02) * stationary, torch.tensor([masked - 0.02], dtype=torch.float64)])
    assert rows * float(((off - law) ** 2 / law).sum()) > noncentrality(3, LEVEL / 2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_remasking_happens_and_spares_the_prompt(strategy):
    states = []
    result = run(ReMDM(strategy), steps=24, callback=states.append)
    kept = prompts() != MASK
    taken = 0
    before = prompts()
    for state in states:
        assert torch.equal(state.tokens[kept], prompts()[kept])
        taken += int(((before != MASK) & state.masked).sum())
        before = state.tokens
    assert taken > 0
    assert not bool(torch.isin(result.tokens[~kept], torch.tensor([MASK, *BANNED])).any())
    switched = []
    run(ReMDM(strategy, t_switch=0.5), steps=24, callback=switched.append)
    before = prompts()
    for state in switched[:12]:
        assert not bool(((before != MASK) & state.masked).any())
        before = state.tokens


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_remdm_rows_do_not_depend_on_the_batch(strategy):
    rows, streams = prompts(), RowStreams(SEED, 5)
    model = Random()
    whole = run(ReMDM(strategy), model, rng=streams)
    assert model.batches == [call.rows for call in whole.history]
    assert whole.row_nfe[3] == 0
    for part in (torch.tensor([2, 0]), torch.tensor([4, 3, 2, 1, 0])):
        some = run(ReMDM(strategy), prompt=rows[part], rng=streams[part])
        assert torch.equal(some.tokens, whole.tokens[part])
        assert torch.equal(some.row_nfe, whole.row_nfe[part])
    for settings in ({"cache": False}, {"whole_batch": True}):
        assert torch.equal(run(ReMDM(strategy), rng=streams, **settings).tokens, whole.tokens)
    assert run(ReMDM(strategy), cache=False).nfe == 9
    assert torch.equal(run(ReMDM(strategy), Headed()).tokens, whole.tokens)


# --- P2 -----------------------------------------------------------------------------------------------------


def plan(
    model: Random,
    row: Tensor,
    index: int,
    *,
    steps: int,
    eta: float,
    shares: Callable[[int, int], float],
    temperature: float = 1.0,
    planner: Random | None = None,
) -> Tensor:
    """P2 of one row. `shares(i, n)` is 1 - kappa after step i of n; with linear kappa floored exactly."""
    x = row.clone()
    loose = [i for i in range(LENGTH) if row[i] == MASK]
    for step in range(steps if loose else 0):
        logits = model.row(x) @ model.weight.T
        logits[:, [MASK, *BANNED]] = -math.inf
        z, masked = x.clone(), [i for i in loose if x[i] == MASK]
        for i in masked:
            streams = RowStreams(SEED, [index], step=step, positions=[i])
            z[i] = driftmax.categorical(logits[i : i + 1], temperature=temperature, rng=streams)
        log_probs = model.log_probs(x)
        judge = log_probs if planner is None else planner.log_probs(z)
        # Equation 7; its limit for eta = 0 keeps what is in place
        weight = eta if eta > 0 else 1.0
        score = {i: weight * float(log_probs[i, z[i]].exp()) for i in masked}
        score |= {i: float(judge[i, z[i]].exp()) if eta > 0 else 1.0 for i in loose if i not in masked}
        number = math.floor(len(loose) * shares(step + 1, steps) + 1e-9)
        kept = sorted(loose, key=lambda i: (-score[i], i in masked, i))[: len(loose) - number]
        for i in loose:
            x[i] = z[i] if i in kept else MASK
    return x


SHARES: list[tuple[dict[str, Any], Callable[[int, int], float]]] = [
    ({"schedule": Linear()}, lambda i, n: 1 - i / n),
    ({"schedule": LogLinear()}, lambda i, n: 0.999 * (1 - i / n) if i < n else 0.0),
    ({"kappa": lambda u: math.sin(u * math.pi / 2)}, lambda i, n: 1 - math.sin(i / n * math.pi / 2)),
]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0, 2.5])
@pytest.mark.parametrize(("settings", "shares"), SHARES, ids=["linear", "loglinear", "sine"])
def test_path_planning(settings, shares, eta, temperature):
    settings = dict(settings)
    sampler = P2(eta, settings.pop("kappa", None))
    states = []
    result = run(sampler, steps=8, temperature=temperature, callback=states.append, **settings)
    wanted = [
        plan(Random(), row, i, steps=8, eta=eta, shares=shares, temperature=temperature)
        for i, row in enumerate(prompts())
    ]
    assert torch.equal(result.tokens, torch.stack(wanted))
    back = sum(int((~a.masked & b.masked).sum()) for a, b in itertools.pairwise(states))
    assert (back > 0) == (eta > 0)
    assert result.row_nfe.tolist() == [8, 8, 8, 0, 8]
    assert result.nfe == 8


@pytest.mark.parametrize("eta", [0.0, 0.1, 1.0])
def test_path_planning_with_a_planner(eta):
    planner = Random(seed=5)
    result = run(P2(eta, planner=planner), steps=8)
    wanted = [
        plan(Random(), row, i, steps=8, eta=eta, shares=SHARES[0][1], planner=Random(seed=5))
        for i, row in enumerate(prompts())
    ]
    assert torch.equal(result.tokens, torch.stack(wanted))
    assert planner.batches == [4] * 8
    assert result.nfe == 8


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_without_weight_on_tokens_in_place_it_is_confidence(temperature):
    """12 masks in 12 steps: one a call, the most confident."""
    got = sample(
        Random(), (3, LENGTH), mask_id=MASK, sampler=P2(0.0), schedule=Linear(), steps=LENGTH, rng=1,
        temperature=temperature,
    )  # fmt: skip
    wanted = sample(Random(), (3, LENGTH), mask_id=MASK, sampler=Confidence(), rng=1, temperature=temperature)
    assert torch.equal(got.tokens, wanted.tokens)
    assert got.history == wanted.history


def test_tokens_in_place_win_ties():
    """A network that is sure of the last position first, then of everything: what was revealed stays."""

    def model(tokens: Tensor) -> Tensor:
        logits = torch.tensor([0.0, 800.0, 0.0]).repeat(*tokens.shape, 1)
        logits[(tokens == 3).all(1), :3] = 0.0
        return logits

    model.time_independent = True
    states = []
    sample(model, (1, 4), mask_id=3, sampler=P2(), schedule=Linear(), steps=4, rng=0, callback=states.append)
    wanted = [[True, True, True, False], [False, True, True, False], [False, False, True, False], [False] * 4]
    assert [state.masked[0].tolist() for state in states] == wanted


def test_p2_rows_do_not_depend_on_the_batch():
    rows, streams, sampler = prompts(), RowStreams(SEED, 5), P2(1.5)
    model = Random()
    whole = run(sampler, model, rng=streams)
    assert model.batches == [call.rows for call in whole.history] == [4] * 9
    for part in (torch.tensor([2, 0]), torch.tensor([4, 3, 2, 1, 0])):
        assert torch.equal(run(sampler, prompt=rows[part], rng=streams[part]).tokens, whole.tokens[part])
    for settings in ({"cache": False}, {"whole_batch": True}):
        full = run(sampler, rng=streams, **settings)
        assert torch.equal(full.tokens, whole.tokens)
        assert full.row_nfe.tolist() == [9] * 5
    assert torch.equal(run(sampler, Headed()).tokens, whole.tokens)


def test_a_whole_batch_with_a_head_apart():
    """No token is in place at first, and no mask at times later: calls with nothing to score."""
    for settings in ({}, {"kappa": lambda u: min(1.0, 2 * u)}):
        got, wanted = (
            run(P2(1.5, **settings), model, prompt=prompts()[[0]], whole_batch=whole)
            for model, whole in ((Headed(), True), (Random(), False))
        )
        assert torch.equal(got.tokens, wanted.tokens)


class Everywhere:
    """The same law at every position, by logits or by features and a head."""

    time_independent = True

    def __init__(self, head):
        self.logits = torch.randn(7, generator=torch.Generator().manual_seed(0))
        if head:
            self.head = self.logits[:, None], None

    def features(self, tokens):
        return torch.ones(*tokens.shape, 1)

    def __call__(self, tokens):
        return self.logits.expand(*tokens.shape, 7)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}], ids=str)
def test_a_token_drawn_and_one_in_place_tie_exactly(head, filters):
    """Both scores are the same number, not two roundings of it: a token in place stays until masks that drew
    a likelier one fill the row, on every backend.
    """
    results = []
    for backend in ("reference", "cpp"):
        model = Everywhere(head)
        with driftmax.use_backend(backend):
            states = []
            options = {"mask_id": 7, "sampler": P2(), "schedule": Linear(), "steps": 8, "rng": 0, **filters}
            sample(model, (16, 24), callback=states.append, **options)
        probability = model.logits.log_softmax(0)
        for before, after in itertools.pairwise(states):
            gone = after.masked & ~before.masked
            fresh = ~after.masked & before.masked
            for row in gone.any(1).nonzero().flatten().tolist():
                worst = probability[before.tokens[row][gone[row]]].max()
                assert probability[after.tokens[row][fresh[row]]].min() > worst
        results.append(states[-1].tokens)
    assert torch.equal(*results)


def test_eta_weighs_probabilities():
    """Positions 0 and 1 of 3 are in place at probabilities 0.9 and 0.5; the mask's draw has 0.6; one must go.

    0.6 eta passes 0.5 at eta = 0.83 and 0.9 at 1.5: then the mask is revealed in exchange. For the published
    code's powers, 0.5 ** eta against 0.6, it would be 0.74.
    """
    sure = torch.tensor([0.9, 0.5, 0.6], dtype=torch.float64)
    logits = torch.stack([sure, (1 - sure) * 0.6, (1 - sure) * 0.4], 1).log()

    def model(tokens: Tensor) -> Tensor:
        return logits.expand(len(tokens), -1, -1)

    model.time_independent = True
    for eta, masked in ((0.0, 2), (0.7, 2), (0.8, 2), (0.85, 1), (1.4, 1), (1.6, 1)):
        sampler = P2(eta, kappa=lambda u: 2 / 3 if u < 1 else 1.0)
        state = sampler.init(Problem(model, (1, 3), 3, steps=3, rng=0, temperature=0.0))
        after = sampler.step(replace(state, tokens=torch.tensor([[0, 0, 3]])))
        assert after.masked[0].nonzero().flatten().tolist() == [masked], eta


@pytest.mark.parametrize("shape", [(0, LENGTH), (2, 0), (2, LENGTH)])
@pytest.mark.parametrize("sampler", [P2(), ReMDM(Cap(0.1)), ReMDM(ConfidenceBased())])
def test_nothing_to_do(sampler, shape):
    prompt = torch.zeros(shape, dtype=torch.int64)
    result = sample(Random(), shape, mask_id=MASK, sampler=sampler, steps=3, prompt=prompt)
    assert torch.equal(result.tokens, prompt)
    assert result.nfe == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: Cap(-0.1),
        lambda: Rescale(1.1),
        lambda: Loop(t_on=0.2, t_off=0.5),
        lambda: Loop(alpha_on=1.0),
        lambda: ReMDM(Cap(0.1), t_switch=2.0),
        lambda: P2(-1.0),
        lambda: P2(math.nan),
        lambda: run(P2(kappa=lambda u: u * 0.5)),
        lambda: run(P2(kappa=lambda u: 1.0 - u)),
        lambda: run(P2(), lambda tokens, t: tokens),
        lambda: run(P2(planner=lambda tokens, t: tokens)),
        lambda: run(ReMDM(Cap(0.1)), lambda tokens, t: tokens),
        lambda: run(ReMDM(Cap(0.1)), steps=None),
        lambda: run(P2(), steps=None),
    ],
)
def test_bad_settings(make):
    with pytest.raises(ValueError, match=r"must be|need |needs "):
        make()


def test_a_strategy_is_an_object():
    with pytest.raises(TypeError, match="Remasking"):
        ReMDM("cap")
