"""The loop without Ray: every ZeRO stage and world size against a plain PyTorch loop, and checkpoints between them.

Processes have a gloo group of their own; each runs several cases one after the other.
"""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from raysd.config import TrainingSpec, load, override
from raysd.data.cache import TensorCache
from raysd.data.sampler import Sampler
from raysd.diffusion import add_noise, sample_posterior
from raysd.methods import METHODS
from raysd.models import family_of
from raysd.storage import Storage
from raysd.train import checkpoint
from raysd.train.batches import Batches, Item, Source, draw_randomness
from raysd.train.build import build_engine
from raysd.train.checkpoint import Progress
from raysd.train.ema import Ema
from raysd.train.loop import training_steps
from raysd.train.validate import validation_loss
from raysd.train.worker import load_weights
from tests.ports import free_port

PICTURES = 7
SPEC = load(
    TrainingSpec,
    {
        "data": {"source": "x", "resolution": 64},
        "method": {"kind": "lora", "rank": 2, "alpha": 3.0, "dropout": 0.1},
        "loss": {"caption_dropout": 0.3, "min_snr_gamma": 5.0, "noise_offset": 0.1},
        "optim": {"steps": 6, "batch_size": 4, "lr": 1e-2, "schedule": "cosine", "warmup": 2, "ema": 0.9},
    },
)
LORA_PLAIN = {"method.dropout": 0.0, "loss.min_snr_gamma": None, "loss.noise_offset": 0.0, "optim.ema": None}
FULL = {
    "method.kind": "full",
    "optim.ema": None,
    "optim.lr": 1e-4,
    "loss.min_snr_gamma": None,
    "loss.noise_offset": 0.0,
}


def data(root: Path) -> tuple[list[Item], TensorCache, dict[str, torch.Tensor]]:
    """Made-up moments and embeddings; the same in every process."""
    torch.manual_seed(0)
    cache = TensorCache(Storage(str(root)).child("latents")).refresh()
    keys = [f"picture{n}" for n in range(PICTURES)]
    moments = {key: torch.cat([torch.randn(4, 16, 16), torch.full((4, 16, 16), -4.0)]) for key in keys}
    if cache.missing(keys) and not dist.is_initialized():
        cache.write(moments)
    text = {f"text{n}": torch.randn(24, 64) for n in range(PICTURES)} | {"empty": torch.randn(24, 64)}
    items = [Item((key,), f"caption {n}", f"text{n}", "", "") for n, key in enumerate(keys)]
    return items, cache, text


