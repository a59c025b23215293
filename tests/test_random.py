"""RowStreams: construction, slicing, errors; and what `rng=` may be."""

from __future__ import annotations

import driftmax
import numpy as np
import pytest
import torch
from driftmax import RowStreams

IDS = [5, 0, 2**32 - 1, 17, 3]
SEEDS = [1, -2, 2**63 - 1, -(2**63), 0]


def draws(streams: RowStreams, **kwargs: object) -> torch.Tensor:
    """Sixty-four words of every row."""
    return driftmax.random.bits((len(streams), 64), rng=streams, **kwargs)


def full() -> RowStreams:
    positions = torch.tensor([[3, 1], [4, 1], [5, 9], [2, 6], [2**32 - 1, 0]])
    return RowStreams(torch.tensor(SEEDS), torch.tensor(IDS), step=9, positions=positions)


@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        slice(1, 4),
        slice(None, None, 2),
        slice(None, None, 3),
        torch.tensor([4, 0, 0]),
        [2, 1],
        torch.tensor([True, False, False, True, True]),
        [False, True, False, False, False],
    ],
)
def test_slicing_keeps_every_rows_randomness(index):
    streams = RowStreams(torch.tensor(SEEDS), torch.tensor(IDS), step=9, positions=torch.arange(5) + 7)
    chosen = slice(index, index + 1 or None) if isinstance(index, int) else index
    assert torch.equal(draws(streams[index]), draws(streams)[chosen])
    logits = torch.zeros(5, 3000)
    tokens = driftmax.categorical(logits, rng=streams)
    assert torch.equal(driftmax.categorical(logits[chosen], rng=streams[index]), tokens[chosen])


def test_slicing_slices_all_fields():
    part = full()[torch.tensor([2, 0])]
    assert len(part) == 2
    assert part.seed.tolist() == [SEEDS[2], SEEDS[0]]
    assert part.rows.tolist() == [IDS[2], IDS[0]]
    assert part.positions.tolist() == [[5, 9], [3, 1]]
    assert part.step == 9


def test_slicing_a_count_keeps_ids_and_one_seed():
    part = RowStreams(torch.tensor([42]), 10)[3:9:2]
    assert part.rows.tolist() == [3, 5, 7]
    assert part.seed.tolist() == [42]
    assert torch.equal(draws(part), draws(RowStreams(42, 10))[3:9:2])


def test_iteration_ends():
    assert [row.rows.tolist() for row in RowStreams(0, 3)] == [[0], [1], [2]]


@pytest.mark.parametrize("index", [5, -6, 1.5, torch.tensor([0.5]), torch.zeros(4, dtype=torch.bool)])
def test_bad_index(index):
    with pytest.raises((IndexError, TypeError)):
        RowStreams(0, 5)[index]


def test_at_replaces_what_is_given():
    moved = full().at(step=11)
    assert moved.step == 11
    assert torch.equal(moved.positions, full().positions)
    placed = full().at(positions=torch.zeros(5, dtype=torch.int64))
    assert placed.step == 9
    assert placed.positions.tolist() == [0] * 5
    assert not torch.equal(draws(RowStreams(0, 2)), draws(RowStreams(0, 2).at(step=1)))
    assert torch.equal(draws(RowStreams(0, 2).at(step=1)), draws(RowStreams(0, 2).at(step=torch.tensor(1))))


def test_to_moves_every_tensor():
    moved = full().to("meta")
    assert {moved.seed.device.type, moved.rows.device.type, moved.positions.device.type} == {"meta"}


