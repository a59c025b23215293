"""Backends, registration with torch, torch.compile, debugging."""

from __future__ import annotations

import subprocess
import sys
import threading

import driftmax
import pytest
import torch
from driftmax import RowStreams
from driftmax.errors import status_word
from driftmax.ops import _dispatch
from driftmax.ops._dispatch import OPS
from torch._subclasses.fake_tensor import FakeTensorMode

SAMPLES = [(name, number) for name, op in OPS.items() for number, _ in enumerate(op.samples())]


def leaves(value):
    return torch.utils._pytree.tree_leaves(value)


@pytest.mark.parametrize(("name", "number"), SAMPLES)
@pytest.mark.parametrize("which", ["auto", "reference"])
def test_opcheck(name, number, which):
    sample = list(OPS[name].samples())[number]
    torch.library.opcheck(getattr(torch.ops.driftmax, name).default, (*sample, which))


@pytest.mark.parametrize(("name", "number"), SAMPLES)
def test_samples_agree_between_backends(name, number):
    results = []
    for which in ("cpp", "reference"):
        sample = list(OPS[name].samples())[number]
        getattr(torch.ops.driftmax, name)(*sample, which)
        results.append([value for value in sample if isinstance(value, torch.Tensor)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_use_backend_decides_nests_and_restores(monkeypatch):
    calls = []
    op = OPS["categorical"]
    original = op.reference

    def spy(*arguments):
        calls.append("reference")
        original(*arguments)

    monkeypatch.setattr(op, "reference", spy)
    monkeypatch.setattr(op, "_resolved", {})
    logits = torch.zeros(2, 5)
    driftmax.categorical(logits, rng=0)
    assert calls == []
    with driftmax.use_backend("reference"):
        driftmax.categorical(logits, rng=0)
        assert len(calls) == 1
        with driftmax.use_backend("cpp"):
            driftmax.categorical(logits, rng=0)
        driftmax.categorical(logits, rng=0, backend="cpp")
        assert len(calls) == 1
        elsewhere = threading.Thread(target=driftmax.categorical, args=(logits,), kwargs={"rng": 0})
        elsewhere.start()
        elsewhere.join()
        assert len(calls) == 1
        torch.compile(lambda x: driftmax.categorical(x, rng=0), backend="eager")(logits)
        assert len(calls) == 2
    with pytest.raises(KeyError), driftmax.use_backend("reference"):
        raise KeyError
    driftmax.categorical(logits, rng=0)
    assert len(calls) == 2


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="'numpy'"):
        driftmax.categorical(torch.zeros(1, 2), rng=0, backend="numpy")
    with pytest.raises(ValueError, match="'numpy'"), driftmax.use_backend("numpy"):
        pass


def test_a_backend_that_is_missing_says_why(monkeypatch):
    monkeypatch.setattr(_dispatch, "_core_error", ImportError("No module named 'driftmax._core'"))
    monkeypatch.setattr(_dispatch, "core", None)
    monkeypatch.setattr(OPS["categorical"], "_resolved", {})
    assert "_core" in driftmax.available_backends()["cpp"]
    for which in ("auto", "cpp"):  # nothing falls back silently
        with pytest.raises(driftmax.BackendUnavailable, match="pip install"):
            driftmax.categorical(torch.zeros(1, 2), rng=0, backend=which)
    with pytest.raises(driftmax.BackendUnavailable, match="pip install"), driftmax.use_backend("cpp"):
        pass
    assert driftmax.categorical(torch.zeros(1, 1), rng=0, backend="reference").tolist() == [0]


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(driftmax.BackendUnavailable, match="TRITON_INTERPRET"):
        driftmax.categorical(torch.zeros(1, 2), rng=0, backend="triton")
    monkeypatch.setattr(_dispatch.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in driftmax.available_backends()["triton"]


def test_import_works_without_the_core():
    program = """
import sys
sys.modules["driftmax._core"] = None
import torch, driftmax
assert driftmax.available_backends()["cpp"] is not None
assert driftmax.categorical(torch.zeros(1, 1), rng=0, backend="reference").tolist() == [0]
try:
    driftmax.categorical(torch.zeros(1, 1), rng=0)
except driftmax.BackendUnavailable:
    print("said so")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "said so\n"


def test_status_word_is_sticky_until_checked():
    word = status_word(torch.device("cpu"))
    word.fill_(1 | 3 << 8)
    with pytest.raises(driftmax.InvalidDistribution, match="row 3: a logit is NaN") as raised:
        driftmax.check_status()
    assert raised.value.draw == 3
    driftmax.check_status()


def test_debug_checks_after_every_op(monkeypatch):
    def faulty(*arguments):
        status_word(torch.device("cpu")).fill_(2 | 1 << 8)

    monkeypatch.setattr(OPS["categorical"], "_resolved", {"reference": faulty})
    driftmax.categorical(torch.zeros(2, 3), rng=0, backend="reference")
    with pytest.raises(driftmax.InvalidDistribution, match="row 1: a logit is \\+inf"):
        driftmax.check_status()
    driftmax.set_debug(True)
    with pytest.raises(driftmax.InvalidDistribution, match="row 1: a logit is \\+inf"):
        driftmax.categorical(torch.zeros(2, 3), rng=0, backend="reference")


def logits() -> torch.Tensor:
    return torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))


def head() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 32, generator=generator), torch.randn(3000, 32, generator=generator)


def categorical_with_streams(x, seeds, step):
    return driftmax.categorical(x[1:3], rng=RowStreams(seeds, 4).at(step=step)[1:3], return_stats=True)


def categorical_filtered(x, temperatures, top_ks):
    options = {"temperature": temperatures, "top_k": top_ks, "top_p": 0.9, "min_p": 0.01}
    return driftmax.categorical(x, rng=7, return_stats=True, **options)


def every_fill(streams):
    kinds = ("uniform", "normal", "exponential", "gumbel")
    noise = [getattr(driftmax.random, kind)((4, 5), rng=streams, dtype=torch.float64) for kind in kinds]
    return [*noise, driftmax.random.bits(9, rng=3)]


COMPILED = {
    "seed": (lambda x: driftmax.categorical(x, rng=7), logits),
    "large seed": (lambda x: driftmax.categorical(x, rng=2**64 - 1), logits),
    "seed as argument": (lambda x, seed: driftmax.categorical(x, rng=seed), lambda: (logits(), 5)),
    "one row": (lambda x: driftmax.categorical(x[0], rng=7), logits),
    "positions": (lambda x: driftmax.categorical(x.view(2, 2, 3, -1), rng=7), logits),
    "streams given": (
        lambda x, streams: driftmax.categorical(x, rng=streams),
        lambda: (logits(), RowStreams(3, [9, 8, 7, 2**32 - 1], step=5)),
    ),
    "streams made inside": (
        categorical_with_streams,
        lambda: (logits(), torch.tensor([1, 2, 3, -4]), torch.tensor(5)),
    ),
    "filters": (
        categorical_filtered,
        lambda: (logits(), torch.tensor([0.0, 1.0, 2.0, 0.5]), torch.tensor([1, 2, 30, 400])),
    ),
    "out": (
        lambda x, out: driftmax.categorical(x, rng=7, out=out),
        lambda: (logits(), torch.zeros(4).long()),
    ),
    "reference": (lambda x: driftmax.categorical(x, rng=7, backend="reference"), logits),
    "top-k": (lambda x: driftmax.gumbel_topk(x, 3, rng=7, return_scores=True), logits),
    "head": (lambda h, w: driftmax.lm_head_categorical(h, w, rng=7, return_stats=True), head),
    "fills": (every_fill, lambda: (RowStreams(0, 4),)),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_draws_are_the_eager_ones(name):
    torch.compiler.reset()
    function, make = COMPILED[name]
    arguments = make()
    arguments = arguments if isinstance(arguments, tuple) else (arguments,)
    eager = [value.clone() for value in leaves(function(*arguments))]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
    for ours, theirs in zip(leaves(compiled), eager, strict=True):
        assert torch.equal(ours, theirs)


def test_steps_do_not_recompile():
    torch.compiler.reset()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    def draw(x, step):
        return driftmax.categorical(x, rng=RowStreams(7, 4, step=step))

    compiled = torch.compile(draw, fullgraph=True, backend=count)
    for step in range(4):
        assert torch.equal(compiled(logits(), torch.tensor(step)), draw(logits(), step))
    assert len(graphs) == 1


def test_compiled_default_rng_draws_anew():
    torch.compiler.reset()
    compiled = torch.compile(lambda x: driftmax.categorical(x), fullgraph=True, backend="aot_eager")
    x = torch.zeros(50, 1000)
    assert not torch.equal(compiled(x), compiled(x))  # equal with probability 1000**-50


def test_inductor():
    torch.compiler.reset()
    x = logits()
    compiled = torch.compile(lambda x: driftmax.categorical(x.T * 2, rng=7), fullgraph=True)
    assert torch.equal(compiled(x), driftmax.categorical(x.T * 2, rng=7))


def test_fake_tensors_and_export():
    with FakeTensorMode():
        tokens, stats = driftmax.categorical(torch.empty(3, 2, 10).double(), rng=0, return_stats=True)
        assert tokens.shape == (3, 2)
        assert stats.entropy.dtype == torch.float64

    class Sampler(torch.nn.Module):
        def forward(self, x):
            return driftmax.categorical(x, rng=3)

    exported = torch.export.export(Sampler(), (logits(),)).module()
    assert torch.equal(exported(logits()), driftmax.categorical(logits(), rng=3))


def test_inputs_that_require_grad_are_fine(backend):
    x = logits().requires_grad_()
    tokens, stats = driftmax.categorical(x, rng=0, return_stats=True, backend=backend)
    assert not stats.log_prob.requires_grad
    assert torch.equal(tokens, driftmax.categorical(x.detach(), rng=0))
    hidden, weight = head()
    weight = torch.nn.Parameter(weight)
    drawn = driftmax.lm_head_categorical(hidden, weight, rng=0, backend=backend)
    assert torch.equal(drawn, driftmax.lm_head_categorical(hidden, weight.detach(), rng=0))
