"""`transfer`: against the rule written with Python's sort, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from driftmax import transfer
from driftmax.ops._dispatch import core
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as hs

INF = math.inf
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
MASK = 9


def by_sorting(
    tokens: torch.Tensor,
    drawn: torch.Tensor,
    scores: torch.Tensor,
    count: list[int] | None,
    threshold: list[float] | None = None,
    begin: int = 0,
    end: int | None = None,
    eligible: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens and where they were written, row by row."""
    tokens, moved = tokens.clone(), torch.zeros_like(tokens, dtype=torch.bool)
    rows, length = tokens.shape
    for b in range(rows):
        candidates = []
        for j in range(begin, length if end is None else end):
            if int(tokens[b, j]) == MASK and (eligible is None or bool(eligible[b, j])):
                score = float(scores[b, j])
                candidates.append((INF if math.isnan(score) else -score, j))
        many = 1 if count is None else count[b]
        if threshold is not None:
            many = max(many, sum(-score >= threshold[b] for score, _ in candidates))
        for _, j in sorted(candidates)[:many]:
            tokens[b, j] = drawn[b, j]
            moved[b, j] = True
    return tokens, moved


def batch(rows: int, length: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Tokens (two of three masked), drawn tokens, and scores with ties, NaN and both infinities."""
    generator = torch.Generator().manual_seed(seed)
    masked = torch.rand(rows, length, generator=generator) < 0.67
    scores = torch.randn(rows, length, generator=generator)
    kind = torch.randint(0, 12, (rows, length), generator=generator)
    scores = torch.where(kind < 4, scores.round(), scores)
    scores = torch.where(kind == 5, torch.tensor(math.nan), scores)
    scores = torch.where(kind == 6, -INF, torch.where(kind == 7, INF, scores))
    drawn = torch.randint(0, MASK, (rows, length), generator=generator)
    return [torch.where(masked, MASK, 1), drawn, scores.to(dtype)]


def agree(parts: list[torch.Tensor], count: object, backend: str, **options: object) -> None:
    tokens, drawn, scores = parts
    got, rows = tokens.clone(), len(tokens)

    def per_row(value: object) -> list[object] | None:
        return None if value is None else torch.as_tensor(value).expand(rows).tolist()

    moved = transfer(got, drawn, scores, count, mask_id=MASK, backend=backend, **options)
    options["threshold"] = per_row(options.get("threshold"))
    wanted, where = by_sorting(tokens, drawn, scores, per_row(count), **options)
    assert torch.equal(got, wanted)
    assert torch.equal(moved, where)
    assert moved.dtype == torch.bool


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (4, 7), (3, 100), (2, 1500)])
def test_the_rule(rows, length, dtype, backend):
    parts = batch(rows, length, length, dtype)
    eligible = torch.rand(length, generator=torch.Generator().manual_seed(1)) < 0.5
    counts = torch.tensor([0, 2, length, 10**12])[:rows]
    for count, threshold in (
        (0, None),
        (3, None),
        (length, None),
        (counts, None),
        (None, 0.5),
        (2, torch.linspace(-1, 2, rows)),
        (0, INF),
        (counts, -INF),
    ):
        agree(parts, count, backend, threshold=threshold)
        agree(parts, count, backend, threshold=threshold, begin=length // 3, end=length - length // 4)
        agree(parts, count, backend, threshold=threshold, eligible=eligible.expand(rows, length))


def test_float32_scores_meet_float64_thresholds(backend):
    """0.1 in float32 lies above 0.1 in float64: it reaches that threshold; 0.7 lies below."""
    tokens, drawn = torch.full((2, 3), MASK), torch.zeros(2, 3, dtype=torch.int64)
    scores = torch.tensor([[0.1, 0.0, 0.0], [0.7, 0.0, 0.0]])
    moved = transfer(
        tokens, drawn, scores, 0, mask_id=MASK, threshold=torch.tensor([0.1, 0.7]).double(), backend=backend
    )
    exact = torch.tensor([0.1, 0.7], dtype=torch.float64)
    moved = transfer(tokens, drawn, scores, 0, mask_id=MASK, threshold=exact, backend=backend) | moved
    assert moved[:, 0].tolist() == [True, True]
    tokens.fill_(MASK)
    moved = transfer(tokens, drawn, scores, 0, mask_id=MASK, threshold=exact, backend=backend)
    assert moved[:, 0].tolist() == [True, False]


def test_a_whole_decoding(backend):
    """Blocks left to right, two tokens at a time, until no mask is left; nothing is written twice."""
    length = 24
    tokens = torch.full((3, length), MASK)
    tokens[:, :4] = 0
    scores = torch.rand(3, length, generator=torch.Generator().manual_seed(0))
    written = torch.zeros(3, length, dtype=torch.int64)
    for begin in range(4, length, 10):
        for step in range(5):
            drawn = torch.full((3, length), begin + step)
            moved = transfer(
                tokens, drawn, scores, 2, mask_id=MASK + 100, begin=begin, end=begin + 10, backend=backend
            )
            assert not moved.any()
            moved = transfer(
                tokens, drawn, scores, 2, mask_id=MASK, begin=begin, end=begin + 10, backend=backend
            )
            written += moved
            assert moved.sum(1).tolist() == [2, 2, 2]
            assert not moved[:, :begin].any()
    assert torch.equal(written[:, 4:], torch.ones_like(written[:, 4:]))
    assert not written[:, :4].any()


def test_rows_threads_and_isa():
    tokens, drawn, scores = batch(40, 300)
    wanted = tokens.clone()
    moved = transfer(wanted, drawn, scores, 20, mask_id=MASK)
    chosen = core.isa()
    try:
        for isa in core.available_isas():
            core.set_isa(isa)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                for rows in (torch.arange(40), torch.tensor([7]), torch.arange(39, -1, -1)):
                    got = tokens[rows]
                    assert torch.equal(
                        transfer(got, drawn[rows], scores[rows], 20, mask_id=MASK), moved[rows]
                    )
                    assert torch.equal(got, wanted[rows])
    finally:
        core.set_isa(chosen)


def test_strides(backend):
    tokens, drawn, scores = batch(6, 30)
    eligible = torch.rand(6, 30, generator=torch.Generator().manual_seed(5)) < 0.5
    wanted = tokens.clone()
    moved = transfer(wanted, drawn, scores, 4, mask_id=MASK, eligible=eligible, backend=backend)
    transposed, wide = (x.T.contiguous().T for x in (tokens, drawn)), tokens.repeat_interleave(2, dim=1)
    got, other = transposed
    assert torch.equal(
        transfer(
            got, other, scores.T.contiguous().T, 4, mask_id=MASK, eligible=eligible.T.contiguous().T,
            backend=backend,
        ),
        moved,
    )  # fmt: skip
    assert torch.equal(got, wanted)
    transfer(wide[:, ::2], drawn, scores, 4, mask_id=MASK, eligible=eligible, backend=backend)
    assert torch.equal(wide[:, ::2], wanted)
    assert torch.equal(wide[:, 1::2], tokens)


def test_empty_batches(backend):
    for shape in ((0, 4), (3, 0)):
        tokens = torch.zeros(shape, dtype=torch.int64)
        moved = transfer(tokens, tokens, torch.zeros(shape), 2, mask_id=0, backend=backend)
        assert moved.shape == shape


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"count": None}, ValueError, "a count, a threshold"),
        ({"count": -1}, ValueError, "count must be at least 0"),
        ({"count": torch.tensor([1, -1])}, ValueError, "every count"),
        ({"count": torch.zeros(2)}, TypeError, "count must be integers"),
        ({"count": torch.ones(3).long()}, ValueError, "broadcast"),
        ({"threshold": math.nan}, ValueError, "threshold must be a number"),
        ({"threshold": torch.tensor([0.0, math.nan])}, ValueError, "every threshold"),
        ({"begin": -1}, ValueError, "begin, end"),
        ({"begin": 3, "end": 2}, ValueError, "begin, end"),
        ({"end": 6}, ValueError, "begin, end"),
        ({"tokens": torch.zeros(2, 5)}, TypeError, "tokens must be int64"),
        ({"tokens": torch.zeros(10).long()}, ValueError, "tokens must have shape"),
        ({"drawn": torch.zeros(2, 4).long()}, ValueError, "drawn must have shape"),
        ({"drawn": torch.zeros(2, 5)}, TypeError, "drawn must be int64"),
        ({"scores": torch.zeros(2, 4)}, ValueError, "scores must have shape"),
        ({"scores": torch.zeros(2, 5).long()}, TypeError, "floating-point"),
        ({"scores": [[0.0]]}, TypeError, "scores must be a torch.Tensor"),
        ({"eligible": torch.zeros(2, 5)}, TypeError, "bool"),
        ({"eligible": torch.zeros(2, 4).bool()}, ValueError, "broadcast"),
        ({"backend": "none"}, ValueError, "none"),
    ],
)
def test_errors(arguments, error, words):
    given = {
        "tokens": torch.zeros(2, 5).long(),
        "drawn": torch.zeros(2, 5).long(),
        "scores": torch.zeros(2, 5),
        "count": 1,
        "mask_id": MASK,
    }
    with pytest.raises(error, match=words):
        transfer(**{**given, **arguments})


def test_compiled():
    torch.compiler.reset()
    tokens, drawn, scores = batch(3, 40)
    scores = scores.nan_to_num()

    def step(tokens, scores, count):
        moved = transfer(tokens, drawn, scores * 2, count, mask_id=MASK, threshold=1.5, begin=2)
        return moved.sum(1)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, theirs = tokens.clone(), tokens.clone()
    for count in (torch.tensor([1, 2, 3]), torch.tensor([9, 0, 2])):
        assert torch.equal(compiled(ours, scores, count), step(theirs, scores, count))
        assert torch.equal(ours, theirs)


@settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    hs.integers(0, 5),
    hs.one_of(hs.integers(0, 70), hs.sampled_from([1023, 1024, 1025])),
    hs.sampled_from(DTYPES),
    hs.integers(0, 2**31),
    hs.one_of(hs.none(), hs.integers(0, 80)),
    hs.one_of(hs.none(), hs.sampled_from([-INF, -1.0, 0.0, 1.0, INF])),
    hs.tuples(hs.floats(0, 1), hs.floats(0, 1)),
    hs.booleans(),
)
def test_fuzz(rows, length, dtype, seed, count, threshold, window, restricted):
    if count is None and threshold is None:
        return
    parts = batch(rows, length, seed, dtype)
    begin, end = sorted(int(part * length) for part in window)
    eligible = None
    if restricted:
        eligible = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed + 1)) < 0.6
    for backend in ("cpp", "reference"):
        agree(parts, count, backend, threshold=threshold, begin=begin, end=end, eligible=eligible)
