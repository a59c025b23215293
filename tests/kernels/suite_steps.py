"""The step ops of masked diffusion in Triton against the reference; run like suite.py, with its helpers."""

from __future__ import annotations

import pytest
import torch
from driftmax import InvalidDistribution, RowStreams, check_status, transfer, unmask

from tests.kernels.suite import FLOATS, logits_of, near_ties, pytestmark, streams_of

__all__ = ["pytestmark"]  # the interpreter's remarks are of no interest here either


def masks_of(rows: int, length: int, mask_id: int, device: torch.device) -> torch.Tensor:
    """Two of three positions masked."""
    tokens = torch.arange(rows * length).view(rows, length) % 3
    return torch.where(tokens == 1, 0, mask_id).to(device)


def stepped(
    logits: torch.Tensor, tokens: torch.Tensor, probability: object, **options: object
) -> torch.Tensor:
    """Step with both backends, assert equal tokens and counts, return the new tokens."""
    ours, theirs = tokens.clone(), tokens.clone()
    counts = unmask(logits, ours, probability, **options, backend="triton")
    wanted = unmask(logits, theirs, probability, **options, backend="reference")
    check_status()
    assert torch.equal(counts, wanted)
    assert torch.equal(ours, theirs), f"{(ours != theirs).sum()} of {ours.numel()} differ"
    return ours


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("length", "vocab"), [(6, 3), (3, 200), (3, 1024)])
def test_unmask_is_the_references(length: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    logits = logits_of(3 * length, vocab, device, dtype).view(3, length, vocab)
    chance = torch.tensor([0.3, 1.0, 0.0], dtype=torch.float64, device=device)
    temperature = torch.tensor([[1.0], [0.0], [0.5]], dtype=torch.float64, device=device)
    for mask_id in (1, vocab):
        tokens = masks_of(3, length, mask_id, device)
        rng, forbidden = streams_of(3, device), torch.tensor([0, vocab], device=device)
        options = {"mask_id": mask_id, "temperature": temperature, "rng": rng}
        found = stepped(logits, tokens, chance, **options)
        assert bool((found != mask_id)[1].all())
        assert torch.equal(found[2], tokens[2])
        if vocab > 3:
            assert not bool((stepped(logits, tokens, 0.7, forbidden=forbidden, **options) == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_unmask_of_long_rows(dtype: torch.dtype, device: torch.device) -> None:
    """The block race, with the maximum of every row forbidden."""
    logits = logits_of(8, 3500, device, dtype).view(2, 4, 3500)
    logits[..., [7, 2000]] = 30.0
    assert not near_ties(
        logits.view(8, 3500).index_fill(1, torch.tensor([7, 2000], device=device), -50.0), 5
    ).any()
    tokens = torch.full((2, 4), 2000, device=device)
    forbidden = torch.tensor([7, 3499, 9999, 1024], device=device)
    found = stepped(logits, tokens, 0.6, mask_id=2000, forbidden=forbidden, rng=5)
    assert 0 < int((found == 2000).sum()) < 8
    assert int((found == 7).sum()) == 0
    greedy = stepped(logits, tokens, 1.0, mask_id=2000, forbidden=forbidden, temperature=0.0, rng=5)
    logits[..., [7, 2000, 3499, 1024]] = -torch.inf
    assert torch.equal(greedy, logits.argmax(2))


def test_unmask_of_a_window(device: torch.device) -> None:
    logits = logits_of(20, 300, device).view(2, 10, 300)
    rng = streams_of(2, device)
    whole = stepped(logits, masks_of(2, 10, -1, device), 0.5, mask_id=-1, rng=rng)
    part = masks_of(2, 10, -1, device)[:, 4:9]
    window = rng.at(positions=torch.arange(4, 9, device=device).expand(2, 5))
    assert torch.equal(stepped(logits[:, 4:9], part, 0.5, mask_id=-1, rng=window), whole[:, 4:9])


def test_unmask_of_more_positions_than_a_tile(device: torch.device) -> None:
    logits = torch.zeros(1, 1, 1, device=device).expand(2, 2500, 1)
    stepped(logits, masks_of(2, 2500, 8, device), 0.004, mask_id=8, rng=RowStreams(3, 2))


@pytest.mark.parametrize("vocab", [100, 2500])
@pytest.mark.parametrize(
    ("value", "reason"), [(float("nan"), "NaN"), (float("inf"), r"\+inf"), (-torch.inf, "no token")]
)
def test_unmask_reports_bad_rows_and_leaves_them_masked(
    vocab: int, value: float, reason: str, device: torch.device
) -> None:
    logits = logits_of(6, vocab, device).view(2, 3, vocab)
    logits[1, 1] = value
    tokens = torch.full((2, 3), -1, device=device)
    tokens[1, 1] = 0
    assert unmask(logits, tokens.clone(), 1.0, mask_id=-1, rng=1, backend="triton").tolist() == [3, 2]
    check_status()  # a row that nobody draws from
    tokens[1, 1] = -1
    assert unmask(logits, tokens, 1.0, mask_id=-1, rng=1, backend="triton").tolist() == [3, 2]
    assert (tokens == -1).nonzero().tolist() == [[1, 1]]
    with pytest.raises(InvalidDistribution, match=f"row 4: .*{reason}"):
        check_status()


def transferred(tokens: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
    """Transfer with both backends, assert equal results, return where a token was written."""
    ours, theirs = tokens.clone(), tokens.clone()
    moved = transfer(ours, *arguments, **options, backend="triton")
    wanted = transfer(theirs, *arguments, **options, backend="reference")
    assert torch.equal(moved, wanted), f"{(moved != wanted).sum()} of {moved.numel()} differ"
    assert torch.equal(ours, theirs)
    return moved


RULES: list[dict[str, object]] = [
    {"count": 3},
    {"count": torch.tensor([0, 5, 10**6])},
    {"threshold": 0.5},
    {"threshold": torch.tensor([-torch.inf, 9.0, 0.0]), "count": 2},
    {"count": 4, "begin": 3, "end": 20},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_transfer_is_the_references(
    rule: dict[str, object], dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(3)
    for length in (23, 1500):
        scores = torch.randn(3, length, generator=generator)
        scores[:, ::3] = scores[:, ::3].round()  # ties, zeros of both signs
        scores[:, 4::50], scores[:, 7::60] = torch.nan, -torch.inf
        drawn = torch.randint(0, 9, (3, length), generator=generator).to(device)
        eligible = (torch.rand(3, length, generator=generator) < 0.7).to(device)
        moved_rule = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in rule.items()}
        for where in (None, eligible):
            transferred(
                masks_of(3, length, 9, device),
                drawn,
                scores.to(device, dtype),
                mask_id=9,
                eligible=where,
                **moved_rule,
            )


def test_transfer_of_more_positions_than_a_tile(device: torch.device) -> None:
    """Equal scores over several tiles: the ties are cut in the order of positions."""
    scores = torch.zeros(1, 9000, device=device)
    tokens = torch.full((1, 9000), 9, device=device)
    tokens[0, :100] = 0
    moved = transferred(tokens, torch.zeros_like(tokens), scores, 7000, mask_id=9, begin=50)
    assert moved[0].nonzero()[:, 0].tolist() == list(range(100, 7100))
    scores[0, ::2] = torch.arange(4500, device=device).flip(0) * 1e-3
    transferred(tokens, torch.zeros_like(tokens), scores, 3000, mask_id=9)
