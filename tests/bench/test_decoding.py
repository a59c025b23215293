"""The decoding case: its torch forms follow the law and choose as the rules do; its gates refuse others."""

from __future__ import annotations

import pytest
import torch
from driftmax.bench.cases import decoding
from driftmax.bench.harness import GateFailed, Settings

from tests.statistics import assert_law

NAMES = [rule.name for rule in decoding.RULES]
FORMS = {"published": decoding.published_step, "best": decoding.best_step}


@pytest.fixture(params=decoding.RULES, ids=NAMES)
def rule(request: pytest.FixtureRequest) -> decoding.Rule:
    return request.param


@pytest.mark.parametrize("form", FORMS)
def test_torch_forms_draw_the_law(rule: decoding.Rule, form: str) -> None:
    """8 x 500 draws of one call; 1e-9 of false alarm, and a temperature of 0.8 is refused below."""
    torch.manual_seed(0)
    logits = torch.linspace(-1.5, 1.0, 6)
    model = decoding.Stored(logits)
    seen = decoding.torch_decode(FORMS[form], model, rule.in_one_call(), (8, 500), 1, 1.0)
    assert len(seen) == 1
    assert_law(seen[0].view(-1), torch.softmax(logits.double(), 0))
    with pytest.raises(AssertionError):
        assert_law(seen[0].view(-1), torch.softmax(logits.double() / 0.8, 0))


@pytest.mark.parametrize("seed", range(3))
def test_all_forms_make_the_same_choices(rule: decoding.Rule, seed: int) -> None:
    """On logits of three seeds; the gate counts calls and compares the tokens after each."""
    model = decoding.Stored(decoding.stored_logits(Settings(seed=seed), 32, 700))
    decoding.check_same_choices(rule, decoding._ways(model, rule, 4, seed), 700)


@pytest.mark.parametrize("form", FORMS)
def test_torch_forms_treat_rows_alike(rule: decoding.Rule, form: str) -> None:
    """Two equal rows at temperature 0, where nothing is random but the order of RandomOrder."""
    model = decoding.Stored(decoding.stored_logits(Settings(), 32, 700))
    seen = decoding.torch_decode(FORMS[form], model, rule, (2, 32), 4, 0.0)
    assert torch.equal(seen[-1][0], seen[-1][1])
    if rule.score != "random":
        assert all(torch.equal(tokens[0], tokens[1]) for tokens in seen)


def test_the_logits_order_positions_differently_by_rule() -> None:
    """Otherwise the gate could not tell one rule's score from another's; and some positions are unsure."""
    model = decoding.Stored(decoding.stored_logits(Settings(), 32, 700))
    law = torch.softmax(model.logits.double(), 1)
    best = law.topk(2).values
    scores = (best[:, 0], -torch.special.entr(law).sum(1), best[:, 0] - best[:, 1])

    def steps(score: torch.Tensor) -> tuple[tuple[int, ...], ...]:
        """The positions of each step of eight."""
        order = score.argsort(descending=True).view(4, 8)
        return tuple(tuple(sorted(step)) for step in order.tolist())

    assert len({steps(score) for score in scores}) == 3
    assert int((best[:, 0] < 0.9).sum()) == 4


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("EntropyOrder", "MarginOrder"),
        ("MarginOrder", "MaskGitPlus"),
        ("MaskGitPlus", "EntropyOrder"),
        ("Confidence", "RandomOrder"),
        ("Threshold", "Factor"),
    ],
)
def test_another_rules_choices_are_refused(name: str, wrong: str) -> None:
    model = decoding.Stored(decoding.stored_logits(Settings(), 32, 700))
    rules = {rule.name: rule for rule in decoding.RULES}
    ways = decoding._ways(model, rules[name], 4, 0)
    ways["driftmax"] = decoding._ways(model, rules[wrong], 4, 0)["driftmax"]
    with pytest.raises(GateFailed, match=name):
        decoding.check_same_choices(rules[name], ways, 700)


def test_a_wrong_law_is_refused(rule: decoding.Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    right = decoding.sample

    def sharp(model, shape, *, temperature, **options):
        return right(model, shape, temperature=0.8 * temperature, **options)

    decoding.check_law(rule, Settings(quick=True))
    monkeypatch.setattr(decoding, "sample", sharp)
    with pytest.raises(GateFailed, match="law"):
        decoding.check_law(rule, Settings(quick=True))


def test_a_failed_gate_leaves_the_rule_out(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """The others are timed, the failure is told, and the picture can be drawn."""
    monkeypatch.setattr(decoding, "QUICK_SIZES", ((300, 16, 4),))
    right = decoding.check_same_choices

    def check(rule, ways, mask_id):
        if rule.name == "Factor":
            raise GateFailed("Factor: on purpose")
        right(rule, ways, mask_id)

    monkeypatch.setattr(decoding, "check_same_choices", check)
    finding = decoding.report(Settings(quick=True, rounds=2, budget_s=0.01, least_rounds=1))
    assert finding.failure == "Factor: on purpose"
    assert {row["rule"] for row in finding.rows} == set(NAMES) - {"Factor"}
    assert len(finding.rows) == 7 * 2 * 4
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    finding.draw(finding.rows, tmp_path / "rules.png")
    assert (tmp_path / "rules.png").stat().st_size > 10_000


def test_the_limit_reads_what_each_call_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks of the block for a rule that looks, the revealed alone for a random order."""
    model = decoding.Stored(decoding.stored_logits(Settings(), 32, 100))
    monkeypatch.setattr(decoding.limits, "bare_read", lambda logits, settings: lambda: len(logits))
    rules = {rule.name: rule for rule in decoding.RULES}

    def counts(name: str) -> object:
        rule = rules[name]
        run = decoding._ways(model, rule, 4, 0)["driftmax"](0.0)
        return decoding._reads(model.logits, run, rule, 100, Settings())()

    assert counts("Confidence") == [16, 8, 16, 8]
    assert counts("EntropyOrder") == [32, 24, 16, 8]
    assert counts("RandomOrder") == [8, 8, 8, 8]
