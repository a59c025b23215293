"""Masked diffusion on a GPU: tokens against the CPU's, loops in CUDA graphs, host reads, speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import driftmax
import torch
from driftmax import RowStreams
from driftmax.discrete import (
    P2,
    SMC,
    SVDD,
    Ancestral,
    Cap,
    CapturedLoop,
    Completion,
    Confidence,
    ConfidenceBased,
    EntropyBounded,
    EntropyOrder,
    Euler,
    Factor,
    FirstHitting,
    HighOrderReveal,
    LocalSoftmax,
    LogLinear,
    Loop,
    MarginOrder,
    MaskGitPlus,
    ParallelReveal,
    Plan,
    Problem,
    RandomOrder,
    ReMDM,
    Sampler,
    State,
    Threshold,
    UniformAnalytic,
    UniformEuler,
    sample,
)
from driftmax.discrete.bytes_model import load_bytes_model
from driftmax.discrete.network import RADD, Head, RADDConfig
from driftmax.discrete.rules import Adaptive
from torch import Tensor
from torch.nn import functional

from .cases.discrete import careful_ancestral, plain_ancestral
from .gpu_session import Run, Session, equal

__all__ = [
    "bench_discrete",
    "check_captured",
    "check_guided",
    "check_loops",
    "check_networks",
    "check_samplers",
    "check_uniform",
]

VOCAB, BATCH, LENGTH = 50, 5, 64


class Neighbours:
    """Logits from a token, its neighbour and the position: sums of two, the same bits on every device."""

    time_independent = True

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(1)
        self.own = torch.randn(VOCAB + 1, VOCAB, generator=generator).to(device) * 3
        self.place = torch.randn(LENGTH, VOCAB, generator=generator).to(device) * 2

    def __call__(self, tokens: Tensor, t: Tensor | None = None) -> Tensor:
        return self.own[tokens.roll(1, 1)] + self.place


class OneHot(Neighbours):
    """The same law from features and a head: products with one nonzero term, so exact."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.head = Head(self.own.T.contiguous(), None)

    def features(self, tokens: Tensor) -> Tensor:
        """Neighbours one-hot."""
        return functional.one_hot(tokens.roll(1, 1), VOCAB + 1).float()

    def __call__(self, tokens: Tensor, t: Tensor | None = None) -> Tensor:
        return functional.linear(self.features(tokens), self.head.weight)


class Scores(Neighbours):
    """The same numbers as log-scores of uniform-state diffusion."""

    time_independent = False


