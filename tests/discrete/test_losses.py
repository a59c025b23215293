"""λ-DCE and t-DCE: closed forms and exact expectations on a model small enough to enumerate."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from driftmax import RowStreams
from driftmax.discrete.likelihood import exact_nll_bound
from driftmax.discrete.losses import lambda_dce, masked_nll, t_dce
from driftmax.discrete.schedules import Cosine, Linear, LogLinear, Schedule
from driftmax.random import uniform
from scipy import integrate
from torch import Tensor

V, L, MASK = 3, 4, 3


class Table:
    """A denoiser without any structure: logits drawn for each of the (V + 1)^L partly masked sequences."""

    time_independent = True

    def __init__(self, columns: int = V, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(3)
        shape = ((V + 1) ** L, L, columns)
        self.logits = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def __call__(self, tokens: Tensor) -> Tensor:
        place = (V + 1) ** torch.arange(L)
        return self.logits[(tokens * place).sum(-1)]


CLEAN = torch.tensor([2, 0, 1, 1])


def set_losses(model: Table) -> list[tuple[int, float]]:
    """Size and summed loss of every set of masked positions."""
    found = []
    for size in range(1, L + 1):
        for chosen in itertools.combinations(range(L), size):
            noisy = CLEAN.clone()
            noisy[list(chosen)] = MASK
            law = model(noisy[None])[0].double().log_softmax(-1)
            found.append((size, -sum(float(law[i, CLEAN[i]]) for i in chosen)))
    return found


def integral(model: Table, low: float, high: float) -> float:
    """∫_low^high (1/λ) E[Σ_{masked} −log p] dλ by quadrature."""

    def integrand(level: float) -> float:
        return sum(nll * level ** (size - 1) * (1 - level) ** (L - size) for size, nll in losses)

    losses = set_losses(model)
    return float(integrate.quad(integrand, low, high)[0])


def test_masked_nll_is_the_cross_entropy_at_masked_positions() -> None:
    logits = torch.randn(2, L, V, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    masked = torch.tensor([[True, False, True, False], [False, False, False, True]])
    got = masked_nll(logits, tokens, masked, mask_id=MASK)
    wanted = -logits.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0] * masked
    torch.testing.assert_close(got, wanted.float())
    assert bool((masked_nll(logits, tokens, torch.zeros_like(masked), mask_id=MASK) == 0).all())


@pytest.mark.parametrize("mask_id", [1, 3])
def test_a_column_for_the_mask_has_no_probability(mask_id: int) -> None:
    logits = torch.randn(1, L, V + 1, generator=torch.Generator().manual_seed(0))
    kept = [v for v in range(V + 1) if v != mask_id]
    clean = torch.tensor([[0, 2, 2, 0]])
    masked = torch.ones(1, L, dtype=torch.bool)
    wanted = masked_nll(logits[..., kept], torch.searchsorted(torch.tensor(kept), clean), masked, mask_id=9)
    assert torch.equal(masked_nll(logits, clean, masked, mask_id=mask_id), wanted)


def test_half_precision_logits_are_reduced_in_float32() -> None:
    tokens = CLEAN[None].expand(64, -1)
    half = lambda_dce(Table(dtype=torch.bfloat16), tokens, mask_id=MASK, rng=0)
    assert half.dtype == torch.float32
    exact = Table()
    exact.logits = Table(dtype=torch.bfloat16).logits.double()
    torch.testing.assert_close(half, lambda_dce(exact, tokens, mask_id=MASK, rng=0).float())


def test_a_row_is_its_formula() -> None:
    rows, model = 32, Table()
    streams = RowStreams(5, rows, step=3)
    draws = uniform((rows, L + 1), rng=streams)
    level = (torch.arange(rows) + draws[:, 0]) / rows
    got = lambda_dce(model, CLEAN.expand(rows, -1), mask_id=MASK, rng=streams, reduction="tokens")
    for row in range(rows):
        masked = draws[row, 1:] < level[row]
        law = model(torch.where(masked, MASK, CLEAN)[None])[0].log_softmax(-1)
        wanted = torch.where(masked, -law[torch.arange(L), CLEAN], 0.0) / level[row]
        torch.testing.assert_close(got[row], wanted, rtol=1e-6, atol=0)


def test_reductions_agree() -> None:
    tokens = CLEAN.expand(50, -1)
    each, rows, mean = (
        lambda_dce(Table(), tokens, mask_id=MASK, rng=1, reduction=r) for r in ("tokens", "rows", "mean")
    )
    torch.testing.assert_close(each.sum(1), rows)
    torch.testing.assert_close(each.mean(), mean)
    assert bool((each[each != 0] > 0).all())


def test_enumerated_bound_is_the_mean_over_orders() -> None:
    """The three forms of one bound: mean NLL over all 24 orders, weighted sets, and the λ integral."""
    model = Table()
    total = 0.0
    for order in itertools.permutations(range(L)):
        noisy = torch.full((L,), MASK)
        for i in order:
            total -= float(model(noisy[None])[0, i].log_softmax(-1)[CLEAN[i]])
            noisy[i] = CLEAN[i]
    mean = total / math.factorial(L)
    assert float(exact_nll_bound(model, CLEAN[None], mask_id=MASK).nats) == pytest.approx(mean, rel=1e-12)
    assert integral(model, 0.0, 1.0) == pytest.approx(mean, rel=1e-9)


ROWS = 2**17
SIGMAS = 6.5  # two-sided false-alarm rate 8e-11 for a normal mean


def assert_mean(rows: Tensor, wanted: float, power: float = 0.04) -> None:
    """The mean of `rows` is `wanted`; a relative error of `power` would be seen with probability > 0.999."""
    error = float(rows.std()) / math.sqrt(len(rows))
    assert (SIGMAS + 3.1) * error < power * wanted, "no power"
    assert abs(float(rows.mean()) - wanted) < SIGMAS * error


@pytest.mark.parametrize("stratified", [True, False])
def test_lambda_dce_is_unbiased(stratified: bool) -> None:
    model = Table()
    rows = lambda_dce(model, CLEAN.expand(ROWS, -1), mask_id=MASK, rng=11, least=0.02, stratified=stratified)
    assert_mean(rows, integral(model, 0.02, 1.0))


@pytest.mark.parametrize(("schedule", "least"), [(Linear(), 0.02), (LogLinear(), 0.02), (Cosine(), 0.1)])
def test_t_dce_is_unbiased(schedule: Schedule, least: float) -> None:
    """Both losses estimate one integral, over the levels that the times reach."""
    model = Table()
    rows = t_dce(model, CLEAN.expand(ROWS, -1), mask_id=MASK, rng=12, schedule=schedule, least=least)
    low, high = (1.0 - float(schedule.alpha(torch.tensor(t, dtype=torch.float64))) for t in (least, 1.0))
    assert_mean(rows, integral(model, low, high))


def test_the_test_sees_a_wrong_weight() -> None:
    """1/λ replaced by 1/(λ + 0.03) is far outside."""
    model = Table()
    tokens = lambda_dce(model, CLEAN.expand(ROWS, -1), mask_id=MASK, rng=11, least=0.02, reduction="tokens")
    draws = uniform((ROWS, L + 1), rng=11)
    level = 0.02 + 0.98 * (torch.arange(ROWS) + draws[:, 0]) / ROWS
    faulty = (tokens * (level / (level + 0.03))[:, None]).sum(1)
    with pytest.raises(AssertionError):
        assert_mean(faulty, integral(model, 0.02, 1.0))


def test_the_linear_schedule_is_lambda_dce_itself() -> None:
    tokens = CLEAN.expand(500, -1)
    by_level = lambda_dce(Table(), tokens, mask_id=MASK, rng=2)
    by_time = t_dce(Table(), tokens, mask_id=MASK, rng=2, schedule=Linear())
    torch.testing.assert_close(by_time, by_level, rtol=1e-6, atol=1e-9)


def test_levels_are_stratified() -> None:
    """Row b's masked fraction lies in its stratum, up to six deviations of a binomial of 20000."""
    seen: list[Tensor] = []

    def model(noisy: Tensor) -> Tensor:
        seen.append((noisy == 2).double().mean(1))
        return torch.zeros(*noisy.shape, 2)

    lambda_dce(model, torch.zeros(16, 20_000, dtype=torch.int64), mask_id=2, rng=0)
    slack = 6 * 0.5 / math.sqrt(20_000)
    assert bool((seen[0] > torch.arange(16) / 16 - slack).all())
    assert bool((seen[0] < torch.arange(1, 17) / 16 + slack).all())


