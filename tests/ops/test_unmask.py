"""`unmask`: the tokens of uniform, comparison and `categorical` done one after another, bit for bit.

Statistical assertions are those of tests/statistics.py: level 1e-9 each, fixed seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import driftmax
import pytest
import torch
from driftmax import InvalidDistribution, RowStreams, categorical, unmask
from driftmax.ops._dispatch import core
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as hs

from tests import statistics as st

INF = math.inf
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
Uniforms = Callable[[RowStreams, torch.Size], torch.Tensor]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def some_masks(rows: int, length: int, mask_id: int, share: float = 0.6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    masked = torch.rand(rows, length, generator=generator) < share
    return torch.where(masked, mask_id, torch.randint(0, 3, (rows, length), generator=generator))


def streams_of(rows: int, step: int = 2**24 - 1) -> RowStreams:
    """Seeds and row ids over their whole range."""
    return RowStreams(
        torch.arange(rows) * 2**40 - 5, (torch.arange(rows) * 0x3FFFFFFF + 7) % 2**32, step=step
    )


def clock(streams: RowStreams, shape: torch.Size) -> torch.Tensor:
    return driftmax.random.uniform(shape, rng=streams, dtype=torch.float64)


def one_by_one(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    probability: torch.Tensor | float,
    *,
    mask_id: int,
    streams: RowStreams,
    forbidden: tuple[int, ...] = (),
    temperature: torch.Tensor | float = 1.0,
    backend: str = "cpp",
    uniforms: Uniforms = clock,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The step as discrete/ancestral.py composes it: new tokens, and how many were revealed in each row."""
    rows, length, vocab = logits.shape
    probability = torch.as_tensor(probability, dtype=torch.float64).expand(rows)
    reveal = (tokens == mask_id) & (uniforms(streams, tokens.shape) < probability[:, None])
    row, position = reveal.nonzero(as_tuple=True)
    chosen = logits[row, position].clone()
    chosen[:, [token for token in {mask_id, *forbidden} if 0 <= token < vocab]] = -INF
    heat = torch.as_tensor(temperature, dtype=torch.float64).expand(rows, length)[row, position]
    result = tokens.clone()
    result[row, position] = categorical(
        chosen, temperature=heat, rng=streams[row].at(positions=position), backend=backend
    )
    return result, reveal.sum(1)


def agree(logits: torch.Tensor, tokens: torch.Tensor, probability: object, backend: str, **options) -> None:
    """Assert that `unmask` gives the composite's tokens and counts, and leaves the logits as they are."""
    before, got = logits.clone(), tokens.clone()
    wanted, counts = one_by_one(logits, tokens, probability, backend=backend, **options)
    streams = options.pop("streams")
    revealed = unmask(logits, got, probability, rng=streams, backend=backend, **options)
    assert torch.equal(got, wanted)
    assert torch.equal(revealed, counts)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "length", "vocab"), [(3, 9, 1), (5, 33, 7), (4, 17, 1024), (3, 40, 2500)])
def test_the_step_is_its_parts(rows, length, vocab, dtype, backend):
    """Outside the vocabulary, inside it, first, last: the mask; with and without other forbidden columns."""
    logits = normal(rows, length, vocab, seed=vocab, dtype=dtype)
    logits[..., 2::5] = -INF
    chance = torch.linspace(0.2, 1, rows, dtype=torch.float64)
    for mask_id in (-1, vocab, 3, 0, vocab - 1):
        if vocab == 1 and mask_id == 0:
            continue  # nothing would be left to draw
        forbidden = (4, vocab + 7, -3) if vocab > 5 else ()
        options = {"mask_id": mask_id, "streams": streams_of(rows), "forbidden": forbidden}
        agree(logits, some_masks(rows, length, mask_id), chance, backend, **options)


def test_temperatures_and_scalar_probability(backend):
    logits = normal(3, 30, 1500)
    for temperature in (0.0, 0.5, torch.tensor([[0.0], [1.0], [2.0]]), torch.rand(30)):
        for probability in (0.0, 0.3, 1.0, 1):
            agree(
                logits,
                some_masks(3, 30, 1500),
                probability,
                backend,
                mask_id=1500,
                streams=streams_of(3),
                temperature=temperature,
            )


