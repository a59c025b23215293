"""Philox4x32-10 against the published vectors (Random123's), and the counter of docs/numerics.md."""

from __future__ import annotations

import pytest
import torch
from driftmax.ops._dispatch import core
from driftmax.reference.philox import philox4x32, streams, words, words64

KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def parse(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


def one_stream(seed: int = 0, row: int = 0, position: int = 0, step: int = 0):
    place = torch.tensor([row]), torch.tensor([position])
    return streams(1, 1, seed, None, *place, step, None, torch.device("cpu"))


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_published_vectors(counter, key, output):
    counter, key, output = parse(counter), parse(key), parse(output)
    tensors = [tuple(torch.tensor([word]) for word in group) for group in (counter, key)]
    assert tuple(int(word) for word in philox4x32(*tensors)) == output
    assert core.philox4x32(*counter, *key) == output


def test_words_have_the_published_layout():
    """The second published vector, all ones, is the last block of the last stream and purpose."""
    drawn = words(one_stream(2**64 - 1 - 2**64, 2**32 - 1, 2**32 - 1, 2**24 - 1), 0xFF, (2**32 - 1) * 4, 4)
    assert drawn[0].tolist() == list(parse(KNOWN[1][2]))


def test_random_counters_agree_with_the_core():
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(0, 2**32, (6, 200), generator=generator)
    ours = torch.stack(philox4x32(tuple(counters[:4]), tuple(counters[4:])))
    for column in range(200):
        assert tuple(ours[:, column].tolist()) == core.philox4x32(*counters[:, column].tolist())


def test_elements_beyond_2_to_34_carry_into_the_position():
    """Past 2**32 blocks of four come the first blocks of the next position, not a repetition."""
    start = 2**34
    across = words(one_stream(position=7), 1, start - 8, 16)[0]
    assert across[:8].tolist() == words(one_stream(position=7), 1, start - 8, 8)[0].tolist()
    assert across[8:].tolist() == words(one_stream(position=8), 1, 0, 8)[0].tolist()
    assert across[8:].tolist() != words(one_stream(position=7), 1, 0, 8)[0].tolist()
    for number in range(16):
        block = (start - 8 + number) // 4
        word = core.philox4x32(block & 0xFFFFFFFF, 7 + (block >> 32), 1 << 24, 0, 0, 0)[number % 4]
        assert int(across[number]) == word


def test_the_position_wraps():
    drawn = words(one_stream(position=2**32 - 1), 1, 2**34, 4)[0]
    assert drawn.tolist() == words(one_stream(position=0), 1, 0, 4)[0].tolist()


def test_planes_are_different_words():
    high, low = words64(one_stream(), 1, 0, 4000)
    assert torch.equal(high, words(one_stream(), 1, 0, 4000))
    assert torch.equal(low, words(one_stream(), 0x81, 0, 4000))
    assert int((high == low).sum()) == 0  # 4000 * 2**-32 by chance


def test_starts_may_differ_by_stream():
    both = streams(2, 1, 5, None, None, None, 0, None, torch.device("cpu"))
    drawn = words(both, 16, torch.tensor([1024, 4096]), 10)
    for row, start in enumerate((1024, 4096)):
        assert drawn[row].tolist() == words(both, 16, start, 10)[row].tolist()


def test_default_rows_and_positions():
    made = streams(2, 3, 5, None, None, None, 1, None, torch.device("cpu"))
    assert made.row.tolist() == [0, 0, 0, 1, 1, 1]
    assert made.position.tolist() == [0, 1, 2, 0, 1, 2]
    assert made.seed.tolist() == [5] * 6
    assert made.step.tolist() == [1] * 6