def test_time_dependent_models_get_the_time() -> None:
    seen: list[Tensor] = []

    def model(noisy: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return torch.zeros(*noisy.shape, V)

    t_dce(model, CLEAN.expand(8, -1), mask_id=MASK, rng=0, schedule=Linear(), least=0.5)
    assert seen[0].shape == (8,)
    assert bool(((seen[0] > 0.5) & (seen[0] < 1)).all())


def test_gradients_flow_to_masked_positions_only() -> None:
    logits = torch.randn(6, L, V, generator=torch.Generator().manual_seed(0)).requires_grad_()
    each = lambda_dce(lambda _: logits, CLEAN.expand(6, -1), mask_id=MASK, rng=4, reduction="tokens")
    each.mean().backward()
    masked = each.detach() > 0
    assert logits.grad is not None
    assert 0 < int(masked.sum()) < masked.numel()
    assert bool((logits.grad[~masked] == 0).all())
    assert bool((logits.grad[masked] != 0).all())
    torch.testing.assert_close(logits.grad.sum(-1), torch.zeros(6, L), atol=1e-6, rtol=0)


def test_rows_keep_their_masks_in_any_batch() -> None:
    tokens, streams = CLEAN.expand(20, -1), RowStreams(9, 20)
    whole = lambda_dce(Table(), tokens, mask_id=MASK, rng=streams, stratified=False)
    part = lambda_dce(Table(), tokens[5:9], mask_id=MASK, rng=streams[5:9], stratified=False)
    assert torch.equal(whole[5:9], part)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (CLEAN, {}, "int64"),
        (CLEAN[None].int(), {}, "int64"),
        (torch.tensor([[0, MASK]]), {}, "clean"),
        (CLEAN[None], {"least": 1.0}, "least"),
        (CLEAN[None], {"reduction": "sum"}, "reduction"),
    ],
)
def test_bad_arguments(tokens: Tensor, options: dict[str, object], message: str) -> None:
    for loss in (lambda_dce, lambda *a, **k: t_dce(*a, schedule=Linear(), **k)):
        with pytest.raises(ValueError, match=message):
            loss(Table(), tokens, mask_id=MASK, **options)


def test_logits_of_another_shape() -> None:
    with pytest.raises(ValueError, match="leading shape"):
        lambda_dce(lambda noisy: torch.zeros(1, 2, V), CLEAN[None], mask_id=MASK, rng=0)
