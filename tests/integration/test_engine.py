"""Engines against a plain PyTorch loop, at every ZeRO stage and with one and two ranks.

Run as a program this file is one rank: it goes through all scenarios in one process group and rank 0 saves what it saw.
The tests look at that. Two ranks run first, because one of the scenarios goes on with one rank where two had stopped.
"""

import copy
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from raysd.config.base import load
from raysd.config.training import TrainingSpec
from raysd.errors import SpecError, TrainingFailed
from raysd.train.build import build_engine
from raysd.train.ema import Ema, owners
from raysd.train.engine import Engine, LossScale, TorchEngine, clip_gradients
from raysd.train.optimizer import build_optimizer

CPU = torch.device("cpu")
BATCH, STEPS, CUT, LR, CLIP = 6, 6, 3, 1e-2, 1.0
STAGES = (0, 1, 2, 3)


class Net(nn.Module):
    """Odd sizes, a frozen layer, an unused one, one used in every other step, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Conv2d(3, 5, 3, padding=1).requires_grad_(False)
        self.conv = nn.Conv2d(5, 7, 3, padding=1)
        self.norm = nn.GroupNorm(1, 7)
        self.unused = nn.Linear(3, 5)
        self.hidden = nn.Linear(7 * 36, 11)
        self.side = nn.Linear(11, 3)
        self.out = nn.Linear(11, 3)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, side: bool = False) -> Tensor:
        h = self.norm(self.conv(self.frozen(x))).relu()
        h = self.drop(self.hidden(h.flatten(1)).relu())
        return self.out(h) + self.side(h) if side else self.out(h)


def net() -> Net:
    """The same weights each time, in the layout that training uses."""
    torch.manual_seed(0)
    return Net().to(memory_format=torch.channels_last)


def spec(stage: int = 0, precision: str = "fp32", offload: str = "none", **optim: Any) -> TrainingSpec:
    fields = {"steps": STEPS, "batch_size": BATCH, "lr": LR, "clip": CLIP, **optim}
    scale = {"zero_stage": stage, "precision": precision, "offload": offload}
    return load(TrainingSpec, {"data": {"source": "sample"}, "optim": fields, "scale": scale})


def micro_batches(step: int, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """This rank's part of the global batch; in odd steps cut in two of different size. Seeds dropout for each."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(BATCH, 3, 6, 6, generator=generator), torch.randn(BATCH, 3, generator=generator)
    size = BATCH // world
    rows = torch.arange(rank * size, (rank + 1) * size)
    parts = rows.split([size - 1, 1]) if step % 2 else (rows,)
    for number, part in enumerate(parts):
        torch.manual_seed(1000 * step + 10 * rank + number)
        yield x[part], y[part], number == len(parts) - 1


def loss_of(prediction: Tensor, target: Tensor, world: int) -> Tensor:
    """Its mean over ranks, of the sum over micro-batches, is the mean squared error of the global batch."""
    return (prediction.float() - target).pow(2).sum() * world / (3 * BATCH)


def train(engine: Engine, start: int, end: int, lr: float = LR) -> list[tuple[float, float]]:
    """[(loss, gradient norm)] of some steps."""
    return [step_of(engine, step, lr) for step in range(start, end)]


def step_of(engine: Engine, step: int, lr: float = LR) -> tuple[float, float]:
    total = torch.zeros((), dtype=torch.float64)
    for x, y, last in micro_batches(step, engine.rank, engine.world):
        loss = loss_of(engine(x, side=step % 2 == 0), y, engine.world)
        engine.backward(loss, last)
        total += loss.detach().double() / engine.world
    if engine.world > 1:
        dist.all_reduce(total)
    return total.item(), engine.step(lr)


def plain_loop(
    world: int, precision: str = "fp32", clip: float = CLIP
) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """What the engines have to reproduce: one process, all ranks' micro-batches one after the other."""
    model = net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.01)
    seen = []
    for step in range(STEPS):
        total = 0.0
        for rank in range(world):
            for x, y, _ in micro_batches(step, rank, world):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                    prediction = model(x, side=step % 2 == 0)
                loss = loss_of(prediction, y, 1)
                loss.backward()
                total += loss.item()
        for parameter in model.parameters():  # ZeRO steps parameters without a gradient too
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((total, norm.item()))
    return seen, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


