"""The operators on a GPU: Triton against the reference at real sizes, CUDA graphs, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import driftmax
import torch
from driftmax import RowStreams
from driftmax.reference import categorical as oracle
from driftmax.reference import fill as reference_noise
from driftmax.reference.philox import streams, words64

from .gpu_session import Session, agree, both, equal

__all__ = [
    "check_capture",
    "check_categorical",
    "check_fills",
    "check_head",
    "check_law",
    "check_steps",
]


def check_fills(session: Session) -> None:
    """Noise is the reference's, bit for bit, also past element 2**32."""
    size = 4_000_001 if session.on_gpu else 5001
    for kind in ("uniform", "exponential", "gumbel", "normal"):
        for dtype in (torch.float32, torch.float64):
            fill = getattr(driftmax.random, kind)
            name = f"fill {kind} {dtype}"
            session.check(name, agree, fill, size, rng=7, dtype=dtype, device=session.device)
    if session.on_gpu and torch.cuda.get_device_properties(0).total_memory > 40e9:
        session.check("fill bits past 2**32 elements", _far_words, session)


def _far_words(session: Session) -> str:
    words = driftmax.random.bits(2**32 + 4096, rng=3, device=session.device, backend="triton")[-4096:]
    stream = streams(1, 1, 3, None, None, torch.zeros(1, dtype=torch.int64), 0, None, torch.device("cpu"))
    wanted = reference_noise.noise(stream, 1, 2**32, 4096, torch.int32)[0]
    return equal(words.cpu(), wanted)


def _block_race(logits: torch.Tensor) -> str:
    ours, theirs = both(driftmax.categorical, logits, rng=11)
    differ: torch.Tensor = ours != theirs
    stream = streams(logits.shape[0], 1, 11, None, None, None, 0, None, logits.device)
    padded = torch.nn.functional.pad(logits.double(), (0, -logits.shape[1] % 1024), value=-torch.inf)
    padded = padded.view(logits.shape[0], -1, 1024)
    mass = (padded - logits.double().amax(1)[:, None, None]).exp().sum(2)
    clock = reference_noise.exponential(*words64(stream, oracle.BLOCK_NOISE, 0, mass.shape[1])) / mass
    first, second = clock.sort(1).values[:, :2].unbind(1)
    unexplained = int((differ & (second > first * (1 + 2.0**-18))).sum())
    assert unexplained == 0, f"{unexplained} tokens differ without a near tie"
    return f"{logits.shape[0]} draws, {int(differ.sum())} near ties"


