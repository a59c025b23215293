"""The discrete case: its peers draw the law they are compared at, its formula, its accounts of a step."""

from __future__ import annotations

import pytest
import torch
from driftmax.bench import memory
from driftmax.bench.cases import discrete
from driftmax.bench.harness import GateFailed, Settings
from driftmax.discrete import Problem, sample
from driftmax.discrete.network import RADD, RADDConfig

from tests.statistics import assert_law


@pytest.mark.parametrize("loop", [discrete.plain_ancestral, discrete.careful_ancestral])
def test_peers_draw_the_law(loop) -> None:
    """8 x 500 draws of a law over 6 tokens; the mask is gone."""
    torch.manual_seed(0)
    logits = torch.linspace(-1.5, 1.0, 6)
    tokens = loop(discrete.Null(logits), (8, 500), 7, 6)
    assert_law(tokens.view(-1), torch.softmax(logits.double(), 0))


def test_expected_calls() -> None:
    """One step calls once; many steps call once a token; one token calls once; the published numbers."""
    assert [round(discrete.expected_calls(n, 1024)) for n in (1024, 2048, 4096)] == [647, 806, 906]
    assert discrete.expected_calls(1, 100) == 1
    assert discrete.expected_calls(10**9, 100) == pytest.approx(100, rel=1e-5)
    assert discrete.expected_calls(100, 1) == pytest.approx(1)


@pytest.fixture
def network() -> RADD:
    """RADD in miniature, with a head that is not zero."""
    torch.manual_seed(0)
    network = RADD(RADDConfig(vocab_size=50, hidden_size=16, blocks=1, heads=2)).eval()
    torch.nn.init.normal_(network.output_layer.linear.weight)
    return network


def test_a_clocked_network_gives_the_same_tokens(network: RADD) -> None:
    options = {"mask_id": 50, "steps": 20, "rng": 3}
    clocked = discrete.Clocked(network)
    assert torch.equal(sample(clocked, (2, 16), **options).tokens, sample(network, (2, 16), **options).tokens)
    tokens = torch.full((2, 16), 50)
    assert torch.equal(clocked(tokens), network(tokens))


def test_the_parts_of_a_step_add_up(network: RADD) -> None:
    """Body and sampler are inside the step; the steps are those that `sample` would take."""
    clocked = discrete.Clocked(network)
    problem = Problem(clocked, (2, 16), mask_id=50, steps=20, rng=3)
    steps = discrete.plan_steps(network, problem, clocked, 5)
    assert len(steps) == 5
    for one in steps:
        assert 0 < one.body < one.whole
        assert one.product > 0
        assert one.body + one.product + one.sampler == pytest.approx(one.whole)


def test_step_rows_project_hours_from_counted_calls(network: RADD) -> None:
    one = discrete.plain_row_seconds(network, 16)
    here = discrete.Setting("RADD-small", 2, 16, 50, 40)
    rows = list(discrete.step_rows(Settings(), network, here, 3, one))
    value = {(row["sampler"], row["quantity"]): row["value"] for row in rows}
    calls = discrete._plan_calls(2, 16, 40, discrete.Plan(), 0)
    assert calls <= 16
    hours = "hours, calls x s per call"
    assert value["driftmax Plan", hours] == pytest.approx(
        calls * value["driftmax Plan", "s per call"] / 3600, rel=2e-3
    )
    plain = value["torch, plain loop: body + 2 x head and draws of a row", "s per call"]
    assert one > 0
    assert plain == pytest.approx(value["network's body", "s per call"] + 2 * one, rel=2e-3)
    assert value[discrete.PLAIN, hours] == pytest.approx(40 * plain / 3600, rel=2e-3)
    assert ("sampler and draws", "share of the network's time") in value


def test_a_step_of_the_plain_loop_takes_the_memory() -> None:
    """The plain loop holds float64 tensors of 41 MB, at least two; Plan's step none of that size."""
    network = RADD(RADDConfig(vocab_size=20_000, hidden_size=16, blocks=1, heads=2)).eval()
    values = {row["sampler"]: row["value"] for row in discrete.memory_rows(Settings(), network, 256)}
    if memory.extra_peak_mb(lambda: None, torch.device("cpu")) is None:
        assert not values  # the system has no such counter
        return
    assert set(values) == {"network's body", "driftmax Plan", discrete.PLAIN}
    assert values["driftmax Plan"] < 20
    assert 75 < values[discrete.PLAIN] < 200


def test_a_wrong_plan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose network was sharper than the law it is held to."""
    right = discrete.sample

    def sharp(model, shape, **options):
        return right(model, shape, temperature=0.8, **options)

    monkeypatch.setattr(discrete, "sample", sharp)
    with pytest.raises(GateFailed, match="law"):
        discrete._law_gate(discrete.Null(torch.linspace(-3.0, 1.0, 50)), Settings())


def test_the_plain_loop_is_projected_from_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its tensors would be too large, from a step on fewer positions."""
    monkeypatch.setattr(discrete, "LARGEST", 8 * 51)
    model = discrete.Null(torch.zeros(50))
    first, second = discrete._plain_rows(Settings(quick=True), model, 32, 50)
    assert first["quantity"] == "s per step on 8 positions"
    assert second["value"] == pytest.approx(4 * 4 * first["value"], rel=2e-3)
