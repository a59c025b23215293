"""`from_transformers` drives real masked language model classes: random weights, nothing downloaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from driftmax.discrete import Ancestral, FirstHitting, Plan, sample
from driftmax.discrete.decoding import Confidence, EntropyBounded, Factor, MarginOrder, RandomOrder
from driftmax.discrete.guidance import ClassifierFreeGuidance
from driftmax.discrete.pretrained import from_transformers
from driftmax.discrete.remask import P2, Cap, ConfidenceBased, ReMDM
from torch import Tensor, nn

VOCAB, LENGTH, MASK, PAD = 40, 10, 4, 0
SPECIAL = (0, 1, 2, 3)


def bert(**settings: Any) -> Any:
    """A BERT of two layers with logits of a few nats and a bias that is not zero."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        initializer_range=0.5,
        pad_token_id=PAD,
        **settings,
    )
    model = transformers.BertForMaskedLM(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().bias.normal_()
    return model


def esm() -> Any:
    """Its head adds a bias that is not the output embedding's."""
    torch.manual_seed(0)
    config = transformers.EsmConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH + 2,
        pad_token_id=1,
        mask_token_id=MASK,
        token_dropout=False,
    )
    model = transformers.EsmForMaskedLM(config).eval()
    with torch.no_grad():
        model.lm_head.bias.normal_()
    return model


class Capped(nn.Module):
    """Not a model of transformers, but called like one; `after` is what it does to its logits."""

    def __init__(self, after: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out, self.after = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB, bias=False), after
        self.out.weight.data *= 1e-2

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def get_output_embeddings(self) -> nn.Linear:
        return self.out

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        self.seen = options
        return SimpleNamespace(logits=self.after(self.out(self.embed(input_ids))))


def tokens(seed: int = 0, rows: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCAB, (rows, LENGTH), generator=generator)


SAMPLERS = [
    (Plan(), 30),
    (Ancestral(), 6),
    (FirstHitting(), None),
    (Confidence(block_length=5), 4),
    (RandomOrder(), 4),
    (MarginOrder(), None),
    (Factor(1.0), None),
    (EntropyBounded(1.0), None),
    (ReMDM(Cap(0.2)), 12),
    (ReMDM(ConfidenceBased()), 12),
    (P2(), 6),
]


@pytest.mark.parametrize(("sampler", "steps"), SAMPLERS, ids=lambda value: str(value)[:20])
def test_bert_through_every_sampler(sampler, steps):
    model = from_transformers(bert())
    prompt = torch.full((4, LENGTH), MASK)
    prompt[:, 0], prompt[2, 3:5] = 2, 7
    kept = prompt != MASK
    result = sample(
        model, (4, LENGTH), mask_id=MASK, sampler=sampler, steps=steps, prompt=prompt, banned=SPECIAL, rng=0
    )
    assert torch.equal(result.tokens[kept], prompt[kept])
    assert int(result.tokens[~kept].min()) > MASK
    assert result.nfe == len(result.history) > 0


def test_greedy_confidence_against_the_model_itself():
    """The rule by hand on the model as transformers runs it, one position at a time."""
    model = bert().double()
    wanted = torch.full((1, LENGTH), MASK)
    with torch.no_grad():
        for _ in range(LENGTH):
            logits = model(wanted).logits[0]
            logits[:, [MASK, *SPECIAL]] = -torch.inf
            best = logits.log_softmax(1).max(1)
            place = int(best.values.masked_fill(wanted[0] != MASK, -torch.inf).argmax())
            wanted[0, place] = best.indices[place]
    options: dict[str, Any] = {"mask_id": MASK, "sampler": Confidence(), "banned": SPECIAL, "temperature": 0}
    assert torch.equal(sample(from_transformers(model), (1, LENGTH), **options).tokens, wanted)


def test_logits_and_features_of_bert():
    model = bert()
    denoiser = from_transformers(model)
    assert denoiser.time_independent
    x = tokens()
    with torch.no_grad():
        wanted = model(x).logits
        assert torch.equal(denoiser(x), wanted)
        assert torch.equal(denoiser(x, torch.ones(3)), wanted)
        weight, bias = denoiser.head
        features = denoiser.features(x)
        torch.testing.assert_close(features @ weight.T + bias, wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(x).logits, wanted)  # no hook stays behind
    assert features.shape == (3, LENGTH, 16)
    assert torch.equal(weight, model.get_input_embeddings().weight)
    assert sum(p.numel() for p in denoiser.parameters()) == sum(p.numel() for p in model.parameters())


def test_bfloat16():
    model = bert().to(torch.bfloat16)
    denoiser = from_transformers(model)
    assert denoiser.head is not None
    assert denoiser(tokens()).dtype == torch.bfloat16
    result = sample(denoiser, (2, LENGTH), mask_id=MASK, sampler=Confidence(), steps=3, banned=SPECIAL, rng=0)
    assert int(result.tokens.min()) > MASK


