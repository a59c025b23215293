"""The samplers' laws against exact enumeration, their calls, and what must not change the tokens."""

from __future__ import annotations

import itertools
import math

import driftmax
import pytest
import torch
from driftmax.discrete import (
    Ancestral,
    Cosine,
    Euler,
    FirstHitting,
    Geometric,
    HighOrderReveal,
    Linear,
    LogLinear,
    ParallelReveal,
    Plan,
    Polynomial,
    Problem,
    sample,
)

from tests.discrete.oracle import MarkovOracle, floor, total_variation

DRAWS = 60_000
ORACLE = MarkovOracle()


def drawn(sampler, seed=0, draws=DRAWS, **options):
    model = ORACLE.model()
    return sample(model, (draws, ORACLE.length), mask_id=ORACLE.mask_id, sampler=sampler, rng=seed, **options)


def distance(law, sampler, **options):
    """(total variation from `law`, the level that exact draws stay below)."""
    result = drawn(sampler, **options)
    return total_variation(ORACLE.histogram(result.tokens), law), floor(law, DRAWS)


class TestLaws:
    """Every sampler against its own law by enumeration. A shift of 3 % of the mass is far above the floor."""

    @pytest.mark.parametrize("sampler", [Plan(), FirstHitting(), ParallelReveal(1)], ids=str)
    def test_exact_samplers(self, sampler):
        got, level = distance(ORACLE.law, sampler)
        assert got < level

    @pytest.mark.parametrize("steps", [1, 2, 5])
    @pytest.mark.parametrize("schedule", [Linear(), Cosine(), Geometric(), Polynomial(2.0)], ids=str)
    def test_plan_on_a_grid_is_ancestral_sampling(self, steps, schedule):
        times = schedule.grid(steps)
        probabilities = schedule.unmask_probability(times[1:], times[:-1]).tolist()
        law = ORACLE.grid_law([*probabilities[:-1], 1.0])
        for sampler in (Plan(), Ancestral()):
            got, level = distance(law, sampler, steps=steps, schedule=schedule)
            assert got < level, sampler

    def test_euler(self):
        steps, schedule = 4, Cosine()
        times = schedule.grid(steps)
        start = times[:-1]
        rate = schedule.sigma(start) * schedule.alpha(start) / (1 - schedule.alpha(start))
        rate[0] = schedule.masked_rate(1.0)  # sigma alpha where alpha is 0
        probabilities = ((start - times[1:]) * rate).clamp(0, 1).tolist()
        law = ORACLE.grid_law([*probabilities[:-1], 1.0])
        got, level = distance(law, Euler(), steps=steps, schedule=schedule)
        assert got < level
        ancestral, _ = distance(law, Ancestral(), steps=steps, schedule=schedule)
        assert ancestral > level  # the two differ, and the test sees it

    @pytest.mark.parametrize("k", [2, 3, 6])
    def test_parallel_reveal_has_the_bias_it_says(self, k):
        law = ORACLE.parallel_law(k)
        got, level = distance(law, ParallelReveal(k))
        assert got < level
        bias = total_variation(law, ORACLE.law)
        assert bias > 4 * level
        biased, _ = distance(ORACLE.law, ParallelReveal(k))
        assert biased == pytest.approx(bias, abs=level)

    @pytest.mark.parametrize("method", ["correct", "extrapolate"])
    @pytest.mark.parametrize("k", [2, 3])
    def test_high_order_reveal_has_its_law_and_less_bias(self, k, method):
        law = ORACLE.high_order_law(k, method)
        assert law.sum() == pytest.approx(1)
        got, level = distance(law, HighOrderReveal(k, method))
        assert got < level
        bias, plain = (total_variation(one, ORACLE.law) for one in (law, ORACLE.parallel_law(k)))
        assert level < plain - bias

    @pytest.mark.parametrize("method", ["correct", "extrapolate"])
    def test_high_order_reveal_of_one_is_exact(self, method):
        got, level = distance(ORACLE.law, HighOrderReveal(1, method))
        assert got < level

    def test_prompts_condition(self):
        prompt = torch.tensor([3, 0, 3, 3, 2, 3])
        fits = (ORACLE.sequences[:, 1] == 0) & (ORACLE.sequences[:, 4] == 2)
        law = ORACLE.law * fits
        law /= law.sum()
        for sampler in (Plan(), FirstHitting()):
            got, level = distance(law, sampler, prompt=prompt)
            assert got < level

    def test_the_enumeration_is_a_law(self):
        assert ORACLE.law.sum() == pytest.approx(1)
        assert ORACLE.parallel_law(1) == pytest.approx(ORACLE.law, abs=1e-12)
        fine = ORACLE.grid_law([1 / (64 - k) for k in range(64)])
        assert total_variation(fine, ORACLE.law) < 0.02


