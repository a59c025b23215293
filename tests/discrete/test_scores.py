"""Concrete scores against enumeration of the noisy marginals of a Markov chain."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from driftmax.discrete import (
    Ancestral,
    Denoiser,
    FirstHitting,
    Geometric,
    Linear,
    LogLinear,
    Problem,
    sample,
)
from driftmax.discrete.scores import (
    NoiseConditioned,
    ScoreDenoiser,
    ScoreModel,
    absorbing_log_scores,
    denoiser_logits,
    uniform_log_scores,
)
from driftmax.discrete.uniform import UniformAnalytic, analytic_log_probabilities

from tests.discrete.oracle import MarkovOracle, floor, total_variation

ORACLE = MarkovOracle(vocab=3, length=4)
LAW = torch.from_numpy(ORACLE.law)
STATES = torch.from_numpy(ORACLE.sequences)
PARTIAL = torch.from_numpy(ORACLE.partial)
DENOISER = torch.from_numpy(ORACLE.conditionals)  # [codes, L, V]


def absorbing_marginal(noise):
    """p_t of every partly masked sequence: sum over x0 of p(x0) times alpha and 1 - alpha per position."""
    alpha = math.exp(-noise)
    masked = (ORACLE.mask_id == PARTIAL)[:, None]
    same = PARTIAL[:, None] == STATES[None]
    factor = torch.where(masked, 1 - alpha, alpha * same.double())
    return factor.double().prod(-1) @ LAW


def absorbing_ratios(noise):
    """p_t(x, x_i = v) / p_t(x) at masked positions; NaN elsewhere. [codes, L, V]."""
    p, ratios = absorbing_marginal(noise), torch.full_like(DENOISER, math.nan)
    for i, v in itertools.product(range(ORACLE.length), range(ORACLE.vocab)):
        masked = PARTIAL[:, i] == ORACLE.mask_id
        other = PARTIAL[masked].clone()
        other[:, i] = v
        ratios[masked, i, v] = p[ORACLE.code(other)] / p[masked]
    return ratios


MASKED = (ORACLE.mask_id == PARTIAL)[..., None].expand_as(DENOISER)


class TestAbsorbing:
    @pytest.mark.parametrize("noise", [1e-6, 0.1, 1.0, 6.9, 40.0])
    def test_scores_are_ratios_of_marginals(self, noise):
        got = absorbing_log_scores(DENOISER.log(), noise)
        assert torch.allclose(got[MASKED].exp(), absorbing_ratios(noise)[MASKED], rtol=1e-9, atol=0)

    @pytest.mark.parametrize("noise", [1e-6, 0.1, 1.0, 6.9, 40.0])
    def test_back_from_ratios(self, noise):
        got = denoiser_logits(absorbing_ratios(noise).log(), noise)
        assert torch.allclose(got[MASKED].exp(), DENOISER[MASKED], rtol=1e-9, atol=0)

    def test_the_test_sees_a_wrong_factor(self):
        """alpha for alpha / (1 - alpha), as in another convention, is far off."""
        wrong = DENOISER.log() - 1.0
        assert not torch.allclose(wrong[MASKED].exp(), absorbing_ratios(1.0)[MASKED], rtol=0.1)

    def test_noise_per_row(self):
        logits, noise = torch.randn(2, 3, 5), torch.tensor([0.5, 3.0])
        got = absorbing_log_scores(logits, noise)
        for row in range(2):
            assert torch.equal(got[row], absorbing_log_scores(logits[row], float(noise[row])))
        assert torch.allclose(denoiser_logits(got, noise), logits.log_softmax(-1), atol=1e-6)

    @pytest.mark.parametrize("noise", [1e-12, 700.0, 1e5])
    def test_extreme_noise_stays_finite(self, noise):
        logits = torch.randn(1, 2, 5)
        scores = absorbing_log_scores(logits.double(), noise)
        assert bool(torch.isfinite(scores).all())
        assert torch.allclose(denoiser_logits(scores, noise), logits.double().log_softmax(-1), atol=1e-9)

    def test_the_missing_mass_of_a_network_is_kept(self):
        scores = absorbing_log_scores(torch.zeros(1, 1, 4), 2.0) + math.log(0.9)
        assert float(denoiser_logits(scores, 2.0).logsumexp(-1)) == pytest.approx(math.log(0.9), abs=1e-6)


class TestUniform:
    """Scores from the law of x0_i given all of the noisy sequence, by enumeration of both."""

    @staticmethod
    def enumerate(noise):
        """(posterior [states, L, V], ratios [states, L, V]) of uniform noise on the chain's law."""
        vocab, length, alpha = ORACLE.vocab, ORACLE.length, math.exp(-noise)
        same = (STATES[:, None] == STATES[None]).double()  # [x0, x, L]
        joint = LAW[:, None] * (alpha * same + (1 - alpha) / vocab).prod(-1)
        p = joint.sum(0)
        posterior = torch.zeros(len(LAW), length, vocab, dtype=torch.float64)
        ratios = torch.zeros_like(posterior)
        weight = vocab ** torch.arange(length - 1, -1, -1)
        for i, v in itertools.product(range(length), range(vocab)):
            posterior[:, i, v] = joint[STATES[:, i] == v].sum(0) / p
            other = STATES.clone()
            other[:, i] = v
            ratios[:, i, v] = p[other @ weight] / p
        return posterior, ratios

    @pytest.mark.parametrize("noise", [1e-3, 0.3, 2.0, 15.0])
    def test_scores_are_ratios_of_marginals(self, noise):
        posterior, ratios = self.enumerate(noise)
        got = uniform_log_scores(posterior.log(), STATES, noise)
        assert torch.allclose(got.exp(), ratios, rtol=1e-9, atol=0)

    @pytest.mark.parametrize("noise", [0.3, 2.0])
    def test_removing_all_noise_is_the_way_back(self, noise):
        posterior, ratios = self.enumerate(noise)
        got = analytic_log_probabilities(ratios.log(), STATES, noise).softmax(-1)
        assert torch.allclose(got, posterior, rtol=1e-9, atol=1e-15)


