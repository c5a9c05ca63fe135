"""What a run needs, from shapes alone: against the papers' arithmetic, real optimisers, and by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import bases
from raysd import cluster
from raysd.cluster import Allotment
from raysd.config import TrainingSpec, load, override
from raysd.errors import NotFound, RequestError, SpecError
from raysd.methods import METHODS
from raysd.plan import fit
from raysd.plan.changes import _singles, change_that_fits, words
from raysd.plan.devices import device, devices
from raysd.plan.estimate import Planner
from raysd.plan.memory import Memory, memory_of, micro_batches, optimizer_bytes
from raysd.plan.shapes import build, configurations, count
from raysd.plan.speed import measured_in
from raysd.plan.trace import Trace, trace
from raysd.storage import Storage
from raysd.train import runs
from raysd.train.optimizer import build_optimizer
from raysd.train.runs import RunRecord
from tests.cluster import raysd
from tests.livebytes import folder_of

UNET = 859_520_964
"""Parameters of Stable Diffusion 1.5's U-Net."""
LORA = 797_184
"""Of the adapters of rank 4 on its attention, as diffusers' scripts train them."""
SHALLOW = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
}
PLAIN = load(
    TrainingSpec,
    {
        "data": {"source": "x", "resolution": 128},
        "method": {"kind": "full"},
        "optim": {"steps": 100, "batch_size": 4},
    },
)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("sd15"), bases.SD15)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("small"), SHALLOW)


def spec_with(**changes: Any) -> TrainingSpec:
    return override(PLAIN, {path.replace("__", "."): value for path, value in changes.items()})


def states(folder: Path, world: int, **changes: Any) -> Memory:
    """Of a run without activations: only what depends on the number of parameters."""
    spec = spec_with(optim__batch_size=64, scale__workers=world, **changes)
    return memory_of(Trace(count(build(folder, spec)), 0, ((0, 0),), 0), spec, world)


def moment(memory: Memory, name: str) -> dict[str, int]:
    return dict(next(found for found in memory.moments if found.name == name).parts)


def test_parameters_are_the_published_ones(sd15):
    full = count(build(sd15, PLAIN))
    assert (full.trained, full.frozen) == (UNET, 0)
    lora = count(build(sd15, spec_with(method__kind="lora", method__rank=4, scale__precision="bf16")))
    assert (lora.trained, lora.frozen, lora.frozen_bytes) == (LORA, UNET, 2 * UNET)


def test_model_states_are_those_of_the_zero_paper(sd15):
    """Table 1 and figure 1 of arXiv:1910.02054, K = 12: 2 + 2 + 12 bytes a parameter there, 4 + 4 + 8 here."""
    step = moment(states(sd15, 1), "step")
    assert step["weights"] + step["gradients"] + step["optimiser state"] == 16 * UNET

    workers = 64
    one, two, three = (moment(states(sd15, workers, scale__zero_stage=stage), "step") for stage in (1, 2, 3))
    shard = 4 * UNET / workers
    for found in (one, two):
        assert found["weights"] == 4 * UNET
        assert found["optimiser state"] == pytest.approx(2 * shard, rel=1e-6)
        assert found["fp32 copy of the shard"] == pytest.approx(shard, rel=1e-6)
    before = moment(states(sd15, workers, scale__zero_stage=1), "reduction")
    assert before["gradients"] == 4 * UNET, "stage 1 has all gradients before it reduces them"
    assert two["gradients"] == pytest.approx(shard, rel=1e-6)
    sharded = three["weights"] + three["gradients"] + three["optimiser state"]
    assert sharded == pytest.approx(16 * UNET / workers, rel=1e-6), "stage 3: all of it, divided by the workers"


def test_offloaded_states_are_in_the_host(sd15):
    memory = states(sd15, 4, scale__zero_stage=2, scale__offload="optimizer")
    assert "optimiser state" not in moment(memory, "step")
    assert memory.host["optimiser state"] == pytest.approx(8 * UNET / 4, rel=1e-6)


def test_the_average_is_kept_once_over_all_workers(sd15):
    assert moment(states(sd15, 1, optim__ema=0.9), "step")["moving average"] == 4 * UNET
    assert moment(states(sd15, 4, optim__ema=0.9), "step")["moving average"] == pytest.approx(UNET, rel=0.02)


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "prodigy"])
def test_optimizer_state_is_what_the_optimizer_makes(kind):
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((96, 64), (7,), (8, 4, 3, 3))]
    spec = spec_with(optim__kind=kind).optim
    optimizer = build_optimizer(parameters, spec)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tensors = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    made = sum(value.numel() * value.element_size() for value in tensors if value.ndim)
    shapes = {str(number): parameter.shape for number, parameter in enumerate(parameters)}
    counts = replace(count(torch.nn.Linear(1, 1)), shapes=shapes)
    assert optimizer_bytes(counts, spec) == made


