"""Next-token logits of a real language model over real text, made on the spot.

The model mixes a smoothed 4-gram with a small recurrent network, both fitted to the Python standard library's
own sources, which every machine that runs this package carries, at a vocabulary of 32768. It takes under a
minute on two cores (a third of that for the quick model), reports bits per token on files it never saw, and
is cached. The logits are what a sampler meets in practice: a few likely tokens, a long uneven tail, and rows
of very different entropy.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import re
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from . import ngram
from .machine import threads, version_of

VOCABULARY = 32768
BYTES = 256  # the first ids spell words outside the vocabulary
WIDTH = 128
HIDDEN = 256
SPAN = 32  # tokens per training sequence
SPAN_READ = 128  # tokens per window when logits are made
WARM = 16  # first positions of such a window, not used
CHUNK = 256  # rows of logits made at a time
HELD_OUT = 20  # every 20th file is never trained on
NEGATIVES = 1024
NETWORK_RATE = 4e-3
TABLE_RATE = 0.1
NETWORK_SHARE = 0.25  # weight of the network in the mixture; the counts have the rest
FORMAT = 1  # raise when the training changes, so that old caches are not used

# Words with their leading blank, split at case changes and underscores, numbers, punctuation, line breaks
# with their indentation: the pieces a source file is made of.
PIECE = re.compile(
    r" ?[A-Z]?[a-z]+| ?[A-Z]+(?![a-z])| ?\d{1,4}|\n[ \t]*|[ ]+(?=\S)| ?[^\sA-Za-z\d]+|\s|.", re.DOTALL
)


@dataclass(frozen=True)
class Recipe:
    """How long to train: sequences per step, most steps, and a wall-clock cap for slow machines."""

    name: str
    batch: int
    steps: int
    seconds: float


FULL = Recipe("full", batch=32, steps=800, seconds=45.0)
QUICK = Recipe("quick", batch=32, steps=150, seconds=8.0)


class NextToken(torch.nn.Module):
    """Embedding, one GRU, and an output layer tied to the embedding with a unigram bias."""

    def __init__(self, unigram: torch.Tensor) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(unigram.numel(), WIDTH)
        torch.nn.init.normal_(self.embedding.weight, std=0.1)
        self.recurrent = torch.nn.GRU(WIDTH, HIDDEN, batch_first=True)
        self.down = torch.nn.Linear(HIDDEN, WIDTH)
        self.bias = torch.nn.Parameter(unigram.log())

    def features(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, T] ids to [B, T, WIDTH] features; feature t has seen tokens up to t."""
        states, _ = self.recurrent(self.embedding(tokens))
        return self.down(states)  # type: ignore[no-any-return]  # torch.nn.Module calls are untyped

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """[n, WIDTH] features to [n, V] logits."""
        return features @ self.embedding.weight.T + self.bias


@dataclass(frozen=True)
class RealModel:
    """A trained model and the held-out text.

    Attributes
    ----------
    network : NextToken
        In evaluation mode.
    counts : ngram.NGram
        The counted half of the mixture.
    held_out : int64 tensor
        Token ids of the files that were not trained on, in one row.
    bits_per_token, unigram_bits : float
        Cross entropy on held-out text, of the model and of token frequencies alone.
    seconds : float
        Time the training took when it was done.
    recipe : str
        ``"full"`` or ``"quick"``.
    """

    network: NextToken
    counts: ngram.NGram
    held_out: torch.Tensor
    bits_per_token: float
    unigram_bits: float
    seconds: float
    recipe: str

    @torch.no_grad()
    def logits(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, V] log-probabilities at positions spread over held-out text, and the tokens that came."""
        contexts, targets = _windows(self.held_out, rows)
        features = self.network.features(contexts)[:, WARM:].reshape(-1, WIDTH)[:rows]
        before = contexts.unfold(1, ngram.ORDER - 1, 1)[:, WARM - ngram.ORDER + 2 :].reshape(
            -1, ngram.ORDER - 1
        )[:rows]
        result = torch.empty(rows, VOCABULARY)
        for begin in range(0, rows, CHUNK):
            part = slice(begin, begin + CHUNK)
            law = torch.softmax(self.network.logits(features[part]), -1).mul_(NETWORK_SHARE)
            law.add_(self.counts.probabilities(before[part].numpy()), alpha=1.0 - NETWORK_SHARE)
            torch.log(law, out=result[part])
        return result, targets

    def summary(self) -> str:
        """One line that shows that this is a real model."""
        return (
            "real logits: 4-gram and GRU mixture on the standard library's sources, "
            f"V = {VOCABULARY}, held-out {self.bits_per_token:.2f} bits per token "
            f"(perplexity {2**self.bits_per_token:.0f}; token frequencies alone "
            f"{2**self.unigram_bits:.0f}), {self.recipe} training, {self.seconds:.0f} s"
        )


def cache_directory() -> Path:
    """Where the trained model is kept: ``DRIFTMAX_CACHE``, or the platform's cache directory for the user."""
    forced = os.environ.get("DRIFTMAX_CACHE")
    if forced:
        return Path(forced)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "driftmax"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "driftmax"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "driftmax"


