"""Steps that read nothing on the host, checked without a GPU: fake tensors have no values to read."""

from __future__ import annotations

import dataclasses
from functools import partial

import driftmax
import pytest
import torch
from driftmax.discrete import (
    P2,
    SMC,
    SVDD,
    Ancestral,
    Argmax,
    Cap,
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
    Rescale,
    Threshold,
    UniformAnalytic,
    UniformEuler,
    ancestral,
    remask,
    rules,
    sample,
    svdd,
)
from driftmax.discrete.rules import true_positions
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

VOCAB, LENGTH = 11, 12


class Copies(TorchDispatchMode):
    """Notes every copy between the host and the device, which waits for it or cannot be captured."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [part for part in (*args, out) if isinstance(part, torch.Tensor)]
        if len({part.device.type for part in tensors}) > 1:
            self.seen.append(str(func))
        return out


class Plain:
    """Logits that depend on the tokens."""

    time_independent = True

    def __call__(self, tokens, t=None):
        return torch.nn.functional.one_hot(tokens.clamp(max=VOCAB - 1), VOCAB).float()


class WithHead:
    """The same with features and a head."""

    time_independent = True

    def __init__(self, device="cpu"):
        self.head = torch.ones(VOCAB, 4, device=device), None

    def features(self, tokens):
        return tokens[..., None].float().expand(*tokens.shape, 4)

    def __call__(self, tokens, t=None):
        return self.features(tokens) @ self.head[0].T


def on_device(value, mode):
    """A copy of what a state is made of, with fake tensors for tensors."""
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, driftmax.RowStreams):
        positions = None if value.positions is None else on_device(value.positions, mode)
        rows = len(value) if value._rows is None else on_device(value.rows, mode)
        return driftmax.RowStreams(on_device(value.seed, mode), rows, step=value.step, positions=positions)
    if isinstance(value, WithHead):
        return WithHead("meta")
    if isinstance(value, tuple):
        parts = [on_device(part, mode) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [on_device(part, mode) for part in value]
    if isinstance(value, Problem):
        problem = object.__new__(Problem)
        for part in dataclasses.fields(Problem):
            object.__setattr__(problem, part.name, on_device(getattr(value, part.name), mode))
        object.__setattr__(problem, "device", torch.device("meta"))
        return problem
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {part.name: on_device(getattr(value, part.name), mode) for part in dataclasses.fields(value)}
        copy = object.__new__(type(value))
        for name, part in fields.items():
            object.__setattr__(copy, name, part)
        return copy
    return value


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    """States are made on the CPU here, as for a device."""
    for module in (ancestral, remask):
        monkeypatch.setattr(module, "decides_ahead", lambda problem: True)


def run_faked(sampler, model, prompt=True, **options):
    """All steps on fake tensors; the copies between host and device that they made."""
    start = torch.full((3, LENGTH), VOCAB)
    if prompt:
        start[1, :4] = 2
    state = sampler.init(Problem(model, (3, LENGTH), VOCAB, rng=0, prompt=start, banned=[1], **options))
    with FakeTensorMode(allow_non_fake_inputs=False) as mode, Copies() as copies:
        state = on_device(state, mode)
        while not state.done:
            state = sampler.step(state)
    assert state.step == state.total > 1
    return copies.seen


@pytest.mark.parametrize("model", [Plain(), WithHead()], ids=["logits", "head"])
@pytest.mark.parametrize(
    ("sampler", "steps"),
    [
        (Plan(), None),
        (Plan(), 5),
        (FirstHitting(), None),
        (ParallelReveal(3), None),
        (HighOrderReveal(3), None),
        (RandomOrder(block_length=4), None),
        (Confidence(), 5),
        (Confidence(block_length=4), None),
        (EntropyOrder(order_temperature=0.5), 5),
        (MarginOrder(), 5),
        (MaskGitPlus(), 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("cache", [True, False])
def test_counted_steps_read_nothing(sampler, steps, model, cache):
    assert run_faked(sampler, model, steps=steps, cache=cache) == []


@pytest.mark.parametrize("model", [Plain(), WithHead()], ids=["logits", "head"])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}], ids=str)
@pytest.mark.parametrize("sampler", [Ancestral(), Euler()], ids=str)
@pytest.mark.parametrize("cache", [True, False])
def test_grid_steps_read_nothing(sampler, model, options, cache):
    assert run_faked(sampler, model, steps=5, cache=cache, **options) == []


@pytest.mark.parametrize("model", [Plain(), WithHead()], ids=["logits", "head"])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    "sampler",
    [
        ReMDM(Cap(0.5)),
        ReMDM(Rescale(0.5)),
        ReMDM(Loop(0.5)),
        P2(),
        P2(0.0),
        P2(planner=Plain()),
    ],
    ids=lambda sampler: str(sampler).partition(" object")[0],
)
def test_steps_that_change_tokens_again_read_nothing(sampler, model, cache):
    assert run_faked(sampler, model, steps=12, cache=cache) == []


@pytest.mark.parametrize("model", [Plain(), WithHead()], ids=["logits", "head"])
def test_remasking_by_confidence_reads_nothing_without_a_cache(model):
    assert run_faked(ReMDM(ConfidenceBased()), model, steps=12, cache=False) == []


def threes(tokens, t=None):
    return (tokens == 3).sum(1)


BASES = [Ancestral(), Euler(), FirstHitting(), ParallelReveal(3), RandomOrder(block_length=4), Plan()]


@pytest.mark.parametrize("value", [threes, Completion(threes)], ids=["value", "completion"])
@pytest.mark.parametrize("selection", [SMC(), SMC(shared=True), LocalSoftmax(), Argmax()], ids=str)
@pytest.mark.parametrize("base", BASES, ids=str)
def test_guided_steps_look_at_values_late_and_at_nothing_else(base, selection, value, monkeypatch):
    begun, heard = [], []

    class Told:
        """Values are numbers."""

        def __init__(self, values):
            begun.append(self)
            self.shape = values.shape

        def get(self):
            heard.append(len(begun) - begun.index(self) - 1)
            return [0] * self.shape[0]

    monkeypatch.setattr(svdd, "Reading", Told)
    sampler = SVDD(base, value, 4, selection=selection)
    steps = 12 if isinstance(base, (Ancestral, Euler)) else None
    assert run_faked(sampler, Plain(), steps=steps, cache=False, prompt=not selection.shared) == []
    assert heard == [1] * (len(begun) - 1) + [0]  # the last one's at once


class Elsewhere(torch.Tensor):
    """On a device, as far as it says."""

    @property
    def is_cpu(self):
        return False


def positions_without_looking(where, many):
    return [part.as_subclass(torch.Tensor) for part in true_positions(where.as_subclass(Elsewhere), many)]


@pytest.mark.parametrize("value", [threes, Completion(threes)], ids=["value", "completion"])
@pytest.mark.parametrize("base", BASES, ids=str)
def test_guided_tokens_do_not_depend_on_how_positions_are_found(base, value, monkeypatch):
    prompt = torch.full((3, LENGTH), VOCAB)
    prompt[1, 1:] = 2
    steps = 12 if isinstance(base, (Ancestral, Euler)) else None
    options = {"mask_id": VOCAB, "sampler": SVDD(base, value, 4), "steps": steps, "rng": 5, "cache": False}
    wanted = sample(Plain(), (3, LENGTH), prompt=prompt, **options)
    monkeypatch.setattr(svdd, "true_positions", positions_without_looking)
    found = sample(Plain(), (3, LENGTH), prompt=prompt, **options)
    assert torch.equal(found.tokens, wanted.tokens)
    assert (found.nfe, found.row_nfe.tolist()) == (wanted.nfe, wanted.row_nfe.tolist())


class Next(Plain):
    """The most probable token is the one after that in place, of a mask the first."""

    def __call__(self, tokens, t=None):
        return torch.nn.functional.one_hot((tokens + 1) % (VOCAB + 1), VOCAB).float()


def test_a_completion_touches_masks_only(monkeypatch):
    """Also where there are fewer than the host thought, and none."""
    monkeypatch.setattr(svdd, "true_positions", positions_without_looking)
    problem = Problem(Next(), (3, LENGTH), VOCAB, rng=0, cache=False)
    for masks in (0, 1, 5):
        tokens = torch.full((3, LENGTH), 2)
        tokens[1, :masks] = VOCAB
        completed, rows = Completion(threes).complete(problem, tokens, None, 5)
        assert torch.equal(completed, tokens.masked_fill(tokens == VOCAB, 0))
        assert rows.tolist() == [0, 1, 2]


class Scores(Plain):
    """Log-scores that depend on time."""

    time_independent = False


@pytest.mark.parametrize("sampler", [UniformEuler(VOCAB), UniformAnalytic(VOCAB)], ids=str)
def test_steps_of_uniform_diffusion_read_nothing(sampler):
    assert run_faked(sampler, Scores(), steps=12, schedule=LogLinear(), cache=False) == []


def test_steps_that_read_are_seen():
    for sampler, steps in ((Threshold(), None), (ReMDM(ConfidenceBased()), 5)):
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            run_faked(sampler, Plain(), steps=steps)


@pytest.mark.parametrize("lookahead", [0, 1, 3])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    "rule", [Threshold, Factor, EntropyBounded, partial(Threshold, block_length=4)], ids=str
)
def test_adaptive_steps_read_how_many_masks_are_left(rule, cache, lookahead, monkeypatch):
    """Nothing else, once a step, as late as they were told to; no more calls than that costs."""
    begun, heard = [], []

    class Told:
        """In place of numbers: a row that reveals three tokens a call."""

        def __init__(self, values):
            assert values.shape == (3,)
            begun.append(self)
            self.left = [max(0, masks - 3 * len(begun)) for masks in (LENGTH, LENGTH - 4, LENGTH)]

        def get(self):
            heard.append(len(begun) - begun.index(self) - 1)
            return self.left

    monkeypatch.setattr(rules, "Reading", Told)
    assert run_faked(rule(lookahead=lookahead), Plain(), cache=cache) == []
    assert set(heard) == {lookahead}
    assert len(begun) == min(LENGTH // 3 + lookahead, LENGTH)


def test_positions_without_looking():
    """The way that reads nothing finds what nonzero finds."""
    where = torch.rand(5, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    wanted = where.nonzero(as_tuple=True)
    many = int(where.sum())
    for asked in (many, many + 7):
        for found, other in zip(positions_without_looking(where, asked), wanted, strict=True):
            assert torch.equal(found, torch.cat((other, other))[:asked])
