"""The shipped model: its file, its text, and that it has learned Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from driftmax.discrete import bytes_model
from driftmax.discrete.bytes_model import MASK_ID, decode, encode, load_bytes_model, standard_library
from driftmax.discrete.likelihood import nll_bound

# Bits per byte of the shipped file on 512 held-out windows, which scripts/train_bytes_model.py prints.
MEASURED = 2.253
SLACK = 0.5


def library(root: Path, extra: dict[str, str]) -> Path:
    """A small standard library: 200 plain files, and more."""
    files = {f"module{i:03}.py": f"number = {i}\n" for i in range(200)} | extra
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_file_fits_the_wheel() -> None:
    assert bytes_model.PATH.stat().st_size <= 8 * 2**20


def test_model_is_ready_to_use() -> None:
    model = load_bytes_model()
    assert (model.config.vocab_size, model.config.mask_id, model.config.length) == (256, MASK_ID, 256)
    assert model.time_independent
    assert not model.training
    assert load_bytes_model(dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16


def test_held_out_text_costs_what_was_measured() -> None:
    """32 of the windows that were measured; files of other Python versions differ in places."""
    text = standard_library("held_out")
    first = torch.linspace(0, len(text) - 256, 32).long()
    tokens = text[first[:, None] + torch.arange(256)].long()
    bound = nll_bound(load_bytes_model(), tokens, mask_id=MASK_ID, samples=4, rng=0)
    bits, error = bound.bits_per_token()
    assert error < SLACK / 3
    assert abs(bits - MEASURED) < SLACK


# One byte to guess between its neighbours: what stands before it, the byte, and what follows.
GUESSES = [
    ("class Reader:\n    def __init__(sel", "f", ", path):\n        self.path = path\n"),
    ("    try:\n        value = int(text)\n    excep", "t", " ValueError:\n        raise\n"),
    ("    if value is not Non", "e", ":\n        return value\n    return None\n"),
    ("    for name in names:\n        retur", "n", " name\n"),
    ("class Node:\n    de", "f", " close(self):\n        pass\n"),
    ("import os\nimpor", "t", " sys\n\n"),
    ("        self", ".", "value = value\n        self.name = name\n"),
    ("def main(", ")", ":\n    pass\n\n"),
    ("    if not name:\n", " ", "       raise TypeError(name)\n"),
    ("    return self._name\n\n    def value(self)", ":", "\n        return self._value\n"),
    ("    while True:\n        if no", "t", " line:\n            break\n"),
    ("    def __len_", "_", "(self):\n        return len(self.data)\n"),
]


def test_it_knows_python() -> None:
    """A model of single bytes would guess blanks only, and be right once."""
    model, right = load_bytes_model(), []
    for before, wanted, after in GUESSES:
        tokens = encode(before + wanted + after)
        place = len(encode(before))
        tokens[place] = MASK_ID
        right.append(decode(model(tokens[None])[0, place].argmax()[None]) == wanted)
    assert sum(right) >= 11, right


def test_split_is_a_partition_by_file(tmp_path: Path) -> None:
    root = library(tmp_path, {"package/__init__.py": "inside = 1\n"})
    train, held_out = (bytes(standard_library(part, root).tolist()) for part in ("train", "held_out"))
    lines = train.splitlines() + held_out.splitlines()
    assert sorted(lines) == sorted([b"number = %d" % i for i in range(200)] + [b"inside = 1"])
    assert 3 <= len(held_out.splitlines()) <= 30
    moved = library(tmp_path / "elsewhere", {"package/__init__.py": "inside = 1\n"})
    assert bytes(standard_library("held_out", moved).tolist()) == held_out


@pytest.mark.parametrize(
    "name",
    [
        "test/test_os.py",
        "lib2to3/tests/pytree.py",
        "idlelib/idle_test/mock.py",
        "encodings/cp273.py",
        "pydoc_data/topics.py",
        "site-packages/x/y.py",
        "_sysconfigdata__linux.py",
        "notes.txt",
    ],
)
def test_what_is_not_library_code_is_left_out(tmp_path: Path, name: str) -> None:
    root = library(tmp_path, {name: "unwanted\n"})
    for part in ("train", "held_out"):
        assert b"unwanted" not in bytes(standard_library(part, root).tolist())


def test_python_without_sources(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="sources are not in"):
        standard_library("train", tmp_path)


def test_package_without_its_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bytes_model, "PATH", tmp_path / "bytes_model.safetensors")
    with pytest.raises(FileNotFoundError, match="reinstall driftmax"):
        load_bytes_model()


def test_text_round_trips() -> None:
    text = "naïve = '€'\n"
    assert decode(encode(text)) == text
    tokens = encode(text)
    tokens[2] = MASK_ID  # first half of a two-byte letter
    assert decode(tokens) == "na░\ufffdve = '€'\n"