@contextmanager
def no_host_reads(device: torch.device) -> Iterator[None]:
    """Torch raises on a read that waits for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run(sampler: Sampler, state: State) -> State:
    """All steps."""
    while not state.done:
        state = sampler.step(state)
    return state


COUNTED: list[tuple[Sampler, int | None]] = [
    (Plan(), None),
    (Plan(), 16),
    (FirstHitting(), None),
    (ParallelReveal(4), None),
    (HighOrderReveal(4), None),
    (RandomOrder(block_length=16), None),
    (Confidence(block_length=16), 16),
    (Confidence(), 10),
    (EntropyOrder(), 10),
    (EntropyOrder(order_temperature=0.5), 10),
    (MarginOrder(), 10),
    (MaskGitPlus(), 10),
]
GRID: list[tuple[Sampler, int | None]] = [(Ancestral(), 32), (Euler(), 32)]
BACK: list[tuple[Sampler, int | None]] = [
    (ReMDM(Cap(0.2)), 32),
    (ReMDM(Loop(0.1)), 32),
    (P2(), 16),
]
LOOKING: list[tuple[Sampler, int | None]] = [(ReMDM(ConfidenceBased()), 32)]
ADAPTIVE: list[tuple[Sampler, int | None]] = [
    (Threshold(0.5), None),
    (Factor(1.0), None),
    (EntropyBounded(0.5), None),
    (Threshold(0.5, block_length=16), None),
    (Threshold(0.5, lookahead=1), None),
    (Factor(1.0, block_length=16, lookahead=2), None),
]


class Threes:
    """A reward: how many tokens are 3."""

    def __call__(self, tokens: Tensor, t: Tensor | None = None) -> Tensor:
        return (tokens == 3).sum(1)

    def __repr__(self) -> str:
        return "Threes()"


GUIDED: list[tuple[Sampler, int | None]] = [
    (SVDD(Ancestral(), Threes(), 4, 0.5), 32),
    (SVDD(FirstHitting(), Threes(), 4, 0.5, LocalSoftmax()), None),
    (SVDD(Plan(), Completion(Threes()), 4, 0.5, SMC(0.9)), None),
    (SVDD(ParallelReveal(4), Completion(Threes()), 4, 0.5), None),
]
UNIFORM: list[tuple[Sampler, int | None]] = [(UniformAnalytic(VOCAB), 16), (UniformEuler(VOCAB), 16)]


AHEAD: list[Sampler] = [
    Threshold(0.5, lookahead=1),
    Factor(1.0, block_length=16, lookahead=1),
    EntropyBounded(0.5, lookahead=2),
]


def problem_of(
    model: Neighbours,
    steps: int | None,
    device: torch.device,
    *,
    cache: bool = True,
    streams: RowStreams | None = None,
) -> Problem:
    """A batch with prompts of different lengths."""
    prompt = torch.full((BATCH, LENGTH), VOCAB, device=device)
    for row in range(1, BATCH):
        prompt[row, : 9 * row] = row
    if streams is None:
        streams = RowStreams(3, BATCH)
    return Problem(
        model, (BATCH, LENGTH), VOCAB, LogLinear(), steps, prompt, banned=[2], rng=streams, cache=cache
    )


def check_samplers(session: Session) -> None:
    """Tokens of the CPU, with and without a cache; no reads on the host in the steps that promise none."""
    for model in (Neighbours, OneHot):
        for sampler, steps in (*COUNTED, *GRID, *BACK, *LOOKING, *ADAPTIVE):

            def tokens(
                model: type[Neighbours] = model, sampler: Sampler = sampler, steps: int | None = steps
            ) -> str:
                here = torch.device("cpu")
                with driftmax.use_backend("reference"):
                    wanted = run(sampler, sampler.init(problem_of(model(here), steps, here)))
                for cache in (True, False):
                    problem = problem_of(model(session.device), steps, session.device, cache=cache)
                    found = run(sampler, sampler.init(problem))
                    seen = equal(found.tokens.cpu(), wanted.tokens)
                return f"{seen}, {wanted.nfe} calls"

            session.check(f"tokens of the CPU: {model.__name__} {sampler} steps={steps}", tokens)
        promised = (*COUNTED, *GRID, *BACK)
        quiet = [(sampler, steps, cache) for sampler, steps in promised for cache in (True, False)]
        # What they wait for is older than the step just given to the device.
        quiet += [(sampler, None, cache) for sampler in AHEAD for cache in (True, False)]
        quiet += [(sampler, steps, False) for sampler, steps in LOOKING]
        for sampler, steps, cache in quiet:

            def reads(
                model: type[Neighbours] = model,
                sampler: Sampler = sampler,
                steps: int | None = steps,
                cache: bool = cache,
            ) -> str:
                state = sampler.init(problem_of(model(session.device), steps, session.device, cache=cache))
                with no_host_reads(session.device):
                    state = run(sampler, state)
                return f"{state.step} steps, {int(state.masked.sum())} masks left"

            session.check(f"no host reads: {model.__name__} {sampler} steps={steps} cache={cache}", reads)


def check_guided(session: Session) -> None:
    """Guided sampling without a cache: the CPU's tokens; values looked at late, and nothing else."""
    here = torch.device("cpu")
    for sampler, steps in GUIDED:
        for model in (Neighbours, OneHot):
            if model is OneHot and steps is not None:
                continue  # a grid and a head: reads which positions it reveals

            def tokens(
                model: type[Neighbours] = model, sampler: Sampler = sampler, steps: int | None = steps
            ) -> str:
                with driftmax.use_backend("reference"):
                    wanted = run(sampler, sampler.init(problem_of(model(here), steps, here, cache=False)))
                state = sampler.init(problem_of(model(session.device), steps, session.device, cache=False))
                with no_host_reads(session.device):
                    state = run(sampler, state)
                assert state.nfe == wanted.nfe, (state.nfe, wanted.nfe)
                return equal(state.tokens.cpu(), wanted.tokens) + f", {state.nfe} calls without a host read"

            session.check(f"tokens of the CPU: {model.__name__} {sampler} steps={steps}", tokens)


def check_captured(session: Session) -> None:
    """Loops that the device ends itself: the CPU's tokens and calls, for prompts and seeds of all kinds."""
    here = torch.device("cpu")
    for model in (Neighbours, OneHot):
        for sampler, _ in ADAPTIVE:
            if not session.on_gpu:
                continue

            def loop(model: type[Neighbours] = model, sampler: Sampler = sampler) -> str:
                assert isinstance(sampler, Adaptive)
                captured = CapturedLoop(sampler, problem_of(model(session.device), None, session.device))
                seen = []
                for seed in (3, -7, 8):
                    streams = RowStreams(seed, BATCH)
                    problem = problem_of(model(here), None, here, streams=streams)
                    prompt = problem.start().roll(seed, 1)
                    with driftmax.use_backend("reference"):
                        wanted = run(sampler, sampler.init(replace(problem, prompt=prompt)))
                    tokens = prompt.to(session.device)
                    with no_host_reads(session.device):
                        result = captured(streams, tokens)
                    equal(result.tokens.cpu(), wanted.tokens)
                    assert int(result.nfe) == wanted.nfe, (int(result.nfe), wanted.nfe)
                    equal(result.row_nfe.cpu(), wanted.row_nfe)
                    seen.append(str(wanted.nfe))
                return f"{', '.join(seen)} calls from one graph, the CPU's tokens"

            session.check(f"loop in a CUDA graph: {model.__name__} {sampler}", loop)