# What a rank does.


def build(which: TrainingSpec, weights: dict[str, Tensor] | None = None) -> Engine:
    model = net()
    model.load_state_dict(weights or {}, strict=False)
    return build_engine(model, which, device=CPU, rank=dist.get_rank(), world=dist.get_world_size())


def snapshot(engine: Engine) -> dict[str, Any]:
    """All that a checkpoint holds, as copies."""
    names = engine.trainable_names()
    return {
        "weights": {name: engine.full_weight(name).clone().contiguous() for name in names},
        "states": {
            name: {key: value.clone().contiguous() for key, value in engine.optimizer_state(name).items()}
            for name in names
        },
        "scalars": dict(engine.scalars()),
    }


def resumed(which: TrainingSpec, saved: dict[str, Any]) -> Engine:
    engine = build(which, saved["weights"])
    engine.load_optimizer_state(saved["states"], CUT)
    engine.load_scalars(saved["scalars"])
    return engine


def uninterrupted_and_resumed(which: TrainingSpec, lr: float = LR) -> dict[str, Any]:
    engine = build(which)
    seen = train(engine, 0, CUT, lr)
    saved = snapshot(engine)
    seen += train(engine, CUT, STEPS, lr)
    other = resumed(which, saved)
    again = train(other, CUT, STEPS, lr)
    return {"seen": seen, "again": again, "saved": saved, "end": snapshot(engine), "end again": snapshot(other)}


def average(which: TrainingSpec) -> dict[str, Any]:
    """Train with a moving average, show it in the middle, go on."""
    engine = build(which)
    ema = Ema(engine, 0.5)
    by_hand = {name: engine.full_weight(name).clone() for name in engine.trainable_names()}
    seen = []
    for step in range(CUT):
        seen.append(step_of(engine, step))
        ema.update(step)
        kept = min(0.5, (1 + step) / (10 + step))
        by_hand = {name: kept * old + (1 - kept) * engine.full_weight(name) for name, old in by_hand.items()}
    full = {name: ema.full(name).clone() for name in by_hand}
    before = {name: engine.full_weight(name).clone() for name in by_hand}
    with ema.swapped():
        shown = evaluate(engine)
    after = {name: engine.full_weight(name).clone() for name in by_hand}
    loaded = Ema(engine, 0.5)
    loaded.load(full)
    return {
        "by hand": by_hand,
        "full": full,
        "shown": shown,
        "expected": torch.func.functional_call(net().eval(), full, probe()),
        "restored": all(torch.equal(before[name], after[name]) for name in before),
        "loaded": all(torch.equal(loaded.full(name), full[name]) for name in full),
        "seen": seen + train(engine, CUT, STEPS),
        "held": sum(value.numel() for value in ema._own.values()) / sum(value.numel() for value in full.values()),
    }


def probe() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(9))


def evaluate(engine: Engine) -> Tensor:
    engine.module.eval()
    with torch.no_grad():
        shown = engine(probe())
    engine.module.train()
    return shown


def broken_step(which: TrainingSpec) -> dict[str, Any]:
    """A step whose gradients are not finite on rank 0 only, between good ones."""
    engine = build(which)
    seen = train(engine, 0, 1)
    before = snapshot(engine)
    loss = engine(probe()).sum() * (float("nan") if engine.rank == 0 else 1.0)
    engine.backward(loss, last=True)
    norm, skipped, after = engine.step(LR), engine.skipped, snapshot(engine)
    seen += train(engine, 1, 3)
    same = all(torch.equal(before["weights"][name], after["weights"][name]) for name in before["weights"])
    return {"norm": norm, "skipped": skipped, "same": same, "seen": seen, "skipped later": engine.skipped}


def half(stage: int) -> dict[str, Any]:
    """fp16 with loss scaling. `build_engine` refuses it on CPU because it is slow; the arithmetic can be tried."""
    from raysd.train.deepspeed_engine import DeepSpeedEngine

    which, rank, world = spec(stage, "fp16"), dist.get_rank(), dist.get_world_size()
    if (stage, world) == (0, 1):
        engine: Engine = TorchEngine(net(), which, device=CPU)
    else:
        engine = DeepSpeedEngine(net(), which, device=CPU, rank=rank, world=world)
    engine.load_scalars({"loss_scale": 1024.0, "loss_scale_good": 7})
    seen = train(engine, 0, 3)
    engine.backward(engine(probe()).sum() * math.inf, last=True)
    norm = engine.step(LR)
    return {"seen": seen, "norm": norm, "skipped": engine.skipped, "scalars": engine.scalars()}


