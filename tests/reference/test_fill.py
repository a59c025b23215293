"""The reference's noise functions against exact arithmetic, over their whole range."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import pytest
import torch
from driftmax.reference.fill import exponential, gumbel, log_core, log_pos, normal, uniform, unit

getcontext().prec = 60
FLOATS = [torch.float32, torch.float64]
EPSILON = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
# Both ends, the switch between the two logarithms, and powers of two.
WORDS = sorted(
    {0, 1, 2, 3, 0x4AFB0CCB, 0x4AFB0CCC, 0x4AFB0CCD, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF}
    | {1 << bit for bit in range(32)}
    | {0xFFFFFFFF - (1 << bit) for bit in range(32)}
)


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    lows = (0, 1, 0x80000000, 0xFFFFFFFF)
    grid = torch.tensor([(high, low) for high in WORDS for low in lows])
    generator = torch.Generator().manual_seed(0)
    return torch.cat([grid, torch.randint(0, 2**32, (300, 2), generator=generator)]).unbind(1)


def exact_unit(high: int, low: int) -> Decimal:
    return (Decimal((high << 32) | low) + Decimal("0.5")) / Decimal(2**64)


def worst(values: torch.Tensor, exact: list[Decimal]) -> float:
    """Largest relative error."""
    return max(float(abs(Decimal(v) - e) / abs(e)) for v, e in zip(values.tolist(), exact, strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
def test_uniform_is_exact_and_open(dtype):
    high, low = pairs()
    bits = 23 if dtype == torch.float32 else 52
    for value, h, w in zip(uniform(high, low, dtype).tolist(), high.tolist(), low.tolist(), strict=True):
        assert Decimal(value) == (Decimal(((h << 32) | w) >> (64 - bits)) + Decimal("0.5")) / Decimal(2**bits)
        assert 0.0 < value < 1.0


@pytest.mark.parametrize("dtype", FLOATS)
def test_unit_keeps_its_relative_precision(dtype):
    high, low = pairs()
    exact = [exact_unit(h, w) for h, w in zip(high.tolist(), low.tolist(), strict=True)]
    assert worst(unit(high, low, dtype), exact) < 3 * EPSILON[dtype]
    assert float(unit(torch.tensor(0), torch.tensor(0), dtype)) == 2.0**-65


@pytest.mark.parametrize("dtype", FLOATS)
def test_logarithms(dtype):
    f = torch.linspace(math.sqrt(0.5) - 1, math.sqrt(2) - 1, 501, dtype=dtype)
    f = f[f != 0]
    assert worst(log_core(f, 0), [(1 + Decimal(v)).ln() for v in f.tolist()]) < 4 * EPSILON[dtype]
    x = torch.cat([2.0 ** torch.arange(-65, 7, dtype=dtype), torch.linspace(1e-3, 50, 500, dtype=dtype)])
    x = x[x != 1]
    assert worst(log_pos(x), [Decimal(v).ln() for v in x.tolist()]) < 4 * EPSILON[dtype]


@pytest.mark.parametrize("dtype", FLOATS)
def test_exponential_is_accurate_at_both_ends(dtype):
    """Relative error of a few roundings everywhere: also for E near 2**-65 and near 45."""
    high, low = pairs()
    exact = [-(1 - exact_unit(h, w)).ln() for h, w in zip(high.tolist(), low.tolist(), strict=True)]
    assert worst(exponential(high, low, dtype), exact) < 6 * EPSILON[dtype]
    ends = exponential(torch.tensor([0, 2**32 - 1]), torch.tensor([0, 2**32 - 1]), dtype)
    assert float(ends[0]) == pytest.approx(2.0**-65)
    assert float(ends[1]) == pytest.approx(65 * math.log(2))


@pytest.mark.parametrize("dtype", FLOATS)
def test_gumbel_ceiling(dtype):
    """Above 44, where fp32 uniforms stop at 16.64 and float64 ones at 36.74."""
    high, low = pairs()
    values = gumbel(high, low, dtype)
    assert float(values.max()) > 44
    assert -3.82 < float(values.min()) < -3.8
    exact = [-(-(1 - exact_unit(h, w)).ln()).ln() for h, w in zip(high.tolist(), low.tolist(), strict=True)]
    for value, wanted in zip(values.tolist(), exact, strict=True):
        assert abs(Decimal(value) - wanted) < Decimal(10 * EPSILON[dtype]) * (1 + abs(wanted))


@pytest.mark.parametrize("dtype", FLOATS)
def test_normal_covers_both_tails(dtype):
    high, low = pairs()
    largest = torch.full_like(high, 2**32 - 1)
    z = normal(torch.stack((largest, high), 1), torch.stack((largest, low), 1), dtype)
    radius = torch.linalg.vector_norm(z.double(), dim=1)
    assert float((radius / math.sqrt(2 * 65 * math.log(2)) - 1).abs().max()) < 8 * EPSILON[dtype]
    assert float(z.max()) > 9.49
    assert float(z.min()) < -9.49
    turns = torch.atan2(z[:, 1].double(), z[:, 0].double()) / (2 * math.pi)
    exact = [float(exact_unit(h, w)) for h, w in zip(high.tolist(), low.tolist(), strict=True)]
    gap = torch.remainder(turns - torch.tensor(exact, dtype=torch.float64) + 0.5, 1) - 0.5
    assert float(gap.abs().max()) < 8 * EPSILON[dtype] + (2.0**-33 if dtype == torch.float32 else 0)


def tail_mass(law, threshold: float, dtype: torch.dtype) -> float:
    """Probability that `law`, increasing in its 64-bit word, exceeds `threshold`: by bisection."""
    below, above = -1, 2**64
    while above - below > 1:
        middle = (below + above) // 2
        value = law(torch.tensor([middle >> 32]), torch.tensor([middle & 0xFFFFFFFF]), dtype)
        below, above = (below, middle) if float(value) > threshold else (middle, above)
    return (2**64 - above) / 2**64


def fp32_exponential(high: torch.Tensor, low: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The usual faulty way: a 24-bit uniform and one logarithm."""
    return -torch.log1p(-((high >> 8).to(torch.float32) * 2.0**-24))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threshold", [1e-6, 0.1, 3.0, 10.0, 18.0, 22.0, 30.0, 36.0])
def test_exponential_tail_is_the_laws(dtype, threshold):
    """P(E > t) over all 2**64 draws; a normal beyond 6 is t = 18. At t = 36 some 4000 words are left."""
    exact = math.exp(-threshold)
    allowed = 4e-4 * exact if threshold > 1 else 8 * EPSILON[dtype] + 2.0**-64
    assert abs(tail_mass(exponential, threshold, dtype) - exact) < allowed


def test_the_tail_test_sees_fp32_noise():
    assert abs(tail_mass(fp32_exponential, 10.0, torch.float32) - math.exp(-10)) < 1e-3 * math.exp(-10)
    assert tail_mass(fp32_exponential, 18.0, torch.float32) == 0.0