def check_uniform(session: Session) -> None:
    """Uniform-state diffusion: the CPU's tokens, and no reads on the host."""
    for sampler, steps in UNIFORM:

        def tokens(sampler: Sampler = sampler, steps: int | None = steps) -> str:
            here = torch.device("cpu")
            with driftmax.use_backend("reference"):
                wanted = run(sampler, sampler.init(problem_of(Scores(here), steps, here, cache=False)))
            state = sampler.init(problem_of(Scores(session.device), steps, session.device, cache=False))
            with no_host_reads(session.device):
                state = run(sampler, state)
            return equal(state.tokens.cpu(), wanted.tokens) + f", {state.step} steps without a host read"

        session.check(f"tokens of the CPU: {sampler} steps={steps}", tokens)


def check_loops(session: Session) -> None:
    """Whole loops in a CUDA graph whose seed is a tensor: a replay is a run with that seed."""
    seeds = torch.zeros(1, dtype=torch.int64, device=session.device)
    rows = torch.arange(BATCH, device=session.device)
    counted = [
        (Confidence(), 10),
        (Confidence(block_length=16), 16),
        (EntropyOrder(), 10),
        (MarginOrder(), 10),
        (MaskGitPlus(), 10),
    ]
    for sampler, steps, cache in [
        *((sampler, steps, False) for sampler, steps in GRID),
        *((sampler, steps, cache) for sampler, steps in counted for cache in (True, False)),
    ]:

        def loop(sampler: Sampler = sampler, steps: int | None = steps, cache: bool = cache) -> str:
            model = Neighbours(session.device)

            def start() -> State:
                streams = RowStreams(seeds, rows)
                return sampler.init(problem_of(model, steps, session.device, cache=cache, streams=streams))

            state = start()
            run(sampler, state)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                last = run(sampler, state)
            for seed in (5, -7):
                seeds.fill_(seed)
                graph.replay()
                equal(last.tokens, run(sampler, start()).tokens)
            return f"{last.step} steps, two replays equal eager"

        if session.on_gpu:
            session.check(f"CUDA graph of a loop: {sampler} cache={cache}", loop)


def network_of(config: RADDConfig, device: torch.device) -> RADD:
    """Random weights in bfloat16; the output layer, which starts at zero, too."""
    torch.manual_seed(0)
    network = RADD(config).eval()
    torch.nn.init.normal_(network.output_layer.linear.weight, std=0.02)
    return network.to(device, torch.bfloat16)


def check_networks(session: Session) -> None:
    """A bfloat16 transformer: a fixed batch make-up gives the same tokens with and without a cache."""
    config = RADDConfig(5000, 256, 2, 4) if session.on_gpu else RADDConfig(60, 16, 1, 2)
    network, shape = network_of(config, session.device), (4, 128) if session.on_gpu else (2, 8)
    some: list[tuple[Sampler, int | None]] = [(Plan(), 32), (FirstHitting(), None), (Confidence(), 16)]
    for sampler, steps in some:

        def cached(sampler: Sampler = sampler, steps: int | None = steps) -> str:
            results = [
                sample(
                    network, shape, mask_id=config.mask_id, sampler=sampler, steps=steps, rng=1, cache=cache,
                    whole_batch=True, device=session.device,
                )
                for cache in (True, False)
            ]  # fmt: skip
            return (
                equal(results[0].tokens, results[1].tokens) + f", {results[0].nfe} and {results[1].nfe} calls"
            )

        session.check(f"RADD in bfloat16, whole batch: {sampler}", cached)


@torch.no_grad()
def bench_discrete(session: Session) -> None:
    """Whole runs: RADD-small beside the plain and the careful loop; limit: the network's calls alone."""
    rounds, session.rounds = session.rounds, min(session.rounds, 1)  # runs of seconds
    small = RADDConfig.small() if session.on_gpu else RADDConfig(60, 16, 1, 2)
    length = 1024 if session.on_gpu else 8
    network = network_of(small, session.device)
    for batch, steps in ((1, 256), (16, 128)) if session.on_gpu else ((2, 4),):
        _bench_runs(session, network, (batch, length), steps)
    session.rounds = min(rounds, 7)  # what the host bounds varies by half from run to run
    _bench_loop(session)
    _bench_waiting(session)
    session.rounds = rounds


