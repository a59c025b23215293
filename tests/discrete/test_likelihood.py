"""The AO-ARM bound on Markov chains, whose exact denoiser reaches the true entropy; its standard error."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from driftmax import RowStreams
from driftmax.discrete.likelihood import LikelihoodBound, exact_nll_bound, nll_bound
from torch import Tensor

V, MASK = 3, 3
KERNEL = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]], dtype=torch.float64)


def stationary() -> Tensor:
    return torch.linalg.matrix_power(KERNEL, 200)[0]


def entropy(law: Tensor) -> Tensor:
    return -(law * law.log()).sum(-1)


RATE = float(stationary() @ entropy(KERNEL))  # entropy rate of the chain, nats per token


def joint(length: int) -> tuple[Tensor, Tensor]:
    """All sequences [V^L, L] and their probabilities."""
    sequences = torch.tensor(list(itertools.product(range(V), repeat=length)))
    law = stationary()[sequences[:, 0]]
    for i in range(1, length):
        law = law * KERNEL[sequences[:, i - 1], sequences[:, i]]
    return sequences, law


class Enumerated:
    """The exact denoiser of a joint table: conditionals by summing over all sequences that fit."""

    time_independent = True

    def __init__(self, length: int) -> None:
        self.sequences, self.law = joint(length)

    def __call__(self, tokens: Tensor) -> Tensor:
        fits = ((tokens[:, None] == MASK) | (tokens[:, None] == self.sequences)).all(-1)
        weight = fits * self.law
        each = [(weight @ (self.sequences == v).double()) for v in range(V)]
        return (torch.stack(each, -1) / weight.sum(1)[:, None, None]).log()


class Chain:
    """The exact denoiser of a long chain: a masked token depends on its nearest known neighbours only."""

    time_independent = True

    def __call__(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        powers = torch.stack([torch.linalg.matrix_power(KERNEL, d) for d in range(length + 1)])
        place = torch.arange(length).expand(batch, -1)
        known = tokens != MASK
        left = torch.where(known, place, -1).cummax(1).values.roll(1, 1)
        left[:, 0] = -1
        right = torch.where(known, place, length).flip(1).cummin(1).values.flip(1).roll(-1, 1)
        right[:, -1] = length
        padded = tokens.clamp(max=V - 1)
        before = powers[place - left.clamp(min=0), padded.gather(1, left.clamp(min=0))]
        before = torch.where((left >= 0)[..., None], before, stationary())
        after = powers[right.clamp(max=length - 1) - place, :, padded.gather(1, right.clamp(max=length - 1))]
        after = torch.where((right < length)[..., None], after, 1.0)
        return (before * after).log()


def chains(rows: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.empty(rows, length, dtype=torch.int64)
    law = stationary().expand(rows, -1)
    for i in range(length):
        tokens[:, i] = torch.multinomial(law, 1, generator=generator)[:, 0]
        law = KERNEL[tokens[:, i]]
    return tokens


def test_exact_bound_of_a_consistent_model_is_the_nll() -> None:
    model = Enumerated(5)
    bound = exact_nll_bound(model, model.sequences, mask_id=MASK, batch_size=7)
    torch.testing.assert_close(bound.nats, -model.law.log(), rtol=1e-12, atol=0)
    assert bound.evaluations == 3**5 * 31
    assert bool((bound.standard_error == 0).all())


def test_exact_bound_reaches_the_entropy_rate() -> None:
    """The mean bound is the entropy H_L of L tokens, and H_L − H_{L−1} is the chain's entropy rate."""
    means = []
    for length in (4, 5):
        model = Enumerated(length)
        bound = exact_nll_bound(model, model.sequences, mask_id=MASK)
        means.append(float(model.law @ bound.nats))
        assert means[-1] == pytest.approx(float(entropy(stationary())) + (length - 1) * RATE, rel=1e-12)
    assert means[1] - means[0] == pytest.approx(RATE, rel=1e-10)


