"""Uniform-state diffusion where it can be enumerated: the law of the implemented step, propagated."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import driftmax
import pytest
import torch
from driftmax.discrete import Geometric, Linear, LogLinear, Problem, sample, uniform
from driftmax.discrete.uniform import (
    UniformAnalytic,
    UniformEuler,
    analytic_log_probabilities,
    euler_log_probabilities,
)
from torch.nn.functional import one_hot

from tests.statistics import LEVEL, assert_law, chi_square, noncentrality, total_variation

FINE = LogLinear(1e-6)  # the start is uniform to 1e-6, so that the steps' error is all there is


class UniformOracle:
    """A random law on V**L sequences, its noisy marginals and exact ratios."""

    def __init__(self, vocab=3, length=2, seed=0):
        self.vocab, self.length = vocab, length
        self.states = torch.tensor(list(itertools.product(range(vocab), repeat=length)))
        self.weight = vocab ** torch.arange(length - 1, -1, -1)
        generator = torch.Generator().manual_seed(seed)
        self.law = (1.5 * torch.randn(vocab**length, generator=generator, dtype=torch.float64)).softmax(0)
        changed = [
            (self.states + (v - self.states) * one_hot(torch.tensor(i), length)) @ self.weight
            for i, v in itertools.product(range(length), range(vocab))
        ]
        self.neighbours = torch.stack(changed, 1).view(-1, length, vocab)

    def marginal(self, noise):
        """p_t at total noise, by the forward transition position by position."""
        p, alpha = self.law.view([self.vocab] * self.length), math.exp(-noise)
        for i in range(self.length):
            p = alpha * p + (1 - alpha) * p.mean(i, keepdim=True)
        return p.flatten()

    def log_scores(self, noise):
        logs = self.marginal(noise).log()
        return logs[self.neighbours] - logs[:, None, None]

    def model(self, schedule):
        return lambda tokens, t: self.log_scores(float(schedule.sigma_bar(t[0])))[tokens @ self.weight]

    def start_state(self, sampler, schedule, steps, **options):
        problem = Problem(self.model(schedule), (1, self.length), -1, schedule, steps, rng=0, **options)
        return sampler.init(problem)

    def kernel(self, sampler, state):
        """Matrix of the step from `state`, out of the sampler's own probabilities; fixed where prompted."""
        noise = float(state.problem.schedule.sigma_bar(torch.tensor(state.memo[0][state.step])))
        law = sampler.transition(state, self.states, self.log_scores(noise)).softmax(-1)
        prompt = state.problem.prompt
        parts = []
        for i in range(self.length):
            part = law[:, i, self.states[:, i]]
            if prompt is not None and int(prompt[0, i]) != state.problem.mask_id:
                part = (self.states[:, i] == prompt[0, i]).double().expand_as(part)
            parts.append(part)
        return torch.stack(parts).prod(0)

    def output(self, sampler, schedule, steps, start=None, **options):
        """Exact law of the sampler's output."""
        state = self.start_state(sampler, schedule, steps, **options)
        p = torch.full((len(self.law),), 1 / len(self.law), dtype=torch.float64) if start is None else start
        for k in range(steps):
            p = p @ self.kernel(sampler, replace(state, step=k))
        return p


def transition(noise, vocab):
    """e**(noise Q) by the matrix exponential."""
    rate = torch.full((vocab, vocab), 1 / vocab, dtype=torch.float64) - torch.eye(vocab, dtype=torch.float64)
    return torch.matrix_exp(noise * rate)