def _bench_runs(session: Session, network: RADD, shape: tuple[int, int], steps: int) -> None:
    mask_id, device = network.config.mask_id, session.device
    few = steps if session.rounds else 2  # enough to compile

    def ours() -> object:
        return sample(network, shape, mask_id=mask_id, steps=few, rng=1, device=device)

    def body() -> None:
        state = Plan().init(Problem(network, shape, mask_id, LogLinear(), few, rng=1, device=device))
        tokens = torch.full(shape, mask_id, device=device)
        for rows in state.memo.active:
            network.features(tokens[:rows])

    def plain() -> object:
        return plain_ancestral(network, shape, few, mask_id, device)

    def careful() -> object:
        return careful_ancestral(network, shape, few, mask_id, device)

    runs: dict[str, Run] = {"driftmax": ours, "torch, plain loop": plain, "torch, careful": careful}
    name = f"RADD-small bfloat16 L={shape[1]} n={steps}"
    session.bench("discrete", name, (shape[0], network.config.vocab_size), runs, body, graph=False)


def _bench_loop(session: Session) -> None:
    """The byte model's ancestral loop: eager, and in a CUDA graph."""
    network = load_bytes_model().to(session.device, torch.bfloat16).eval()
    batch, length, steps = (16, 256, 128) if session.on_gpu else (1, 8, 2)
    seeds = torch.zeros(1, dtype=torch.int64, device=session.device)
    streams = RowStreams(seeds, torch.arange(batch, device=session.device))
    mask_id = network.config.mask_id

    class Logits:
        """Without the head: logits at every position."""

        time_independent = True

        def __call__(self, tokens: Tensor, t: Tensor | None = None) -> Tensor:
            logits: Tensor = network(tokens)
            return logits

    problem = Problem(
        Logits(),
        (batch, length),
        mask_id,
        LogLinear(),
        steps,
        rng=streams,
        cache=False,
        device=session.device,
    )
    state = Ancestral().init(problem)
    tokens = torch.full((batch, length), mask_id, device=session.device)

    def body() -> None:
        for _ in range(steps):
            network(tokens)

    def ours() -> object:
        return run(Ancestral(), state)

    def plan() -> object:
        return sample(network, (batch, length), mask_id=mask_id, steps=steps, rng=1, device=session.device)

    def plain() -> object:
        return plain_ancestral(network, (batch, length), steps, mask_id, session.device)

    name, shape = f"byte model L={length} n={steps}", (batch, network.config.vocab_size)
    runs: dict[str, Run] = {"driftmax": ours, "driftmax Plan": plan, "torch, plain loop": plain}
    session.bench("discrete", f"{name} eager", shape, runs, body, graph=False)
    session.bench(
        "discrete", f"{name} CUDA graph", shape, {"driftmax": ours, "torch, plain loop": plain}, body
    )


def _bench_waiting(session: Session) -> None:
    """An adaptive rule's loop in a CUDA graph, and on the host: waiting after every call, or hearing later.

    Limit: the network's calls alone, in a CUDA graph too.
    """
    network = load_bytes_model().to(session.device, torch.bfloat16).eval()
    batch, length = (16, 256) if session.on_gpu else (1, 8)
    shape, mask_id = (batch, length), network.config.mask_id
    tokens = torch.full(shape, mask_id, device=session.device)

    def rule(lookahead: int) -> int:
        sampler = Threshold(0.5, lookahead=lookahead)
        return sample(
            network, shape, mask_id=mask_id, sampler=sampler, rng=1, whole_batch=True, device=session.device
        ).nfe

    calls = rule(0)

    def body() -> None:
        for _ in range(calls):
            network.features(tokens)

    runs: dict[str, Run] = {"driftmax": partial(rule, 0), "driftmax lookahead=1": partial(rule, 1)}
    limit: Run = body
    if session.on_gpu:
        captured = CapturedLoop(
            Threshold(0.5), Problem(network, shape, mask_id, rng=1, device=session.device)
        )
        assert int(captured().nfe) == calls
        runs = {
            "driftmax": lambda: int(captured().nfe),
            "driftmax, loop on the host": partial(rule, 0),
            "driftmax, loop on the host, lookahead=1": partial(rule, 1),
        }
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            body()
        limit = graph.replay
    name = f"byte model L={length} Threshold(0.5), {calls} calls"
    session.bench("discrete", name, (batch, network.config.vocab_size), runs, limit, graph=False)