def run(
    base: Path,
    root: Path,
    spec: TrainingSpec,
    *,
    resume: bool = False,
    until: int | None = None,
    every: int = 3,
    fence: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Steps of `spec` through the real loop, a checkpoint each `every` steps; returns the losses."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    family, method = family_of(base), METHODS[spec.method.kind]
    items, cache, text = data(root)
    store = Storage(str(root)).child("run")
    found = checkpoint.latest(store) if resume else None
    module = method.build(family, base, spec)
    if found:
        load_weights(module, store, found)
    engine = build_engine(module, spec, device=torch.device("cpu"), rank=rank, world=world)
    ema = Ema(engine, spec.optim.ema) if spec.optim.ema else None
    if found:
        checkpoint.load_state(store, found, engine, ema)
    schedule = family.noise_schedule(base)
    sampler = Sampler(PICTURES, spec.optim.batch_size, spec.seed)
    source = Source(cache, text, family.latent_scale(base))
    batches = Batches(items, "empty", source, sampler, schedule, spec, rank, world)
    losses = []
    start = found.step if found else 0
    saver = checkpoint.Saver(store, engine, ema, "1", lambda: fence(record.step))
    for record in training_steps(engine, method, batches, schedule, spec, ema, start, spec.optim.steps or 0):
        losses.append(record.loss)
        if record.step % every == 0:
            saver.save(Progress(step=record.step))
        if record.step == until:
            break
    return losses


def final_weights(root: Path, average: bool = True) -> dict[str, torch.Tensor]:
    store = Storage(str(root)).child("run")
    newest = checkpoint.latest(store)
    assert newest is not None
    assert newest.step == 6
    return checkpoint.weights(store, newest, ema=average)


def plain_loop(base: Path, root: Path, spec: TrainingSpec) -> list[float]:
    """The same training in plain PyTorch: one process, the whole batch at once, torch's AdamW."""
    family = family_of(base)
    items, cache, text = data(root)
    module = METHODS[spec.method.kind].build(family, base, spec).train()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optim = spec.optim
    optimizer = torch.optim.AdamW(trained, optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
    alphas = family.noise_schedule(base).alphas_cumprod
    losses = []
    for step in range(optim.steps or 0):
        draws = Sampler(PICTURES, optim.batch_size, spec.seed).batch(step)
        rows = [
            draw_randomness((spec.seed, "step", step, d.index), (4, 16, 16), 1000, spec.loss.caption_dropout, 0.0)
            for d in draws
        ]
        moments = torch.stack(cache.read([items[d.example].latents[0] for d in draws]))
        latents = sample_posterior(moments, torch.stack([r.posterior for r in rows]), *family.latent_scale(base))
        noise, timesteps = torch.stack([r.noise for r in rows]), torch.tensor([r.timestep for r in rows])
        captions = ["empty" if r.dropped else items[d.example].text for d, r in zip(draws, rows, strict=True)]
        noisy = add_noise(latents, noise, alphas, timesteps)
        predicted = module.denoiser(noisy, timesteps, torch.stack([text[key] for key in captions])).sample
        loss = torch.nn.functional.mse_loss(predicted, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, optim.clip or 1e9)
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * factor_by_hand(step, optim.steps or 0, optim.warmup)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def factor_by_hand(step: int, total: int, warmup: int) -> float:
    import math

    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def enter(rank: int, world: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...], out: str) -> None:
    """Join the group and do `work`; rank 0 writes what it returns."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        dist.init_process_group("gloo", rank=rank, world_size=world)
    result = work(*arguments)
    if rank == 0:
        Path(out).write_text(json.dumps(result))
    if world > 1:
        dist.destroy_process_group()


def spawn(world: int, work: Callable[..., Any], arguments: tuple[Any, ...], tmp_path: Path) -> Any:
    out = tmp_path / f"result-{free_port()}.json"
    multiprocessing.set_forkserver_preload(["benchmarks.preloaded"])
    ranks = (world, free_port(), work, arguments, str(out))
    mp.start_processes(enter, ranks, nprocs=world, start_method="forkserver")
    return json.loads(out.read_text())


def validated(base: Path, root: Path, changes: dict[str, Any]) -> list[float]:
    """Losses of steps, each followed by a validation of the moving average."""
    spec = override(SPEC, changes)
    family, method = family_of(base), METHODS[spec.method.kind]
    items, cache, text = data(root)
    rank, world = dist.get_rank(), dist.get_world_size()
    module = method.build(family, base, spec)
    engine = build_engine(module, spec, device=torch.device("cpu"), rank=rank, world=world)
    ema, schedule = Ema(engine, 0.9), family.noise_schedule(base)
    source = Source(cache, text, family.latent_scale(base))
    sampler = Sampler(PICTURES, spec.optim.batch_size, spec.seed)
    batches = Batches(items, "empty", source, sampler, schedule, spec, rank, world)
    losses: list[float] = []

    def validate() -> None:
        with ema.swapped():
            loss = validation_loss(engine, method, items[:2], source, schedule, spec)
        assert loss is not None
        losses.append(loss)

    validate()
    for record in training_steps(engine, method, batches, schedule, spec, ema, 0, 2):
        losses.append(record.loss)
        validate()
    return losses


def test_a_validation_between_micro_steps_of_a_sharded_model_is_that_of_a_whole_one(tiny_base, tmp_path):
    """What stage 3 fetched ahead for a backward pass is still under way when the weights of before are put back."""
    changes = {**FULL, "optim.micro_batch": 1, "validation.timesteps": 2}
    data(tmp_path)
    whole, sharded = (
        spawn(2, validated, (tiny_base, tmp_path, {**changes, "scale.zero_stage": stage}), tmp_path) for stage in (0, 3)
    )
    assert sharded == pytest.approx(whole, rel=2e-5)


def all_stages(base: Path, root: Path, changes: dict[str, Any]) -> list[list[float]]:
    stages = (0, 1, 2, 3)
    return [run(base, root, override(SPEC, {**changes, "scale.zero_stage": stage}), every=99) for stage in stages]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("changes", [LORA_PLAIN, FULL], ids=["lora", "full"])
def test_every_stage_gives_the_losses_of_a_plain_loop(tiny_base, tmp_path, world, changes):
    data(tmp_path)
    wanted = plain_loop(tiny_base, tmp_path, override(SPEC, changes))
    for stage, losses in enumerate(spawn(world, all_stages, (tiny_base, tmp_path, changes), tmp_path)):
        assert losses == pytest.approx(wanted, rel=2e-5), f"stage {stage}"


def test_accumulation_is_normalised_over_the_global_batch(tiny_base, tmp_path):
    changes = {**LORA_PLAIN, "optim.batch_size": 7, "scale.zero_stage": 2}
    data(tmp_path)
    wanted = plain_loop(tiny_base, tmp_path, override(SPEC, changes))
    uneven = {**changes, "optim.micro_batch": 2}
    assert spawn(2, run, (tiny_base, tmp_path, override(SPEC, uneven)), tmp_path) == pytest.approx(wanted, rel=2e-5)


def journey(base: Path, root: Path, stages: tuple[int, int]) -> list[float]:
    """Three steps at one stage, three at another, from the checkpoint between them."""
    before = run(base, root, override(SPEC, {"scale.zero_stage": stages[0]}), until=3)
    return before + run(base, root, override(SPEC, {"scale.zero_stage": stages[1]}), resume=True)


@pytest.mark.long
def test_a_checkpoint_moves_between_stages_and_back(tiny_base, tmp_path):
    roots = [tmp_path / name for name in ("whole", "up", "down")]
    for root in roots:
        data(root)
    whole = spawn(2, run, (tiny_base, roots[0], override(SPEC, {"scale.zero_stage": 2})), tmp_path)
    for root, stages in zip(roots[1:], [(2, 3), (3, 2)], strict=True):
        assert spawn(2, journey, (tiny_base, root, stages), tmp_path) == pytest.approx(whole, rel=2e-5)
        for name, tensor in final_weights(roots[0]).items():
            assert torch.allclose(final_weights(root)[name], tensor, rtol=1e-3, atol=1e-5), name


def second_of(base: Path, root: Path, spec: TrainingSpec) -> list[float]:
    return run(base, root, spec, resume=True)


def first_of(base: Path, root: Path, spec: TrainingSpec) -> list[float]:
    return run(base, root, spec, until=3)


@pytest.mark.long
def test_a_checkpoint_moves_between_world_sizes_and_back(tiny_base, tmp_path):
    spec = override(SPEC, {"scale.zero_stage": 2, "method.dropout": 0.0})
    roots = [tmp_path / name for name in ("whole", "fewer", "more")]
    for root in roots:
        data(root)
    whole = spawn(2, run, (tiny_base, roots[0], spec), tmp_path)
    for root, (first, second) in zip(roots[1:], [(2, 1), (1, 2)], strict=True):
        before = spawn(first, first_of, (tiny_base, root, spec), tmp_path)
        after = spawn(second, second_of, (tiny_base, root, spec), tmp_path)
        assert before + after == pytest.approx(whole, rel=2e-5)


def die_at_six(step: int) -> None:
    """Between the parts of the second checkpoint and its manifest."""
    if step == 6:
        os.kill(os.getpid(), signal.SIGKILL)


def until_killed(base: Path, root: Path, spec: TrainingSpec) -> list[float]:
    return run(base, root, spec, fence=die_at_six)


@pytest.mark.parametrize(
    ("world", "stage"), [pytest.param(1, 0, marks=pytest.mark.long), pytest.param(2, 2, marks=pytest.mark.long), (2, 3)]
)
def test_killed_while_writing_a_checkpoint_it_ends_in_the_same_weights(tiny_base, tmp_path, world, stage):
    spec = override(SPEC, {"scale.zero_stage": stage})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    data(whole), data(killed)
    spawn(world, run, (tiny_base, whole, spec), tmp_path)
    with pytest.raises(mp.ProcessExitedException):
        spawn(world, until_killed, (tiny_base, killed, spec), tmp_path)
    halves = list((killed / "run" / "checkpoints").glob("00000006-*/part-*"))
    assert halves, "the second checkpoint's parts were written, but not its manifest"
    store = Storage(str(killed)).child("run")
    assert [found.step for found in checkpoint.complete(store)] == [3]
    spawn(world, second_of, (tiny_base, killed, spec), tmp_path)
    for average in (False, True):
        expected, got = final_weights(whole, average), final_weights(killed, average)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in expected)
        assert not any(name.startswith("module.") for name in got)


def judged(base: Path, root: Path, stages: tuple[int, ...]) -> list[list[float]]:
    """Validation losses of two calls at each stage. Seven pictures at three timesteps leave a rank of two without a pair.

    The adapters are not zero, so that a dropout which is left on would show.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    family, method = family_of(base), METHODS["lora"]
    items, cache, text = data(root)
    rows = []
    for stage in stages:
        spec = override(SPEC, {"scale.zero_stage": stage, "validation.timesteps": 3})
        module = method.build(family, base, spec)
        torch.manual_seed(1)
        for parameter in module.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        engine = build_engine(module, spec, device=torch.device("cpu"), rank=rank, world=world)
        source, schedule = Source(cache, text, family.latent_scale(base)), family.noise_schedule(base)
        losses = []
        for call in range(2):
            torch.manual_seed(rank + 10 * call)
            before = torch.get_rng_state()
            losses.append(validation_loss(engine, method, items, source, schedule, spec) or 0.0)
            assert torch.equal(torch.get_rng_state(), before), "training draws what it would have drawn"
            assert engine.module.training
        rows.append(losses)
    return rows


def test_validation_loss_is_the_same_each_time_and_at_every_world_size(tiny_base, tmp_path):
    data(tmp_path)
    [[wanted, again]] = spawn(1, judged, (tiny_base, tmp_path, (0,)), tmp_path)
    assert wanted == again > 0.1
    for first, second in spawn(2, judged, (tiny_base, tmp_path, (0, 3)), tmp_path):
        assert first == second == pytest.approx(wanted, rel=1e-5)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
