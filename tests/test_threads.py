"""Forks, the GIL and concurrent callers, on torch's threads and on the core's own. Every wait has a limit, so
that a hang fails instead of hanging the suite.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import driftmax
import pytest
import torch
from driftmax import categorical
from driftmax.ops._dispatch import core
from driftmax.ops._threads import torch_team

LIMIT = 60.0  # seconds until a child counts as hung


@pytest.fixture(autouse=True, params=["torch", "own"])
def whose_threads(request):
    """Every test on both kinds of threads."""
    team = torch_team() if request.param == "torch" else 0
    if request.param == "torch" and not team:
        # not on Linux, or a torch without OpenMP: the core has nothing but its own
        pytest.skip("this torch has no OpenMP runtime to borrow threads from")
    core.borrow_team(team)
    yield request.param
    core.borrow_team(torch_team())


def long_draw(rng: int = 1) -> torch.Tensor:
    """Large enough for every thread of the pool to get a share."""
    return categorical(logits(), rng=rng, backend="cpp")


def logits() -> torch.Tensor:
    return torch.randn(64, 20_000, generator=torch.Generator().manual_seed(0))


def in_child(body) -> bytes:
    """Fork, run `body` in the child and return the bytes it gives; a child that hangs is killed and fails the
    test.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            os.write(writer, body())
            status = 0
        finally:
            os._exit(status)  # no handlers and no test runner in the child
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], LIMIT)
        if not ready:
            os.kill(child, signal.SIGKILL)
        answer = os.read(reader, 1 << 16) if ready else b""
    finally:
        os.close(reader)
        _, status = os.waitpid(child, 0)
    assert ready, "the forked child hung"
    assert status == 0, f"the forked child ended with {status}"
    return answer


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform cannot fork")


@needs_fork
@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_fork_after_a_parallel_draw():
    """The pool's threads exist in the parent only: a child makes its own, a grandchild too, and the parent
    goes on.
    """
    torch.set_num_threads(3)
    x = logits()
    wanted = categorical(x, rng=1, backend="cpp").numpy().tobytes()

    def draw() -> bytes:
        return categorical(x, rng=1, backend="cpp").numpy().tobytes()

    for _ in range(3):
        assert in_child(draw) == wanted
        assert draw() == wanted
    assert in_child(lambda: draw() if in_child(draw) == wanted else b"") == wanted


@needs_fork
@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_fork_while_another_thread_draws():
    """The child inherits whatever locks were held; it must not wait for their owners."""
    torch.set_num_threads(3)
    x, stop = logits(), threading.Event()
    wanted = categorical(x, rng=1, backend="cpp").numpy().tobytes()

    def busy() -> None:
        while not stop.is_set():
            categorical(x, rng=2, backend="cpp")

    other = threading.Thread(target=busy)
    other.start()
    try:
        for _ in range(5):
            assert in_child(lambda: categorical(x, rng=1, backend="cpp").numpy().tobytes()) == wanted
    finally:
        stop.set()
        other.join(LIMIT)
    assert not other.is_alive()


def test_the_gil_is_released():
    """A Python thread counts while a draw runs.

    The switch interval is longer than the test, so that nobody is forced to hand over the GIL: the counter
    gives it up after every count, this thread only inside the draw. Were it held there, the count would stand
    still.
    """
    torch.set_num_threads(1)
    row = torch.zeros(1, 50_000).expand(2000, 50_000)
    counted, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1
            time.sleep(0)  # gives up the GIL

    interval = sys.getswitchinterval()
    other = threading.Thread(target=count)
    try:
        sys.setswitchinterval(LIMIT)
        other.start()
        start = counted[0]
        sum(range(1_000_000))
        held = counted[0] - start
        start = counted[0]
        for seed in range(3):
            categorical(row, rng=seed, backend="cpp")
        released = counted[0] - start
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        other.join(LIMIT)
    assert held == 0, "the counter ran although nothing released the GIL: the test shows nothing"
    assert released > 10


def test_concurrent_draws_equal_serial_ones():
    """Four Python threads share the pool; each gets what it would get alone, errors included."""
    torch.set_num_threads(2)
    x = logits()
    bad = x.clone()
    bad[40, 17] = float("nan")
    wanted = {seed: categorical(x, rng=seed, top_p=0.9 if seed % 2 else None) for seed in range(8)}

    def work(thread: int) -> list[str]:
        wrong = []
        for turn in range(24):
            seed = (turn + thread) % 8
            if not torch.equal(categorical(x, rng=seed, top_p=0.9 if seed % 2 else None), wanted[seed]):
                wrong.append(f"thread {thread}, seed {seed}")
            try:
                categorical(bad, rng=seed)
                wrong.append("no error")
            except driftmax.InvalidDistribution as error:
                if error.draw != 40:
                    wrong.append(str(error))
        return wrong

    with ThreadPoolExecutor(4) as pool:
        done = [future.result(timeout=LIMIT) for future in [pool.submit(work, thread) for thread in range(4)]]
    assert done == [[], [], [], []]


def test_many_threads_for_little_work():
    """More threads than rows, than blocks, than cores."""
    x = torch.randn(3, 70_000)
    wanted = categorical(x, rng=0)
    for threads in (2, 7, 64):
        torch.set_num_threads(threads)
        for _ in range(20):
            assert torch.equal(categorical(x, rng=0), wanted)
            assert torch.equal(categorical(x[:1], rng=0), wanted[:1])


def test_both_kinds_of_threads_draw_the_same(whose_threads):
    assert core.team_is_borrowed() == (whose_threads == "torch")
    torch.set_num_threads(3)
    here = long_draw()
    core.borrow_team(0)
    assert torch.equal(here, long_draw())


@needs_fork
@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(whose_threads):
    """Those that the parent borrowed were not copied by the fork."""
    long_draw()
    assert in_child(lambda: str(core.team_is_borrowed()).encode()) == b"False"
    assert core.team_is_borrowed() == (whose_threads == "torch"), "the parent keeps what it has"