def test_float32_probabilities_are_what_they_are(backend):
    """A float32 value is compared as the float64 of the same value, not as the decimal it was made from."""
    u = clock(RowStreams(3, 1), torch.Size((1, 4000)))
    chance = u.float()
    logits, tokens = torch.zeros(1, 1, 4).expand(4000, 1, 4), torch.full((4000, 1), 9)
    streams = RowStreams(3, torch.zeros(4000, dtype=torch.int64), positions=torch.arange(4000)[:, None])
    revealed = unmask(logits, tokens, chance[0], mask_id=9, rng=streams, backend=backend)
    assert torch.equal(revealed, (u < chance.double())[0].long())
    assert 1000 < int(revealed.sum()) < 3000


WRONG: dict[str, Uniforms] = {
    "float32": lambda streams, shape: driftmax.random.uniform(shape, rng=streams).double(),
    "next step": lambda streams, shape: clock(streams.at(step=int(streams.step) + 1), shape),
    "one stream": lambda streams, shape: driftmax.random.uniform(shape, rng=7, dtype=torch.float64),
    "next element": lambda streams, shape: clock(streams, torch.Size((shape[0], shape[1] + 1)))[:, 1:],
    "position in the counter": lambda streams, shape: torch.stack(
        [clock(streams.at(positions=torch.full((shape[0],), j)), torch.Size((shape[0], 1)))[:, 0]
         for j in range(shape[1])], 1,
    ),
    "complement": lambda streams, shape: 1 - clock(streams, shape),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_another_uniform_would_be_seen(name, backend):
    """Of 4096 decisions near even odds; float32 differs from float64 only where the odds are finer than its
    grid.
    """
    streams = RowStreams(7, 4, step=3)
    u = clock(streams, torch.Size((4, 64)))
    chance = u.median(1).values + 2.0**-30 if name == "float32" else torch.full((4,), 0.5).double()
    logits, tokens = normal(4, 64, 11), torch.full((4, 64), -1)
    agree(logits, tokens, chance, backend, mask_id=-1, streams=streams)
    wrong, _ = one_by_one(
        logits, tokens, chance, mask_id=-1, streams=streams, backend=backend, uniforms=WRONG[name]
    )
    unmask(logits, tokens, chance, mask_id=-1, rng=streams, backend=backend)
    assert not torch.equal(tokens, wrong)


# ---- what a step depends on


def test_rows_alone_split_and_permuted(backend):
    logits, masked = normal(9, 12, 1300), some_masks(9, 12, 1300)
    streams, chance = streams_of(9), torch.rand(9, generator=torch.Generator().manual_seed(1)).double()

    def step(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = masked[rows]
        counts = unmask(logits[rows], tokens, chance[rows], mask_id=1300, rng=streams[rows], backend=backend)
        return tokens, counts

    whole, counts = step(torch.arange(9))
    for rows in (torch.tensor([4]), torch.tensor([8, 0, 3]), torch.randperm(9)):
        tokens, some = step(rows)
        assert torch.equal(tokens, whole[rows])
        assert torch.equal(some, counts[rows])


def test_positions_of_longer_rows(backend):
    """A window of the positions, said to be one, gets the tokens that it gets in the whole rows."""
    logits, whole = normal(3, 20, 1100), torch.full((3, 20), 1100)
    part, streams = whole[:, 5:12].clone(), streams_of(3)
    unmask(logits, whole, 0.7, mask_id=1100, rng=streams, backend=backend)
    window = streams.at(positions=torch.arange(5, 12).expand(3, 7))
    unmask(logits[:, 5:12], part, 0.7, mask_id=1100, rng=window, backend=backend)
    assert torch.equal(part, whole[:, 5:12])


def test_threads_and_isa():
    """Many draws, and a single one long enough for threads to share its row."""
    batches = [(normal(6, 300, 1500), 0.4), (normal(1, 3, 150_000), 0.5)]

    def step(logits: torch.Tensor, chance: float) -> torch.Tensor:
        tokens = torch.full(logits.shape[:2], 10**6)
        unmask(logits, tokens, chance, mask_id=10**6, rng=RowStreams(5, len(tokens)))
        return tokens

    wanted = [step(*batch) for batch in batches]
    assert all(bool((tokens < 10**6).any()) for tokens in wanted)
    chosen = core.isa()
    try:
        for isa in core.available_isas():
            core.set_isa(isa)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                for batch, tokens in zip(batches, wanted, strict=True):
                    assert torch.equal(step(*batch), tokens)
    finally:
        core.set_isa(chosen)


def test_rng_forms(backend):
    """An int is the seed of rows 0, 1, ...; steps may be tensors; the default seeds differ."""
    logits = normal(3, 50, 40)

    def step(rng: object) -> torch.Tensor:
        tokens = torch.full((3, 50), 40)
        unmask(logits, tokens, 0.5, mask_id=40, rng=rng, backend=backend)
        return tokens

    assert torch.equal(step(5), step(RowStreams(5, 3)))
    assert torch.equal(
        step(RowStreams(5, 3, step=torch.tensor(8))), step(RowStreams(torch.tensor([5]), 3, step=8))
    )
    assert torch.equal(step(torch.Generator().manual_seed(1)), step(torch.Generator().manual_seed(1)))
    assert not torch.equal(step(None), step(None))  # 150 draws among 40 tokens


def test_strides(backend):
    base = normal(8, 24, 1100)
    masked = some_masks(8, 24, -1)
    views = [
        (base[::2], masked[::2]),
        (base.transpose(0, 1), masked.T),
        (base[:, :, 1:1050], masked),
        (base[:1].expand(8, 24, 1100), masked),
        (base.repeat_interleave(2, dim=2)[..., ::2], masked),
        (base, masked.repeat_interleave(2, dim=1)[:, ::2]),
        (base[:, :1].expand(8, 24, 1100), masked[:1].expand(8, 24).clone()),
    ]
    for logits, tokens in views:
        wanted = tokens.contiguous().clone()
        streams = RowStreams(4, len(tokens))
        counts = unmask(logits.contiguous().clone(), wanted, 0.5, mask_id=-1, rng=streams, backend=backend)
        got = torch.empty_strided(tokens.shape, tokens.stride(), dtype=torch.int64).copy_(tokens)
        assert torch.equal(unmask(logits, got, 0.5, mask_id=-1, rng=streams, backend=backend), counts)
        assert torch.equal(got, wanted)


# ---- the law


@pytest.mark.parametrize(("probability", "seen"), [(0.5, 0.0081), (0.03, 0.0028)])
def test_law_of_a_step(probability, seen):
    """Chi-square over {still masked, each token} of 400 000 positions: a reveal more or less likely by `seen`
    fails it with probability 0.999.
    """
    assert st.noncentrality(5, level=st.LEVEL / 2) < 400_000 * seen**2 / (probability * (1 - probability))
    row = normal(6)
    tokens = torch.full((400, 1000), 6)
    revealed = unmask(row.expand(400, 1000, 6), tokens, probability, mask_id=6, forbidden=[2], rng=1)
    law = st.softmax(row.masked_fill(torch.arange(6) == 2, -INF))
    law = torch.cat((probability * law, torch.tensor([1 - probability])))
    st.assert_law(tokens, law)
    assert torch.equal(revealed, (tokens != 6).sum(1))
    biased = probability + 1.5 * seen
    with pytest.raises(AssertionError):
        st.assert_law(tokens, torch.cat((law[:6] / probability * biased, torch.tensor([1 - biased]))))


def test_rare_reveals():
    """Probability 2^-20 over 40 million positions: 38 expected; float32's grid of 2^-23 would do, a 16-bit
    one not.
    """
    tokens = torch.full((40, 1_000_000), 1)
    revealed = unmask(torch.zeros(1, 1, 1).expand(40, 1_000_000, 1), tokens, 2.0**-20, mask_id=1, rng=2)
    st.assert_mass(int(revealed.sum()), 40_000_000, 2.0**-20)


def test_steps_and_tokens_are_independent():
    """The step at which a position is revealed says nothing about its token: 5 steps by 5 tokens, and the
    steps have the law of the grid.
    """
    row, tokens = normal(5), torch.full((100, 1000), 5)
    when = torch.full_like(tokens, -1)
    for k, probability in enumerate((1 / 5, 1 / 4, 1 / 3, 1 / 2, 1.0)):
        before = tokens == 5
        unmask(row.expand(100, 1000, 5), tokens, probability, mask_id=5, rng=RowStreams(3, 100, step=k))
        when[before & (tokens != 5)] = k
    st.assert_law(when, torch.full((5,), 0.2))
    st.assert_law(tokens, st.softmax(row))
    st.assert_independent(when, tokens, 5)


def test_neighbours_are_independent():
    tokens = torch.full((300, 301), 1)
    unmask(torch.zeros(1, 1, 1).expand(300, 301, 1), tokens, 0.5, mask_id=1, rng=4)
    for first, second in (
        (tokens[:, 1:], tokens[:, :-1]),
        (tokens[1:], tokens[:-1]),
        (tokens[:, 4:], tokens[:, :-4]),
    ):
        st.assert_independent(first.reshape(-1), second.reshape(-1), 2)


# ---- what may go wrong


@pytest.mark.parametrize("vocab", [100, 3000])
@pytest.mark.parametrize(("value", "words"), [(math.nan, "NaN"), (INF, r"\+inf"), (-INF, "no token")])
def test_only_revealed_rows_are_looked_at(vocab, value, words, backend):
    logits, tokens = normal(3, 8, vocab), torch.full((3, 8), -1)
    tokens[:, 5] = 0
    logits[:, 5] = value  # not masked
    logits[2] = value  # never revealed
    logits[:2, :, 9] = math.nan  # forbidden
    chance = torch.tensor([1.0, 0.5, 0.0])
    options = {"mask_id": -1, "forbidden": torch.tensor([9]), "rng": 1, "backend": backend}
    counts = unmask(logits, tokens.clone(), chance, **options)
    assert int(counts[0]) == 7
    assert int(counts[2]) == 0
    logits[0, 3] = value
    before = tokens.clone()
    with pytest.raises(InvalidDistribution, match=f"row 0, position 3: .*{words}"):
        unmask(logits, tokens, chance, **options)
    assert torch.equal(tokens, before)


def test_forbidding_everything_is_an_error(backend):
    with pytest.raises(InvalidDistribution, match="row 0, position 1: no token"):
        unmask(
            torch.zeros(1, 2, 3),
            torch.tensor([[0, 5]]),
            1.0,
            mask_id=5,
            forbidden=range(3),
            rng=0,
            backend=backend,
        )


def test_empty_batches(backend):
    for shape in ((0, 4), (3, 0)):
        tokens = torch.zeros(shape, dtype=torch.int64)
        counts = unmask(torch.zeros(*shape, 5), tokens, 1.0, mask_id=0, rng=0, backend=backend)
        assert counts.tolist() == [0] * shape[0]
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    assert unmask(torch.zeros(2, 3, 1), tokens, 1.0, mask_id=7, rng=0, backend=backend).tolist() == [0, 0]
    assert not tokens.any()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"logits": torch.zeros(2, 3)}, ValueError, r"\[B, L, V\]"),
        ({"logits": torch.zeros(2, 3, 0)}, ValueError, r"\[B, L, V\]"),
        ({"logits": torch.zeros(2, 3, 4).long()}, TypeError, "logits"),
        ({"tokens": torch.zeros(2, 4).long()}, ValueError, "tokens must have shape"),
        ({"tokens": torch.zeros(2, 3)}, TypeError, "tokens must be int64"),
        ({"tokens": [[0]]}, TypeError, "tokens must be a torch.Tensor"),
        ({"probability": 1.5}, ValueError, "probability"),
        ({"probability": math.nan}, ValueError, "probability"),
        ({"probability": torch.tensor([0.1, -0.1])}, ValueError, "probability"),
        ({"probability": torch.zeros(3)}, ValueError, "broadcast"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"temperature": torch.ones(2)}, ValueError, "broadcast"),
        ({"forbidden": torch.zeros(2)}, TypeError, "forbidden"),
        ({"rng": RowStreams(0, 3)}, ValueError, "3 rows"),
        ({"rng": RowStreams(0, 2, positions=[1, 2])}, ValueError, "positions"),
        ({"backend": "none"}, ValueError, "none"),
    ],
)
def test_errors(arguments, error, words):
    given = {"logits": torch.zeros(2, 3, 4), "tokens": torch.zeros(2, 3).long(), "probability": 0.5}
    with pytest.raises(error, match=words):
        unmask(**{**given, "mask_id": 0, "rng": 0, **arguments})