class TestHittingTimes:
    def test_first_time_is_the_largest_of_uniforms(self):
        """masked(tau_1)**L is uniform: Kolmogorov-Smirnov at a false alarm of 1e-6."""
        from scipy.stats import kstest

        seen = []

        def model(tokens, t):
            seen.append(t)
            return torch.zeros(*tokens.shape, 2)

        length, schedule = 5, Cosine()
        sample(model, (4000, length), mask_id=2, sampler=FirstHitting(), schedule=schedule, rng=3)
        first, last = schedule.masked(seen[0]).numpy(), schedule.masked(seen[-1]).numpy()
        assert seen[0].dtype == torch.float32
        assert kstest(first**length, "uniform").pvalue > 1e-6
        assert kstest(1 - (1 - last) ** length, "uniform").pvalue > 1e-6  # the smallest
        assert all(bool((a >= b).all()) for a, b in itertools.pairwise(seen))


class TestCalls:
    @pytest.mark.parametrize("sampler", [Plan(), Ancestral()], ids=str)
    def test_expected_calls_of_a_row(self, sampler):
        """Mean of 2000 rows within 5 standard errors."""
        steps, length, rows = 24, 32, 2000
        result = sample(
            Constant(3), (rows, length), mask_id=3, sampler=sampler, schedule=Linear(), steps=steps, rng=1
        )
        calls = result.row_nfe.double()
        wanted = steps * (1 - (1 - 1 / steps) ** length)
        assert float(calls.mean()) == pytest.approx(wanted, abs=5 * float(calls.std()) / math.sqrt(rows))
        assert result.nfe == len(result.history) <= steps
        assert sum(call.revealed for call in result.history) == rows * length

    def test_own_clocks_make_as_many_calls_as_the_busiest_row(self):
        result = sample(Constant(3), (16, 64), mask_id=3, sampler=Plan(), steps=1024, rng=0)
        assert result.nfe == int(result.row_nfe.max()) <= 64
        lockstep = sample(Constant(3), (16, 64), mask_id=3, sampler=Ancestral(), steps=1024, rng=0)
        assert lockstep.nfe > 4 * result.nfe
        assert [call.rows for call in result.history] == sorted(
            (c.rows for c in result.history), reverse=True
        )

    def test_without_a_cache_every_step_calls(self):
        for sampler in (Plan(), Ancestral()):
            result = sample(Constant(3), (2, 4), mask_id=3, sampler=sampler, steps=50, rng=0, cache=False)
            assert result.nfe == 50
            assert result.row_nfe.tolist() == [50, 50]

    def test_one_call_a_mask(self):
        prompt = torch.tensor([[0, 3, 3, 1], [3, 1, 1, 1]])
        result = sample(Constant(3), (2, 4), mask_id=3, sampler=FirstHitting(), prompt=prompt, rng=0)
        assert result.nfe == 2
        assert result.row_nfe.tolist() == [2, 1]

    def test_nothing_to_fill(self):
        prompt = torch.zeros(2, 4, dtype=torch.int64)
        for sampler in (Plan(), FirstHitting()):
            result = sample(Constant(3), (2, 4), mask_id=3, sampler=sampler, prompt=prompt)
            assert result.nfe == 0
            assert bool((result.tokens == prompt).all())


class Constant:
    """The same law everywhere."""

    time_independent = True

    def __init__(self, vocab):
        self.vocab = vocab

    def __call__(self, tokens, t=None):
        return torch.zeros(*tokens.shape, self.vocab)


class Coupled:
    """Logits that depend on the whole row, computed row by row: no batch can change their bits."""

    time_independent = True

    def __init__(self, vocab=50, width=64):
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(vocab + 1, width, generator=generator, dtype=torch.float64)
        # Multiples of 1/8: products are exact in any order, with the head as without it.
        self.head = ((torch.randn(vocab, width, generator=generator) * 2).round() / 8, None)

    def features(self, tokens):
        # To multiples of 1/8 as well
        return ((self.table[tokens].cumsum(1).sin() * 8).round() / 8).float()

    def __call__(self, tokens, t=None):
        return self.features(tokens) @ self.head[0].T


class Plain(Coupled):
    """The same network without an exposed head."""

    features = None

    def __call__(self, tokens, t=None):
        return Coupled.features(self, tokens) @ self.head[0].T


SAMPLERS = {
    "plan": (Plan(), None),
    "plan on a grid": (Plan(), 12),
    "first-hitting": (FirstHitting(), None),
    "parallel": (ParallelReveal(3), None),
    "high order": (HighOrderReveal(3), None),
    "ancestral": (Ancestral(), 12),
    "euler": (Euler(), 12),
}