def source_files() -> list[Path]:
    """The standard library's Python files without its tests and installed packages, in a fixed order.

    Raises
    ------
    FileNotFoundError
        If this Python was installed without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts)]
    if len(files) < 100:
        raise FileNotFoundError(
            f"real logits need the standard library's sources; {root} holds {len(files)} files"
        )
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def tokenize(texts: list[str], vocabulary: int = VOCABULARY) -> list[np.ndarray]:
    """Split texts into pieces; the most frequent ones become tokens, the rest is spelled in bytes.

    Ties in frequency go to the piece that comes first in the alphabet, so the vocabulary does not depend on
    hash order. Returns one int32 array of ids below ``vocabulary`` per text.
    """
    pieces = [PIECE.findall(text) for text in texts]
    counts: collections.Counter[str] = collections.Counter()
    for one in pieces:
        counts.update(one)
    kept = sorted(counts, key=lambda piece: (-counts[piece], piece))[: vocabulary - BYTES]
    ids: dict[str, tuple[int, ...]] = {piece: (BYTES + i,) for i, piece in enumerate(kept)}
    for piece in counts:
        if piece not in ids:
            ids[piece] = tuple(piece.encode("utf-8", errors="replace"))
    return [np.fromiter((i for piece in one for i in ids[piece]), dtype=np.int32) for one in pieces]


def _corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out token ids."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in source_files()]
    ids = tokenize(texts)
    train = [one for i, one in enumerate(ids) if i % HELD_OUT]
    held_out = [one for i, one in enumerate(ids) if i % HELD_OUT == 0]
    return (
        torch.from_numpy(np.concatenate(train)).long(),
        torch.from_numpy(np.concatenate(held_out)).long(),
    )


class _Rows:
    """The few rows of the embedding and the output bias that one step touches, as leaves of their own.

    Each step reads about two thousand of the 32768 rows. Gradients and row-wise Adagrad (Duchi et al., 2011)
    on just these spare every step a dense update of the whole table.
    """

    def __init__(self, model: NextToken) -> None:
        self.table, self.bias = model.embedding.weight.data, model.bias.data
        self.table_scale = torch.full((self.table.shape[0], 1), 1e-2)
        self.bias_scale = torch.full_like(self.bias, 1.0)

    def take(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.table[ids].requires_grad_(), self.bias[ids].requires_grad_()

    def step(self, ids: torch.Tensor, table: torch.Tensor, bias: torch.Tensor, rate: float) -> None:
        """Adagrad with one scale per row; ``ids`` has no repeats."""
        assert table.grad is not None
        assert bias.grad is not None
        self.table_scale[ids] += table.grad.square().sum(1, keepdim=True)
        self.table[ids] -= rate * table.grad / self.table_scale[ids].sqrt()
        self.bias_scale[ids] += bias.grad.square()
        self.bias[ids] -= rate * bias.grad / self.bias_scale[ids].sqrt()


def _sampled_loss(
    model: NextToken, rows: _Rows, tokens: torch.Tensor, noise: torch.Tensor, rate: float
) -> torch.Tensor:
    """One step's loss and the update of the table's rows; the caller updates the network.

    Softmax over the target and shared negatives, corrected for how often each negative is proposed.
    """
    negatives = torch.multinomial(noise, NEGATIVES, replacement=True)
    ids, where = torch.unique(torch.cat([tokens.reshape(-1), negatives]), return_inverse=True)
    table, bias = rows.take(ids)
    text, drawn = where[: tokens.numel()].reshape(tokens.shape), where[tokens.numel() :]
    targets = text[:, 1:].reshape(-1)
    states, _ = model.recurrent(table[text[:, :-1]])
    features = model.down(states).reshape(-1, WIDTH)
    proposed = (noise[ids] * NEGATIVES).log()
    own = (features * table[targets]).sum(-1) + bias[targets] - proposed[targets]
    other = features @ table[drawn].T + (bias[drawn] - proposed[drawn])
    other = other.masked_fill(drawn == targets[:, None], -torch.inf)
    loss = torch.nn.functional.softplus(torch.logsumexp(other, 1) - own).mean()
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own annotation is missing
    rows.step(ids, table, bias, rate)
    return loss.detach()


def _train(train: torch.Tensor, unigram: torch.Tensor, recipe: Recipe) -> NextToken:
    """Adam on the network, Adagrad on the table, linear decay; progress is the larger of steps and time."""
    model = NextToken(unigram)
    noise = unigram**0.75
    noise /= noise.sum()
    network = [*model.recurrent.parameters(), *model.down.parameters()]
    rows = _Rows(model)
    optimizer = torch.optim.Adam(network, lr=1.0, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)
    span = torch.arange(SPAN + 1)
    start = time.perf_counter()
    with tqdm(total=recipe.steps, desc="training the language model", unit="step", leave=False) as bar:
        for step in range(recipe.steps):
            done = max(step / recipe.steps, (time.perf_counter() - start) / recipe.seconds)
            if done >= 1.0:
                break
            optimizer.param_groups[0]["lr"] = NETWORK_RATE * (1.0 - done) + 1e-4
            first = torch.randint(train.numel() - SPAN - 1, (recipe.batch, 1), generator=generator)
            optimizer.zero_grad()
            loss = _sampled_loss(model, rows, train[first + span], noise, TABLE_RATE * (1.0 - done))
            torch.nn.utils.clip_grad_norm_(network, 1.0)
            optimizer.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return model.eval()


def _windows(held_out: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Contexts [windows, SPAN_READ] spread over held-out text, and the tokens next to the first ``rows``.

    The first ``WARM`` positions of a window, where the model has seen little, do not count.
    """
    windows = math.ceil(rows / (SPAN_READ - WARM))
    begin = torch.linspace(0, held_out.numel() - SPAN_READ - 1, windows + 1).long()[:windows]
    cut = held_out[begin[:, None] + torch.arange(SPAN_READ + 1)]
    return cut[:, :-1], cut[:, WARM + 1 :].reshape(-1)[:rows]


