"""The training loop: it learns, resumes to the same bits, refuses other runs' checkpoints, keeps its own."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from driftmax.discrete.losses import lambda_dce
from driftmax.discrete.network import RADD, RADDConfig
from driftmax.discrete.train import RandomWindows, TrainConfig, TrainInfo, TrainState, init, step, train

SIZES = RADDConfig(vocab_size=5, hidden_size=16, blocks=1, heads=2, dropout=0.1, length=8)
CONFIG = TrainConfig(steps=12, learning_rate=1e-2, warmup=3, cooldown=4, checkpoint_every=5, check_every=2)
TEXT = torch.tensor([0, 1, 2, 3, 4] * 30, dtype=torch.uint8)
DATA = RandomWindows(TEXT, length=8, batch_size=8, seed=3)


def network(seed: int = 0) -> RADD:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return RADD(SIZES)


class Stopped(Exception):
    pass


def stop_after(done: int):
    def callback(state: TrainState, info: TrainInfo) -> None:
        if state.done == done:
            raise Stopped

    return callback


def run(path: Path | None = None, config: TrainConfig = CONFIG, **options: object):
    return train(network(), DATA, config, mask_id=5, checkpoint=path, progress=False, **options)


def assert_same(first, second) -> None:
    assert first.losses == second.losses
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
        assert torch.equal(first.average[name], second.average[name]), name


@pytest.mark.parametrize("cut", [5, 7, 11])
def test_a_run_that_was_cut_off_resumes_to_the_same_bits(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "run.pt"
    with pytest.raises(Stopped):
        run(path, callback=stop_after(cut))
    assert path.exists()
    assert_same(run(path), run())


def test_a_finished_run_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    assert_same(run(path), run(path))


def test_the_end_can_be_moved_before_the_cooldown(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    longer = dataclasses.replace(CONFIG, steps=30)
    with pytest.raises(Stopped):
        run(path, longer, callback=stop_after(6))
    assert_same(run(path), run())


def momentum(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    first, *rest = model.parameters()
    return torch.optim.SGD([{"params": rest}, {"params": [first], "lr": 0.3}], lr=0.1, momentum=0.9)


def test_another_optimizer_resumes_and_its_groups_keep_their_rates(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    rates = []

    def callback(state: TrainState, info: TrainInfo) -> None:
        rates.append([group["lr"] for group in state.optimizer.param_groups])

    whole = run(optimizer=momentum, callback=callback)
    scale = [CONFIG.rate(step) / CONFIG.learning_rate for step in range(CONFIG.steps)]
    assert rates == [pytest.approx([0.1 * s, 0.3 * s]) for s in scale]
    with pytest.raises(Stopped):
        run(path, optimizer=momentum, callback=stop_after(7))
    assert_same(run(path, optimizer=momentum), whole)
    assert whole.losses != run().losses


def byte_script():
    from tests.conftest import ROOT

    specification = importlib.util.spec_from_file_location(
        "trainer", ROOT / "scripts" / "train_bytes_model.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_byte_models_optimizer_resumes_and_its_parts_do_not_matter(tmp_path: Path) -> None:
    """The committed script's loss in one and in two threads, cut off and not."""
    script = byte_script()
    config = dataclasses.replace(script.settings(4, 2), checkpoint_every=2)
    text = torch.arange(5000) % 97
    data = RandomWindows(text.to(torch.uint8), script.LENGTH, script.BATCH)

    def go(threads: int, path: Path | None = None, **options: object):
        net = RADD(RADDConfig(vocab_size=256, hidden_size=16, blocks=1, heads=2, length=script.LENGTH))
        with ThreadPoolExecutor(threads) as pool:
            script._InParts.pool = pool
            torch.manual_seed(0)
            for parameter in net.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            return train(
                net,
                data,
                config,
                mask_id=256,
                loss=script.loss,
                optimizer=script.Muon,
                checkpoint=path,
                progress=False,
                **options,
            )

    whole = go(1)
    assert_same(go(2), whole)
    path = tmp_path / "run.pt"
    with pytest.raises(Stopped):
        go(2, path=path, callback=stop_after(3))
    assert_same(go(1, path=path), whole)


def test_the_byte_models_matrices_turn_orthogonal() -> None:
    script = byte_script()
    matrix = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    for one in (matrix, matrix.T):
        values = torch.linalg.svdvals(script.orthogonal(one))
        assert float(values.min()) > 0.5
        assert float(values.max()) < 1.3


