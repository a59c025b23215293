"""A real pretrained masked language model, end to end. Nightly: it needs the examples extra and minutes."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from driftmax.discrete import Ancestral, FirstHitting, Plan, sample

pytestmark = pytest.mark.slow

# Of 48 domains drawn by the example's plain torch loop, how many have each motif.
PLAIN = {"WG.G": 40, "Y[YFW]C": 39, "two cysteines": 44}


@pytest.fixture(scope="module")
def antibody():
    pytest.importorskip("antiberty", reason='the model: pip install ".[examples]"')
    from tests.conftest import ROOT

    specification = importlib.util.spec_from_file_location("antibody", ROOT / "examples" / "antibody.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["antibody"] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(antibody):
    return antibody.load()


def test_domains_look_like_antibodies(antibody, model):
    """48 domains have each motif as often as those of a plain torch loop, false alarm 1e-4 each.

    Sequences of independent residues of the right frequencies have the motifs in well under half of cases.
    """
    from scipy.stats import fisher_exact

    found = antibody.domains(model, 48)
    assert all(set(residues) <= set("ACDEFGHIKLMNPQRSTVWY") for residues in found)
    for motif, plain in PLAIN.items():
        hits = sum(antibody.has(motif, residues) for residues in found)
        p = fisher_exact([[hits, 48 - hits], [plain, 48 - plain]]).pvalue
        assert p > 1e-4, (motif, hits, plain)
        assert hits > 24
    assert len(set(found)) == 48


@pytest.mark.parametrize(("sampler", "steps"), [(Plan(), 24), (Ancestral(), 24)], ids=str)
def test_cached_and_uncached_runs_agree(antibody, model, sampler, steps):
    """With every call's batch the same, the cache cannot change a bit."""
    prompt = antibody.encode("_" * 30)
    options = {
        "mask_id": antibody.MASK,
        "prompt": prompt,
        "banned": antibody.SPECIAL,
        "rng": 3,
        "steps": steps,
    }
    shape = (4, len(prompt))
    with_ = sample(model, shape, sampler=sampler, whole_batch=True, **options)
    without = sample(model, shape, sampler=sampler, whole_batch=True, cache=False, **options)
    assert bool((with_.tokens == without.tokens).all())
    assert with_.nfe <= without.nfe == steps


def test_special_tokens_are_banned_and_the_prompt_stays(antibody, model):
    prompt = antibody.encode("EVQLV" + "_" * 20 + "WGQG")
    tokens = sample(
        model, (3, len(prompt)), mask_id=antibody.MASK, prompt=prompt, banned=antibody.SPECIAL, rng=0,
        sampler=FirstHitting(),
    ).tokens  # fmt: skip
    kept = prompt != antibody.MASK
    assert bool((tokens[:, kept] == prompt[kept]).all())
    assert not bool(torch.isin(tokens[:, ~kept], torch.tensor(antibody.SPECIAL)).any())