def _fit(recipe: Recipe, rows: int = 1024) -> RealModel:
    """Train both halves and measure the held-out cross entropy at ``rows`` positions."""
    start = time.perf_counter()
    train, held_out = _corpus()
    frequencies = torch.bincount(train, minlength=VOCABULARY).float() + 0.1
    unigram = frequencies / frequencies.sum()
    counts = ngram.fit(train.numpy(), VOCABULARY)
    # One thread: the products are small, and the trained weights then do not depend on the machine's cores.
    with torch.random.fork_rng(devices=[]), threads(1):
        torch.manual_seed(0)
        network = _train(train, unigram, recipe)
    draft = RealModel(network, counts, held_out, math.nan, math.nan, math.nan, recipe.name)
    log_law, targets = draft.logits(rows)
    bits = -float(log_law.gather(1, targets[:, None]).mean()) / math.log(2)
    unigram_bits = -float(unigram[targets].log2().mean())
    seconds = time.perf_counter() - start
    return dataclasses.replace(draft, bits_per_token=bits, unigram_bits=unigram_bits, seconds=seconds)


def _cache_file(recipe: Recipe) -> Path:
    python = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    name = f"real-logits-{FORMAT}-{recipe.name}-python{python}-torch{version_of('torch')}.pt"
    return cache_directory() / name.replace("+", "-")


def _load(path: Path) -> RealModel:
    stored = torch.load(path, map_location="cpu", weights_only=True)
    model = NextToken(torch.full((VOCABULARY,), 1.0 / VOCABULARY))
    model.load_state_dict(stored["network"])
    numbers = {key: float(stored[key]) for key in ("bits_per_token", "unigram_bits", "seconds")}
    counts = ngram.from_state(stored["counts"])
    return RealModel(model.eval(), counts, stored["held_out"], recipe=str(stored["recipe"]), **numbers)


def _store(path: Path, real: RealModel) -> None:
    """Write beside the target and rename, so that a run that is cut off leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    torch.save(
        {
            "network": real.network.state_dict(),
            "counts": real.counts.state(),
            "held_out": real.held_out,
            "bits_per_token": real.bits_per_token,
            "unigram_bits": real.unigram_bits,
            "seconds": real.seconds,
            "recipe": real.recipe,
        },
        partial,
    )
    partial.replace(path)


def real_model(*, quick: bool = False) -> RealModel:
    """The trained model: from the cache, or trained now (and then cached).

    Parameters
    ----------
    quick : bool, default False
        Settle for the shorter training; a cached full model is still preferred.

    Returns
    -------
    RealModel

    Raises
    ------
    FileNotFoundError
        If the standard library's sources are not installed.
    """
    for recipe in (FULL, QUICK) if quick else (FULL,):
        path = _cache_file(recipe)
        if path.exists():
            return _load(path)
    recipe = QUICK if quick else FULL
    real = _fit(recipe)
    _store(_cache_file(recipe), real)
    return real


def real_logits(rows: int, *, quick: bool = False) -> torch.Tensor:
    """Next-token logits over held-out text.

    Parameters
    ----------
    rows : int
        Number of positions, spread over the held-out files.
    quick : bool, default False
        Passed to :func:`real_model`.

    Returns
    -------
    float32 tensor, shape [rows, 32768]
    """
    return real_model(quick=quick).logits(rows)[0]
