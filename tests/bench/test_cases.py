"""Every case: names, gates that pass for driftmax, and gates that refuse a wrong sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import driftmax
import pytest
import torch
from driftmax.bench import gates, harness, inputs, machine, memory, peers
from driftmax.bench.cases import CASES, categorical, load
from driftmax.bench.harness import GateFailed, Settings

TIMED = [name for name in CASES if name not in ("law", "discrete", "decoding")]  # those report


@pytest.mark.parametrize("name", TIMED)
def test_every_gate_passes_and_every_contender_runs(name: str, tiny: Settings) -> None:
    seen = set()
    for workload in load(name).workloads(tiny):
        with workload.around():
            workload.gate()
            workload.subject()
            for other in (*workload.peers.values(), *workload.beside.values()):
                other()
            if workload.limit is not None:
                workload.limit()
        assert workload.case == name
        identity = (workload.variant, workload.dtype, workload.n, workload.v, workload.isa)
        assert identity not in seen, "two rows of one name cannot be told apart"
        seen.add(identity)
    assert seen


def test_a_ring_is_larger_than_the_caches(tiny: Settings) -> None:
    tensor = torch.randn(10, 1000)
    ring = inputs.Ring.beyond_caches(tensor)
    assert sum(copy.numel() * 4 for copy in ring.copies) > 1.5 * machine.cache_bytes()
    assert len({copy.data_ptr() for copy in ring.copies}) == len(ring.copies)
    assert all(torch.equal(copy, tensor) for copy in ring.copies)
    assert sorted(ring.turn() for _ in ring.copies) == list(range(len(ring.copies)))
    assert len(inputs.Ring.beyond_caches(torch.zeros(2**18)).copies) == 2


def test_the_size_of_the_caches() -> None:
    assert 2**20 <= machine.cache_bytes() < 2**32  # bytes, and not KiB


def test_an_unknown_case_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        load("nothing")


def _faulty(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    right = driftmax.categorical

    def draw(logits: torch.Tensor, **options: Any) -> Any:
        options.pop("backend", None)
        return right(change(logits), **options)

    return draw


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x * 1.3,  # a wrong temperature
        lambda x: torch.where(x < x.amax(-1, keepdim=True) - 4.0, -torch.inf, x),  # a cut tail
        lambda x: torch.where(x < x.amax(-1, keepdim=True), -torch.inf, x),  # greedy
    ],
    ids=["temperature", "tail", "greedy"],
)
def test_a_wrong_sampler_is_refused(
    change: Callable[[torch.Tensor], torch.Tensor], tiny: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong on every backend alike, so only the law can tell."""
    workload = next(categorical.workloads(tiny))
    monkeypatch.setattr(driftmax, "categorical", _faulty(change))
    with pytest.raises(GateFailed, match="law"):
        harness.run_workload(workload, tiny)


def test_wrong_statistics_are_refused(tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    right = driftmax.categorical

    def draw(*arguments: Any, **options: Any) -> Any:
        result = right(*arguments, **options)
        if not options.get("return_stats"):
            return result
        tokens, stats = result
        return tokens, stats._replace(entropy=stats.entropy * 1.001)

    workload = next(categorical.workloads(tiny))
    monkeypatch.setattr(driftmax, "categorical", draw)
    with pytest.raises(GateFailed, match="entropy"):
        workload.gate()


def test_the_gates_oracle_of_the_filters() -> None:
    logits = torch.tensor([0.5, 0.3, 0.1, 0.1]).log()
    assert categorical.kept_law(logits, 3, None, None).tolist() == pytest.approx([5 / 9, 3 / 9, 1 / 9, 0.0])
    assert categorical.kept_law(logits, None, 0.75, None).tolist() == pytest.approx([5 / 8, 3 / 8, 0, 0])
    assert categorical.kept_law(logits, None, None, 0.5).tolist() == pytest.approx([5 / 8, 3 / 8, 0, 0])


@pytest.mark.parametrize("name", list(peers.unfiltered_peers(torch.zeros(1, 2))))
def test_unfiltered_peers_draw_the_softmax(name: str) -> None:
    """They are compared with, so they have to be right at this size."""
    torch.manual_seed(0)
    row = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 2
    draws = peers.unfiltered_peers(row.expand(4096, -1))[name]()
    gates.check_law(draws, torch.softmax(row.double(), 0), name)


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}], ids=str)
def test_filtered_peers_draw_the_filtered_law(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    row = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 2
    (name, value), *_ = options.items()
    keep = getattr(peers, f"{name}_filter")
    draws = peers.filtered(row.expand(4096, -1), lambda x: keep(x, value))()
    oracle = {"top_k": None, "top_p": None, "min_p": None} | options
    gates.check_law(draws, categorical.kept_law(row, **oracle), name)


def test_extra_peak_memory_sees_an_allocation() -> None:
    """A 64 MB buffer is seen, to the accuracy of the kernel's counters."""
    measured = memory.extra_peak_mb(lambda: torch.ones(16_000_000), torch.device("cpu"))
    if measured is not None:  # None where the system has no such counter
        assert 50 < measured < 90
        assert memory.extra_peak_mb(lambda: None, torch.device("cpu")) < 10