def test_exact_bound_of_a_wrong_model_is_above_the_nll() -> None:
    model = Enumerated(4)
    bound = exact_nll_bound(lambda x: 0.5 * model(x), model.sequences, mask_id=MASK)
    assert float(model.law @ bound.nats) > float(-model.law @ model.law.log()) + 0.05


def test_long_chain_reaches_the_entropy_rate() -> None:
    """300 chains of 48 tokens: the mean within 5 standard errors (false alarms 6e-7), and these below 2 %."""
    length = 48
    tokens = chains(300, length, seed=0)
    bits, error = nll_bound(Chain(), tokens, mask_id=MASK, samples=8, rng=1).bits_per_token()
    wanted = (float(entropy(stationary())) + (length - 1) * RATE) / length / math.log(2)
    assert error < 0.02 * wanted
    assert abs(bits - wanted) < 5 * error


def test_the_two_exact_denoisers_agree() -> None:
    tokens = chains(40, 5, seed=3)
    tokens = tokens.masked_fill(torch.rand(40, 5, generator=torch.Generator().manual_seed(0)) < 0.5, MASK)
    masked = tokens == MASK
    laws = [model(tokens)[masked].softmax(-1) for model in (Enumerated(5), Chain())]
    torch.testing.assert_close(*laws)


def test_monte_carlo_is_unbiased_and_knows_its_error() -> None:
    """2000 estimates of one bound: their mean within 6 errors, and the root mean square of the stated errors
    within a quarter of the spread (the ratio's own deviation is about 5 %).
    """
    model = Enumerated(5)

    def flat(tokens: Tensor) -> Tensor:
        return 0.3 * model(tokens) + torch.arange(V) * 0.2

    clean = torch.tensor([[0, 2, 1, 1, 0]])
    exact = float(exact_nll_bound(flat, clean, mask_id=MASK).nats)
    bound = nll_bound(flat, clean.expand(2000, -1), mask_id=MASK, samples=6, rng=0, batch_size=4096)
    spread = float(bound.nats.std())
    assert spread > 0
    assert abs(float(bound.nats.mean()) - exact) < 6 * spread / math.sqrt(2000)
    stated = math.sqrt(float(bound.standard_error.square().mean()))
    assert abs(stated / spread - 1) < 0.25


def test_rows_and_calls_can_be_split_at_will() -> None:
    tokens, streams = chains(6, 5, seed=1), RowStreams(4, 6)
    model = Enumerated(5)
    whole = nll_bound(model, tokens, mask_id=MASK, samples=4, rng=streams, batch_size=1000)
    parts = nll_bound(model, tokens[2:5], mask_id=MASK, samples=4, rng=streams[2:5], batch_size=5)
    torch.testing.assert_close(whole.nats[2:5], parts.nats, rtol=1e-12, atol=0)
    assert whole.evaluations == 24


def test_more_samples_more_certainty() -> None:
    tokens = chains(50, 5, seed=2)
    errors = [
        float(nll_bound(Enumerated(5), tokens, mask_id=MASK, samples=n, rng=0).standard_error.mean())
        for n in (4, 64)
    ]
    assert errors[1] < errors[0] / 3


def test_one_sequence_has_no_error_between_sequences() -> None:
    bits, error = LikelihoodBound(torch.ones(1), torch.zeros(1), 2, 1).bits_per_token()
    assert bits == pytest.approx(0.5 / math.log(2))
    assert math.isnan(error)


@pytest.mark.parametrize("samples", [0, 1, 5])
def test_samples_come_in_pairs(samples: int) -> None:
    with pytest.raises(ValueError, match="even"):
        nll_bound(Enumerated(2), torch.zeros(1, 2, dtype=torch.int64), mask_id=MASK, samples=samples)


def test_limits() -> None:
    with pytest.raises(ValueError, match="above 20"):
        exact_nll_bound(Enumerated(2), torch.zeros(1, 21, dtype=torch.int64), mask_id=MASK)
    for function in (exact_nll_bound, nll_bound):
        with pytest.raises(ValueError, match="int64"):
            function(Enumerated(2), torch.zeros(2, dtype=torch.int64), mask_id=MASK)
