"""`driftmax generate` on a model whose law is known, and on the shipped one."""

from __future__ import annotations

import io
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from driftmax import cli
from driftmax.discrete import bytes_model, generate
from driftmax.discrete.bytes_model import MASK_ID, decode
from driftmax.discrete.generate import SAMPLERS, Screen, fill, parse_gaps
from torch import Tensor

ALPHABET = torch.tensor(list(b"abcd"))


class Letters:
    """Every masked byte is a, b, c or d; counts its calls and remembers its windows."""

    time_independent = True

    def __init__(self, width: int = 256) -> None:
        self.config = type("Config", (), {"length": width})
        self.windows: list[Tensor] = []

    def __call__(self, tokens: Tensor, t: object = None) -> Tensor:
        self.windows.append(tokens.clone())
        logits = torch.full((*tokens.shape, 256), -torch.inf)
        logits[..., ALPHABET] = 0.0
        return logits


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> Letters:
    model = Letters()
    monkeypatch.setattr(generate, "load_bytes_model", lambda: model)
    return model


def command(*arguments: str) -> int:
    return cli.main(["generate", *arguments])


def test_gaps() -> None:
    tokens = parse_gaps(b"<?1?>x = <?3?>\n\xff")
    assert tokens.tolist() == [MASK_ID, *b"x = ", MASK_ID, MASK_ID, MASK_ID, 10, 255]


@pytest.mark.parametrize(("text", "message"), [(b"x = 1", "no gap"), (b"<?0?>", "at least one byte")])
def test_gaps_that_are_none(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_gaps(text)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_fills_the_gaps_and_keeps_the_rest(sampler: str) -> None:
    tokens = parse_gaps(b"A<?5?>B<?1?>")
    filled = fill(Letters(), tokens, sampler=SAMPLERS[sampler](4), steps=4)
    assert re.fullmatch(r"A[a-d]{5}B[a-d]", decode(filled.tokens))
    assert filled.nfe >= 1
    assert int((tokens == MASK_ID).sum()) == 6  # the request is left alone


def test_help_names_every_sampler(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("--help")
    printed = capsys.readouterr().out
    assert all(name in printed for name in SAMPLERS)


def test_one_call_for_each_byte_without_steps() -> None:
    model = Letters()
    filled = fill(model, parse_gaps(b"A<?5?>B<?1?>"))
    assert filled.nfe == len(model.windows) == 6


def test_long_texts_are_filled_window_by_window() -> None:
    model = Letters(width=16)
    filled = fill(model, parse_gaps(b"BEGIN<?40?>END"), width=16, steps=3)
    assert re.fullmatch(r"BEGIN[a-d]{40}END", decode(filled.tokens))
    assert {window.shape for window in model.windows} == {(1, 16)}
    for window in model.windows[
        1:
    ]:  # no window starts blind: half of it or more is known, or it is the first
        assert int((window == MASK_ID).sum()) <= 11


def test_a_short_gap_sees_both_sides() -> None:
    model = Letters(width=16)
    fill(model, parse_gaps(b"0123456789" * 4 + b"<?4?>" + b"9876543210" * 4), width=16, steps=1)
    window = model.windows[0][0].tolist()
    assert window == [*b"456789", *[MASK_ID] * 4, *b"987654"]


def test_windows_have_streams_of_their_own() -> None:
    """With one stream for all, windows of equal shape would repeat each other."""
    text = decode(fill(Letters(16), parse_gaps(b"<?16?>" + b"." * 8 + b"<?16?>"), width=16, steps=1).tokens)
    assert text[:16] != text[-16:]


def test_command_prints_text_and_says_how(letters: Letters, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--seed", "5", "--length", "20", "--prompt", "def f") == 0
    printed = capsys.readouterr()
    assert re.fullmatch(r"def f[a-d]{20}\n", printed.out)
    assert re.search(r"\[blocks, seed 5: 20 network calls, \d+\.\d s\]", printed.err)
    assert command("--seed", "5", "--length", "20", "--prompt", "def f") == 0
    assert capsys.readouterr().out == printed.out


def test_seeds_differ_unless_given(letters: Letters, capsys: pytest.CaptureFixture[str]) -> None:
    texts = set()
    for _ in range(2):
        assert command("--length", "60") == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 2


def test_default_length_fills_a_window(letters: Letters, capsys: pytest.CaptureFixture[str]) -> None:
    for prompt, length in (("", 256), ("x" * 10, 246), ("x" * 300, 128)):
        assert command("--prompt", prompt, "--steps", "2") == 0
        assert len(capsys.readouterr().out) == len(prompt) + length + 1


def test_infill_a_file_and_the_standard_input(
    letters: Letters, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gaps.py"
    path.write_bytes(b"x = <?4?>\n\xff")
    assert command("--infill", str(path), "--sampler", "ancestral", "--steps", "3") == 0
    assert re.fullmatch("x = [a-d]{4}\n\ufffd\n", capsys.readouterr().out)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"<?2?>!")))
    assert command("--infill", "-") == 0
    assert re.fullmatch("[a-d]{2}!\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--infill", "nowhere.py"], "there is no file nowhere.py"),
        (["--infill", __file__, "--length", "3"], "drop --prompt and --length"),
        (["--sampler", "magic"], "plan, ancestral, euler, first-hitting, confidence"),
    ],
)
def test_helpful_errors(
    letters: Letters, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments) == cli.EXIT_USAGE
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--steps", "0"], ["--length", "-1"], ["--prompt", "a", "--infill", "b"]]
)
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command(*arguments)
    assert stop.value.code == 2