def test_repr_names_what_is_set():
    assert repr(RowStreams(3, 2)) == "RowStreams(seed=3, rows=2)"
    assert "step=9" in repr(full())
    assert "positions" in repr(full())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"seed": 2**64, "rows": 1}, ValueError, "64 bits"),
        ({"seed": -(2**63) - 1, "rows": 1}, ValueError, "64 bits"),
        ({"seed": 0.5, "rows": 1}, TypeError, None),
        ({"seed": torch.tensor([1, 2]), "rows": 3}, ValueError, "one per row"),
        ({"seed": torch.tensor([1.0]), "rows": 1}, TypeError, "int64"),
        ({"seed": 0, "rows": -1}, ValueError, "rows"),
        ({"seed": 0, "rows": [2**32]}, ValueError, "2\\*\\*32"),
        ({"seed": 0, "rows": [-1]}, ValueError, "2\\*\\*32"),
        ({"seed": 0, "rows": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, "one-dimensional"),
        ({"seed": 0, "rows": torch.zeros(2)}, TypeError, "integers"),
        ({"seed": 0, "rows": 1, "step": 2**24}, ValueError, "2\\*\\*24"),
        ({"seed": 0, "rows": 1, "step": -1}, ValueError, "2\\*\\*24"),
        ({"seed": 0, "rows": 1, "step": torch.tensor(2**24)}, ValueError, "2\\*\\*24"),
        ({"seed": 0, "rows": 2, "step": torch.tensor([1, 2])}, ValueError, "one integer"),
        ({"seed": 0, "rows": 2, "positions": [0]}, ValueError, "positions"),
        ({"seed": 0, "rows": 2, "positions": [0, 2**32]}, ValueError, "2\\*\\*32"),
    ],
)
def test_construction_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        RowStreams(**arguments)


def test_seed_forms_agree():
    wanted = draws(RowStreams(2**64 - 5, 3))
    assert torch.equal(draws(RowStreams(-5, 3)), wanted)
    assert torch.equal(draws(RowStreams(torch.tensor(-5), 3)), wanted)
    assert torch.equal(draws(RowStreams(torch.tensor([2**64 - 5], dtype=torch.uint64), 3)), wanted)
    assert torch.equal(draws(RowStreams(torch.full((3,), -5), 3)), wanted)
    assert torch.equal(draws(RowStreams(np.int64(-5), np.int32(3))), wanted)


def test_all_sixty_four_seed_bits_matter():
    seen = {tuple(driftmax.random.bits(4, rng=1 << bit).tolist()) for bit in range(64)}
    assert len(seen) == 64


def test_rng_forms():
    logits = torch.zeros(3, 5000)
    wanted = driftmax.categorical(logits, rng=11)
    assert torch.equal(driftmax.categorical(logits, rng=RowStreams(11, 3)), wanted)
    assert torch.equal(driftmax.categorical(logits, rng=np.int64(11)), wanted)
    first = driftmax.categorical(logits, rng=torch.Generator().manual_seed(1))
    assert torch.equal(driftmax.categorical(logits, rng=torch.Generator().manual_seed(1)), first)
    generator = torch.Generator().manual_seed(1)
    driftmax.categorical(logits, rng=generator)
    assert not torch.equal(driftmax.categorical(logits, rng=generator), first)
    torch.manual_seed(4)
    drawn = driftmax.categorical(logits)
    assert not torch.equal(driftmax.categorical(logits), drawn)
    torch.manual_seed(4)
    assert torch.equal(driftmax.categorical(logits), drawn)


@pytest.mark.parametrize("rng", ["7", 1.0, [1]])
def test_rng_of_a_wrong_type(rng):
    with pytest.raises(TypeError, match="rng must be"):
        driftmax.categorical(torch.zeros(1, 2), rng=rng)


def test_rng_of_a_wrong_length():
    with pytest.raises(ValueError, match="3 rows, the batch has 2"):
        driftmax.categorical(torch.zeros(2, 5), rng=RowStreams(0, 3))
    with pytest.raises(ValueError, match="positions"):
        driftmax.categorical(torch.zeros(2, 3, 5), rng=RowStreams(0, 2, positions=[0, 1]))


def test_positions_are_those_of_the_flat_batch():
    logits = torch.zeros(2, 3, 4, 2000)
    wanted = driftmax.categorical(logits, rng=6)
    explicit = RowStreams(6, 2, positions=torch.arange(12).expand(2, 12))
    assert torch.equal(driftmax.categorical(logits, rng=explicit), wanted)
    one = driftmax.categorical(logits[1, 2, 1:2], rng=RowStreams(6, [1], positions=[2 * 4 + 1]))
    assert int(one) == int(wanted[1, 2, 1])


def test_one_dimensional_logits_are_row_zero():
    logits = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    token = driftmax.categorical(logits, rng=8)
    assert token.shape == ()
    assert int(token) == int(driftmax.categorical(logits[None], rng=8))