def test_activations_grow_with_pictures_and_not_with_pairs_of_places(small):
    one, two = (trace(small, PLAIN, size, gpu=False) for size in (1, 2))
    assert two.saved / one.saved == pytest.approx(2, rel=0.02)
    assert two.operations / one.operations == pytest.approx(2, rel=0.02)
    large = trace(small, spec_with(data__resolution=512), 1, gpu=False)
    assert large.saved / one.saved == pytest.approx(16, rel=0.1), "a matrix of all pairs would make it far more"


def test_gradients_are_all_seen_and_checkpointing_saves_activations_for_operations(small):
    plain = trace(small, PLAIN, 2, gpu=False)
    assert plain.course[-1][0] == plain.counts.trained_bytes
    less = trace(small, spec_with(scale__gradient_checkpointing=True), 2, gpu=False)
    assert less.peak < 0.5 * plain.peak
    assert 1.15 < less.operations / plain.operations < 1.4


def test_autocast_keeps_low_precision_copies_and_fp32_norms_on_gpus(small):
    plain = trace(small, PLAIN, 1, gpu=False)
    cpu, gpu = (trace(small, spec_with(scale__precision="bf16"), 1, gpu=gpu) for gpu in (False, True))
    copies = 2 * sum(size.numel() for size in plain.counts.shapes.values() if len(size) > 1)
    assert cpu.saved > copies, "the weights that autocast casts are kept for the backward pass"
    assert cpu.saved - copies < 0.8 * plain.saved
    assert gpu.saved > cpu.saved, "CUDA computes norms in fp32"


def test_operations_are_those_of_the_flop_counter(small):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    denoiser = build(small, PLAIN).denoiser
    noisy, text = torch.empty(1, 4, 16, 16, device="meta"), torch.empty(1, 77, 64, device="meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        denoiser(noisy, torch.zeros(1, device="meta"), text).sample.sum().backward()
    found = trace(
        small, PLAIN, 1, gpu=False
    ).operations  # the kernel without a matrix of pairs computes scores once more
    assert counter.get_total_flops() < found < 1.05 * counter.get_total_flops()


def test_micro_batches_are_cut_as_the_loop_cuts_them():
    assert micro_batches(spec_with(optim__batch_size=7, scale__workers=2), 2) == [4]
    assert micro_batches(spec_with(optim__batch_size=8, optim__micro_batch=3), 1) == [2, 3, 3]


def test_seconds_and_cost_follow_from_the_table(small):
    entry = override(device("H100"), {"price": 3.6, "mfu": 0.5, "per_node": 8})
    spec = spec_with(optim__batch_size=8, scale__workers=2)
    found = Planner(small, 100).estimate(spec, "H100", entry)
    assert found.operations == trace(small, spec, 4, gpu=True).operations
    assert found.seconds_a_step == pytest.approx(found.operations / (66.9e12 * 0.5))
    assert found.cost == pytest.approx(100 * found.seconds_a_step * 8 * 3.6 / 3600), "whole nodes are paid"
    assert not found.measured


@pytest.mark.parametrize("share", [0.99, 0.5, pytest.param(0.2, marks=pytest.mark.long)])
def test_the_first_change_that_fits_is_named(small, share):
    spec = spec_with(optim__batch_size=8, data__resolution=256)
    planner = Planner(small, 1)
    whole = planner.estimate(spec, "lab", device("A10G"))
    lab = override(device("A10G"), {"memory": 1 + share * whole.needed / 2**30, "reserved": 1.0})
    assert not planner.estimate(spec, "lab", lab).fits
    found = change_that_fits(planner, spec, "lab", lab)
    assert found is not None
    change, estimate = found
    assert estimate.fits
    assert estimate.spec == override(spec, change)
    if share == 0.99:
        assert words(change) == "--scale.gradient_checkpointing true"


@pytest.mark.long
def test_another_method_is_tried_where_the_method_names_a_lighter_one(small, monkeypatch):
    singles = [{"method.kind": "lora"}, {"method.kind": "full"}]
    assert [change for change in _singles(PLAIN) if change in singles] == singles[:1]
    monkeypatch.setitem(METHODS, "full", SimpleNamespace(lighter="full"))
    assert [change for change in _singles(PLAIN) if change in singles] == singles[1:]


def test_nothing_fits_into_nothing(small):
    lab = override(device("A10G"), {"memory": 1.0001, "reserved": 1.0})
    assert change_that_fits(Planner(small, 1), PLAIN, "lab", lab) is None


def test_the_shipped_table_has_the_devices_and_says_that_prices_are_examples():
    assert set(devices()) == {"A10G", "L4", "A100-40GB", "A100-80GB", "H100", "H200", "CPU"}
    text = (Path(fit.__file__).parent / "devices.toml").read_text()
    assert re.search(r"EXAMPLES.*\n?.*20\d\d", text)


def test_entries_of_the_users_table_come_first(tmp_path, monkeypatch):
    path = tmp_path / "devices.toml"
    path.write_text('[lab]\nlike = "A100-80GB"\nper_node = 4\nprice = 0.0\n[H100]\nprice = 2.5\n')
    monkeypatch.setenv("RAYSD_DEVICES", str(path))
    assert (device("lab").memory, device("lab").per_node, device("lab").price) == (79.2, 4, 0.0)
    assert (device("H100").price, device("H100").memory) == (2.5, 79.1)
    path.write_text("[H100]\nprize = 2.5\n")
    with pytest.raises(SpecError, match=r"devices.toml: H100: prize: unknown"):
        devices()
    path.write_text('[lab]\nlike = "A1000"\n')
    with pytest.raises(RequestError, match=r"lab: like 'A1000' is not one of"):
        devices()


@pytest.mark.parametrize(
    ("name", "label"),
    [("NVIDIA A100-SXM4-80GB", "A100-80GB"), ("NVIDIA A100-PCIE-40GB", "A100-40GB"), ("NVIDIA H100 80GB HBM3", "H100")],
)
def test_torchs_names_are_known(name, label):
    assert [key for key, entry in devices().items() if entry.is_named(name)] == [label]


def gpus(monkeypatch: pytest.MonkeyPatch, **resources: float) -> None:
    import ray

    monkeypatch.setattr(cluster, "allot", lambda scale: Allotment(1, int(resources.get("GPU", 0) > 0)))
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)