# ---- with torch, and at random


def test_compiled_steps_are_the_eager_ones_and_do_not_recompile():
    torch.compiler.reset()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    def step(x, tokens, chance, k):
        streams = RowStreams(7, 3, step=k)
        return unmask(x * 2, tokens, chance, mask_id=50, forbidden=[1, 2], rng=streams)

    compiled = torch.compile(step, fullgraph=True, backend=count)
    x, ours, theirs = normal(3, 40, 51), torch.full((3, 40), 50), torch.full((3, 40), 50)
    for k in range(4):
        chance = torch.full((3,), 1 / (4 - k)).double()
        got = compiled(x, ours, chance, torch.tensor(k))
        assert torch.equal(got, step(x, theirs, chance, torch.tensor(k)))
        assert torch.equal(ours, theirs)
    assert len(graphs) == 1
    assert not (ours == 50).any()


def test_compiled_with_its_writes_functionalised():
    """Into a transposed tensor, whose copy the op writes."""
    torch.compiler.reset()
    x, ours, theirs = normal(3, 40, 51), torch.full((40, 3), 50), torch.full((40, 3), 50)

    def step(x, tokens):
        return unmask(x * 2, tokens.T, 0.5, mask_id=50, rng=7) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, ours), step(x, theirs))
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, torch.full((40, 3), 50))