def scenarios(world: int, folder: Path) -> dict[Any, Any]:
    seen: dict[Any, Any] = {}
    for stage in STAGES:
        for precision in ("fp32", "bf16"):
            seen[stage, precision] = uninterrupted_and_resumed(spec(stage, precision))
        seen["broken", stage] = broken_step(spec(stage))
        seen["unclipped", stage] = train(build(spec(stage, clip=None)), 0, STEPS)
    for source, target in ((2, 3), (3, 2), (0, 2), (1, 0)):
        seen["to", source, target] = train(resumed(spec(target), seen[source, "fp32"]["saved"]), CUT, STEPS)
    for stage in (0, 2, 3):
        seen["ema", stage] = average(spec(stage))
        seen["half", stage] = half(stage)
    for stage in (1, 2, 3):
        seen["offload", stage] = uninterrupted_and_resumed(spec(stage, offload="optimizer"))
        seen["broken offload", stage] = broken_step(spec(stage, offload="optimizer"))
    seen["ema", "offload"] = average(spec(3, offload="optimizer"))
    if world == 2:
        for kind in ("adafactor", "prodigy"):
            seen[kind] = uninterrupted_and_resumed(spec(kind=kind, lr=1.0), 1.0 if kind == "prodigy" else LR)
    else:
        before = torch.load(folder / "2.pt", weights_only=False)[2, "fp32"]
        for stage in (0, 3):
            seen["fewer", stage] = train(resumed(spec(stage), before["saved"]), CUT, STEPS)
    return seen


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous-{world}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    if world == 2:  # so small that even this model takes several buckets, and is sharded
        import raysd.train.deepspeed_engine as module

        module.BUCKET, module.PERSISTENT = 500, 50
    seen = scenarios(world, folder)
    if rank == 0:
        torch.save(seen, folder / f"{world}.pt")
    dist.barrier()


# What the tests see of it.


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("engine")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for world in (2, 1):
        commands = [[sys.executable, __file__, str(rank), str(world), str(folder)] for rank in range(world)]
        processes = [subprocess.Popen(command, env=environment) for command in commands]
        try:
            assert [process.wait(timeout=240) for process in processes] == [0] * world
        finally:
            for process in processes:
                process.kill()
    return {world: torch.load(folder / f"{world}.pt", weights_only=False) for world in (1, 2)}


@pytest.fixture(scope="module")
def expected() -> dict[Any, Any]:
    torch.set_num_threads(1)
    return {(world, precision): plain_loop(world, precision) for world in (1, 2) for precision in ("fp32", "bf16")}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def close(seen: list[tuple[float, float]], wanted: list[tuple[float, float]], rel: float) -> None:
    for got, want in zip(seen, wanted, strict=True):
        assert got == pytest.approx(want, rel=rel)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_same_losses_norms_and_weights_as_a_plain_loop(results, expected, world, stage):
    wanted, weights = expected[world, "fp32"]
    close(results[world][stage, "fp32"]["seen"], wanted, rel=1e-6)
    for name, weight in results[world][stage, "fp32"]["end"]["weights"].items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_autocast_with_fp32_gradients(results, expected, world, stage):
    close(results[world][stage, "bf16"]["seen"], expected[world, "bf16"][0], rel=1e-5)


@pytest.mark.parametrize("world", [1, 2])
def test_without_clipping(results, world):
    wanted, _ = plain_loop(world, clip=math.inf)
    for stage in STAGES:
        close(results[world]["unclipped", stage], wanted, rel=1e-6)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_resuming_is_exact(results, world, precision, stage):
    exactly_resumed(results[world][stage, precision])


def exactly_resumed(run: dict[str, Any]) -> None:
    assert run["again"] == run["seen"][CUT:]
    for name, weight in run["end"]["weights"].items():
        assert torch.equal(weight, run["end again"]["weights"][name]), name
        for key, value in run["end"]["states"][name].items():
            assert torch.equal(value, run["end again"]["states"][name][key]), (name, key)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("source", "target"), [(2, 3), (3, 2), (0, 2), (1, 0)])
