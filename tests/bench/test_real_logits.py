"""The real-logits model on a small scale: tokenizer, n-gram law, training, cache, and its logits."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from driftmax.bench import ngram, real_logits

TEXT = "def f(self):\n    return self.value\n\ndef g(self):\n    return self.value + 1  # ümläut\n"


def _spell(ids: np.ndarray, kept: list[str]) -> str:
    parts = []
    for i in ids:
        parts.append(bytes([i]) if i < real_logits.BYTES else kept[i - real_logits.BYTES].encode())
    return b"".join(parts).decode()


def test_pieces_join_to_the_text() -> None:
    assert "".join(real_logits.PIECE.findall(TEXT)) == TEXT
    assert " return" in real_logits.PIECE.findall(TEXT.replace("\n    ", "\n    x "))


def test_tokens_spell_the_text_with_and_without_byte_fallback() -> None:
    import collections

    pieces = collections.Counter(real_logits.PIECE.findall(TEXT))
    kept = sorted(pieces, key=lambda piece: (-pieces[piece], piece))
    for words in (len(kept), 3):
        ids = real_logits.tokenize([TEXT], real_logits.BYTES + words)[0]
        assert _spell(ids, kept[:words]) == TEXT
        assert int(ids.max()) < real_logits.BYTES + words


def test_ngram_law_is_a_law_and_prefers_what_was_seen() -> None:
    tokens = np.array([1, 2, 3, 4] * 50 + [1, 2, 3, 5], dtype=np.int64)
    model = ngram.fit(tokens, 8)
    law = model.probabilities(np.array([[1, 2, 3], [7, 7, 7]]))
    assert law.sum(1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert int(law[0].argmax()) == 4
    assert law[0, 5] > law[0, 6] > 0
    again = ngram.from_state(model.state()).probabilities(np.array([[1, 2, 3], [7, 7, 7]]))
    assert torch.equal(law, again)


def test_ngram_refuses_ids_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="15 bits"):
        ngram.fit(np.zeros(10, dtype=np.int64), 2**16)


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DRIFTMAX_CACHE", str(tmp_path / "here"))
    assert real_logits.cache_directory() == tmp_path / "here"
    monkeypatch.delenv("DRIFTMAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform.startswith("linux"):
        assert real_logits.cache_directory() == tmp_path / "driftmax"


def test_missing_sources_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(real_logits.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="standard library"):
        real_logits.source_files()


@pytest.fixture
def small_corpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sixty of the library's files, a training of five steps, and a cache of its own."""
    torch.set_num_threads(1)  # tiny products: more threads only wait for each other
    files = real_logits.source_files()[::12][:60]
    recipe = real_logits.Recipe("quick", batch=4, steps=5, seconds=30.0)
    monkeypatch.setattr(real_logits, "source_files", lambda: files)
    monkeypatch.setattr(real_logits, "QUICK", recipe)
    monkeypatch.setenv("DRIFTMAX_CACHE", str(tmp_path))


@pytest.mark.usefixtures("small_corpus")
def test_model_predicts_real_text_and_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    real = real_logits.real_model(quick=True)
    assert 1.0 < real.bits_per_token < real.unigram_bits - 1.0, "no better than token frequencies"
    logits = real_logits.real_logits(40, quick=True)
    assert logits.shape == (40, real_logits.VOCABULARY)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    assert float(logits.logsumexp(1).abs().max()) < 1e-4
    law = logits.softmax(1)
    entropy = -(law * logits).sum(1)
    assert float(entropy.max() - entropy.min()) > 1.0, "real rows differ in how certain they are"

    monkeypatch.setattr(real_logits, "_fit", lambda recipe: pytest.fail("the cache was not used"))
    cached = real_logits.real_model(quick=True)
    assert cached.bits_per_token == pytest.approx(real.bits_per_token)
    assert torch.equal(cached.logits(40)[0], logits)