@pytest.mark.parametrize("name", SAMPLERS)
class TestInvariance:
    """The same tokens, bitwise, whatever is known not to matter."""

    shape = (9, 20)

    def run(self, name, model=None, shape=None, rng=5, **options):
        sampler, steps = SAMPLERS[name]
        shape = shape or self.shape
        return sample(
            model or Coupled(),
            shape,
            mask_id=50,
            sampler=sampler,
            schedule=Cosine(),
            steps=steps,
            rng=rng,
            **options,
        )

    def test_cache(self, name):
        with_, without = self.run(name), self.run(name, cache=False)
        assert bool((with_.tokens == without.tokens).all())
        assert int(with_.row_nfe.sum()) <= int(without.row_nfe.sum())

    def test_whole_batch(self, name):
        assert bool((self.run(name).tokens == self.run(name, whole_batch=True).tokens).all())

    def test_head_or_logits(self, name):
        assert bool((self.run(name).tokens == self.run(name, Plain()).tokens).all())

    def test_split_and_permutation(self, name):
        everything = self.run(name).tokens
        streams = driftmax.RowStreams(5, 9)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
        for rows in (order, order[:4], torch.tensor([8])):
            part = self.run(name, shape=(len(rows), 20), rng=streams[rows])
            assert bool((part.tokens == everything[rows]).all())

    def test_rows_own_seeds(self, name):
        streams = driftmax.RowStreams(torch.tensor([5, 7, 5]), torch.tensor([0, 0, 1]))
        tokens = self.run(name, shape=(3, 20), rng=streams).tokens
        assert bool((tokens[[0, 2]] == self.run(name).tokens[:2]).all())
        assert bool((tokens[1] == self.run(name, rng=7).tokens[0]).all())

    def test_prompt_kept_and_banned_absent(self, name):
        prompt = torch.full(self.shape, 50)
        prompt[:, ::3] = 7
        tokens = self.run(name, prompt=prompt, banned=[7, 8]).tokens
        assert bool((tokens[:, ::3] == 7).all())
        rest = torch.cat((tokens[:, 1::3], tokens[:, 2::3]), 1)
        assert not bool(((rest == 7) | (rest == 8) | (rest == 50)).any())

    def test_seeds_differ(self, name):
        assert not bool((self.run(name).tokens == self.run(name, rng=6).tokens).all())

    def test_by_hand_is_by_sample(self, name):
        sampler, steps = SAMPLERS[name]
        state = sampler.init(Problem(Coupled(), self.shape, 50, Cosine(), steps, rng=5))
        while not state.done:
            before = state.tokens.clone()
            after = sampler.step(state)
            assert bool((state.tokens == before).all())  # a state is a value
            state = after
        assert bool((state.tokens == self.run(name).tokens).all())

    def test_filters_reach_the_draw(self, name):
        greedy = self.run(name, temperature=0.0).tokens
        assert bool((greedy == self.run(name, top_k=1, rng=5).tokens).all())

    def test_callback_and_progress(self, name, capsys):
        seen = []
        result = self.run(name, callback=lambda state: seen.append(int(state.masked.sum())), progress=True)
        assert seen[-1] == 0
        assert seen == sorted(seen, reverse=True)
        assert len(seen) >= result.nfe
        assert "step" in capsys.readouterr().err


class TestLengths:
    """Rows that end before the others."""

    def run(self, sampler, steps=None, **options):
        return sample(
            Coupled(),
            (4, 10),
            mask_id=50,
            sampler=sampler,
            steps=steps,
            rng=3,
            lengths=[10, 4, 0, 7],
            **options,
        )

    @pytest.mark.parametrize("name", SAMPLERS)
    def test_the_end_is_padding_and_costs_no_calls(self, name):
        sampler, steps = SAMPLERS[name]
        result = self.run(sampler, steps, pad_id=49, banned=[49])
        kept = torch.arange(10) >= torch.tensor([10, 4, 0, 7])[:, None]
        assert torch.equal(result.tokens == 49, kept)
        assert result.row_nfe[2] == 0
        prompt = torch.full((4, 10), 50).masked_fill(kept, 49)
        again = sample(
            Coupled(), (4, 10), mask_id=50, sampler=sampler, steps=steps, rng=3, prompt=prompt, banned=[49]
        )
        assert torch.equal(again.tokens, result.tokens)

    def test_padding_overrides_the_prompt(self):
        prompt = torch.full((10,), 7)
        prompt[2] = 50
        tokens = self.run(Plan(), pad_id=49, prompt=prompt).tokens
        assert tokens[1, 4:].tolist() == [49] * 6
        assert tokens[1, [0, 1, 3]].tolist() == [7] * 3

    def test_errors(self):
        with pytest.raises(ValueError, match="needs pad_id"):
            self.run(Plan())
        with pytest.raises(ValueError, match="needs pad_id"):
            self.run(Plan(), pad_id=50)
        with pytest.raises(ValueError, match="goes with lengths"):
            sample(Coupled(), (4, 10), mask_id=50, pad_id=3)
        for lengths in ([1, 2, 3], [1.0, 2.0, 3.0, 4.0], [0, 1, 2, 11], [-1, 0, 0, 0]):
            with pytest.raises(ValueError, match="lengths must be"):
                sample(Coupled(), (4, 10), mask_id=50, lengths=lengths, pad_id=49)