def check_categorical(session: Session) -> None:
    """Tokens against the reference at real sizes, every dtype and option."""
    rows, vocab = (256, 128_256) if session.on_gpu else (4, 3000)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        logits = session.randn(rows, vocab, dtype=dtype)
        name = f"categorical gumbel {dtype}"
        session.check(name, agree, driftmax.categorical, logits, method="gumbel", rng=5)
        session.check(f"categorical block {dtype}", _block_race, logits)
    logits = session.randn(rows, vocab)
    for law in ({"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 1000, "top_p": 0.95, "min_p": 0.01}):
        session.check(f"categorical {law}", _nearly, logits, law)
    session.check("gumbel_topk", agree, driftmax.gumbel_topk, logits[: rows // 4], 100, rng=6)
    if session.on_gpu:
        wide = session.randn(2, 2**24 + 12_345)
        session.check("V > 2**24", agree, driftmax.categorical, wide, method="gumbel", rng=5)
        session.check("V > 2**24, block", _block_race, wide)


def _nearly(logits: torch.Tensor, law: dict[str, Any]) -> str:
    """Kept sets may differ where a running mass is within rounding of top-p; another token needs luck too."""
    ours, theirs = both(driftmax.categorical, logits, rng=6, **law)
    differ = int((ours != theirs).sum())
    assert differ <= 1, f"{differ} of {ours.numel()} differ"
    return f"{ours.numel()} draws, {differ} differ"


def check_head(session: Session) -> None:
    """The fused head against the float64 product, and its independence of the batch."""
    rows, vocab, depth = (256, 128_256, 4096) if session.on_gpu else (3, 2100, 64)
    dtype = torch.bfloat16
    hidden, weight = session.randn(rows, depth, dtype=dtype), session.randn(vocab, depth, dtype=dtype) * 0.002
    head = driftmax.lm_head_categorical

    def invariant() -> str:
        stream = RowStreams(5, rows)
        whole, stats = head(hidden, weight, rng=stream, return_stats=True, backend="triton")
        parts = [slice(0, n) for n in (1, 17, 40, 64, 100, 200) if n < rows] + [slice(rows - 1, rows)]
        for part in parts:  # batches that tiles of all sizes take
            few, own = head(hidden[part], weight, rng=stream[part], return_stats=True, backend="triton")
            plain = head(hidden[part], weight, rng=stream[part], backend="triton")
            equal(whole[part], few)
            equal(whole[part], plain)
            if session.on_gpu:
                equal(stats.log_z[part], own.log_z)
                equal(stats.entropy[part], own.entropy)
        return f"{rows} rows, {len(parts)} parts"

    session.check("head: draws do not depend on the batch", invariant)

    def close() -> str:
        some = slice(0, 64)
        logits = hidden[some].float().double() @ weight.double().T
        ours, stats = head(hidden[some], weight, rng=5, return_stats=True, backend="triton")
        theirs, wanted = driftmax.categorical(logits, rng=5, return_stats=True, backend="reference")
        differ = int((ours != theirs).sum())
        assert differ <= 1, f"{differ} tokens differ"
        torch.testing.assert_close(stats.log_z.double(), wanted.log_z, rtol=1e-4, atol=1e-4)
        return f"{len(ours)} draws, {differ} differ"

    session.check("head: tokens of the unfused path", close)


def check_steps(session: Session) -> None:
    """Steps of masked diffusion against the reference; one captured, its number on the device."""
    rows, length, vocab = (4, 64, 50_257) if session.on_gpu else (2, 4, 1100)
    logits = session.randn(rows * length, vocab).view(rows, length, vocab)
    chance = torch.linspace(0.1, 1, rows, dtype=torch.float64, device=session.device)
    number = torch.zeros(1, dtype=torch.int64, device=session.device)
    seeds = torch.arange(rows, device=session.device)
    tokens = torch.empty(rows, length, dtype=torch.int64, device=session.device)

    def step(backend: str = "triton") -> torch.Tensor:
        tokens.fill_(vocab)
        stream = RowStreams(seeds, torch.arange(rows, device=session.device), step=number)
        counts: torch.Tensor = driftmax.unmask(
            logits, tokens, chance, mask_id=vocab, forbidden=seeds, rng=stream, backend=backend
        )
        return torch.cat((tokens, counts[:, None]), 1)

    def agrees() -> str:
        differ = int((step() != step("reference")).sum())
        assert differ <= 1, f"{differ} differ"  # a near tie of the block race
        return f"{rows * length} positions, {differ} differ"

    def graph() -> str:
        step()
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            found = step()
        for k in (3, 2**24 - 1):
            number.fill_(k)
            captured.replay()
            equal(found.clone(), step())
        return "two replays equal eager"

    def moves(size: int, **rule: Any) -> str:
        scores = session.randn(8, size).round()
        drawn = torch.arange(size, device=session.device).expand(8, size)
        masked = torch.where(drawn % 3 == 0, 0, -1)
        results = []
        for backend in ("triton", "reference"):
            written = masked.clone()
            moved = driftmax.transfer(written, drawn, scores, mask_id=-1, backend=backend, **rule)
            results.append(torch.cat((written, moved.long())))
        return equal(*results)

    session.check("unmask", agrees)
    for size in (64, 1024, 4096, 32_768) if session.on_gpu else (64,):
        session.check(f"transfer count L={size}", moves, size, count=size // 8)
        session.check(f"transfer threshold L={size}", moves, size, threshold=2.0)
    if session.on_gpu:
        session.check("CUDA graph of an unmask step", graph)


def _chi_square(draws: torch.Tensor, p: torch.Tensor) -> float:
    counts = torch.bincount(draws, minlength=len(p)).double()
    expected = p.double() * len(draws)
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(p) - 1) / 2.0).double(), statistic.cpu() / 2))


def check_law(session: Session) -> None:
    """Chi-square at 1e-6 a test, and the 18-nat tail, in which 24-bit noise never draws."""
    draws, vocab = (1 << 18, 2500) if session.on_gpu else (64, 1030)
    row = session.randn(1, vocab) / 3
    options: tuple[dict[str, Any], ...] = ({"method": "block"}, {"method": "gumbel"}, {"top_k": 500})
    for option in options:

        def law(option: dict[str, Any] = option) -> str:
            tokens = driftmax.categorical(row.expand(draws, vocab), rng=21, backend="triton", **option)
            p = row[0].double().softmax(0)
            if "top_k" in option:
                p = torch.where(p >= p.topk(500).values[-1], p, 0.0)
                assert bool((p[tokens] > 0).all()), "a token outside the kept set"
                keep = p.nonzero()[:, 0]
                tokens, p = torch.searchsorted(keep, tokens), p[keep] / p.sum()
            value = _chi_square(tokens, p)
            assert value > 1e-6, f"p = {value:.2g}"
            return f"{draws} draws, p = {value:.3f}"

        session.check(f"law {option}", law)

    def tail(method: str) -> str:
        size, count = (200_000, 1 << 16) if session.on_gpu else (5000, 64)
        heavy = torch.full((1, size), -18.0, device=session.device)
        heavy[0, 17] = 0
        tokens = driftmax.categorical(heavy.expand(count, size), rng=22, method=method, backend="triton")
        share = float(1 - heavy[0].double().softmax(0)[17])
        seen, expected = int((tokens != 17).sum()), count * share
        assert abs(seen - expected) <= 5 * expected**0.5 + 5, f"{seen} tail draws, expected {expected:.0f}"
        return f"{seen} tail draws, expected {expected:.0f}"

    for method in ("block", "gumbel"):
        session.check(f"18-nat tail {method}", tail, method)


def check_capture(session: Session) -> None:
    """CUDA graphs replay with the seed that the tensor holds then; torch.compile draws what eager draws."""
    logits = session.randn(8, 50_257 if session.on_gpu else 1500)
    seeds = torch.zeros(1, dtype=torch.int64, device=session.device)
    options: tuple[dict[str, Any], ...] = ({}, {"method": "gumbel"}, {"top_k": 50, "top_p": 0.9})
    for option in options:

        def draw(option: dict[str, Any] = option) -> torch.Tensor:
            stream = RowStreams(seeds, torch.arange(8, device=session.device))
            tokens: torch.Tensor = driftmax.categorical(logits, rng=stream, backend="triton", **option)
            return tokens

        def graph(draw: Callable[[], torch.Tensor] = draw) -> str:
            draw()
            torch.cuda.synchronize()
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                tokens = draw()
            for seed in (1, 99):
                seeds.fill_(seed)
                captured.replay()
                equal(tokens, draw())
            return "two replays equal eager"

        if session.on_gpu:
            session.check(f"CUDA graph {option}", graph)

    def compiled() -> str:
        step = torch.compile(lambda x: driftmax.categorical(x * 2, rng=3, backend="triton"), fullgraph=True)
        return equal(step(logits), driftmax.categorical(logits * 2, rng=3, backend="triton"))

    if session.on_gpu:
        session.check("torch.compile(fullgraph=True)", compiled)
