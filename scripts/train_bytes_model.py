"""Train the byte-level model that ships with the package, on the standard library's sources.

    python scripts/train_bytes_model.py [--steps N] [--checkpoint FILE] [--output FILE]

A run that was stopped goes on from its checkpoint when started again; the result is the same. With the
defaults this writes python/driftmax/discrete/bytes_model.safetensors, then measures bits per byte on held-out
files.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from driftmax.discrete.bytes_model import MASK_ID, PATH, standard_library
from driftmax.discrete.likelihood import LikelihoodBound, nll_bound
from driftmax.discrete.losses import Reduction, lambda_dce
from driftmax.discrete.network import RADD, RADDConfig
from driftmax.discrete.train import RandomWindows, TrainConfig, TrainInfo, TrainState, train
from driftmax.random import Rng
from torch import Tensor

SEED = 0
LENGTH = 256
BATCH = 8
STEPS = 3600
COOLDOWN = 1600
NETWORK = RADDConfig(vocab_size=256, hidden_size=128, blocks=5, heads=4, length=LENGTH)


def settings(steps: int, cooldown: int) -> TrainConfig:
    """Constant rate, then a linear fall: nothing before the fall depends on the number of steps."""
    return TrainConfig(
        steps=steps,
        learning_rate=2e-3,
        warmup=200,
        cooldown=cooldown,
        betas=(0.9, 0.98),
        weight_decay=0.05,
        ema_decay=0.998,
        seed=SEED,
        checkpoint_every=200,
        check_every=20,
    )


def loss(model: RADD, tokens: Tensor, *, mask_id: int, rng: Rng, reduction: Reduction) -> Tensor:
    """λ-DCE without the last thousandth, whose weights reach 2**24."""
    return lambda_dce(model, tokens, mask_id=mask_id, rng=rng, reduction=reduction, least=1e-3)


def measure(net: RADD, windows: int, samples: int = 16) -> LikelihoodBound:
    """The AO-ARM bound on held-out windows, one starting in each of equal parts of the held-out text."""
    text = standard_library("held_out")
    first = torch.linspace(0, len(text) - LENGTH, windows).long()
    tokens = text[first[:, None] + torch.arange(LENGTH)].long()
    return nll_bound(net, tokens, mask_id=MASK_ID, samples=samples, rng=SEED, batch_size=32)


def report(state: TrainState, info: TrainInfo) -> None:
    """A line every hundred steps, for logs without a terminal."""
    if state.done % 100 == 0:
        recent = state.losses[-100:]
        bits = sum(recent) / len(recent) / math.log(2.0)
        print(
            f"{time.strftime('%H:%M:%S')} step {state.done}: {bits:.3f} bits per byte, "
            f"norm {float(info.norm):.2f}, rate {info.rate:.1e}",
            flush=True,
        )


def main() -> None:
    """Train, save, measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--cooldown", type=int, default=COOLDOWN, help="last steps, in which the rate falls")
    parser.add_argument("--checkpoint", type=Path, default=Path("build/bytes_model.pt"))
    parser.add_argument("--output", type=Path, default=PATH)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--windows", type=int, default=512, help="held-out windows to measure on")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    torch.manual_seed(SEED)
    net = RADD(NETWORK)
    text = standard_library("train")
    size = sum(p.numel() for p in net.parameters())
    seen = arguments.steps * BATCH * LENGTH
    print(f"{size} parameters, {len(text)} bytes to train on, {seen} bytes to see", flush=True)
    result = train(
        net,
        RandomWindows(text, LENGTH, BATCH, seed=SEED),
        settings(arguments.steps, arguments.cooldown),
        mask_id=MASK_ID,
        loss=loss,
        checkpoint=arguments.checkpoint,
        callback=report,
        progress=False,
    )

    notes = {"steps": str(arguments.steps), "seed": str(SEED)}
    best = RADD(NETWORK)
    best.load_state_dict(result.average)
    best.save(arguments.output, dtype=torch.float16, metadata=notes)
    shipped = RADD.load(arguments.output)
    bits, error = measure(shipped, arguments.windows).bits_per_token()
    size = arguments.output.stat().st_size
    print(f"{arguments.output.name}: {size} bytes, held-out {bits:.3f} ± {error:.3f} bits per byte")


if __name__ == "__main__":
    main()
