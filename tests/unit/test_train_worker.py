"""What a worker that ran out of memory says: which errors mean that, and what to try next."""

import os
import re

import pytest
import torch

from raysd.config import TrainingSpec, load, override
from raysd.train.memory import is_out_of_memory, memory_advice

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