def test_resuming_at_another_stage(results, world, source, target):
    close(results[world]["to", source, target], results[world][source, "fp32"]["seen"][CUT:], rel=1e-6)


@pytest.mark.parametrize("stage", [0, 3])
def test_resuming_with_fewer_ranks(results, stage):
    """Two ranks up to the cut, one after it: as the plain loop from the same state on."""
    close(results[1]["fewer", stage], continued_alone(results[2][2, "fp32"]["saved"]), rel=1e-6)


def continued_alone(saved: dict[str, Any]) -> list[tuple[float, float]]:
    """The plain loop from a saved state on, with torch's own way of loading it."""
    model = net()
    model.load_state_dict(saved["weights"], strict=False)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for _, p in named], lr=LR, weight_decay=0.01)
    packed = optimizer.state_dict()
    packed["state"] = {number: copy.deepcopy(saved["states"][name]) for number, (name, _) in enumerate(named)}
    optimizer.load_state_dict(packed)
    seen = []
    for step in range(CUT, STEPS):
        total = 0.0
        for x, y, _ in micro_batches(step, 0, 1):
            loss = loss_of(model(x, side=step % 2 == 0), y, 1)
            loss.backward()
            total += loss.item()
        norm = clip_gradients([p for _, p in named], CLIP, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((total, norm))
    return seen


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_changes_nothing(results, world, stage):
    run = results[world]["offload", stage]
    close(run["seen"], results[world][stage, "fp32"]["seen"], rel=1e-6)
    exactly_resumed(run)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", ["broken", "broken offload"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_not_finite_is_skipped_and_told(results, world, kind, stage):
    if (kind, stage) == ("broken offload", 0):
        return
    run = results[world][kind, stage]
    assert not math.isfinite(run["norm"])
    assert run["skipped"]
    assert run["same"]
    assert not run["skipped later"]
    close(run["seen"], results[world][stage, "fp32"]["seen"][:3], rel=1e-6)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_fp16_scales_the_loss_and_unscales_the_gradients(results, expected, world, stage):
    run = results[world]["half", stage]
    close(run["seen"], expected[world, "fp32"][0][:3], rel=0.01)
    assert not math.isfinite(run["norm"])
    assert run["skipped"]
    assert run["scalars"] == {"loss_scale": 512.0, "loss_scale_good": 0}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [0, 2, 3, "offload"])
def test_the_moving_average_is_gathered_shown_and_taken_away(results, world, stage):
    run = results[world]["ema", stage]
    alone = results[world]["offload", 3] if stage == "offload" else results[world][stage, "fp32"]
    for name, value in run["by hand"].items():
        torch.testing.assert_close(run["full"][name], value, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(run["shown"], run["expected"], rtol=1e-5, atol=1e-6)
    assert run["restored"]
    assert run["loaded"]
    assert (run["held"] < 1) == (world > 1)
    assert run["seen"] == alone["seen"]  # to the bit, as if nothing had been shown


def test_averages_are_spread_evenly():
    sizes = [1000, 999, 50, 40, 30, 900, 7, 7]
    found = owners({str(size): torch.Size([size]) for size in sizes}, 3)
    held = [sum(int(name) for name, owner in found.items() if owner == rank) for rank in range(3)]
    assert list(found) == [str(size) for size in dict.fromkeys(sizes)]
    assert max(held) - min(held) <= 50


@pytest.mark.parametrize("kind", ["adafactor", "prodigy"])
def test_whole_tensor_optimisers_with_two_ranks(results, kind):
    exactly_resumed(results[2][kind])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "adafactor", "prodigy"])
