"""RADD: the published layout, arithmetic against a float64 transcription, head, precisions, and files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from driftmax.discrete.network import RADD, RADDConfig
from safetensors.torch import save_file
from torch import Tensor

CONFIG = RADDConfig(vocab_size=11, hidden_size=16, blocks=2, heads=2, length=12)

# The official state dict of a network of that size, written out by hand: names and shapes.
LAYOUT: dict[str, tuple[int, ...]] = {
    "vocab_embed.embedding": (12, 16),
    "rotary_emb.inv_freq": (4,),
    "blocks.0.norm1.weight": (16,),
    "blocks.0.norm1.bias": (16,),
    "blocks.0.attn_qkv.weight": (48, 16),
    "blocks.0.attn_out.weight": (16, 16),
    "blocks.0.norm2.weight": (16,),
    "blocks.0.norm2.bias": (16,),
    "blocks.0.mlp.0.weight": (64, 16),
    "blocks.0.mlp.0.bias": (64,),
    "blocks.0.mlp.2.weight": (16, 64),
    "blocks.0.mlp.2.bias": (16,),
    "blocks.1.norm1.weight": (16,),
    "blocks.1.norm1.bias": (16,),
    "blocks.1.attn_qkv.weight": (48, 16),
    "blocks.1.attn_out.weight": (16, 16),
    "blocks.1.norm2.weight": (16,),
    "blocks.1.norm2.bias": (16,),
    "blocks.1.mlp.0.weight": (64, 16),
    "blocks.1.mlp.0.bias": (64,),
    "blocks.1.mlp.2.weight": (16, 64),
    "blocks.1.mlp.2.bias": (16,),
    "output_layer.norm_final.weight": (16,),
    "output_layer.norm_final.bias": (16,),
    "output_layer.linear.weight": (12, 16),
    "output_layer.linear.bias": (12,),
}
FREQUENCIES = torch.tensor([1.0, 0.1, 0.01, 0.001])  # 10000 ** -(2 j / 8)


def official(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in LAYOUT.items()}
    state["rotary_emb.inv_freq"] = FREQUENCIES
    return state


def loaded(seed: int = 0) -> RADD:
    net = RADD(CONFIG)
    net.load_official(official(seed))
    return net.eval()


def tokens(batch: int = 3, length: int = 7, seed: int = 1) -> Tensor:
    return torch.randint(0, 12, (batch, length), generator=torch.Generator().manual_seed(seed))


def transcription(state: dict[str, Tensor], ids: list[int]) -> Tensor:
    """The published network on one sequence, in float64, one head and one position at a time: [L, 12]."""
    w = {name: value.double() for name, value in state.items()}
    length, width, heads, each = len(ids), 16, 2, 8

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def turn(x: Tensor, position: int) -> Tensor:
        angle = position * w["rotary_emb.inv_freq"]
        low, high = x[:4], x[4:]
        return torch.cat((low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()))

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = w["vocab_embed.embedding"][ids]
    for block in ("blocks.0", "blocks.1"):
        h = norm(x, f"{block}.norm1")
        qkv = h @ w[f"{block}.attn_qkv.weight"].T
        query, key, value = qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width :]
        mixed = torch.empty(length, width, dtype=torch.float64)
        for head in range(heads):
            part = slice(head * each, (head + 1) * each)
            for i in range(length):
                q = turn(query[i, part], i)
                scores = torch.stack([q @ turn(key[j, part], j) for j in range(length)]) / math.sqrt(each)
                mixed[i, part] = scores.softmax(0) @ value[:, part]
        x = x + mixed @ w[f"{block}.attn_out.weight"].T
        inner = gelu(norm(x, f"{block}.norm2") @ w[f"{block}.mlp.0.weight"].T + w[f"{block}.mlp.0.bias"])
        x = x + inner @ w[f"{block}.mlp.2.weight"].T + w[f"{block}.mlp.2.bias"]
    x = norm(x, "output_layer.norm_final")
    return x @ w["output_layer.linear.weight"].T + w["output_layer.linear.bias"]


def test_published_sizes() -> None:
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in RADD(c).parameters()) for c in (RADDConfig.small(), RADDConfig.medium())
        ]
    assert [round(size / 1e6) for size in sizes] == [162, 405]  # as published


def test_arithmetic_is_the_published_one() -> None:
    net, ids = loaded().double(), tokens()
    wanted = torch.stack([transcription(official(), row.tolist()) for row in ids])
    # The rotary tables are float32; everything else is float64 on both sides.
    torch.testing.assert_close(net(ids), wanted[..., :11], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded()(ids), wanted[..., :11].float(), rtol=1e-3, atol=1e-3)


def test_own_layout_is_the_official_one() -> None:
    ours = {name: tuple(value.shape) for name, value in RADD(CONFIG).state_dict().items()}
    assert {**ours, "rotary_emb.inv_freq": (4,)} == LAYOUT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.mlp.0.bias"), "missing blocks.1.mlp.0.bias"),
        (lambda s: s.pop("rotary_emb.inv_freq"), "missing rotary_emb.inv_freq"),
        (lambda s: s.update({"blocks.2.norm1.weight": torch.ones(16)}), "unexpected blocks.2.norm1.weight"),
        (lambda s: s.update({"blocks.0.attn_qkv.bias": torch.ones(48)}), "unexpected blocks.0.attn_qkv.bias"),
        (
            lambda s: s.update({"vocab_embed.embedding": torch.ones(11, 16)}),
            r"vocab_embed.embedding is \[11, 16\], not \[12, 16\]",
        ),
        (lambda s: s.update({"rotary_emb.inv_freq": FREQUENCIES * 2}), "base 10000"),
    ],
)
def test_loading_is_strict_and_changes_nothing_on_failure(change, message) -> None:
    state, net = official(), RADD(CONFIG)
    change(state)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        net.load_official(state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_many_faults_are_listed_in_short() -> None:
    with pytest.raises(ValueError, match=r"missing .*; .* and 18 more"):
        RADD(CONFIG).load_official({})


def test_checkpoint_averages_come_in_the_order_of_the_official_parameters() -> None:
    raw, averaged = official(0), official(1)
    shadows = [averaged[name] for name in LAYOUT if name != "rotary_emb.inv_freq"]
    checkpoint = {
        "model": raw,
        "ema": {"decay": 0.9999, "num_updates": 5, "shadow_params": shadows},
        "optimizer": {},
        "step": 5,
    }
    net = RADD(CONFIG).eval()
    net.load_official(checkpoint)
    assert torch.equal(net(tokens()), loaded(1)(tokens()))
    net.load_official(checkpoint, ema=False)
    assert torch.equal(net(tokens()), loaded(0)(tokens()))
    checkpoint["ema"]["shadow_params"] = shadows[1:]
    with pytest.raises(ValueError, match="24 averaged tensors, the network 25"):
        net.load_official(checkpoint)


def test_head_and_features_make_the_logits() -> None:
    net, ids = loaded(), tokens()
    features, (weight, bias) = net.features(ids), net.head
    assert features.shape == (3, 7, 16)
    assert weight.shape == (11, 16)
    assert bias is not None
    assert torch.equal(torch.nn.functional.linear(features, weight, bias), net(ids))
    torch.testing.assert_close(features @ weight.T + bias, net(ids))


def test_time_plays_no_role() -> None:
    net, ids = loaded(), tokens()
    assert net.time_independent
    assert torch.equal(net(ids, torch.rand(3)), net(ids))


def test_every_position_sees_every_other_and_its_place() -> None:
    net, ids = loaded(), tokens(1)
    ids[0] = torch.tensor([1, 2, 3, 4, 5, 6, 7])
    base = net(ids)
    for i in range(7):
        other = ids.clone()
        other[0, i] = 9
        assert bool((net(other) != base).any(-1).all()), f"position {i} is not seen everywhere"
    swapped = ids[:, [0, 2, 1, 3, 4, 5, 6]]
    assert not torch.allclose(net(swapped)[0, 0], base[0, 0], atol=1e-4)  # order matters to a third position


def test_untrained_network_predicts_the_uniform_law() -> None:
    assert bool((RADD(CONFIG)(tokens()) == 0).all())


def test_dropout_acts_in_training_only() -> None:
    config = RADDConfig(vocab_size=11, hidden_size=16, blocks=2, heads=2, dropout=0.5)
    net = RADD(config)
    net.load_official(official())
    ids = tokens()
    assert torch.equal(net.eval()(ids), loaded()(ids))
    assert not torch.equal(net.train()(ids), net(ids))


def test_bfloat16_module_and_autocast() -> None:
    # Weights of published scale: at 0.5 the residual stream is so large that bfloat16 says nothing.
    torch.manual_seed(0)
    net = RADD(CONFIG).eval()
    torch.nn.init.normal_(net.output_layer.linear.weight)
    ids, wanted = tokens(), net(tokens()).detach()
    with torch.autocast("cpu", torch.bfloat16):
        automatic = net(ids)
    whole = net.to(torch.bfloat16)(ids)
    assert automatic.dtype == whole.dtype == torch.bfloat16
    for got in (automatic, whole):
        assert float((got.detach().float() - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


def test_changing_lengths_use_their_own_rotary_tables() -> None:
    net = loaded()
    short, long = tokens(2, 5), tokens(2, 9)
    first = net(short), net(long)
    again = loaded()
    assert torch.equal(again(long), first[1])
    assert torch.equal(again(short), first[0])


def test_compiles_without_a_graph_break() -> None:
    net, ids = loaded(), tokens()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), net(ids))


def test_gradients_reach_every_parameter() -> None:
    net, ids = loaded(), tokens()
    net(ids).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name
    assert bool((net.output_layer.linear.weight.grad[11] == 0).all())  # the mask's row is not computed


@pytest.mark.parametrize("ids", [torch.zeros(3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int32)])
def test_tokens_of_another_shape_or_type(ids: Tensor) -> None:
    with pytest.raises(ValueError, match="int64"):
        loaded()(ids)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"blocks": 0}, "blocks"),
        ({"heads": 3}, "even number"),
        ({"heads": 16}, "even number"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_impossible_sizes(sizes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RADDConfig(**{"vocab_size": 11, "hidden_size": 16, "blocks": 2, "heads": 2, **sizes})


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_files_round_trip(tmp_path: Path, dtype: torch.dtype | None) -> None:
    path, net = tmp_path / "new" / "net.safetensors", loaded()
    net.save(path, dtype=dtype, metadata={"note": "x"})
    back = RADD.load(path)
    assert back.config == CONFIG
    assert not back.training
    for name, value in net.state_dict().items():
        assert torch.equal(back.state_dict()[name], value.to(dtype or value.dtype).float())
    assert RADD.load(path, dtype=torch.bfloat16)(tokens()).dtype == torch.bfloat16


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    with pytest.raises(FileNotFoundError):
        RADD.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="whole safetensors"):
        RADD.load(path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="not written"):
        RADD.load(path)
    loaded().save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="whole safetensors"):
        RADD.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.safetensors"
    loaded(0).save(path)

    def fail(tensors: object, file: Path, header: object) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("driftmax.discrete.network.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        loaded(1).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]
    assert torch.equal(RADD.load(path)(tokens()), loaded(0)(tokens()))
