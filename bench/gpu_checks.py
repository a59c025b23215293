"""What only a GPU shows: Triton against the reference at real sizes, CUDA graphs, torch.compile, and speed.

Run by bench/gpu.sh. Needs torch and triton only; the compiled core may be missing. Writes ``checks.csv``
and ``gpu.csv`` into ``--out`` and exits with 1 if a check failed; a workload whose check failed is not
timed. ``--device cpu`` is a dry run in Triton's interpreter (set TRITON_INTERPRET=1) at toy sizes, which
times nothing worth reading.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import driftmax
import torch
import triton
from driftmax import RowStreams
from driftmax.reference import categorical as oracle
from driftmax.reference import fill as reference_noise
from driftmax.reference.philox import streams, words64

Run = Callable[[], object]


@dataclass
class Session:
    """Device, sizes and results of one run."""

    device: torch.device
    out: Path
    quick: bool
    checks: list[dict[str, object]] = field(default_factory=list)
    rows: list[dict[str, object]] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """Whether this is the real thing."""
        return self.device.type == "cuda"

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Gaussian logits, the same on every machine."""
        generator = torch.Generator().manual_seed(len(shape) + shape[-1])
        return torch.randn(*shape, generator=generator).to(self.device, dtype) * 3

    def check(self, name: str, test: Callable[..., str], *arguments: Any, **options: Any) -> bool:
        """Run a check that returns what it saw and raises AssertionError on a failure."""
        begin = time.perf_counter()
        try:
            ok, seen = True, test(*arguments, **options)
            driftmax.check_status()
        except (
            Exception
        ) as failure:  # one failed check must not hide the others; it is in the table and the exit code
            ok, seen = False, f"{type(failure).__name__}: {str(failure).splitlines()[:1]}"
            traceback.print_exc()
        self.checks.append(
            {"check": name, "ok": ok, "seen": seen, "seconds": round(time.perf_counter() - begin, 2)}
        )
        print(f"{'ok  ' if ok else 'FAIL'} {name}: {seen}", flush=True)
        return ok


def both(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, Any]:
    """The Triton and the reference result of a call."""
    return function(*arguments, **options, backend="triton"), function(
        *arguments, **options, backend="reference"
    )


