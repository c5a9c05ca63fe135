"""What a worker does besides its steps: what it says where memory ran out, notices, validation."""

import os
import re
from types import SimpleNamespace

import pytest
import ray
import torch

from raysd.config import TrainingSpec, load, override
from raysd.methods import METHODS, TrainedModule
from raysd.models.sd import StableDiffusion
from raysd.train import validate
from raysd.train.memory import is_out_of_memory, memory_advice
from raysd.train.worker import Worker

SPEC = load(
    TrainingSpec,
    {"data": {"source": "x"}, "optim": {"steps": 1, "batch_size": 12}, "scale": {"workers": 2, "zero_stage": 1}},
)
SMALLEST = {
    "optim.batch_size": 2,
    "scale.gradient_checkpointing": True,
    "scale.precision": "bf16",
    "scale.zero_stage": 3,
}


@pytest.mark.parametrize(
    ("error", "means_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("shape '[2, 3]' is invalid for input of size 5"), False),
        (ValueError("memory format"), False),
    ],
    ids=str,
)
def test_which_errors_mean_that_memory_ran_out(error, means_it):
    assert is_out_of_memory(error) is means_it


def test_an_allocation_that_the_cpu_refuses_means_it_too():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize(
    ("changes", "tries"),
    [
        ({}, ["optim.micro_batch 3", "scale.gradient_checkpointing true", "scale.precision bf16"]),
        ({"optim.micro_batch": 2, "scale.workers": [1, 3]}, ["optim.micro_batch 1"]),
        ({**SMALLEST, "optim.batch_size": 3}, ["optim.micro_batch 1"]),
        ({**SMALLEST, "scale.zero_stage": 1}, ["scale.zero_stage 2"]),
        ({**SMALLEST, "scale.zero_stage": 1, "method.kind": "full"}, ["scale.zero_stage 2", "method.kind lora"]),
        ({**SMALLEST, "scale.zero_stage": 0, "optim.kind": "adafactor"}, []),
        ({**SMALLEST, "scale.zero_stage": 0, "scale.workers": 1, "optim.batch_size": 1}, []),
        (SMALLEST, []),
    ],
)
def test_the_advice_names_the_machine_the_request_and_settings_that_can_be_given(changes, tries):
    spec = override(SPEC, changes)
    text = memory_advice(spec, RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore\nand more"))
    first, asked, advice = text.splitlines()
    assert first == f"out of memory on {os.uname().nodename}: CUDA out of memory. Tried to allocate 2 GiB"
    most = spec.scale.most_workers
    assert asked == f"asked for: batch {spec.optim.batch_size} over {most} workers at {spec.data.resolution} px"
    found = re.findall(r"--(\S+) (\S+)", advice)
    assert [" ".join(words) for words in found][: len(tries)] == tries
    assert len(found) <= 3
    assert tries or advice == "try: a smaller data.resolution or a larger machine"
    for path, value in found:
        assert override(spec, {path: value}) != spec, "a spec takes it, and it changes something"


def test_an_error_without_words_is_still_told():
    assert ": out of memory\n" in memory_advice(SPEC, MemoryError())


def test_a_trial_that_is_its_own_worker_hears_that_its_node_is_taken_away(monkeypatch):
    """Ray Train's local mode has no watcher."""
    from ray._private.state import state

    worker = Worker.__new__(Worker)
    worker.job = SimpleNamespace(here=True)
    told: list[str] = []
    worker.leaving, worker._report = set(), lambda kind, text: told.append(text)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "mine"))
    draining = {"another": 0}
    monkeypatch.setattr(state, "get_draining_nodes", lambda: draining)
    assert not worker._notice()
    draining["mine"] = 0
    assert worker._notice()
    assert not worker._notice(), "it was answered with a checkpoint"
    assert len(told) == 1


def test_advice_to_train_less_names_what_the_method_says(monkeypatch):
    monkeypatch.setitem(METHODS, "lora", SimpleNamespace(lighter="full"))
    text = memory_advice(override(SPEC, {**SMALLEST, "method.kind": "lora"}), MemoryError())
    assert text.endswith("try: --method.kind full")


@pytest.mark.parametrize("text", [True, False])
def test_pictures_are_drawn_with_what_is_trained_where_the_family_has_it(text):
    parts = (("denoiser", "transformer"), ("text_encoder", "text_encoder_2"))
    seen: dict[str, torch.nn.Module] = {}

    def pipeline(folder, **components):
        seen.update(components)
        return SimpleNamespace(to=lambda device: lambda prompts, **_: SimpleNamespace(images=prompts))

    family = SimpleNamespace(trained_parts=parts, pipeline=pipeline)
    denoiser, encoder = torch.nn.Identity(), torch.nn.Identity()
    module = TrainedModule(family, denoiser, encoder if text else None)
    engine = SimpleNamespace(module=module, device=torch.device("cpu"))
    assert validate.pictures(engine, None, override(SPEC, {"validation.prompts": ["x"]})) == ["x"]
    assert seen == {"transformer": denoiser, **({"text_encoder_2": encoder} if text else {})}


@pytest.mark.parametrize("prediction", ["base", "v_prediction"])
def test_pictures_are_drawn_by_what_the_module_learns_to_predict(tiny_base, monkeypatch, prediction):
    """As the pictures of the version will be, whose scheduler says it."""
    drawn: list[object] = []

    class Watched(StableDiffusion):
        def pipeline(self, *given, **components):
            drawn.append(super().pipeline(*given, **components))
            return drawn[-1]

    monkeypatch.setattr(validate, "PICTURE_STEPS", 1)
    spec = override(SPEC, {"method.kind": "full", "loss.prediction": prediction, "validation.prompts": ["x"]})
    engine = SimpleNamespace(module=METHODS["full"].build(Watched(), tiny_base, spec), device=torch.device("cpu"))
    assert len(validate.pictures(engine, tiny_base, spec)) == 1
    [pipeline] = drawn
    wanted = {name: value for name, value in Watched().scheduler_config(tiny_base).items() if name[0] != "_"}
    assert wanted["prediction_type"] == "epsilon"
    if prediction != "base":
        wanted["prediction_type"] = prediction
    assert {name: pipeline.scheduler.config[name] for name in wanted} == wanted


def test_a_long_validation_is_not_taken_for_a_hang(monkeypatch):
    """It may have thousands of passes, all before the first step."""
    monkeypatch.setattr(validate, "_batch", lambda pairs, *_: SimpleNamespace(to=lambda device: pairs))
    engine = SimpleNamespace(world=1, rank=0, device="cpu", module=torch.nn.Identity())
    method = SimpleNamespace(loss=lambda engine, batch, schedule, spec: torch.ones(len(batch)))
    schedule, spec = SimpleNamespace(alphas_cumprod=range(1000)), override(SPEC, {"optim.batch_size": 2})
    beats: list[int] = []
    loss = validate.validation_loss(engine, method, ["a"] * 6, None, schedule, spec, lambda: beats.append(1))
    assert loss == 1.0
    assert len(beats) == 6 * spec.validation.timesteps / 2
