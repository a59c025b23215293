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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from driftmax.discrete.bytes_model import MASK_ID, PATH, standard_library
from driftmax.discrete.likelihood import LikelihoodBound, nll_bound
from driftmax.discrete.losses import Reduction, masked_nll
from driftmax.discrete.network import RADD, RADDConfig
from driftmax.discrete.train import RandomWindows, TrainConfig, TrainInfo, TrainState, train
from driftmax.random import RowStreams, uniform
from torch import Tensor, nn

SEED = 0
LENGTH = 256
BATCH = 8
STEPS = 11400
COOLDOWN = 4000
NETWORK = RADDConfig(vocab_size=256, hidden_size=128, blocks=5, heads=4, length=LENGTH)

# Rows of a batch that go through the network together. The parts run in threads of their own, which keeps two
# cores busier than torch's threads in small products do, and add up in order: the result does not depend on
# the number of threads.
PART = 4
# While most tokens are masked, little can be learned but their frequencies. Until this step at most half are,
# and the network finds the neighbours: at equal time this took 0.4 bits off the loss at 5 % masked, and 0.1
# over all levels.
CURRICULUM = 2500
# From this step on a quarter of the rows are masked as text is that is generated block by block: known up to
# some place, then AHEAD bytes of which some are known, then nothing. Losses in those bytes count double: they
# are few.
BLOCKWISE = 5000
AHEAD = 32
LEAST = 1e-3
EMBEDDING_STD = 0.5
MATRIX_RATE = 0.02


def network() -> RADD:
    """The network at the start: branches that begin at zero, and an embedding large enough to be seen."""
    torch.manual_seed(SEED)
    net = RADD(NETWORK)
    for name, parameter in net.named_parameters():
        if name.endswith(("attn_out.weight", "mlp.2.weight")):
            nn.init.zeros_(parameter)
    nn.init.normal_(net.vocab_embed.embedding, std=EMBEDDING_STD)
    return net


def settings(steps: int, cooldown: int) -> TrainConfig:
    """Constant rate, then a linear fall: nothing before the fall depends on the number of steps."""
    return TrainConfig(
        steps=steps,
        learning_rate=8e-3,
        warmup=50,
        cooldown=cooldown,
        betas=(0.9, 0.98),
        ema_decay=0.998,
        seed=SEED,
        checkpoint_every=200,
        check_every=20,
    )


class Muon(torch.optim.AdamW):
    """Muon for the blocks' matrices (K. Jordan, 2024), AdamW for the rest.

    The averaged gradient of a matrix is replaced by nearly its nearest orthogonal matrix, with Newton-Schulz
    steps. torch.optim.Muon rounds to bfloat16 there, which processors without such arithmetic emulate: its
    step took three times the network's here.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        matrices = [p for name, p in model.named_parameters() if name.startswith("blocks") and p.dim() == 2]
        chosen = set(matrices)
        rest = [p for p in model.parameters() if p not in chosen]
        super().__init__(rest, lr=config.learning_rate, betas=config.betas, weight_decay=0.0, fused=True)
        self.add_param_group({"params": matrices, "lr": MATRIX_RATE, "muon": True})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch allows closures; train passes none
        """One step of both; AdamW sees no gradients of the matrices."""
        for group in self.param_groups:
            if group.get("muon"):
                for matrix in group["params"]:
                    self._turn(matrix, group["lr"])
                    matrix.grad = None
        super().step()

    def _turn(self, matrix: Tensor, rate: float) -> None:
        state = self.state[matrix]
        average = state.setdefault("average", torch.zeros_like(matrix))
        state.setdefault("step", torch.zeros(()))  # not used, but AdamW looks for it when a state is loaded
        average.lerp_(matrix.grad, 0.05)
        ahead = matrix.grad.lerp(average, 0.95)
        parts = ahead.chunk(3) if ahead.shape[0] == 3 * ahead.shape[1] else (ahead,)
        scale = max(1.0, parts[0].shape[0] / matrix.shape[1]) ** 0.5
        matrix.add_(torch.cat([orthogonal(part) for part in parts]), alpha=-rate * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """Singular values to about 1, by five steps of the quintic iteration with Jordan's coefficients."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def loss(model: RADD, tokens: Tensor, *, mask_id: int, rng: RowStreams, reduction: Reduction) -> Tensor:
    """Mean cross-entropy of masked tokens, each counted alike.

    The λ-DCE loss weighs a row with 1/λ, so that a few tokens of few rows speak for all; which law is best at
    each level does not depend on the weights, and equal ones have the least variance.
    """
    assert isinstance(rng.step, int)
    most = 0.5 if rng.step < CURRICULUM else 1.0
    batch = torch.arange(len(tokens))
    draws = uniform((len(tokens), LENGTH + 2), rng=rng)
    level = ((batch + draws[:, 0]) / len(tokens) * (most - LEAST) + LEAST)[:, None]
    masked = draws[:, 1:-1] < level
    weight = masked.float()
    if rng.step >= BLOCKWISE:
        ahead = torch.arange(LENGTH) - (draws[:, -1:] * LENGTH).long()
        blockwise = ((batch + rng.step) % 4 == 3)[:, None]
        behind = ahead >= AHEAD
        masked = torch.where(blockwise, (masked & (ahead >= 0)) | behind, masked)
        weight = torch.where(blockwise, 2.0 * (masked & ~behind), masked.float())
    noisy = tokens.masked_fill(masked, mask_id)
    scale = 1.0 / float(weight.sum().clamp_min(1))

    def part(rows: Tensor) -> Tensor:
        wanted = weight[rows] > 0
        losses = masked_nll(model(noisy[rows]), tokens[rows], wanted, mask_id=mask_id)
        return (losses * weight[rows]).sum() * scale

    # Every part holds levels from all over the range.
    count = -(-len(tokens) // PART)
    return _InParts.apply(
        part, [torch.arange(n, len(tokens), count) for n in range(count)], *model.parameters()
    )


class _InParts(torch.autograd.Function):
    """Sum of ``part(rows)`` over parts of a batch, forward and backward in a pool of threads."""

    pool: ThreadPoolExecutor

    @staticmethod
    def forward(
        ctx: Any, part: Callable[[Tensor], Tensor], rows: list[Tensor], *parameters: Tensor
    ) -> Tensor:
        def work(rows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            with torch.enable_grad():
                value = part(rows)
                return value.detach(), torch.autograd.grad(value, parameters)

        done = list(_InParts.pool.map(work, rows))
        ctx.gradients = [
            sum(gradients[1:], gradients[0]) for gradients in zip(*(g for _, g in done), strict=True)
        ]
        return torch.stack([value for value, _ in done]).sum()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Any, ...]:
        return None, None, *(gradient * outer for gradient in ctx.gradients)


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
    torch.set_num_threads(1)
    _InParts.pool = ThreadPoolExecutor(arguments.threads, initializer=torch.set_num_threads, initargs=(1,))

    net = network()
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
        optimizer=Muon,
        checkpoint=arguments.checkpoint,
        callback=report,
        progress=False,
    )

    torch.set_num_threads(arguments.threads)
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