def agree(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Assert that both backends give the same bits."""
    return equal(*both(function, *arguments, **options))


def equal(ours: torch.Tensor, theirs: torch.Tensor) -> str:
    """Assert bitwise equality; say of how much."""
    differ = int((ours != theirs).sum())
    assert differ == 0, f"{differ} of {ours.numel()} differ"
    return f"{ours.numel()} equal"


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
        whole = head(hidden, weight, rng=stream, backend="triton")
        for part in (slice(0, 1), slice(1, rows // 2), slice(rows - 1, rows)):
            equal(whole[part], head(hidden[part], weight, rng=stream[part], backend="triton"))
        return f"{rows} rows, three splits"

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


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch annotates its instances only


def _times(session: Session, run: Run, rounds: int) -> list[float]:
    """Seconds of a call: a CUDA graph's replay with a cold L2 where it can be captured, else eager."""
    run()
    if not session.on_gpu:
        start = time.perf_counter()
        run()
        return [time.perf_counter() - start]
    torch.cuda.synchronize()
    replay: Run = run
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        replay = graph.replay
    except RuntimeError:  # some peers sync inside; they are timed as users call them
        torch.cuda.synchronize()
    flush = torch.empty(1 << 28, dtype=torch.int8, device=session.device)
    seconds = []
    for _ in range(rounds):
        flush.zero_()
        begin, end = _event(), _event()
        begin.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return seconds


def bench(
    session: Session, case: str, variant: str, shape: tuple[int, int], runs: dict[str, Run], limit: Run
) -> None:
    """Time driftmax (first), its peers and the limit; add one row for each."""
    rounds = 10 if session.quick else 30
    medians: dict[str, float] = {}
    for name, run in {**runs, "limit": limit}.items():
        try:
            medians[name] = statistics.median(_times(session, run, rounds))
        except Exception as failure:  # a peer that fails at this size is reported as such, not timed
            print(f"     {case} {variant} {name}: {type(failure).__name__}: {str(failure).splitlines()[:1]}")
    ours, floor = medians.get("driftmax"), medians.get("limit")
    for name, median in medians.items():
        row: dict[str, object] = {
            "case": case, "variant": variant, "N": shape[0], "V": shape[1], "contender": name,
            "median_ms": round(median * 1e3, 5),
            "ratio": round(median / ours, 3) if ours else "",
            "share_of_limit": round(floor / ours, 3) if floor and ours and name == "driftmax" else "",
        }  # fmt: skip
        session.rows.append(row)
        print("     " + "  ".join(f"{key}={value}" for key, value in row.items() if value != ""), flush=True)


def peer(module: str, name: str) -> Callable[..., object] | None:
    """A function of an optional package, or None."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except (
        Exception
    ) as failure:  # broken installs of peers raise anything on import; the bench goes on without them
        print(f"     no {module}: {type(failure).__name__}")
        return None


def torch_gumbel(x: torch.Tensor) -> torch.Tensor:
    """The usual way: float32 Gumbels, argmax."""
    clock = torch.empty_like(x, dtype=torch.float32).exponential_()
    return (x.float() - clock.log()).argmax(-1)


def torch_multinomial(x: torch.Tensor) -> torch.Tensor:
    """The other usual way."""
    return torch.multinomial(x.float().softmax(-1), 1)


def torch_topk(x: torch.Tensor, k: int) -> torch.Tensor:
    """Top-k sampling with torch."""
    return torch.multinomial(x.float().topk(k).values.softmax(-1), 1)


def torch_gumbel_topk(x: torch.Tensor, k: int) -> torch.Tensor:
    """k draws without replacement, float32."""
    return (x - torch.empty_like(x).exponential_().log()).topk(k).indices


def on_probs(function: Callable[..., object], x: torch.Tensor, *arguments: object) -> object:
    """A peer that takes probabilities, with the softmax it needs."""
    return function(x.float().softmax(-1), *arguments)


def bare_read(x: torch.Tensor) -> torch.Tensor:
    """One pass over the logits."""
    return x.view(-1).sum(dtype=torch.float32)


def bench_categorical(session: Session) -> None:
    """Methods and filters against torch and, where they import, flashinfer and vLLM; limit: a bare read."""
    flash = {
        name: peer("flashinfer.sampling", name)
        for name in ("sampling_from_probs", "top_k_sampling_from_probs", "top_p_sampling_from_probs")
    }
    vllm = peer("vllm.v1.sample.ops.topk_topp_sampler", "random_sample")
    vocab = 128_256 if session.on_gpu else 1500
    ours = partial(driftmax.categorical, rng=1, backend="triton")
    for rows in (1, 16, 64, 256, 1024) if session.on_gpu else (2,):
        for dtype in (torch.float32, torch.bfloat16):
            x, kind, shape = session.randn(rows, vocab, dtype=dtype), str(dtype)[6:], (rows, vocab)
            read = partial(bare_read, x)
            usual: dict[str, Run] = {"torch gumbel-argmax fp32": partial(torch_gumbel, x)}
            runs: dict[str, Run] = {"driftmax": partial(ours, x), **usual}
            runs["torch multinomial"] = partial(torch_multinomial, x)
            if (function := flash["sampling_from_probs"]) is not None:
                runs["flashinfer"] = partial(on_probs, function, x)
            if vllm is not None:
                runs["vllm random_sample"] = partial(on_probs, vllm, x, {})
            bench(session, "categorical", f"block {kind}", shape, runs, read)
            runs = {"driftmax": partial(ours, x, method="gumbel"), **usual}
            bench(session, "categorical", f"gumbel {kind}", shape, runs, read)
            runs = {"driftmax": partial(ours, x, return_stats=True)}
            bench(session, "categorical", f"block+stats {kind}", shape, runs, read)
            if rows > 256:
                continue
            runs = {"driftmax": partial(ours, x, top_k=50), "torch topk": partial(torch_topk, x, 50)}
            if (function := flash["top_k_sampling_from_probs"]) is not None:
                runs["flashinfer"] = partial(on_probs, function, x, 50)
            bench(session, "categorical", f"top_k=50 {kind}", shape, runs, read)
            runs = {"driftmax": partial(ours, x, top_p=0.9)}
            if (function := flash["top_p_sampling_from_probs"]) is not None:
                runs["flashinfer"] = partial(on_probs, function, x, 0.9)
            bench(session, "categorical", f"top_p=0.9 {kind}", shape, runs, read)


def bench_fills(session: Session) -> None:
    """Fills against torch's generator; limit: a bare write."""
    size = 1 << (27 if session.on_gpu else 12)
    out = torch.empty(size, device=session.device)
    peers: dict[str, Run] = {
        "uniform": out.uniform_,
        "normal": out.normal_,
        "exponential": out.exponential_,
    }
    for kind in ("uniform", "normal", "exponential", "gumbel"):
        fill = getattr(driftmax.random, kind)
        runs: dict[str, Run] = {"driftmax": partial(fill, size, rng=1, out=out, backend="triton")}
        if kind in peers:
            runs["torch"] = peers[kind]
        bench(session, "fill", f"{kind} float32", (1, size), runs, out.zero_)


def bench_topk(session: Session) -> None:
    """k draws without replacement; limit: a bare read."""
    rows, vocab = (64, 128_256) if session.on_gpu else (1, 1500)
    x = session.randn(rows, vocab)
    runs: dict[str, Run] = {
        "driftmax": partial(driftmax.gumbel_topk, x, 16, rng=1, backend="triton"),
        "torch gumbel topk fp32": partial(torch_gumbel_topk, x, 16),
    }
    bench(session, "gumbel_topk", "k=16 float32", (rows, vocab), runs, partial(bare_read, x))


def bench_head(session: Session) -> None:
    """The fused head against matmul and sampling; limit: the matmul alone."""
    vocab, depth = (128_256, 4096) if session.on_gpu else (1500, 64)
    weight = session.randn(vocab, depth, dtype=torch.bfloat16) * 0.002

    def unfused(sample: Callable[[torch.Tensor], object], hidden: torch.Tensor) -> object:
        return sample(hidden @ weight.T)

    ours = partial(driftmax.categorical, rng=1, backend="triton")
    for rows in (1, 16, 64, 256) if session.on_gpu else (2,):
        h = session.randn(rows, depth, dtype=torch.bfloat16)
        runs: dict[str, Run] = {
            "driftmax": partial(driftmax.lm_head_categorical, h, weight, rng=1, backend="triton"),
            "matmul + driftmax.categorical": partial(unfused, ours, h),
            "matmul + torch gumbel-argmax": partial(unfused, torch_gumbel, h),
        }
        variant = f"bfloat16 D={depth}"
        bench(
            session, "lm_head_categorical", variant, (rows, vocab), runs, partial(torch.matmul, h, weight.T)
        )


def bench_steps(session: Session) -> None:
    """A step that reveals one position in 64, against gather and draw; limit: a read of as many rows."""
    rows, length, vocab = (16, 512, 50_257) if session.on_gpu else (1, 4, 1100)
    x = session.randn(rows * length, vocab, dtype=torch.bfloat16).view(rows, length, vocab)
    tokens = torch.full((rows, length), vocab, device=session.device)

    def ours() -> None:
        driftmax.unmask(x, tokens.clone(), 1 / 64, mask_id=vocab, rng=1, backend="triton")

    def gathered() -> torch.Tensor:
        row, position = ((tokens == vocab) & (torch.rand_like(tokens, dtype=torch.float64) < 1 / 64)).nonzero(
            as_tuple=True
        )
        return torch_gumbel(x[row, position])

    runs: dict[str, Run] = {"driftmax": ours, "torch nonzero, gather, gumbel fp32": gathered}
    read = partial(bare_read, x[0, : max(1, rows * length // 64)])
    bench(session, "unmask", "p=1/64 bfloat16", (rows * length, vocab), runs, read)


def write(path: Path, rows: list[dict[str, object]], constants: dict[str, object]) -> None:
    """Tidy rows with the machine's columns."""
    if rows:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *constants])
            writer.writeheader()
            writer.writerows(row | constants for row in rows)


def main() -> int:
    """All checks, then the timings; 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--skip-bench", action="store_true")
    options = parser.parse_args()
    session = Session(torch.device(options.device), options.out, options.quick)
    options.out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if session.on_gpu else "interpreter"
    machine: dict[str, object] = {
        "device": name, "torch": torch.__version__, "triton": triton.__version__,
        "driftmax": driftmax.__version__,
        "python": sys.version.split()[0], "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print(machine, driftmax.available_backends(), flush=True)
    for checks in (check_fills, check_categorical, check_head, check_law, check_steps, check_capture):
        checks(session)
        write(options.out / "checks.csv", session.checks, machine)
    failed = [str(row["check"]) for row in session.checks if not row["ok"]]
    if not options.skip_bench:
        benches: dict[tuple[str, ...], Callable[[Session], None]] = {
            ("fill",): bench_fills,
            ("categorical", "law", "18-nat", "CUDA"): bench_categorical,
            ("gumbel_topk",): bench_topk,
            ("head",): bench_head,
            ("unmask", "transfer"): bench_steps,
        }
        for checks_of, run in benches.items():
            if any(check.startswith(checks_of) for check in failed):
                print(f"     {checks_of[0]}: not timed, its checks failed")
            else:
                run(session)
            write(options.out / "gpu.csv", session.rows, machine)
    print(
        f"{len(session.checks) - len(failed)} of {len(session.checks)} checks passed", *failed, sep="\n     "
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
