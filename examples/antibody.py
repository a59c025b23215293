"""Design antibodies with a published masked language model: whole domains, and one loop by infilling.

    pip install ".[examples]" && python examples/antibody.py --write docs/gallery/antibody.md

The model is AntiBERTy (Ruffolo et al., "Deciphering antibody affinity maturation with language models and
weakly supervised learning", 2021), which its Python package carries. It is a masked language model, hence a
time-independent denoiser as it stands. Its mask is a token in the middle of its vocabulary; the sampler bans
the special tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from driftmax.discrete import (
    Confidence,
    EntropyBounded,
    FirstHitting,
    ParallelReveal,
    Plan,
    Threshold,
    from_transformers,
    sample,
)
from tqdm import tqdm

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"ACDEFGHIKLMNPQRSTVWY"]
CLS, SEP, MASK = 2, 3, 4
SPECIAL = [0, 1, 2, 3, 4]
LENGTH = 121  # residues of a typical heavy-chain variable domain; a light chain's has a dozen fewer
# Trastuzumab's heavy-chain variable domain (public sequence); its third hypervariable loop is to be designed.
FRAMEWORK = "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYC"
LOOP, TAIL = "SRWGGDGFYAMDY", "WGQGTLVTVSS"
MOTIFS = ("WG.G", "Y[YFW]C", "two cysteines")


def load() -> Any:
    """AntiBERTy as a denoiser."""
    from transformers import BertConfig, BertForMaskedLM

    found = importlib.util.find_spec("antiberty")
    if found is None or not found.submodule_search_locations:
        raise SystemExit('this example needs the model: pip install ".[examples]"')
    folder = Path(found.submodule_search_locations[0]) / "trained_models" / "AntiBERTy_md_smooth"
    config = json.loads((folder / "config.json").read_text())
    model = BertForMaskedLM(BertConfig(**config))
    weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    missing = model.load_state_dict(weights, strict=False).missing_keys
    # Tied to the embedding, where listed at all.
    unexpected = [name for name in missing if "decoder" not in name and "position_ids" not in name]
    if unexpected:
        raise SystemExit(f"the weights lack {unexpected}")
    model.tie_weights()
    return from_transformers(model.eval())


def encode(residues: str) -> torch.Tensor:
    """int64 [length + 2]: residues between [CLS] and [SEP]; '_' is a mask."""
    inner = [MASK if letter == "_" else TOKENS.index(letter) for letter in residues]
    return torch.tensor([CLS, *inner, SEP])


def decode(tokens: torch.Tensor) -> str:
    """Residues of one row."""
    return "".join(TOKENS[token] for token in tokens[1:-1].tolist())


def domains(model: Any, count: int, *, rng: int = 0, **options: Any) -> list[str]:
    """Whole domains, every residue masked at first."""
    prompt = encode("_" * LENGTH)
    options = {"sampler": FirstHitting(), **options}
    result = sample(
        model, (count, len(prompt)), mask_id=MASK, prompt=prompt, banned=SPECIAL, rng=rng, **options
    )
    return [decode(row) for row in result.tokens]


@torch.no_grad()
def plain_loop(model: Any, count: int, *, seed: int = 0) -> list[str]:
    """The same by a plain torch loop, to compare with: a random position a call, torch.multinomial."""
    generator = torch.Generator().manual_seed(seed)
    tokens = encode("_" * LENGTH).repeat(count, 1)
    order = torch.rand(count, LENGTH, generator=generator).argsort(1) + 1
    rows = torch.arange(count)
    for k in tqdm(range(LENGTH), unit="step"):
        law = model(tokens)[rows, order[:, k]].double()
        law[:, SPECIAL] = -torch.inf
        tokens[rows, order[:, k]] = torch.multinomial(law.softmax(-1), 1, generator=generator)[:, 0]
    return [decode(row) for row in tokens]


def has(motif: str, residues: str) -> bool:
    """Whether a domain has one of `MOTIFS`."""
    return residues.count("C") >= 2 if motif == "two cysteines" else re.search(motif, residues) is not None


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Interval of a proportion (Wilson, 1927)."""
    share, spread = hits / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return centre - half, centre + half


@torch.no_grad()
def pseudo_log_likelihood(model: Any, tokens: torch.Tensor, where: range) -> torch.Tensor:
    """Mean log p(residue | all others) over the positions `where`, float [B]: one masked position a row."""
    rows = tokens[:, None].repeat(1, len(where), 1)
    for i, position in enumerate(where):
        rows[:, i, position] = MASK
    logits = model(rows.view(-1, tokens.shape[1]))
    logits[..., SPECIAL] = -torch.inf
    logits = logits.log_softmax(-1).view(*rows.shape, -1)
    i = torch.arange(len(where))
    at = torch.tensor(list(where))
    return logits[:, i, at, tokens[:, at]].mean(1)