class TestWholeBatch:
    def test_products_of_one_shape(self, monkeypatch):
        """The head's products have the same number of rows in every call, with or without a cache."""
        from driftmax.discrete import reveal

        sizes = set()
        plain = reveal.lm_head_categorical

        def watched(hidden, *arguments, **options):
            sizes.add(hidden.shape[0])
            return plain(hidden, *arguments, **options)

        monkeypatch.setattr(reveal, "lm_head_categorical", watched)
        tokens = []
        for cache in (True, False):
            options = {"steps": 3, "rng": 1, "whole_batch": True, "cache": cache}
            tokens.append(sample(Coupled(), (9, 30), mask_id=50, **options).tokens)
        assert sizes == {64}
        assert bool((tokens[0] == tokens[1]).all())
        assert bool((tokens[0] == sample(Coupled(), (9, 30), mask_id=50, steps=3, rng=1).tokens).all())


class TestMaskColumn:
    def test_mask_inside_the_vocabulary_is_never_drawn(self):
        def model(tokens, t=None):
            logits = torch.zeros(*tokens.shape, 5)
            logits[..., 2] = 50.0
            return logits

        model.time_independent = True
        tokens = sample(model, (50, 8), mask_id=2, rng=0).tokens
        assert not bool((tokens == 2).any())

    def test_head_with_a_bias(self):
        model = Coupled()
        weight, _ = model.head
        model.head = (weight, torch.full((50,), -3.0))
        assert bool((sample(model, (4, 8), mask_id=3, rng=0).tokens != 3).all())


class TestErrors:
    def time_dependent(self, tokens, t):
        return torch.zeros(*tokens.shape, 3)

    def test_cache_needs_time_independence(self):
        with pytest.raises(ValueError, match="time_independent"):
            sample(self.time_dependent, (1, 2), mask_id=3, sampler=Ancestral(), steps=2)
        with pytest.raises(ValueError, match="time_independent"):
            sample(self.time_dependent, (1, 2), mask_id=3)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"sampler": Ancestral()}, "steps"),
            ({"steps": 0}, "steps"),
            ({"rng": driftmax.RowStreams(0, 3)}, "rows"),
            ({"rng": driftmax.RowStreams(0, 2, step=1)}, "steps"),
            ({"prompt": torch.zeros(5, dtype=torch.int64)}, "prompt"),
        ],
    )
    def test_values(self, options, match):
        with pytest.raises(ValueError, match=match):
            sample(Constant(3), (2, 4), mask_id=3, **options)

    def test_types(self):
        with pytest.raises(TypeError, match="prompt"):
            sample(Constant(3), (2, 4), mask_id=3, prompt=torch.zeros(2, 4))
        with pytest.raises(TypeError, match="callable"):
            sample(3, (2, 4), mask_id=3)

    def test_logits_of_a_wrong_shape(self):
        def model(tokens, t=None):
            return torch.zeros(tokens.shape[0], 3)

        model.time_independent = True
        with pytest.raises(ValueError, match="logits of shape"):
            sample(model, (2, 4), mask_id=3)

    def test_bad_logits_are_named(self):
        def model(tokens, t=None):
            return torch.full((*tokens.shape, 3), torch.nan)

        model.time_independent = True
        with pytest.raises(driftmax.InvalidDistribution):
            sample(model, (2, 4), mask_id=3)

    def test_no_k(self):
        with pytest.raises(ValueError, match="k must"):
            ParallelReveal(0)
        with pytest.raises(ValueError, match="k must be"):
            HighOrderReveal(0)
        with pytest.raises(ValueError, match="method must be"):
            HighOrderReveal(2, "guess")


def test_a_generator_supplies_the_seed():
    one, two = (torch.Generator().manual_seed(3) for _ in range(2))
    first = sample(Constant(9), (3, 5), mask_id=9, rng=one).tokens
    assert bool((first == sample(Constant(9), (3, 5), mask_id=9, rng=two).tokens).all())
    assert not bool((first == sample(Constant(9), (3, 5), mask_id=9, rng=one).tokens).all())


def test_loglinear_and_linear_grids_bin_alike():
    """The grid's shares of masked mass are the same, since eps cancels."""
    a = sample(Coupled(), (3, 20), mask_id=50, schedule=LogLinear(), steps=7, rng=0)
    b = sample(Coupled(), (3, 20), mask_id=50, schedule=Linear(), steps=7, rng=0)
    assert bool((a.tokens == b.tokens).all())