def test_watching_a_file_prints_some_frames(letters: Letters, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--watch", "--length", "64", "--seed", "0") == 0
    printed = capsys.readouterr().out
    frames = re.findall(r"--- (\d+) of 64 masked ---\n(.*)\n", printed)
    assert 10 <= len(frames) <= 17
    for left, text in frames:
        assert text.count("░") == int(left)
        assert len(text) == 64
    counts = [int(left) for left, _ in frames]
    assert counts == sorted(counts, reverse=True)
    assert "\x1b" not in printed
    final = printed.splitlines()[-1]
    for _, text in frames:  # what is unmasked stays
        assert all(a in ("░", b) for a, b in zip(text, final, strict=True))


def play(screen: str, columns: int) -> list[str]:
    """What a terminal shows after the output: understands the three sequences that are used."""
    rows: list[str] = [""]
    row = 0
    for token in re.findall(r"\x1b\[\d*[A-Z]|\n|[^\x1b\n]+", screen):
        if token == "\x1b[2K":
            rows[row] = ""
        elif token == "\x1b[J":
            rows[row:] = [""]
        elif token.startswith("\x1b["):
            row -= int(token[2:-1])
            assert row >= 0
        elif token == "\n":
            row += 1
            if row == len(rows):
                rows.append("")
        else:
            assert len(token) <= columns
            rows[row] = token
    return rows


def test_watching_a_terminal_redraws_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "_FRAME_SECONDS", 0.0)
    monkeypatch.setattr(
        generate.shutil, "get_terminal_size", lambda: generate.shutil.os.terminal_size((30, 10))
    )
    terminal, tokens = Terminal(), parse_gaps(b"x = 1\n" + b"<?40?>" + b"\nend\x1b\n")
    screen = Screen(terminal, 40)
    terminal.write("above\n")
    seen: list[str] = []

    def callback(state: Tensor) -> None:
        screen(state)
        rows = play(terminal.getvalue(), 30)
        assert rows[:2] == ["above", "x = 1"]
        assert rows[4:6] == ["end\ufffd", ""]  # an escape byte in the text does not reach the terminal
        assert len(rows[2]) == 30
        assert len(rows[3]) == 10
        seen.append(rows[2] + rows[3])

    filled = fill(Letters(), tokens, callback=callback)
    assert len(seen) == 40
    assert seen[-1] == decode(filled.tokens)[6:46]
    screen.clear()
    assert play(terminal.getvalue(), 30) == ["above", ""]


def test_a_text_longer_than_the_terminal_shows_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        generate.shutil, "get_terminal_size", lambda: generate.shutil.os.terminal_size((30, 4))
    )
    terminal = Terminal()
    Screen(terminal, 1)(torch.tensor(list(b"a\nb\nc\nd\ne")))
    assert play(terminal.getvalue(), 30) == ["c", "d", "e", ""]


def test_terminals_without_unicode(letters: Letters, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert command("--watch", "--length", "4", "--prompt", "é") == 0
    assert re.search(rb"masked ---\n\?[_a-d]{4}\n", raw.getvalue())


@pytest.fixture(scope="module")
def written() -> str:
    """Six windows as the command writes them, fixed seeds."""
    model = generate.load_bytes_model()
    mask = torch.full((256,), MASK_ID)
    blocks = SAMPLERS["blocks"](None)
    return "\n".join(
        decode(fill(model, mask, sampler=blocks, top_p=0.9, seed=seed).tokens) for seed in range(6)
    )


def test_real_text_has_the_looks_of_python(written: str) -> None:
    """No single law, but what a model of single bytes does not do: ASCII, keywords as often as in code (19 in
    1000 bytes), lines of code's length, many of them indented.
    """
    assert sum(c.isascii() for c in written) > 0.97 * len(written)
    words = r"\b(?:self|def|return|if|for|in|import|None|not|class|raise|else|and|is)\b"
    assert len(re.findall(words, written)) >= 0.008 * len(written)
    lines = [line for line in written.splitlines() if line.strip()]
    assert 20 <= len(lines) <= 120
    assert sum(line.startswith("    ") for line in lines) >= len(lines) // 3


def test_many_words_are_the_librarys(written: str) -> None:
    """Words of three letters and more that the library has five times: 0.92 in held-out files. Letters alone,
    shuffled among the words, give 0.02.
    """
    letters = r"[A-Za-z]{3,}"
    library = decode(bytes_model.standard_library("train").long())
    known = {word for word, count in Counter(re.findall(letters, library)).items() if count >= 5}
    words = re.findall(letters, written)
    assert len(words) > 60
    assert sum(word in known for word in words) > 0.35 * len(words)
    shuffled = torch.tensor(list("".join(words).encode()))
    order = torch.randperm(len(shuffled), generator=torch.Generator().manual_seed(0))
    nonsense = bytes(shuffled[order].tolist()).decode()
    cut, place = [], 0
    for word in words:
        cut.append(nonsense[place : place + len(word)])
        place += len(word)
    assert sum(word in known for word in cut) < 0.15 * len(cut)