@dataclass(frozen=True)
class Design:
    """Loops of one sampler."""

    name: str
    loops: list[str]
    calls: int
    seconds: float
    likelihood: float


def design(model: Any, count: int = 8) -> list[Design]:
    """Fill the loop under each sampler; the last entry scores the natural loop."""
    prompt = encode(FRAMEWORK + "_" * len(LOOP) + TAIL)
    where = range(1 + len(FRAMEWORK), 1 + len(FRAMEWORK) + len(LOOP))
    settings: list[tuple[str, dict[str, Any]]] = [
        ("Plan()", {"sampler": Plan()}),
        ("Plan(), 6 steps", {"sampler": Plan(), "steps": 6}),
        ("FirstHitting()", {"sampler": FirstHitting()}),
        ("ParallelReveal(4)", {"sampler": ParallelReveal(4)}),
        ("Confidence(), 6 steps", {"sampler": Confidence(), "steps": 6}),
        ("Threshold(0.5)", {"sampler": Threshold(0.5)}),
        ("EntropyBounded(1.0)", {"sampler": EntropyBounded(1.0)}),
    ]
    designs = []
    for name, options in settings:
        start = time.perf_counter()
        result = sample(
            model, (count, len(prompt)), mask_id=MASK, prompt=prompt, banned=SPECIAL, rng=1, **options
        )
        seconds = time.perf_counter() - start
        loops = [decode(row)[where[0] - 1 : where[-1]] for row in result.tokens]
        likelihood = float(pseudo_log_likelihood(model, result.tokens, where).mean())
        designs.append(Design(name, loops, result.nfe, seconds, likelihood))
    natural = encode(FRAMEWORK + LOOP + TAIL)[None]
    likelihood = float(pseudo_log_likelihood(model, natural, where).mean())
    return [*designs, Design("natural loop", [LOOP], 0, 0.0, likelihood)]


def share(motif: str, found: list[str]) -> str:
    """Share of domains that have a motif, with its interval."""
    hits = sum(has(motif, residues) for residues in found)
    low, high = wilson(hits, len(found))
    return f"{hits / len(found):.2f} ({low:.2f} to {high:.2f})"


def page(found: list[str], plain: list[str], designs: list[Design]) -> str:
    """The gallery page."""
    count = len(found)
    lines = [
        "# Antibodies from a masked language model",
        "",
        "Written by `python examples/antibody.py --write docs/gallery/antibody.md`. The model is AntiBERTy",
        "(26 M parameters, in its own package); nothing is trained here.",
        "",
        "## Whole domains from nothing",
        "",
        f"{count} domains of {LENGTH} residues, drawn from all masks by first-hitting, and as many by a",
        "plain torch loop over random positions, which has the same law. The model knows heavy and light",
        "chains; before the last strand heavy ones have W, light ones F. Shares with 95 % intervals:",
        "",
        "| motif | `FirstHitting()` | plain loop |",
        "|---|---|---|",
    ]
    lines += [f"| `{motif}` | {share(motif, found)} | {share(motif, plain)} |" for motif in MOTIFS]
    lines += ["", "The first three:", "", "```text", *found[:3], "```", ""]
    lines += [
        "## One loop by infilling",
        "",
        f"The third hypervariable loop of trastuzumab's heavy chain ({len(LOOP)} residues),",
        f"{len(designs[0].loops)} designs under each sampler. Pseudo-likelihood: the model's mean",
        "log-probability of each residue of the loop given all others. Samplers that choose the surest",
        "positions first leave the model's law for its modes, and get likelier loops.",
        "",
        "| sampler | calls | seconds | pseudo-log-likelihood | distinct | first design |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for one in designs:
        effort = f"{one.calls} | {one.seconds:.2f}" if one.calls else " | "
        distinct = f"{len(set(one.loops))} of {len(one.loops)}"
        lines.append(f"| {one.name} | {effort} | {one.likelihood:.2f} | {distinct} | `{one.loops[0]}` |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=48, help="domains drawn from nothing (default 48)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the gallery page")
    arguments = parser.parse_args()
    model = load()
    found = domains(model, arguments.count, progress=True)
    text = page(found, plain_loop(model, arguments.count), design(model))
    print(text)
    if arguments.write:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
