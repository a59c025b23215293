"""`driftmax generate`: text from the shipped byte-level model, from nothing, after a prompt, or into gaps.

A text may be longer than the network's window of 256 bytes: gaps are filled window by window, from the left,
each with text on both sides where there is some.
"""

from __future__ import annotations

import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from driftmax import discrete
from driftmax.discrete import Denoiser, Sampler, State
from driftmax.discrete.bytes_model import MASK_ID, decode, encode, load_bytes_model
from driftmax.random import RowStreams

__all__ = ["SAMPLERS", "Filled", "fill", "parse_gaps", "run"]

# Bytes of a block: what is written left to right has to agree with less that is not there yet, and a small
# model is better at that. One byte a call in an order that does not look at the draws keeps the model's law.
_BLOCK = 8


def _blocks(steps: int | None) -> Sampler:
    return discrete.RandomOrder(block_length=_BLOCK if steps is None else max(_BLOCK, -(-_WIDTH // steps)))


#: Samplers by the name that the command takes, made from the steps per window: five that draw from the
#: model's law, three decoding rules.
SAMPLERS: dict[str, Callable[[int | None], Sampler]] = {
    "blocks": _blocks,
    "plan": lambda steps: discrete.Plan(),
    "ancestral": lambda steps: discrete.Ancestral(),
    "euler": lambda steps: discrete.Euler(),
    "first-hitting": lambda steps: discrete.FirstHitting(),
    "confidence": lambda steps: discrete.Confidence(),
    "entropy": lambda steps: discrete.EntropyOrder(),
    "margin": lambda steps: discrete.MarginOrder(),
}
_NEED_GRID = frozenset({"ancestral", "euler"})

_WIDTH = 256  # bytes of a window
GAP = re.compile(rb"<\?([0-9]+)\?>")
_FRAMES = 16  # printed where the output is not a terminal
_FRAME_SECONDS = 1 / 30


@dataclass(frozen=True)
class Filled:
    """A text without masks.

    Attributes
    ----------
    tokens : Tensor
        int64 ``[N]``.
    nfe : int
        Network calls.
    """

    tokens: Tensor
    nfe: int


def parse_gaps(text: bytes) -> Tensor:
    """Tokens of a text whose gaps are written ``<?N?>``, N bytes to be filled in.

    Parameters
    ----------
    text : bytes
        Anything; what is not a gap stays.

    Returns
    -------
    Tensor
        int64 ``[N]``, 256 in the gaps.

    Raises
    ------
    ValueError
        If there is no gap, or one of no bytes.

    Examples
    --------
    >>> from driftmax.discrete.generate import parse_gaps
    >>> parse_gaps(b"a<?2?>b").tolist()
    [97, 256, 256, 98]
    """
    tokens: list[int] = []
    end = 0
    for gap in GAP.finditer(text):
        if int(gap[1]) < 1:
            raise ValueError(f"a gap must have at least one byte: {gap[0].decode()}")
        tokens += [*text[end : gap.start()], *[MASK_ID] * int(gap[1])]
        end = gap.end()
    if not end:
        raise ValueError("there is no gap to fill; mark one of N bytes with <?N?>")
    return torch.tensor([*tokens, *text[end:]], dtype=torch.int64)


def _windows(tokens: Tensor, width: int) -> Iterator[tuple[int, int]]:
    """Windows [begin, end) to fill, from the left, until no mask is left; `tokens` changes in between.

    A short gap sits in the middle of its window. A long one is filled half a window at a time.
    """
    while bool((masked := tokens == MASK_ID).any()):
        first = int(masked.long().argmax())
        known = (~masked[first:]).nonzero()
        gap = int(known[0]) if len(known) else len(tokens) - first
        before = (width - gap) // 2 if gap <= width // 2 else width // 2
        begin = max(0, min(first - before, len(tokens) - width))
        yield begin, min(begin + width, len(tokens))


def fill(
    model: Denoiser,
    tokens: Tensor,
    *,
    sampler: Sampler | None = None,
    steps: int | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float | None = None,
    width: int = _WIDTH,
    callback: Callable[[Tensor], None] | None = None,
    progress: bool = False,
) -> Filled:
    """Draw the masked tokens of a text of any length.

    Parameters
    ----------
    model : callable
        Denoiser of tokens 0 to 255, such as `load_bytes_model`'s.
    tokens : Tensor
        int64 ``[N]``; 256 where a token is wanted.
    sampler : object, default Plan()
        A sampler of `driftmax.discrete`.
    steps : int, optional
        Steps per window; None reveals one token at a time (not for `Ancestral` and `Euler`).
    seed : int, default 0
        Of the noise; each window has a stream of its own.
    temperature : float, default 1.0
        Of each draw. The model's law is that of 1; below it, text is more likely and less varied.
    top_p : float, optional
        Draw from the likeliest bytes that together have this probability.
    width : int, default 256
        Tokens per window. A text of at most that many is one window and follows the model's law exactly; of a
        longer one, each window does given what is known in it.
    callback : callable, optional
        Called with the whole text, int64 ``[N]``, after every step.
    progress : bool, default False
        Show a bar for each window.

    Returns
    -------
    Filled

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete.generate import fill, parse_gaps
    >>> def always_x(tokens, t=None):
    ...     return torch.nn.functional.one_hot(torch.full_like(tokens, 120), 256) * 1e4
    >>> always_x.time_independent = True
    >>> bytes(fill(always_x, parse_gaps(b"a<?2?>b")).tokens.tolist())
    b'axxb'
    """
    tokens, calls = tokens.clone(), 0
    for number, (begin, end) in enumerate(_windows(tokens, width)):

        def show(state: State, begin: int = begin, end: int = end) -> None:
            if callback is not None:
                tokens[begin:end] = state.tokens[0]
                callback(tokens)

        result = discrete.sample(
            model,
            (1, end - begin),
            mask_id=MASK_ID,
            sampler=discrete.Plan() if sampler is None else sampler,
            schedule=discrete.LogLinear(),
            steps=steps,
            prompt=tokens[None, begin:end].clone(),
            rng=RowStreams(seed, [number]),
            callback=show,
            progress=progress,
            temperature=temperature,
            top_p=top_p,
        )
        tokens[begin:end] = result.tokens[0]
        calls += int(result.nfe)
    return Filled(tokens, calls)


class Screen:
    """Shows a text while it unmasks: in place on a terminal, else as a few frames one below the other."""

    def __init__(self, stream: TextIO, masked: int) -> None:
        self.stream, self.total = stream, masked
        self.live = stream.isatty()
        self.rows = 0
        self.drawn = -1.0
        self.left = masked + 1

    def __call__(self, tokens: Tensor) -> None:
        """Show the text, unless the last frame was just now (terminal) or differs by little (file)."""
        left = int((tokens == MASK_ID).sum())
        if self.live:
            now = time.perf_counter()
            if now - self.drawn >= _FRAME_SECONDS or not left:
                self.drawn = now
                self.redraw(_shown(tokens, self.stream))
        elif self.left - left >= self.total / _FRAMES:
            self.left = left
            _write(self.stream, f"--- {left} of {self.total} masked ---\n{_shown(tokens, self.stream)}\n")

    def redraw(self, text: str) -> None:
        """Replace the last frame by this one, cut to the terminal's size."""
        size = shutil.get_terminal_size()
        lines = [
            line[i : i + size.columns]
            for line in text.expandtabs(8).split("\n")
            for i in range(0, max(1, len(line)), size.columns)
        ]
        lines = lines[-max(1, size.lines - 1) :]
        back = f"\x1b[{self.rows}A" if self.rows else ""
        _write(self.stream, back + "".join(f"\x1b[2K{line}\n" for line in lines) + "\x1b[J")
        self.rows = len(lines)

    def clear(self) -> None:
        """Take the last frame off the terminal."""
        if self.live and self.rows:
            _write(self.stream, f"\x1b[{self.rows}A\x1b[J")
            self.rows = 0


def _shown(tokens: Tensor, stream: TextIO) -> str:
    """Text for people: masks as blocks, and on a terminal nothing that could move its cursor."""
    encoding = stream.encoding or "utf-8"
    mask = "░" if "░".encode(encoding, "replace") != b"?" else "_"
    text = decode(tokens, mask=mask)
    if stream.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    return text


def _write(stream: TextIO, text: str) -> None:
    """Write what the stream's encoding can hold, the rest replaced."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "replace").decode(encoding))
    stream.flush()


def _request(prompt: str | None, infill: Path | None, length: int | None, width: int) -> Tensor:
    """The text to be filled in, from the command's options."""
    if infill is not None:
        if prompt is not None or length is not None:
            raise ValueError("--infill says what is known and how much is wanted; drop --prompt and --length")
        if infill != Path("-") and not infill.is_file():
            raise FileNotFoundError(f"there is no file {infill}")
        raw = sys.stdin.buffer.read() if infill == Path("-") else infill.read_bytes()
        return parse_gaps(raw)
    known = encode(prompt or "")
    wanted = length if length is not None else max(width - len(known), width // 2)
    return torch.cat((known, torch.full((wanted,), MASK_ID)))


def run(
    *,
    prompt: str | None = None,
    infill: Path | None = None,
    sampler: str = "blocks",
    steps: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    temperature: float = 1.0,
    top_p: float = 0.9,
    watch: bool = False,
) -> int:
    """Print a text drawn from the shipped model: what ``driftmax generate`` does.

    Parameters
    ----------
    prompt : str, optional
        How the text begins.
    infill : Path, optional
        Instead: a file with gaps ``<?N?>``; ``-`` is the standard input.
    sampler : str, default "blocks"
        A key of `SAMPLERS`.
    steps : int, optional
        Steps per window of 256 bytes; by default one byte at a time, or 256 steps for samplers that need a
        grid.
    length : int, optional
        Bytes after the prompt; by default those that are left in a window, at least half of one.
    seed : int, optional
        By default a fresh one. It is printed to the standard error, with the network calls and the time.
    temperature : float, default 1.0
        Of each draw; see `fill`.
    top_p : float, default 0.9
        See `fill`; 1 draws from the model's law.
    watch : bool, default False
        Show the text while it unmasks.

    Returns
    -------
    int
        Exit code 0.

    Raises
    ------
    ValueError, FileNotFoundError
        On options that do not fit, or files that are not there.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"no sampler called {sampler}; there are {', '.join(SAMPLERS)}")
    model = load_bytes_model()
    width = model.config.length
    tokens = _request(prompt, infill, length, width)
    if steps is None and sampler in _NEED_GRID:
        steps = width
    seed = secrets.randbits(32) if seed is None else seed
    screen = Screen(sys.stdout, int((tokens == MASK_ID).sum())) if watch else None
    begin = time.perf_counter()
    filled = fill(
        model,
        tokens,
        sampler=SAMPLERS[sampler](steps),
        steps=steps,
        seed=seed,
        temperature=temperature,
        top_p=None if top_p == 1.0 else top_p,
        width=width,
        callback=screen,
        progress=screen is None and sys.stderr.isatty(),
    )
    if screen is not None:
        screen.clear()
    seconds = time.perf_counter() - begin
    text = _shown(filled.tokens, sys.stdout)
    _write(sys.stdout, text if text.endswith("\n") else f"{text}\n")
    _write(sys.stderr, f"[{sampler}, seed {seed}: {filled.nfe} network calls, {seconds:.1f} s]\n")
    return 0
