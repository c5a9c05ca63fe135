"""`raysd train` beside diffusers' own train_text_to_image_lora.py, both as whole commands.

LoRA of rank 4, batch 16, 64 px, 240 rendered pictures, the bundled base's shape, 60 steps, TensorBoard on, nothing held
out for validation, nothing cached before. The script is not part of this repository: --peer-script names it, and
--peer-python an interpreter with what it needs (benchmarks/peer_runner.py says how torchvision comes without a GPU).
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import bases, hardware
from benchmarks.options import Options, Skipped
from benchmarks.results import Result, Table, Target

BATCH = 16
STEADY_BOUND = {"fp32": 1.5, "bf16": 2.0}
COMMAND_BOUND = 2.0

RECIPE = """
base = "{base}"
[data]
source = "{pictures}"
resolution = 64
validation = 0.0
duplicates = "keep"
[method]
kind = "lora"
rank = 4
[optim]
lr = 1e-4
steps = {steps}
batch_size = 16
[scale]
precision = "{precision}"
[publish]
model = "bench"
"""


@dataclass(frozen=True)
class Setting:
    """What both train on."""

    work: Path
    base: Path
    pictures: Path
    steps: int
    skip: int  # first steps that the steady rate leaves out


@dataclass(frozen=True)
class Command:
    """One command from its start to its end, in seconds of the clock."""

    began: float
    ended: float
    steps: list[float]  # ends of steps
    stages: dict[str, float]  # seconds of each stage

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def rate(self, skip: int) -> float:
        """Steady pictures/s, from the end of step `skip` to the end of the last."""
        return BATCH * (len(self.steps) - skip) / (self.steps[-1] - self.steps[skip - 1])


Commands = dict[tuple[str, str], list[Command]]
"""By precision and side."""


def run(options: Options) -> Result:
    script, python = options.peer_script, options.peer_python
    if script is None or python is None:
        raise Skipped("it needs --peer-script (train_text_to_image_lora.py of diffusers) and --peer-python")
    from raysd.assets.make.renderer import write_dataset

    pictures, steps, skip, repeats = (32, 3, 1, 1) if options.quick else (240, 60, 10, 3)
    base = bases.tiny(options.work / "base")
    write_dataset(options.work / "pictures", pictures, seed=0, resolution=64)
    setting = Setting(options.work, base, options.work / "pictures", steps, skip)
    found: Commands = {}
    for precision in STEADY_BOUND:
        for number in range(repeats):
            scratch = options.work / f"{precision}-{number}"
            found.setdefault((precision, "raysd"), []).append(_raysd(setting, precision, scratch / "raysd"))
            found.setdefault((precision, "peer"), []).append(
                _peer(setting, precision, scratch / "peer", script, python)
            )
    return _result(found, setting, {"pictures": pictures, "steps": steps, "skipped_steps": skip, "repeats": repeats})


def _raysd(setting: Setting, precision: str, scratch: Path) -> Command:
    scratch.mkdir(parents=True)
    recipe, events = scratch / "run.toml", scratch / "events.jsonl"
    recipe.write_text(
        RECIPE.format(base=setting.base, pictures=setting.pictures, steps=setting.steps, precision=precision)
    )
    command = [sys.executable, "-m", "benchmarks.peer_raysd", str(events), "train", str(recipe), "--name", "bench"]
    environment = {"RAYSD_STORAGE": str(scratch / "store"), "PYTHONPATH": str(Path(__file__).parent.parent)}
    began, ended = _timed(command, environment, scratch)
    seen = [json.loads(line) for line in events.read_text().splitlines()]
    lines = (scratch / "store" / "runs" / "bench" / "metrics.jsonl").read_text().splitlines()
    ends = [row["time"] for row in map(json.loads, lines) if "loss" in row]
    published = (scratch / "store" / "runs" / "bench" / "run.json").stat().st_mtime
    return Command(began, ended, ends, _stages(began, published, ended, seen))


def _peer(setting: Setting, precision: str, scratch: Path, script: Path, python: Path) -> Command:
    scratch.mkdir(parents=True)
    ends = scratch / "steps.json"
    mixed = {"fp32": "no"}.get(precision, precision)
    command = [str(python), str(Path(__file__).with_name("peer_runner.py")), str(ends), str(script)]
    command += [f"--pretrained_model_name_or_path={setting.base}", f"--train_data_dir={setting.pictures}"]
    command += ["--resolution=64", f"--train_batch_size={BATCH}", f"--max_train_steps={setting.steps}", "--rank=4"]
    command += ["--learning_rate=1e-4", "--lr_warmup_steps=0", "--seed=0", f"--mixed_precision={mixed}"]
    command += [f"--output_dir={scratch / 'out'}"]
    environment = {"HF_HOME": str(scratch / "hub"), "HF_HUB_OFFLINE": "1"}
    began, ended = _timed(command, environment, scratch)
    assert (scratch / "out" / "pytorch_lora_weights.safetensors").is_file(), "the peer wrote no weights"
    steps = json.loads(ends.read_text())
    stages = {"until the first step's end": steps[0] - began, "other steps": steps[-1] - steps[0]}
    return Command(began, ended, steps, {**stages, "to the end": ended - steps[-1]})


def _timed(command: list[str], environment: dict[str, str], scratch: Path) -> tuple[float, float]:
    """When it began and ended. Its output is kept beside its files; a failure shows the last lines."""
    log = scratch / "log.txt"
    with open(log, "w") as file:
        began = time.time()
        code = subprocess.run(
            command, env={**os.environ, **environment}, stdout=file, stderr=file, cwd=scratch
        ).returncode
        ended = time.time()
    if code:
        raise RuntimeError(f"{command[0]} ... ended with {code}:\n{log.read_text()[-2000:]}")
    return began, ended


def _stages(began: float, published: float, ended: float, seen: list[dict[str, object]]) -> dict[str, float]:
    """Seconds between the events of a run that had nothing to resume from."""

    def when(kind: str, text: str = "", key: str = "seen", last: bool = False) -> float:
        times = [event[key] for event in seen if event["kind"] == kind and str(event.get("text", "")).startswith(text)]
        return float(str(times[-1 if last else 0]))

    marks = [
        ("imports, reading the recipe", began),
        ("check the pictures", when("phase", "checking")),
        ("start Ray", when("phase", "starting Ray")),
        ("encode pictures", when("count", "encode pictures")),
        ("encode captions", when("count", "encode captions")),
        ("start the worker: process, imports, model", when("phase", "starting workers")),
        ("first step", when("start", key="time")),
        ("other steps", when("step", key="time")),
        ("checkpoint", when("step", key="time", last=True)),
        ("end the worker", when("checkpoint", key="time", last=True)),
        ("publish", when("phase", "publishing")),
        ("end Ray, exit", published),
    ]
    bounds = [*(mark for _, mark in marks), ended]
    return {name: bounds[n + 1] - start for n, (name, start) in enumerate(marks)}


def _result(found: Commands, setting: Setting, settings: dict[str, object]) -> Result:
    rates = {case: median(one.rate(setting.skip) for one in commands) for case, commands in found.items()}
    whole = {side: median(one.seconds for one in found["fp32", side]) for side in ("raysd", "peer")}
    targets = [
        Target(f"{precision}: steady pictures/s, raysd / peer", _ratio(rates, precision), bound, at_least=True)
        for precision, bound in STEADY_BOUND.items()
    ]
    ratio = whole["raysd"] / whole["peer"]
    what = f"whole command of {setting.steps} steps, fp32: seconds, raysd / peer"
    targets.append(Target(what, ratio, COMMAND_BOUND, at_least=False))
    gpu = hardware.gpu_name() is not None
    note = hardware.bf16_note(hardware.describe(gpu))
    return Result(targets, [_rates(rates), *_parts(found)], _samples(found, setting.skip), settings, [note], gpu)


def _ratio(rates: dict[tuple[str, str], float], precision: str) -> float:
    return rates[precision, "raysd"] / rates[precision, "peer"]


def _rates(rates: dict[tuple[str, str], float]) -> Table:
    rows = [
        [precision, round(rates[precision, "raysd"], 1), round(rates[precision, "peer"], 1), round(ratio, 2)]
        for precision in STEADY_BOUND
        for ratio in [_ratio(rates, precision)]
    ]
    return Table("Steady pictures/s", ["precision", "raysd", "peer", "ratio"], rows)


def _parts(found: Commands) -> list[Table]:
    """Where the seconds of the fp32 commands go."""
    tables = []
    for side, name in (("raysd", "raysd train"), ("peer", "the peer")):
        commands = found["fp32", side]
        parts = {part: median(one.stages[part] for one in commands) for part in commands[0].stages}
        rows = [[part, round(seconds, 2)] for part, seconds in parts.items()]
        rows.append(["whole command", round(median(one.seconds for one in commands), 2)])
        tables.append(Table(f"Where the seconds of {name} go, fp32", ["part", "s"], rows))
    return tables


def _samples(found: Commands, skip: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {}
    for (precision, side), commands in found.items():
        samples[f"{precision} {side} pictures/s"] = [one.rate(skip) for one in commands]
        samples[f"{precision} {side} seconds"] = [one.seconds for one in commands]
        for part in commands[0].stages:
            samples[f"{precision} {side} s: {part}"] = [one.stages[part] for one in commands]
    return samples
