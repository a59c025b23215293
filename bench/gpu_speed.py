"""Speed of the operators on a GPU: medians of CUDA graph replays with a cold L2, peers and limits beside."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import driftmax
import torch

from .gpu_session import Run, Session

__all__ = ["bench_categorical", "bench_fills", "bench_head", "bench_steps", "bench_topk"]


def peer(module: str, name: str) -> Callable[..., object] | None:
    """A function of an optional package, or None."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except (
        Exception
    ) as failure:  # broken installs of peers raise anything on import; the bench goes on without them
        print(f"     no {module}: {type(failure).__name__}")
        return None


def torch_gumbel(x: torch.Tensor) -> torch.Tensor:
    """The usual way: float32 Gumbels, argmax; in place where that saves memory traffic."""
    clock = torch.empty_like(x, dtype=torch.float32).exponential_()
    return clock.log_().neg_().add_(x).argmax(-1)


def torch_fused(x: torch.Tensor) -> torch.Tensor:
    """The same in a form that torch.compile fuses into one reduction."""
    return (x.float() - torch.empty_like(x, dtype=torch.float32).exponential_().log()).argmax(-1)


def torch_multinomial(x: torch.Tensor) -> torch.Tensor:
    """The other usual way."""
    return torch.multinomial(x.float().softmax(-1), 1)


def torch_topk(x: torch.Tensor, k: int) -> torch.Tensor:
    """Top-k sampling with torch."""
    return torch.multinomial(x.float().topk(k).values.softmax(-1), 1)


def torch_topp(x: torch.Tensor, p: float) -> torch.Tensor:
    """Top-p sampling with torch: sort, cut by the running mass, draw, map back."""
    ranked, order = x.float().softmax(-1).sort(-1, descending=True)
    ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= p, 0.0)
    race = ranked.div_(torch.empty_like(ranked).exponential_())
    return order.gather(-1, race.argmax(-1, keepdim=True))


def torch_gumbel_topk(x: torch.Tensor, k: int) -> torch.Tensor:
    """k draws without replacement, float32."""
    return (x - torch.empty_like(x).exponential_().log()).topk(k).indices


def on_floats(function: Callable[..., object], x: torch.Tensor) -> object:
    """A peer that takes float32 logits."""
    return function(x.float())


def on_probs(function: Callable[..., object], x: torch.Tensor, *arguments: object) -> object:
    """A peer that takes probabilities, with the softmax it needs."""
    return function(x.float().softmax(-1), *arguments)


def bare_read(x: torch.Tensor) -> torch.Tensor:
    """One pass over the logits."""
    return x.view(-1).sum(dtype=torch.float32)


def bench_categorical(session: Session) -> None:
    """Methods and filters against torch and, where they import, flashinfer and vLLM; limit: a bare read."""
    flash = {
        name: peer("flashinfer.sampling", name)
        for name in (
            "sampling_from_logits",
            "sampling_from_probs",
            "top_k_sampling_from_probs",
            "top_p_sampling_from_probs",
        )
    }
    vllm = peer("vllm.v1.sample.ops.topk_topp_sampler", "random_sample")
    vocab = 128_256 if session.on_gpu else 1500
    ours = partial(driftmax.categorical, rng=1, backend="triton")
    for rows in (1, 16, 64, 256, 1024) if session.on_gpu else (2,):
        for dtype in (torch.float32, torch.bfloat16):
            x, kind, shape = session.randn(rows, vocab, dtype=dtype), str(dtype)[6:], (rows, vocab)
            read = partial(bare_read, x)
            fused = torch.compile(torch_fused, dynamic=False)
            usual: dict[str, Run] = {
                "torch gumbel-argmax fp32": partial(torch_gumbel, x),
                "torch.compile gumbel-argmax fp32": partial(fused, x),
            }
            runs: dict[str, Run] = {"driftmax": partial(ours, x), **usual}
            runs["torch multinomial"] = partial(torch_multinomial, x)
            if (function := flash["sampling_from_logits"]) is not None:
                runs["flashinfer from logits"] = partial(on_floats, function, x)
            if (function := flash["sampling_from_probs"]) is not None:
                runs["flashinfer softmax, from probs"] = partial(on_probs, function, x)
            if vllm is not None:
                runs["vllm random_sample"] = partial(on_probs, vllm, x, {})
            session.bench("categorical", f"block {kind}", shape, runs, read)
            runs = {"driftmax": partial(ours, x, method="gumbel"), **usual}
            session.bench("categorical", f"gumbel {kind}", shape, runs, read)
            runs = {"driftmax": partial(ours, x, return_stats=True)}
            session.bench("categorical", f"block+stats {kind}", shape, runs, read)
            if rows > 256:
                continue
            runs = {"driftmax": partial(ours, x, top_k=50), "torch topk": partial(torch_topk, x, 50)}
            if (function := flash["top_k_sampling_from_probs"]) is not None:
                runs["flashinfer"] = partial(on_probs, function, x, 50)
            session.bench("categorical", f"top_k=50 {kind}", shape, runs, read)
            runs = {"driftmax": partial(ours, x, top_p=0.9), "torch sort": partial(torch_topp, x, 0.9)}
            if (function := flash["top_p_sampling_from_probs"]) is not None:
                runs["flashinfer"] = partial(on_probs, function, x, 0.9)
            session.bench("categorical", f"top_p=0.9 {kind}", shape, runs, read)