@settings(
    max_examples=80,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    hs.sampled_from(DTYPES),
    hs.one_of(hs.integers(2, 40), hs.sampled_from([1023, 1024, 1025, 2049]), hs.integers(1026, 4000)),
    hs.integers(0, 4),
    hs.sampled_from([0, 1, 2, 7, 33]),
    hs.sampled_from(["none", "prompt", "all"]),
    hs.lists(hs.integers(-5, 60), max_size=6),
    hs.sampled_from([1.0, 0.0, 0.3, 2.0]),
    hs.integers(0, 2**63 - 1),
)
def test_fuzz(dtype, vocab, rows, length, masks, forbidden, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(rows, length, vocab, generator=generator)).to(dtype)
    logits[torch.rand(rows, length, vocab, generator=generator) < 0.2] = -INF
    mask_id = int(torch.randint(-2, vocab + 2, (1,), generator=generator))
    free = next(token for token in range(vocab, -1, -1) if token not in {mask_id, vocab, *forbidden})
    logits[..., max(free, 0)] = 1.0
    tokens = some_masks(rows, length, mask_id, {"none": 0.0, "prompt": 0.5, "all": 1.0}[masks], seed % 1000)
    allowed = [token for token in range(vocab) if token not in {mask_id, *forbidden}]
    if not allowed:
        return
    chance = torch.rand(rows, generator=generator).double()
    options = {"mask_id": mask_id, "forbidden": tuple(forbidden), "temperature": temperature}
    streams = RowStreams(seed, rows, step=seed % 2**24)
    agree(logits, tokens, chance, "cpp", streams=streams, **options)
    agree(logits, tokens, chance, "reference", streams=streams, **options)