class TestSteps:
    @pytest.mark.parametrize("noise", [1e-9, 0.3, 4.0])
    def test_analytic_is_the_formula(self, noise):
        """(e**(-noise Q) s)_y (e**(noise Q))_{xy}, with matrix exponentials."""
        oracle = UniformOracle(4, 2)
        scores, vocab = oracle.log_scores(5.0), oracle.vocab
        earlier = scores.exp() @ transition(-noise, vocab)
        wanted = earlier * transition(noise, vocab)[oracle.states]
        got = analytic_log_probabilities(scores, oracle.states, noise).softmax(-1)
        assert torch.allclose(got, wanted / wanted.sum(-1, keepdim=True), rtol=1e-9, atol=0)

    def test_analytic_takes_a_single_position_exactly(self):
        oracle, vocab = UniformOracle(5, 1), 5
        late, early = 2.0, 0.7
        joint = oracle.marginal(early)[None, :] * transition(late - early, vocab)  # [x_t, x_s]
        got = analytic_log_probabilities(oracle.log_scores(late), oracle.states, late - early).softmax(-1)
        assert torch.allclose(got[:, 0], joint / joint.sum(1, keepdim=True), rtol=1e-12, atol=0)

    def test_near_uniform_scores_keep_their_digits(self):
        """Scores 1 + delta with delta near e**-noise, at the longest noise: score - (1 - e**-noise) mean
        cancels, and would be all wrong in float32."""
        delta, noise = torch.tensor([[0.0, 3e-9, 1e-9, 5e-9]], dtype=torch.float64), 20.0
        got = analytic_log_probabilities(delta, torch.tensor([0]), noise).softmax(-1)
        wanted = delta - delta.mean() + math.exp(-noise)
        wanted = wanted.clamp(min=0) / wanted.clamp(min=0).sum()
        assert torch.allclose(got, wanted, rtol=1e-6, atol=0)

    def test_analytic_clamps_what_no_distribution_has(self):
        scores = torch.tensor([[0.0, -5.0, 2.0]], dtype=torch.float64)
        law = analytic_log_probabilities(scores, torch.tensor([0]), 1.0).softmax(-1)
        earlier = scores.exp() - (1 - math.exp(-1.0)) * scores.exp().mean()
        assert float(earlier[0, 0]) < 0
        assert float(earlier[0, 1]) < 0
        assert law.tolist() == [[0.0, 0.0, 1.0]]

    def test_euler_is_the_formula(self):
        oracle, noise = UniformOracle(4, 2), 0.2
        scores = oracle.log_scores(1.0)
        own = one_hot(oracle.states, 4).bool()
        wanted = noise / 4 * scores.exp().masked_fill(own, 0.0)
        wanted[own] = 1 - wanted.sum(-1).flatten()
        assert bool((wanted > 0).all())  # no clamp here
        assert torch.allclose(euler_log_probabilities(scores, oracle.states, noise).exp(), wanted, rtol=1e-12)

    def test_euler_clamps_the_probability_to_stay(self):
        scores = torch.tensor([[9.0, 1.0, 2.0]])
        law = euler_log_probabilities(scores, torch.tensor([0]), 3.0)
        assert law[0, 0] == -math.inf
        assert law.softmax(-1)[0, 1:].tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])

    @pytest.mark.parametrize("kernel", [euler_log_probabilities, analytic_log_probabilities])
    def test_no_noise_no_move(self, kernel):
        law = kernel(torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), 0.0).softmax(-1)
        assert bool((law == one_hot(torch.zeros(2, 3, dtype=torch.int64), 4)).all())

    @pytest.mark.parametrize("kernel", [euler_log_probabilities, analytic_log_probabilities])
    def test_the_own_entry_is_not_looked_at(self, kernel):
        scores, tokens = torch.randn(2, 3, 4), torch.randint(4, (2, 3))
        other = scores.scatter(-1, tokens.unsqueeze(-1), 7.0)
        assert bool((kernel(scores, tokens, 0.5) == kernel(other, tokens, 0.5)).all())

    @pytest.mark.parametrize("kernel", [euler_log_probabilities, analytic_log_probabilities])
    def test_impossible_tokens(self, kernel):
        scores = torch.tensor([[0.0, -math.inf, 1.0]], dtype=torch.float64)
        assert float(kernel(scores, torch.tensor([0]), 0.5).softmax(-1)[0, 1]) == 0