def bench_fills(session: Session) -> None:
    """Fills against torch's generator; limit: a bare write."""
    size = 1 << (27 if session.on_gpu else 12)
    out = torch.empty(size, device=session.device)
    peers: dict[str, Run] = {
        "uniform": out.uniform_,
        "normal": out.normal_,
        "exponential": out.exponential_,
    }
    for kind in ("uniform", "normal", "exponential", "gumbel"):
        fill = getattr(driftmax.random, kind)
        runs: dict[str, Run] = {"driftmax": partial(fill, size, rng=1, out=out, backend="triton")}
        if kind in peers:
            runs["torch"] = peers[kind]
        session.bench("fill", f"{kind} float32", (1, size), runs, out.zero_)


def bench_topk(session: Session) -> None:
    """k draws without replacement; limit: a bare read."""
    rows, vocab = (64, 128_256) if session.on_gpu else (1, 1500)
    x = session.randn(rows, vocab)
    runs: dict[str, Run] = {
        "driftmax": partial(driftmax.gumbel_topk, x, 16, rng=1, backend="triton"),
        "torch gumbel topk fp32": partial(torch_gumbel_topk, x, 16),
    }
    session.bench("gumbel_topk", "k=16 float32", (rows, vocab), runs, partial(bare_read, x))


def bench_head(session: Session) -> None:
    """The fused head against matmul and sampling; limit: the matmul alone."""
    vocab, depth = (128_256, 4096) if session.on_gpu else (1500, 64)
    weight = session.randn(vocab, depth, dtype=torch.bfloat16) * 0.002

    def unfused(sample: Callable[[torch.Tensor], object], hidden: torch.Tensor) -> object:
        return sample(hidden @ weight.T)

    ours = partial(driftmax.categorical, rng=1, backend="triton")
    for rows in (1, 16, 64, 256) if session.on_gpu else (2,):
        h = session.randn(rows, depth, dtype=torch.bfloat16)
        runs: dict[str, Run] = {
            "driftmax": partial(driftmax.lm_head_categorical, h, weight, rng=1, backend="triton"),
            "matmul + driftmax.categorical": partial(unfused, ours, h),
            "matmul + torch gumbel-argmax": partial(unfused, torch_gumbel, h),
        }
        variant = f"bfloat16 D={depth}"
        session.bench("lm_head_categorical", variant, (rows, vocab), runs, partial(torch.matmul, h, weight.T))


def bench_steps(session: Session) -> None:
    """A step that reveals one position in 64, against gather and draw; limit: a read of as many rows."""
    rows, length, vocab = (16, 512, 50_257) if session.on_gpu else (1, 4, 1100)
    x = session.randn(rows * length, vocab, dtype=torch.bfloat16).view(rows, length, vocab)
    tokens = torch.full((rows, length), vocab, device=session.device)

    def ours() -> None:
        driftmax.unmask(x, tokens.clone(), 1 / 64, mask_id=vocab, rng=1, backend="triton")

    def gathered() -> torch.Tensor:
        row, position = ((tokens == vocab) & (torch.rand_like(tokens, dtype=torch.float64) < 1 / 64)).nonzero(
            as_tuple=True
        )
        return torch_gumbel(x[row, position])

    usual = "torch nonzero, gather, gumbel fp32"
    runs: dict[str, Run] = {"driftmax": ours, usual: gathered}
    read = partial(bare_read, x[0, : max(1, rows * length // 64)])
    shape = (rows * length, vocab)
    session.bench("unmask", "p=1/64 bfloat16", shape, runs, read, waits=frozenset({usual}))