@pytest.mark.parametrize(
    "make",
    [
        esm,
        lambda: Capped(lambda logits: 30.0 * torch.tanh(logits / 30.0)).eval(),
        lambda: Capped(lambda logits: 0.99 * logits).eval(),
        lambda: Capped(lambda logits: logits[..., :-1]).eval(),
    ],
    ids=["bias elsewhere", "soft cap", "scale", "cut"],
)
def test_a_head_that_does_more_is_left_out(make):
    model = make()
    denoiser = from_transformers(model)
    assert denoiser.head is None
    with pytest.raises(ValueError, match="no head"):
        denoiser.features(tokens())
    assert torch.equal(denoiser(tokens()), model(input_ids=tokens()).logits)
    result = sample(denoiser, (2, LENGTH), mask_id=MASK, sampler=Plan(), rng=0, banned=SPECIAL)
    assert int(result.tokens.min()) > MASK


def test_a_plain_head_is_found():
    assert from_transformers(Capped(lambda logits: logits).eval()).head is not None
    assert from_transformers(Capped(lambda logits: logits.float()).eval().double()).head is not None


def test_shift():
    model = bert()
    plain, shifted = from_transformers(model), from_transformers(model, shift=True)
    x = tokens()
    with torch.no_grad():
        assert torch.equal(shifted(x)[:, 1:], plain(x)[:, :-1])
        assert torch.equal(shifted(x)[:, 0], plain(x)[:, 0])
        assert torch.equal(shifted.features(x)[:, 1:], plain.features(x)[:, :-1])


def test_attention_mask_and_padding():
    model = bert()
    x = tokens()
    x[:, :2] = PAD
    mask = torch.tensor([0, 0] + [1] * (LENGTH - 2))
    other = x.clone()
    other[:, :2] = 9
    with torch.no_grad():
        wanted = model(x, attention_mask=mask.expand(3, -1)).logits
        assert torch.equal(from_transformers(model, attention_mask=mask)(x), wanted)
        assert torch.equal(from_transformers(model, pad_id=PAD)(x), wanted)
        # what is not attended to does not matter to the rest
        got = from_transformers(model, attention_mask=mask)(other)
        torch.testing.assert_close(got[:, 2:], wanted[:, 2:], rtol=0, atol=1e-5)
        assert not torch.allclose(from_transformers(model)(other)[:, 2:], wanted[:, 2:], atol=1e-2)
    # rows padded in front: each as by itself
    denoiser = from_transformers(model, pad_id=PAD)
    prompt = torch.full((2, LENGTH), MASK)
    prompt[1, :4] = PAD
    options: dict[str, Any] = {"mask_id": MASK, "sampler": Confidence(), "temperature": 0, "banned": SPECIAL}
    both = sample(denoiser, (2, LENGTH), prompt=prompt, **options)
    assert both.row_nfe.tolist() == [LENGTH, LENGTH - 4]
    one = sample(denoiser, (1, LENGTH), prompt=prompt[1], **options)
    assert torch.equal(both.tokens[1], one.tokens[0])


def test_options_go_to_the_model():
    model = Capped(lambda logits: logits).eval()
    from_transformers(model, use_cache=False)(tokens())
    assert model.seen == {"use_cache": False}


def test_guidance_of_a_transformer():
    prompt = torch.full((LENGTH,), MASK)
    prompt[:3] = torch.tensor([7, 8, 9])
    model = from_transformers(bert())
    guided = ClassifierFreeGuidance(model, 2.0, mask_id=MASK, prompt=prompt)
    x = prompt.expand(2, -1)
    with torch.no_grad():
        bare = x.clone()
        bare[:, :3] = MASK
        wanted = model(bare) + 3.0 * (model(x) - model(bare))
        torch.testing.assert_close(guided(x), wanted, rtol=0, atol=1e-4)
    result = sample(
        guided, (2, LENGTH), mask_id=MASK, sampler=Confidence(), prompt=prompt, banned=SPECIAL, rng=0
    )
    assert int(result.tokens.min()) > MASK


def test_special_ids():
    model = bert(bos_token_id=1, eos_token_id=[2, 3])
    assert from_transformers(model).special_ids == (0, 1, 2, 3)
    tokenizer = SimpleNamespace(all_special_ids=[3, 1, 4, 1])
    assert from_transformers(model, tokenizer=tokenizer).special_ids == (1, 3, 4)


def test_errors():
    model = bert()
    with pytest.raises(ValueError, match="training"):
        from_transformers(model.train())
    model.eval()
    ones = torch.ones(LENGTH, dtype=torch.int64)
    with pytest.raises(ValueError, match="pad_id"):
        from_transformers(model, attention_mask=ones.expand(3, -1))
    with pytest.raises(ValueError, match="not both"):
        from_transformers(model, attention_mask=ones, pad_id=0)
    with pytest.raises(ValueError, match="positions"):
        from_transformers(model, attention_mask=ones)(tokens()[:, :-1])
    with pytest.raises(TypeError, match="no logits"):
        from_transformers(model.bert)(tokens())