class TestLaw:
    """The output law, by propagation through the implemented probabilities."""

    @pytest.mark.parametrize("schedule", [FINE, Geometric()], ids=str)
    @pytest.mark.parametrize("sampler", [UniformEuler(3), UniformAnalytic(3)], ids=str)
    @pytest.mark.parametrize("length", [2, 3])
    def test_first_order(self, sampler, schedule, length):
        """Twice the steps, half the error; 2 % stray from the data's law at 64 steps is too much."""
        oracle = UniformOracle(3, length)
        errors = [total_variation(oracle.output(sampler, schedule, n), oracle.law) for n in (16, 32, 64)]
        assert errors[2] < 0.015
        for coarse, fine in itertools.pairwise(errors):
            assert 1.9 < coarse / fine < 2.2

    @pytest.mark.parametrize(
        ("sampler", "wanted"),
        [(UniformEuler(3), [0.190, 0.047, 0.0114]), (UniformAnalytic(3), [0.137, 0.036, 0.0087])],
        ids=str,
    )
    def test_the_errors_that_the_docstring_states(self, sampler, wanted):
        oracle = UniformOracle()
        errors = [total_variation(oracle.output(sampler, Geometric(), n), oracle.law) for n in (4, 16, 64)]
        assert errors == pytest.approx(wanted, abs=5e-4)

    def test_analytic_steps_have_no_error_for_one_position(self):
        oracle, schedule = UniformOracle(4, 1), LogLinear()
        start = oracle.marginal(float(schedule.sigma_bar(1.0)))
        for steps in (1, 3):
            assert (
                total_variation(oracle.output(UniformAnalytic(4), schedule, steps, start), oracle.law) < 1e-7
            )
        assert total_variation(oracle.output(UniformEuler(4), schedule, 3, start), oracle.law) > 0.005

    def test_the_uniform_start_costs_what_the_docstring_says(self):
        oracle, schedule = UniformOracle(4, 1), LogLinear(0.1)
        bias = total_variation(oracle.output(UniformAnalytic(4), schedule, 4), oracle.law)
        assert 1e-3 < bias < 0.1

    @pytest.mark.parametrize(("token", "bias"), [(0, 0.027), (1, 0.059), (2, 0.159)])
    def test_a_prompt_is_an_approximation(self, token, bias):
        """Given the first token, the law of the second is off, however fine the grid."""
        oracle = UniformOracle(3, 2)
        fits = oracle.states[:, 0] == token
        wanted = oracle.law * fits / oracle.law[fits].sum()
        laws = [
            oracle.output(UniformAnalytic(3), FINE, n, fits.double() / 3, prompt=torch.tensor([token, -1]))
            for n in (64, 128)
        ]
        assert total_variation(laws[1], wanted) == pytest.approx(bias, abs=1e-3)
        assert total_variation(*laws) < 0.1 * bias


class TestSamples:
    """Draws against the propagated law. False alarms: 1e-9 a test (see tests/statistics.py)."""

    draws, steps = 30_000, 4

    def run(self, sampler, schedule, oracle, seed=3):
        model = oracle.model(schedule)
        shape = (self.draws, oracle.length)
        result = sample(
            model, shape, mask_id=-1, sampler=sampler, schedule=schedule, steps=self.steps, rng=seed
        )
        assert result.nfe == self.steps
        assert bool((result.row_nfe == self.steps).all())
        return result.tokens @ oracle.weight

    @pytest.mark.parametrize("schedule", [LogLinear(), Geometric()], ids=str)
    @pytest.mark.parametrize("sampler", [UniformEuler(3), UniformAnalytic(3)], ids=str)
    def test_samples_follow_the_propagated_law(self, sampler, schedule):
        oracle = UniformOracle(3, 3)
        assert_law(self.run(sampler, schedule, oracle), oracle.output(sampler, schedule, self.steps))

    def test_the_two_laws_are_told_apart(self):
        """Power: Euler's and the analytic law differ by more than the test needs, and it rejects."""
        oracle = UniformOracle(3, 3)
        laws = [
            oracle.output(sampler, Geometric(), self.steps)
            for sampler in (UniformEuler(3), UniformAnalytic(3))
        ]
        shift = self.draws * float(((laws[0] - laws[1]) ** 2 / laws[1]).sum())
        assert shift > noncentrality(len(oracle.law) - 1)
        codes = self.run(UniformEuler(3), Geometric(), oracle)
        assert chi_square(torch.bincount(codes, minlength=27), laws[1])[0] < LEVEL

    def test_the_start_is_uniform(self):
        oracle = UniformOracle(5, 2)
        problem = Problem(oracle.model(FINE), (20_000, 2), -1, FINE, 4, rng=1)
        tokens = UniformAnalytic(5).init(problem).tokens
        assert_law(tokens @ oracle.weight, torch.full((25,), 1 / 25))