def test_every_optimiser_resumes_exactly_and_learns(kind, layout):
    which = spec(kind=kind, lr=1.0 if kind == "prodigy" else LR)

    def fresh(weights: dict[str, Tensor]) -> TorchEngine:
        torch.manual_seed(0)
        wide = nn.Sequential(nn.Conv2d(3, 67, 3), nn.SiLU(), nn.Conv2d(67, 19, 3), nn.Flatten(), nn.Linear(76, 5))
        wide.load_state_dict(weights, strict=False)
        return TorchEngine(wide.to(memory_format=layout), which, device=CPU)

    def steps(engine: TorchEngine, start: int, end: int) -> list[float]:
        seen = []
        for step in range(start, end):
            x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(step % 2))
            loss = (engine(x) - x.mean((2, 3)) @ torch.ones(3, 5)).pow(2).mean()
            engine.backward(loss, last=True)
            engine.step(which.optim.lr / 10 if kind != "prodigy" else 1.0)
            seen.append(loss.item())
        return seen

    engine = fresh({})
    first = steps(engine, 0, 40)
    saved = snapshot(engine)
    other = fresh(saved["weights"])
    other.load_optimizer_state(saved["states"], 40)
    other.load_scalars(saved["scalars"])
    assert steps(other, 40, 44) == steps(engine, 40, 44)
    end, again = snapshot(engine), snapshot(other)
    assert all(torch.equal(end["weights"][name], again["weights"][name]) for name in end["weights"])
    assert end["scalars"] == again["scalars"]
    assert first[-1] < 0.8 * first[0]


def test_clipping_is_torchs():
    torch.manual_seed(0)
    for clip in (0.01, 1.0, 1e6, None):
        ours = [nn.Parameter(torch.zeros(7, 3)), nn.Parameter(torch.zeros(5))]
        theirs = [nn.Parameter(torch.zeros(7, 3)), nn.Parameter(torch.zeros(5))]
        for mine, other in zip(ours, theirs, strict=True):
            other.grad = torch.randn_like(other)
            mine.grad = other.grad * 64
        norm = nn.utils.clip_grad_norm_(theirs, clip or math.inf).item()
        assert clip_gradients(ours, clip, 64.0) == pytest.approx(norm, rel=1e-6)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=0)


def test_loss_scale_halves_doubles_and_gives_up():
    scale = LossScale("fp16")
    scale.update(finite=False)
    assert (scale.value, scale.good) == (32768.0, 0)
    for _ in range(LossScale.patience):
        scale.update(finite=True)
    assert (scale.value, scale.good) == (65536.0, 0)
    for _ in range(16):
        scale.update(finite=False)
    with pytest.raises(TrainingFailed, match="bf16"):
        scale.update(finite=False)
    assert LossScale("bf16").value == 1.0
    LossScale("bf16").update(finite=False)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(SpecError, match=r"scale\.precision"):
        build_engine(net(), spec(precision="fp16"), device=CPU, rank=0, world=1)
    with pytest.raises(SpecError, match="nothing is trained"):
        build_engine(net().requires_grad_(False), spec(), device=CPU, rank=0, world=1)
    with pytest.raises(TrainingFailed, match="fp32"):
        build_engine(net().bfloat16(), spec(), device=CPU, rank=0, world=1)
    for kind in ("adafactor", "prodigy", "adamw8bit"):
        with pytest.raises(SpecError, match="zero_stage 0"):
            build_optimizer(list(net().parameters()), spec(kind=kind).optim, sharded=True)


def test_a_missing_package_is_told_with_its_extra(monkeypatch):
    for kind, package in (("prodigy", "prodigyopt"), ("adamw8bit", "bitsandbytes.optim")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(SpecError, match=r"raysd\[optimizers\]"):
            build_optimizer(list(net().parameters()), spec(kind=kind).optim)


def test_state_of_another_model_is_refused():
    engine = build_engine(net(), spec(), device=CPU, rank=0, world=1)
    with pytest.raises(TrainingFailed, match="another model"):
        engine.load_optimizer_state({"conv.weight": {}}, 1)


def test_a_process_trains_one_run_after_another():
    """As a search's trials of one worker do."""
    code = """
import torch
from raysd.train.build import build_engine
from raysd.train.engine import leave
from tests.integration.test_engine import CPU, net, spec
seen = []
for stage in (2, 3, 0, 1, 2):
    engine = build_engine(net(), spec(stage), device=CPU, rank=0, world=1)
    torch.manual_seed(1)
    loss = engine(torch.ones(2, 3, 6, 6)).square().mean()
    engine.backward(loss, last=True)
    seen.append((round(float(loss), 5), round(engine.step(1e-2), 4)))
    leave()
assert len(set(seen)) == 1, seen
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_worker_at_stage_0_needs_no_deepspeed():
    code = "import sys, raysd.train.build, raysd.train.ema; assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
