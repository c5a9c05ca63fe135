"""What `raysd plan` says of memory against what a step of the real loop holds, Stable Diffusion 1.5's blocks at reduced width.

Both sides count bytes of tensors; nothing depends on an allocator or on how long anything takes.
"""

from pathlib import Path

import pytest

from benchmarks import bases, caches, spawned
from benchmarks.loops import Task, spec_of
from raysd.config import override
from raysd.plan.devices import device
from raysd.plan.estimate import Planner
from tests.livebytes import ranks_peaks

WITHIN = 0.15
RESOLUTION = 8 * bases.REDUCED["sample_size"]
FEW = [
    ("lora", {}),
    ("full", {}),
    ("full", {"scale.gradient_checkpointing": True}),
    ("full", {"scale.zero_stage": 2}),
]
MORE = [
    ("lora", {"scale.precision": "bf16"}),
    ("full", {"scale.precision": "bf16"}),
    ("full", {"optim.micro_batch": 1}),
    ("full", {"scale.zero_stage": 2, "scale.offload": "optimizer"}),
    ("full", {"scale.zero_stage": 3}),
]
TWO = [
    ("full", {"scale.zero_stage": 0}),
    ("full", {"scale.zero_stage": 1}),
    ("full", {"scale.zero_stage": 2}),
    ("full", {"scale.zero_stage": 2, "optim.micro_batch": 1}),
    ("full", {"scale.zero_stage": 3}),
    ("lora", {"scale.zero_stage": 3}),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, caches)"""
    root = tmp_path_factory.mktemp("plan")
    caches.fill(root / "caches", 8, bases.REDUCED["sample_size"], bases.TOKENS, bases.REDUCED["cross_attention_dim"])
    return bases.denoiser_only(root / "base", bases.REDUCED), root / "caches"


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        pytest.param(1, FEW, id="one worker", marks=pytest.mark.long),
        pytest.param(1, MORE, id="one worker, more settings", marks=pytest.mark.soak),
        pytest.param(2, TWO, id="two workers", marks=pytest.mark.soak),
    ],
)
def test_planned_memory_is_what_a_step_holds(made, world, cases):
    base, root = made
    specs = [
        override(spec_of(kind, 2 * world, RESOLUTION), {"scale.workers": world, **changes}) for kind, changes in cases
    ]
    peaks = spawned.ranks(world, ranks_peaks, [Task(base, root, 8, spec) for spec in specs], world)
    planner, off = Planner(base, None), []
    for (kind, changes), spec, *measured in zip(cases, specs, *peaks, strict=True):
        memory = planner.estimate(spec, "CPU", device("CPU")).memory
        planned = memory.peak.total + sum(memory.host.values())
        off.append((round(planned / max(measured) - 1, 3), kind, changes, planned, max(measured)))
    print(*off, sep="\n")
    assert all(abs(error) <= WITHIN for error, *_ in off), off