def rough(tokens, t):
    """Scores that depend on the whole row, row by row."""
    table = torch.sin(torch.arange(20 * 11, dtype=torch.float64)).view(20, 11)
    return 2 * torch.sin(table[tokens].cumsum(1) + 3 * t[:, None, None].double())


ANALYTIC = UniformAnalytic(11)


class TestSampling:
    shape = (7, 9)

    def run(self, sampler=ANALYTIC, shape=None, rng=5, **options):
        arguments = {"mask_id": 11, "schedule": Geometric(), "steps": 6} | options
        return sample(rough, shape or self.shape, sampler=sampler, rng=rng, **arguments)

    @pytest.mark.parametrize("sampler", [UniformEuler(11), UniformAnalytic(11)], ids=str)
    def test_split_permutation_and_parts(self, sampler, monkeypatch):
        everything = self.run(sampler).tokens
        streams = driftmax.RowStreams(5, 7)
        order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
        part = self.run(sampler, (4, 9), streams[order[:4]]).tokens
        assert bool((part == everything[order[:4]]).all())
        monkeypatch.setattr(uniform, "_ENTRIES", 200)  # two rows at a time
        assert bool((self.run(sampler).tokens == everything).all())
        assert not bool((self.run(sampler, rng=6).tokens == everything).all())

    def test_by_hand_is_by_sample(self):
        sampler = UniformEuler(11)
        state = sampler.init(Problem(rough, self.shape, 11, Geometric(), 6, rng=5))
        while not state.done:
            before = state.tokens.clone()
            after = sampler.step(state)
            assert bool((state.tokens == before).all())
            assert not bool(after.masked.any())
            state = after
        assert bool((state.tokens == self.run(sampler).tokens).all())

    def test_prompt_kept_and_banned_absent(self):
        prompt = torch.full(self.shape, 11)
        prompt[:, ::3] = 7
        result = self.run(prompt=prompt, banned=[7, 8])
        assert bool((result.tokens[:, ::3] == 7).all())
        rest = torch.cat((result.tokens[:, 1::3], result.tokens[:, 2::3]), 1)
        assert not bool(((rest == 7) | (rest == 8)).any())
        assert rest.unique().numel() == 9
        assert [call.revealed for call in result.history] == [7 * 6] * 6

    @pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
    def test_nothing_to_do(self, shape):
        assert self.run(shape=shape).tokens.shape == shape

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"steps": None}, "steps"),
            ({"mask_id": 3}, "mask"),
            ({"temperature": 0.5}, "temperature"),
            ({"top_k": 3}, "filters"),
            ({"schedule": Linear()}, "finite noise"),
            ({"banned": range(11)}, "banned"),
            ({"sampler": UniformAnalytic(10)}, "log-scores of shape"),
        ],
        ids=str,
    )
    def test_errors(self, options, match):
        with pytest.raises(ValueError, match=match):
            self.run(**options)

    def test_a_denoiser_is_not_a_score_model(self):
        def model(tokens, t=None):
            return torch.zeros(*tokens.shape, 5)

        model.time_independent = True
        with pytest.raises(ValueError, match="ScoreModel"):
            sample(model, (1, 2), mask_id=5, sampler=UniformEuler(5), steps=3)

    def test_vocabulary(self):
        with pytest.raises(ValueError, match="vocab_size"):
            UniformEuler(1)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("sampler", [UniformEuler(5), UniformAnalytic(5)], ids=str)
    def test_bad_scores_are_named(self, sampler, bad):
        with pytest.raises(driftmax.InvalidDistribution):
            sample(
                lambda tokens, t: torch.full((*tokens.shape, 5), bad),
                (2, 4),
                mask_id=-1,
                sampler=sampler,
                schedule=Geometric(),
                steps=3,
            )