def test_a_run_that_cannot_fit_is_refused_before_it_starts(small, tmp_path, monkeypatch):
    table = tmp_path / "devices.toml"
    gpus(monkeypatch, **{"GPU": 1, "accelerator_type:L4": 1})
    needed = Planner(small, None).estimate(PLAIN, "L4", device("L4")).needed / 2**30
    monkeypatch.setenv("RAYSD_DEVICES", str(table))

    table.write_text(f"[L4]\nreserved = 0\nmemory = {needed * 1.01}\n")
    assert fit.check_fit(PLAIN, small) is None
    table.write_text(f"[L4]\nreserved = 0\nmemory = {needed * 0.95}\n")
    assert "--scale.gradient_checkpointing true" in (fit.check_fit(PLAIN, small) or "")
    table.write_text(f"[L4]\nreserved = 0\nmemory = {needed * 0.6}\n")
    with pytest.raises(RequestError, match="scale: this run needs about") as refused:
        fit.check_fit(PLAIN, small)
    assert len(str(refused.value).splitlines()) == 3


def test_a_cluster_that_grows_from_nothing_is_looked_at_too(monkeypatch):
    gpus(monkeypatch, CPU=8)
    asked = override(PLAIN, {"scale.accelerator": "L4"})
    assert [name for name, _ in fit.candidates(asked)] == ["L4"]
    assert fit.candidates(PLAIN) == []
    monkeypatch.setenv("RAYSD_CLUSTER_RESOURCES", "GPU=8,accelerator_type:H100=1")
    assert [name for name, _ in fit.candidates(PLAIN)] == ["H100"]
    assert [name for name, _ in fit.candidates(asked)] == ["L4"]


