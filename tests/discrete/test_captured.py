"""`CapturedLoop`: its turns are the sampler's steps, in fixed shapes and without a look at the host."""

from __future__ import annotations

from functools import partial

import driftmax
import pytest
import torch
from driftmax.discrete import (
    CapturedLoop,
    Confidence,
    EntropyBounded,
    Factor,
    MarginOrder,
    Problem,
    Threshold,
    sample,
    while_graph,
)
from driftmax.discrete.captured import Turns
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.discrete.test_no_sync import LENGTH, VOCAB, Copies, Plain, WithHead, on_device

ROWS = 3
RULES = [
    partial(Threshold, 0.2),
    partial(Threshold, 0.0),
    partial(Threshold, 1.1),
    partial(Factor, 1.6),
    partial(EntropyBounded, 2.5),
    partial(EntropyBounded, 2.5, MarginOrder()),
]


class Neighbour(Plain):
    """Logits from the token on the left: what is revealed changes what comes."""

    def __call__(self, tokens, t=None):
        generator = torch.Generator().manual_seed(1)
        return (3 * torch.randn(VOCAB + 1, VOCAB, generator=generator))[tokens.roll(1, 1)]


class NeighbourHead(Neighbour):
    """The same with features and a head."""

    @property
    def head(self):
        return Neighbour.__call__(self, torch.arange(VOCAB + 1)[:, None])[:, 0].T.contiguous(), None

    def features(self, tokens):
        return torch.nn.functional.one_hot(tokens.roll(1, 1), VOCAB + 1).float()


def prompt(first=4):
    tokens = torch.full((ROWS, LENGTH), VOCAB)
    tokens[1, :first] = 2
    tokens[2, ::first] = 3
    return tokens


def run(turns, streams, tokens):
    turns.start(streams, tokens)
    while bool(turns.more):
        turns.turn()
    return turns.tokens.clone(), int(turns.nfe), turns.row_nfe.tolist()


@pytest.mark.parametrize("model", [Neighbour(), NeighbourHead()], ids=["logits", "head"])
@pytest.mark.parametrize("block_length", [None, 5, 100])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_turns_are_steps(rule, block_length, model):
    """With other streams and prompts than it was made for, too."""
    sampler = rule(block_length=block_length)
    turns = Turns(sampler, Problem(model, (ROWS, LENGTH), VOCAB, rng=0, prompt=prompt(), banned=[1]))
    seeds, ids = torch.tensor([5, 8, 7]), torch.tensor([2, 0, 1])
    for streams, tokens in (
        (driftmax.RowStreams(0, ROWS), prompt()),
        (driftmax.RowStreams(-3, ROWS), prompt(3)),
        (driftmax.RowStreams(seeds, ids), prompt(7)),
        (driftmax.RowStreams(seeds[:1], ids), torch.full((ROWS, LENGTH), VOCAB)),
    ):
        wanted = sample(
            model, tokens.shape, mask_id=VOCAB, sampler=sampler, rng=streams, prompt=tokens, banned=[1]
        )
        got, nfe, row_nfe = run(turns, streams, tokens)
        assert torch.equal(got, wanted.tokens)
        assert (nfe, row_nfe) == (wanted.nfe, wanted.row_nfe.tolist())


def test_nothing_to_do():
    turns = Turns(Threshold(), Problem(Plain(), (ROWS, LENGTH), VOCAB, rng=0))
    tokens = torch.full((ROWS, LENGTH), 4)
    got, nfe, row_nfe = run(turns, driftmax.RowStreams(0, ROWS), tokens)
    assert torch.equal(got, tokens)
    assert (nfe, row_nfe) == (0, [0] * ROWS)


def test_masks_that_stay_end_the_loop(monkeypatch):
    """As bad logits leave them on a GPU."""
    turns = Turns(Threshold(), Problem(Plain(), (ROWS, LENGTH), VOCAB, rng=0))
    monkeypatch.setattr(
        Threshold, "reveal", lambda self, state, rows, batch, many, step: (batch.clone(), None)
    )
    _, nfe, row_nfe = run(turns, driftmax.RowStreams(0, ROWS), prompt())
    assert (nfe, row_nfe) == (LENGTH, [LENGTH] * ROWS)


@pytest.mark.parametrize("model", [Plain(), WithHead()], ids=["logits", "head"])
@pytest.mark.parametrize("block_length", [None, 5])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_turns_read_nothing(rule, block_length, model):
    turns = Turns(rule(block_length=block_length), Problem(model, (ROWS, LENGTH), VOCAB, rng=0, banned=[1]))
    with FakeTensorMode(allow_non_fake_inputs=False) as mode, Copies() as copies:
        for name, value in vars(turns).items():
            setattr(turns, name, value if name == "sampler" else on_device(value, mode))
        turns.start(driftmax.RowStreams(7, ROWS), turns.tokens)
        turns.turn()
        turns.turn()
    assert copies.seen == []


def test_errors(monkeypatch):
    problem = Problem(Plain(), (ROWS, LENGTH), VOCAB, rng=0)
    with pytest.raises(TypeError, match="not Confidence"):
        CapturedLoop(Confidence(), problem)
    with pytest.raises(driftmax.BackendUnavailable, match="not cpu"):
        CapturedLoop(Threshold(), problem)

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(while_graph, "import_module", missing)
    with pytest.raises(driftmax.BackendUnavailable, match="pip install cuda-bindings"):
        while_graph.WhileGraph(lambda: None, torch.zeros(1, dtype=torch.bool))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here; the turns are tested on the CPU")
@pytest.mark.parametrize("block_length", [None, 5])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_captured(rule, block_length):
    table = Neighbour()(torch.arange(VOCAB + 1)[:, None])[:, 0].cuda()

    class Here(Plain):
        def __call__(self, tokens, t=None):
            return table[tokens.roll(1, 1)]

    sampler = rule(block_length=block_length)
    problem = Problem(Here(), (ROWS, LENGTH), VOCAB, rng=0, prompt=prompt().cuda(), banned=[1])
    loop = CapturedLoop(sampler, problem)
    seeds, ids = torch.tensor([5, 8, 7]), torch.tensor([2, 0, 1])
    results = []
    for streams, first in ((None, 4), (9, 3), (driftmax.RowStreams(seeds, ids), 7), (None, 4)):
        rng = 0 if streams is None else streams
        with driftmax.use_backend("reference"):
            wanted = sample(
                Neighbour(),
                (ROWS, LENGTH),
                mask_id=VOCAB,
                sampler=sampler,
                rng=rng,
                prompt=prompt(first),
                banned=[1],
            )
        result = loop(streams, prompt(first).cuda())
        results.append((result, wanted))
    for result, wanted in results:
        assert torch.equal(result.tokens.cpu(), wanted.tokens)
        assert int(result.nfe) == wanted.nfe
        assert result.row_nfe.tolist() == wanted.row_nfe.tolist()
    for wrong in (torch.zeros(2, LENGTH, dtype=torch.int64), torch.zeros(ROWS, LENGTH)):
        with pytest.raises(ValueError, match="prompt must be int64"):
            loop(prompt=wrong)
    with pytest.raises(ValueError, match="3 rows"):
        loop(driftmax.RowStreams(0, 2))