class Network:
    """An exact score-entropy network of absorbing noise: a column for the mask, conditioned on the noise."""

    def __init__(self, factor=1.0):
        self.factor, self.noises = factor, []

    def __call__(self, tokens, sigma_bar):
        self.noises.append(sigma_bar)
        noise = sigma_bar.double()[:, None, None]
        ratio = self.factor * DENOISER[ORACLE.code(tokens)] * torch.exp(-noise) / -torch.expm1(-noise)
        return torch.cat((ratio, torch.ones_like(ratio[..., :1])), -1).log()


class TestAdaptors:
    draws = 10_000

    def run(self, model, sampler, schedule, **options):
        shape = (self.draws, ORACLE.length)
        return sample(
            model,
            shape,
            mask_id=ORACLE.mask_id,
            sampler=sampler,
            schedule=schedule,
            rng=2,
            cache=False,
            **options,
        )

    @pytest.mark.parametrize("schedule", [LogLinear(), Geometric()], ids=str)
    @pytest.mark.parametrize("factor", [1.0, 0.7])
    def test_a_score_network_samples_the_chain(self, schedule, factor):
        """Also if its scores do not sum as they should. False alarms: see `floor`."""
        network = Network(factor)
        model = ScoreDenoiser(NoiseConditioned(network, schedule), schedule)
        assert isinstance(model, Denoiser)
        tokens = self.run(model, FirstHitting(), schedule).tokens
        assert total_variation(ORACLE.histogram(tokens), ORACLE.law) < floor(ORACLE.law, self.draws)
        assert len(network.noises) == ORACLE.length
        assert all(noise.dtype == torch.float32 for noise in network.noises)

    def test_the_tokens_are_those_of_the_denoiser(self):
        schedule = LogLinear()
        model = ScoreDenoiser(NoiseConditioned(Network(), schedule), schedule)
        scores = self.run(model, Ancestral(), schedule, steps=5).tokens
        direct = self.run(ORACLE.model(False), Ancestral(), schedule, steps=5).tokens
        assert bool((scores == direct).all())

    def test_the_network_gets_the_schedules_noise(self):
        network, schedule = Network(), Geometric()
        self.run(ScoreDenoiser(NoiseConditioned(network, schedule), schedule), Ancestral(), schedule, steps=4)
        seen = [float(noise[0]) for noise in network.noises]
        assert seen == pytest.approx(schedule.sigma_bar(schedule.grid(4)[:-1]).tolist(), rel=1e-5)

    def test_a_uniform_denoiser_draws_what_its_scores_draw(self):
        """A network that predicts clean tokens under uniform noise, and the exact ratios: the same tokens."""
        schedule = LogLinear()
        weight = ORACLE.vocab ** torch.arange(ORACLE.length - 1, -1, -1)

        def by_posterior(tokens, t):
            noise = float(schedule.sigma_bar(t[0]))
            posterior, _ = TestUniform.enumerate(noise)
            return uniform_log_scores(posterior.log()[tokens @ weight], tokens, noise)

        def by_ratios(tokens, t):
            return TestUniform.enumerate(float(schedule.sigma_bar(t[0])))[1].log()[tokens @ weight]

        sampler, shape = UniformAnalytic(ORACLE.vocab), (2000, ORACLE.length)
        one, two = (
            sample(model, shape, mask_id=-1, sampler=sampler, schedule=schedule, steps=4, rng=2).tokens
            for model in (by_posterior, by_ratios)
        )
        assert bool((one == two).all())

    def test_parameters_tell_the_device(self):
        head = torch.nn.Linear(2, 2)
        model = ScoreDenoiser(NoiseConditioned(head, LogLinear()), LogLinear())
        assert list(model.parameters()) == list(head.parameters())
        assert isinstance(model.scores, ScoreModel)
        assert Problem(model, (1, 2), 3).device == torch.device("cpu")
        assert list(ScoreDenoiser(Network(), LogLinear()).parameters()) == []

    def test_errors(self):
        with pytest.raises(ValueError, match="infinite noise"):
            ScoreDenoiser(Network(), Linear())
        with pytest.raises(ValueError, match="needs the time"):
            ScoreDenoiser(Network(), LogLinear())(torch.zeros(1, 4, dtype=torch.int64))
