"""A run from the command line to a version that draws: real Ray, DeepSpeed, registry."""

import json
import shutil
from pathlib import Path
from statistics import mean

import pytest
import torch
from safetensors.torch import load_file

from raysd.draw import Request, draw
from raysd.references import locate
from raysd.registry import Registry
from raysd.storage import Storage
from raysd.train import checkpoint
from tests.base import toml
from tests.cluster import json_of, raysd


@pytest.fixture(scope="module")
def finished(tiny_base, tiny_pictures, ray_address, tmp_path_factory):
    """A finished LoRA run of two workers at stage 2, its alpha not its rank."""
    root = tmp_path_factory.mktemp("finished")
    path = toml(
        root, tiny_base, tiny_pictures, method__alpha=6.0, scale__workers=2, scale__zero_stage=2, optim__lr=5e-2
    )
    done = raysd("train", str(path), "--name", "first", "--json", storage=root / "store", address=ray_address)
    return root / "store", path, json_of(done)


def test_the_run_says_what_became_of_it(finished):
    store, _, printed = finished
    shown = json_of(raysd("runs", "show", "first", "--json", storage=store))
    for body in (printed, shown):
        assert (body["status"], body["step"], body["checkpoint"], body["version"]) == ("finished", 6, 6, "cats@1")
    assert shown["base_loss"] > 0
    rows = [json.loads(line) for line in (store / "runs/first/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert list((store / "runs/first/tensorboard").glob("*tfevents*"))


def test_the_registry_lists_the_version_with_its_files_and_lineage(finished):
    store, _, _ = finished
    assert json_of(raysd("models", "list", "--json", storage=store)) == [
        {"model": "cats", "versions": [1], "aliases": {}}
    ]
    body = json_of(raysd("models", "show", "cats@1", "--json", storage=store))
    assert [(file["path"], len(file["sha256"])) for file in body["files"]] == [("pytorch_lora_weights.safetensors", 64)]
    record = body["record"]
    assert record["spec"]["method"]["rank"] == 2
    assert all(
        record[name] for name in ("base", "base_digest", "data_digest", "run", "metrics", "code", "method", "family")
    )


def test_publishing_the_same_finished_run_twice_gives_the_same_version(finished, ray_address):
    store, path, _ = finished
    again = json_of(raysd("train", str(path), "--name", "first", "--json", storage=store, address=ray_address))
    words = ["runs", "resume", "first", "--scale.workers", "1", "--scale.zero-stage", "0", "--json"]
    resumed = json_of(raysd(*words, storage=store, address=ray_address))
    assert again["version"] == resumed["version"] == "cats@1"
    assert [model.versions for model in Registry(Storage(str(store))).models()] == [[1]]


def test_another_spec_under_the_same_name_is_refused(finished):
    store, path, _ = finished
    done = raysd("train", str(path), "--name", "first", "--optim.lr", "0.5", storage=store)
    assert done.returncode == 2
    assert "run first exists with other settings (optim.lr)" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3


def test_the_lora_file_draws_the_same_in_plain_diffusers(finished, tmp_path):
    """The true alpha (6, at rank 2) is in the file, and no dropout: diffusers, given nothing else, draws the same."""
    from diffusers import StableDiffusionPipeline

    store, _, _ = finished
    located = locate("cats@1", Storage(str(store)))
    [image] = draw(located, [Request("picture 3", seed=4, steps=5)])
    folder = tmp_path / "exported"
    assert raysd("export", "cats@1", "--format", "diffusers", "--out", str(folder), storage=store).returncode == 0
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pictures = []
    for adapter in (None, folder):
        if adapter is not None:
            pipeline.load_lora_weights(adapter)
            assert pipeline.unet.peft_config["default_0"].lora_alpha == 6
        seeded = torch.Generator().manual_seed(4)
        pictures.append(pipeline("picture 3", num_inference_steps=5, generator=seeded).images[0])
    drawn = torch.tensor(list(image.tobytes())).int()
    without, adapted = (torch.tensor(list(picture.tobytes())).int() for picture in pictures)
    assert (drawn - adapted).abs().max() <= 1
    assert (drawn - without).abs().float().mean() > 1


def test_the_kohya_file_carries_the_true_alpha_and_draws_the_same(finished, tmp_path):
    from diffusers import StableDiffusionPipeline

    store, _, _ = finished
    file = tmp_path / "cats.safetensors"
    words = ["export", "cats@1", "--format", "kohya", "--out", str(file)]
    assert raysd(*words, storage=store).returncode == 0
    assert raysd(*words, storage=store).returncode == 2, "a file is not overwritten"
    tensors = load_file(file)
    assert {float(value) for name, value in tensors.items() if name.endswith(".alpha")} == {6.0}
    located = locate("cats@1", Storage(str(store)))
    [image] = draw(located, [Request("picture 3", seed=4, steps=5)])
    pipeline = StableDiffusionPipeline.from_pretrained(located.folder, safety_checker=None)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    again = pipeline("picture 3", num_inference_steps=5, generator=torch.Generator().manual_seed(4)).images[0]
    drawn, read = (torch.tensor(list(picture.tobytes())).int() for picture in (image, again))
    assert (drawn - read).abs().max() <= 1


def test_saved_names_carry_no_module_prefix(finished):
    from safetensors import safe_open

    store, _, _ = finished
    located = locate("cats@1", Storage(str(store)))
    with safe_open(located.lora, "pt") as file:
        names = list(file.keys())
    assert names
    assert all(name.startswith("unet.") and "module." not in name and "default" not in name for name in names)


@pytest.fixture(scope="module")
def second(finished, tiny_base, tiny_pictures, ray_address, tmp_path_factory):
    """A run of one worker in the same store, with pictures and a profile."""
    store, _, _ = finished
    changes = {"validation__prompts": ["picture 1", "picture 2"], "track__profile": True, "optim__steps": 7}
    changes |= {"scale__gradient_checkpointing": True, "method__alpha": 6.0, "optim__lr": 1e-3}
    path = toml(tmp_path_factory.mktemp("second"), tiny_base, tiny_pictures, **changes)
    json_of(raysd("train", str(path), "--name", "second", "--json", storage=store, address=ray_address))
    return store


def test_pictures_and_a_profile_are_kept_with_the_run(second):
    from PIL import Image

    folder = second / "runs/second"
    names = {picture.name for picture in (folder / "samples").iterdir()}
    assert names == {f"{step:08d}-{number:02d}.png" for step in (0, 7) for number in (0, 1)}
    assert all(Image.open(path).size == (64, 64) for path in (folder / "samples").iterdir())
    assert "traceEvents" in (folder / "profile.json").read_text()


def test_two_runs_are_compared_and_one_is_deleted(second):
    rows = json_of(raysd("runs", "diff", "first", "second", "--json", storage=second))
    changed = {row["path"]: (row["first"], row["second"]) for row in rows}
    assert changed["optim.lr"] == (0.05, 0.001)
    assert changed["scale.workers"] == (2, 1)
    assert not any(path.startswith("data.") for path in changed)
    assert raysd("runs", "delete", "second", storage=second).returncode == 0
    assert [row["name"] for row in json_of(raysd("runs", "list", "--json", storage=second))] == ["first"]
    assert json_of(raysd("models", "show", "cats@2", "--json", storage=second))["ref"] == "cats@2"


def test_a_full_fine_tune_publishes_a_whole_folder_and_the_next_run_starts_from_it(
    tiny_base, tiny_pictures, ray_address, tmp_path
):
    store = tmp_path / "store"
    changes = {"method__kind": "full", "method__text_encoder": True, "scale__workers": 2, "scale__zero_stage": 3}
    path = toml(tmp_path, tiny_base, tiny_pictures, optim__lr=1e-4, optim__ema=0.9, optim__steps=2, **changes)
    done = raysd(
        "train", str(path), "--name", "full", "--publish.alias", "best", "--json", storage=store, address=ray_address
    )
    assert json_of(done)["version"] == "cats@1"
    folder = locate("cats:best", Storage(str(store))).folder
    assert {part.name for part in folder.iterdir()} >= {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert_averages_were_published(folder, Storage(str(store)).child("runs/full"))
    words = [
        "train",
        str(path),
        "--name",
        "next",
        "--base",
        "cats:best",
        "--method.kind",
        "lora",
        "--scale.zero-stage",
        "0",
    ]
    done = raysd(*words, "--scale.workers", "1", "--json", storage=store, address=ray_address)
    assert json_of(done)["version"] == "cats@2"
    record = json_of(raysd("models", "show", "cats@2", "--json", storage=store))["record"]
    assert record["parent"]["ref"] == "cats@1"
    assert json.loads((store / "runs/next/plan.json").read_text())["base"] == "cats@1", "where the alias pointed then"
    Registry(Storage(str(store))).alias(Registry(Storage(str(store))).resolve("cats@2"), "best")
    assert json_of(raysd("runs", "resume", "full", "--json", storage=store))["version"] == "cats@1"
    assert Registry(Storage(str(store))).resolve("cats:best").ref == "cats@2", "a finished run moves it once"
    out = tmp_path / "x.png"
    words = ["generate", "cats@2", "--prompt", "x", "--steps", "2", "--count", "2", "--out", str(out)]
    assert raysd(*words, storage=store).returncode == 0
    assert {picture.name for picture in tmp_path.glob("x-*.png")} == {"x-1.png", "x-2.png"}


def assert_averages_were_published(folder, run):
    """The U-Net's weights are the moving averages of the last checkpoint, in fp16, and not the weights they average."""
    newest = checkpoint.latest(run)
    assert newest is not None
    published = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    for average in (True, False):
        kept = checkpoint.weights(run, newest, ema=average)
        unet = {name.removeprefix("denoiser."): t.half() for name, t in kept.items() if name.startswith("denoiser.")}
        assert unet.keys() == published.keys()
        equal = sum(torch.equal(published[name], tensor) for name, tensor in unet.items())
        assert equal == len(unet) if average else equal < len(unet) / 2


@pytest.mark.long
def test_relative_paths_mean_what_they_meant_where_the_command_was_typed(
    tiny_base, tiny_pictures, ray_address, tmp_path, monkeypatch
):
    """Workers run in folders of their own, and later commands in other ones."""
    (tmp_path / "studio").mkdir()
    shutil.copytree(tiny_base, tmp_path / "studio/my-sd")
    shutil.copytree(tiny_pictures, tmp_path / "studio/cats")
    path, store = toml(tmp_path, tiny_base, tiny_pictures, optim__steps=2), tmp_path / "store"
    monkeypatch.chdir(tmp_path / "studio")
    words = ["train", str(path), "--name", "run", "--base", "./my-sd", "--data.source", "cats", "--json"]
    assert json_of(raysd(*words, storage=store, address=ray_address))["version"] == "cats@1"
    words = ["generate", "cats", "--prompt", "x", "--steps", "2", "--out", str(tmp_path / "x.png")]
    assert raysd(*words, storage=store).returncode == 0, "though a folder of that name lies here"
    monkeypatch.chdir(tmp_path)
    assert json_of(raysd("runs", "resume", "run", "--json", storage=store))["version"] == "cats@1"
    assert raysd(*words[:-1], str(tmp_path / "y.png"), storage=store).returncode == 0
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "y.png").read_bytes()


@pytest.mark.long
def test_early_stopping_publishes_the_best_checkpoint_not_the_last(tiny_base, tiny_pictures, ray_address, tmp_path):
    """A learning rate that ruins the model from the first step on; workers as an elastic range."""
    store = tmp_path / "store"
    changes = {"validation__every": 2, "validation__patience": 2, "scale__workers": [1, 2], "data__validation": 0.3}
    path = toml(tmp_path, tiny_base, tiny_pictures, optim__lr=0.3, optim__steps=40, optim__warmup=12, **changes)
    body = json_of(raysd("train", str(path), "--name", "early", "--json", storage=store, address=ray_address))
    assert body["status"] == "finished"
    assert body["best_step"] < body["step"] < 40
    assert body["step"] == body["best_step"] + 4, "two validations without improvement after the best"
    rows = [json.loads(line) for line in (store / "runs/early/metrics.jsonl").read_text().splitlines()]
    validated = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row and row["step"] > 0}
    assert body["loss"] == min(validated.values()) == validated[body["best_step"]]
    record = json_of(raysd("models", "show", body["version"], "--json", storage=store))["record"]
    assert record["run"]["step"] == body["best_step"]
    assert record["metrics"]["validation_loss"] == body["loss"]


@pytest.mark.long
def test_a_run_that_overfits_is_stopped_and_its_best_checkpoint_is_published(tiny_pictures, ray_address, tmp_path):
    """Every weight on five pictures: they are learnt by heart, and the held-out ones get worse."""
    store = tmp_path / "store"
    changes = {"validation__every": 10, "validation__patience": 5, "validation__timesteps": 8, "data__validation": 0.5}
    changes |= {"method__kind": "full", "optim__lr": 1e-3, "optim__steps": 400, "optim__batch_size": 5}
    changes |= {"data__augment__variants": 1, "loss__caption_dropout": 0.0, "publish__precision": "fp32"}
    path = toml(tmp_path, Path("tiny-sd"), tiny_pictures, **changes)
    body = json_of(raysd("train", str(path), "--name", "over", "--json", storage=store, address=ray_address))
    assert body["step"] == body["best_step"] + 50 < 400, "five validations without improvement after the best"
    rows = [json.loads(line) for line in (store / "runs/over/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert mean(losses[-20:]) < 0.8 * mean(losses[body["best_step"] - 20 : body["best_step"]]), (
        "it went on learning these"
    )
    validated = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert validated[body["step"]] > validated[body["best_step"]] == body["loss"]
    run = Storage(str(store)).child("runs/over")
    published = load_file(
        locate(body["version"], Storage(str(store))).folder / "unet" / "diffusion_pytorch_model.safetensors"
    )
    for step, same in ((body["best_step"], True), (body["step"], False)):
        kept = checkpoint.weights(run, checkpoint.at_step(run, step), ema=False)
        unet = {name.removeprefix("denoiser."): t for name, t in kept.items() if name.startswith("denoiser.")}
        assert unet.keys() == published.keys()
        assert all(torch.equal(unet[name], published[name]) for name in unet) == same


def test_a_run_whose_storage_is_a_bucket(tiny_base, tiny_pictures, s3, tmp_path):
    """Caches, checkpoints and version on S3; the cluster is the command's own, whose processes inherit the credentials."""
    path = toml(tmp_path, tiny_base, tiny_pictures, scale__workers=2, scale__zero_stage=1)
    body = json_of(raysd("train", str(path), "--name", "run", "--json", storage=s3))
    assert (body["status"], body["checkpoint"], body["version"]) == ("finished", 6, "cats@1")
    words = ["--prompt", "a cat", "--steps", "2", "--out", str(tmp_path / "cat.png")]
    done = raysd("generate", "cats@1", *words, storage=s3, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cat.png").exists()


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_a_compiled_denoiser_trains_to_the_same_losses(tiny_base, tiny_pictures, ray_address, tmp_path):
    path = toml(tmp_path, tiny_base, tiny_pictures, method__kind="full", optim__lr=1e-4)
    rows = {}
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        words = ["train", str(path), "--name", name, "--scale.compile", compiled, "--json"]
        assert json_of(raysd(*words, storage=tmp_path / "store", address=ray_address))["status"] == "finished"
        lines = (tmp_path / "store/runs" / name / "metrics.jsonl").read_text().splitlines()
        rows[name] = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert rows["compiled"] == pytest.approx(rows["eager"], rel=1e-3)