def test_an_a100_of_unknown_size_is_refused_by_the_larger_and_said_for_the_smaller(small, tmp_path, monkeypatch):
    table = tmp_path / "devices.toml"
    gpus(monkeypatch, **{"GPU": 8, "accelerator_type:A100": 1})
    needed = Planner(small, None).estimate(PLAIN, "A100-80GB", device("A100-80GB")).needed / 2**30
    monkeypatch.setenv("RAYSD_DEVICES", str(table))

    def said(smaller: float, larger: float) -> str | None:
        rows = (("A100-40GB", smaller), ("A100-80GB", larger))
        table.write_text("".join(f"[{name}]\nreserved = 0\nmemory = {share * needed}\n" for name, share in rows))
        return fit.check_fit(PLAIN, small)

    assert said(1.01, 2.0) is None
    assert "it fits A100-80GB, but not A100-40GB" in (said(0.5, 1.01) or "")
    with pytest.raises(RequestError, match="and A100-80GB has"):
        said(0.2, 0.5)
    gpus(monkeypatch, **{"GPU": 8, "accelerator_type:A100-80G": 1})
    assert said(0.5, 1.01) is None


@pytest.mark.parametrize("resources", [{"CPU": 8}, {"GPU": 1}, {"GPU": 1, "accelerator_type:TPU-V4": 1}])
def test_nothing_is_planned_where_no_gpu_is_known(resources, monkeypatch):
    gpus(monkeypatch, **resources)
    monkeypatch.setattr(fit, "compare", lambda *_: pytest.fail("planned"))
    assert fit.check_fit(PLAIN, Path("nowhere")) is None


def finished(root: Storage, name: str, spec: TrainingSpec, seconds: float, **usage: Any) -> None:
    run = runs.storage_of(root, name)
    runs.write(run, RunRecord(name, spec.model_dump(mode="json"), status="finished"))
    rows = [{"step": step, "loss": 1.0, "time": step * seconds} for step in range(1, 20)]
    run.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    plain = {"device": "cpu", "world": 1, "peak": 1000, "seconds": 60.0, "steps": 19}
    run.write(runs.USAGE, json.dumps({**plain, **usage}).encode())


def test_seconds_come_from_runs_of_the_same_shape_only(tmp_path):
    root = Storage(str(tmp_path))
    finished(root, "same", spec_with(optim__lr=1e-5, optim__steps=7), 0.5)
    finished(root, "larger", spec_with(data__resolution=256), 9.0)
    finished(root, "elsewhere", PLAIN, 9.0, device="NVIDIA L4")
    finished(root, "more-workers", PLAIN, 9.0, world=2)
    assert measured_in(root)(PLAIN, 1, device("CPU")) == pytest.approx(0.5)
    assert measured_in(root)(PLAIN, 1, device("L4")) == pytest.approx(9.0)
    assert measured_in(root)(PLAIN, 4, device("CPU")) is None


def test_planned_and_actual_stand_side_by_side(tmp_path, small):
    from raysd.plan.actual import beside

    root = Storage(str(tmp_path))
    finished(root, "run", override(PLAIN, {"base": str(small)}), 0.5)
    assert beside(root, "run", asked=False) is None, "a run on CPUs is spared the planning"
    found = beside(root, "run")
    assert found is not None
    planned = Planner(small, None).estimate(PLAIN, "CPU", device("CPU"))
    assert found["peak_bytes"] == {"planned": planned.memory.peak.total, "actual": 1000}
    assert found["seconds_a_step"] == {"planned": planned.seconds_a_step, "actual": pytest.approx(0.5)}
    assert found["seconds"]["actual"] == 60.0
    assert beside(root, "run", asked=False) == found, "kept"
    shown = raysd("runs", "show", "run", storage=tmp_path)
    assert "actual 0.5 s" in shown.stdout, shown.stderr


def test_a_base_that_is_not_here_is_named(tmp_path, monkeypatch):
    import huggingface_hub

    def silent(*_: Any, **__: Any) -> str:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", silent)
    with pytest.raises(NotFound, match="base org/model: its configuration is not on this machine"):
        configurations("org/model", Storage(str(tmp_path)))
    beside = folder_of(tmp_path / "model", bases.SMALL)
    assert configurations(str(tmp_path / "model.safetensors"), Storage(str(tmp_path))) == beside


def test_the_command(tmp_path, small):
    words = ["plan", "lora-demo", "--base", str(small), "--cluster"]
    done = raysd(*words, "CPU", "--json", "--scale.zero-stage", "0", "--scale.workers", "1", storage=tmp_path / "store")
    body = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert (body["fits"], body["steps"], body["workers"], body["change"]) == (True, 320, 1, None)
    assert sum(body["bytes"]["moments"][body["bytes"]["peak_moment"]].values()) == body["bytes"]["peak"]
    refused = raysd(*words, "B9000", storage=tmp_path / "store")
    assert refused.returncode == 2
    assert "--cluster B9000: not one of A10G, L4" in refused.stderr
