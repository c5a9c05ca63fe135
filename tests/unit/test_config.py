"""Specs: strictness, dotted paths, messages; and that reading one needs neither torch nor ray."""

import subprocess
import sys

import pytest

from raysd.cli.specs import RECIPES
from raysd.config import TrainingSpec, describe, load, override, read_toml
from raysd.config.training import CheckpointSpec
from raysd.errors import SpecError

PATHS = [
    "seed",
    "base",
    "data.source",
    "data.prompt",
    "data.resolution",
    "method.kind",
    "method.rank",
    "method.alpha",
    "optim.lr",
    "optim.steps",
    "optim.epochs",
    "optim.batch_size",
    "scale.workers",
    "scale.zero_stage",
    "validation.every",
    "checkpoint.every",
    "publish.model",
]


@pytest.fixture
def spec() -> TrainingSpec:
    return load(TrainingSpec, {"data": {"source": "pictures"}, "optim": {"steps": 3}})


def test_importing_config_imports_neither_torch_nor_ray():
    code = "import sys, raysd.config; print([m for m in ('torch', 'ray', 'diffusers', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_importing_the_command_line_imports_neither_torch_nor_ray():
    code = "import sys, raysd.cli; print([m for m in ('torch', 'ray', 'diffusers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_parsed(path):
    assert load(TrainingSpec, read_toml(path), path.name).publish.model


def test_the_recipes_that_ship():
    assert {path.stem for path in RECIPES.glob("*.toml")} >= {"lora-demo", "full-demo"}


def test_the_paths_that_everything_relies_on_exist_and_have_a_meaning():
    known = {row.path: row for row in describe(TrainingSpec)}
    assert not set(PATHS) - set(known)
    assert all(known[path].meaning for path in PATHS if path != "method.kind")


def test_lists_are_told_by_their_members():
    kinds = {row.path: row.kind for row in describe(TrainingSpec)}
    assert kinds["scale.workers"] == "integer | [integer, integer]"
    assert kinds["optim.betas"] == "[number, number]"
    assert kinds["validation.prompts"] == "[text, …]"


def test_override_sets_paths_with_hyphens_and_text_values(spec):
    changed = override(
        spec, {"optim.lr": "3e-5", "scale.zero-stage": "2", "optim.batch-size": 4, "scale.workers": "[1, 2]"}
    )
    assert (changed.optim.lr, changed.scale.zero_stage, changed.scale.workers) == (3e-5, 2, (1, 2))
    assert spec.optim.lr == 1e-4


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.toml").write_text('base = "x"', encoding="utf-8-sig")
    assert read_toml(tmp_path / "a.toml") == {"base": "x"}


def test_text_fields_stay_text(spec):
    assert override(spec, {"data.prompt": "1234"}).data.prompt == "1234"
    assert override(spec, {"base": "true"}).base == "true"


def test_steps_and_epochs_replace_each_other(spec):
    by_epochs = override(spec, {"optim.epochs": "2.5"})
    assert (by_epochs.optim.steps, by_epochs.optim.epochs) == (None, 2.5)
    assert override(by_epochs, {"optim.steps": 7}).optim.epochs is None
    with pytest.raises(SpecError, match="either steps or epochs"):
        override(spec, {"optim.epochs": 2, "optim.steps": 2})


def test_changing_the_method_drops_what_the_new_one_lacks(spec):
    full = override(override(spec, {"method.rank": 16}), {"method.kind": "full", "method.text_encoder": True})
    assert full.method.model_dump() == {"kind": "full", "text_encoder": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.lrr": 1}, r"^optim\.lrr: unknown; did you mean optim\.lr\?$"),
        ({"nothing.like.it": 1}, r"^nothing\.like\.it: unknown path"),
        ({"optim.lr": "fast"}, r"^optim\.lr: .*number.*'fast'"),
        ({"optim.lr": "nan"}, r"^optim\.lr: "),
        ({"method.rank": 0}, r"^method\.rank: .*greater than or equal to 1"),
        ({"method.kind": "dreambooth"}, r"^method.*'lora'"),
        ({"scale.workers": 4}, r"optim\.batch_size 1 is the global batch"),
        ({"scale.offload": "optimizer"}, r"offload needs zero_stage"),
        ({"data.source": None}, r"^data\.source: "),
        ({"data": "./cats"}, r"^data: is a table of fields: set one of them, as data\.augment"),
        ({"loss.kind": "mse"}, r"^loss\.kind: unknown"),
        ({"kind": "x"}, r"^kind: unknown"),
        ({"scale.workers": 0}, r"^scale\.workers: .*greater than 0"),
        ({"optim.betas": [2, 0.9]}, r"^optim\.betas: "),
        ({"validation.prompts": ["a", 3]}, r"^validation\.prompts: "),
        ({"data.augment.foo": 1}, r"^data\.augment\.foo: unknown; did you mean data\.augment\."),
        ({"method.kind": "full", "method.rank": 8}, r"^method\.rank: not for method\.kind full$"),
        ({"optim.clip": "Infinity"}, r"^optim\.clip: .*finite"),
        ({"optim.steps": None, "optim.epochs": "Infinity"}, r"^optim\.epochs: .*finite"),
        (
            {"scale.workers": [1, 2], "optim.batch_size": 4, "checkpoint.every": 0},
            r"checkpoint\.every 0: a run of scale",
        ),
    ],
)
def test_a_wrong_field_is_named(spec, changes, message):
    with pytest.raises(SpecError, match=message) as raised:
        override(spec, changes)
    assert len(str(raised.value).splitlines()) <= 3


def test_many_wrong_fields_are_three_lines(spec):
    wrong = {f"optim.{name}": -1 for name in ("lr", "steps", "batch_size", "warmup", "eps")}
    with pytest.raises(SpecError) as raised:
        override(spec, wrong)
    assert len(str(raised.value).splitlines()) == 3


def test_optimisers_that_look_at_shapes_are_refused_under_zero(spec):
    for kind in ("adafactor", "prodigy", "adamw8bit"):
        assert override(spec, {"optim.kind": kind}).optim.kind == kind
        for stage in (1, 2, 3):
            with pytest.raises(SpecError, match=r"use scale\.zero_stage 0, or optim\.kind adamw"):
                override(spec, {"optim.kind": kind, "scale.zero_stage": stage})


def test_a_broken_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text("seed = 1\noptim = = 2\n")
    with pytest.raises(SpecError, match=r"broken\.toml: not a readable TOML file: .*line 2"):
        read_toml(path)
    with pytest.raises(SpecError, match="no such file"):
        read_toml(tmp_path / "absent.toml")


def test_a_run_keeps_checkpoints_though_nobody_asked():
    assert [CheckpointSpec().interval(total) for total in (6, 400, 5000)] == [50, 50, 500]
    assert CheckpointSpec(every=0).interval(5000) == 0
    assert CheckpointSpec(every=7).interval(5000) == 7