def test_every_source_of_randomness_is_seeded() -> None:
    """Dropout included; torch's own generator neither matters nor moves."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = run()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert_same(first, run())
    assert run(config=dataclasses.replace(CONFIG, seed=1)).losses != first.losses


def test_it_learns_a_periodic_text() -> None:
    """A text of period 5 has no entropy once one token is known: the loss falls far below log 5."""
    config = TrainConfig(steps=150, learning_rate=1e-2, warmup=10, cooldown=50, ema_decay=0.9)
    net = RADD(RADDConfig(vocab_size=5, hidden_size=32, blocks=1, heads=2))
    data = RandomWindows(TEXT, length=8, batch_size=32)
    loss = functools.partial(lambda_dce, least=0.05)
    result = train(net, data, config, mask_id=5, loss=loss, progress=False)
    assert result.losses[0] > 1.2
    assert sum(result.losses[-20:]) / 20 < 0.6
    tokens = torch.tensor([[2, 5, 5, 0, 5, 5, 5, 4]])
    masked = (tokens == 5)[0]
    assert result.averaged()(tokens)[0].argmax(-1)[masked].tolist() == [3, 4, 1, 2, 3]


def test_hand_driven_steps_are_the_loop() -> None:
    whole = run()
    net = network()
    state, losses = init(net, CONFIG), []
    net.train()
    for n in range(CONFIG.steps):
        info = step(state, DATA(n), CONFIG, mask_id=5)
        losses.append(float(info.loss))
        assert info.rate == CONFIG.rate(n)
        assert math.isfinite(float(info.norm))
    assert losses == whole.losses
    assert torch.equal(net.head.weight, whole.model.head.weight)


def test_first_step_of_the_average() -> None:
    """n / (n + 9): after one step the average is 9 parts the start, one part the new weights."""
    net = network()
    start = net.head.bias.detach().clone()
    state = init(net, CONFIG)
    step(state, DATA(0), CONFIG, mask_id=5)
    wanted = 0.9 * net.head.bias.detach() + 0.1 * start
    got = state.average["output_layer.linear.bias"][:5]
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"learning_rate": 1e-3}, "learning_rate 0.01 .now 0.001"), ({"seed": 4}, "seed 0 .now 4")],
)
def test_another_runs_checkpoint_is_refused(tmp_path: Path, change: dict[str, float], message: str) -> None:
    path = tmp_path / "run.pt"
    run(path)
    with pytest.raises(ValueError, match=message):
        run(path, dataclasses.replace(CONFIG, **change))


def test_another_networks_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    run(path)
    other = RADD(dataclasses.replace(SIZES, hidden_size=8))
    with pytest.raises(ValueError, match="another network"):
        train(other, DATA, CONFIG, mask_id=5, checkpoint=path, progress=False)


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"

    def poison(state: TrainState, info: TrainInfo) -> None:
        if state.done == 6:
            with torch.no_grad():
                state.model.head.bias.fill_(math.nan)

    with pytest.raises(RuntimeError, match="loss of step 6 is nan"):
        run(path, callback=poison)
    stored = torch.load(path, weights_only=True)
    assert stored["done"] == 5
    assert bool(torch.isfinite(stored["model"]["output_layer.linear.bias"]).all())


def test_bfloat16_trains_float32_weights() -> None:
    result = run(config=dataclasses.replace(CONFIG, precision="bfloat16", steps=40))
    assert result.losses[-1] < result.losses[0]
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}


def test_vectors_are_not_decayed() -> None:
    config = dataclasses.replace(CONFIG, weight_decay=0.5)
    groups = init(network(), config).optimizer.param_groups
    assert {(group["weight_decay"], p.dim() > 1) for group in groups for p in group["params"]} == {
        (0.5, True),
        (0.0, False),
    }


def test_windows_cover_the_text_evenly() -> None:
    text = torch.arange(40, dtype=torch.uint8)
    data = RandomWindows(text, length=3, batch_size=256, seed=1)
    batches = torch.cat([data(n) for n in range(40)])
    assert batches.dtype == torch.int64
    assert bool((batches[:, 1:] == batches[:, :-1] + 1).all())
    counts = torch.bincount(batches[:, 0], minlength=40)
    assert int(counts[38:].sum()) == 0
    mean = len(batches) / 38
    assert bool((counts[:38] > mean - 6 * math.sqrt(mean)).all())
    assert bool((counts[:38] < mean + 6 * math.sqrt(mean)).all())


def test_windows_need_a_text() -> None:
    for text in (torch.zeros(2, 8), torch.zeros(3)):
        with pytest.raises(ValueError, match="no windows"):
            RandomWindows(text, length=4, batch_size=1)


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"steps": 2**24},
        {"warmup": -1},
        {"ema_decay": 1.0},
        {"learning_rate": 0.0},
        {"clip": 0.0},
        {"precision": "float16"},
        {"checkpoint_every": 0},
    ],
)
def test_settings_out_of_range(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        TrainConfig(**{"steps": 1, **bad})
