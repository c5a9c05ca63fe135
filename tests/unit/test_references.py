"""Hub ids and single files, on files of the layout that the hub and the usual trainers write."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from raysd.errors import IntegrityError, NotFound, RequestError
from raysd.models import FAMILIES
from raysd.references import identity, locate
from raysd.registry import Registry
from tests.original import original_layout


def test_a_hub_id_is_found_in_the_hub_cache(tiny_base, storage, tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--studio--cats"
    shutil.copytree(tiny_base, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert identity(locate("studio/cats", storage).folder) == identity(tiny_base)
    with pytest.raises(NotFound, match="studio/dogs: not on this machine, and the hub did not answer"):
        locate("studio/dogs", storage)


def test_a_single_file_is_the_model_it_was_made_from(tiny_base, storage, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_file(original_layout(tiny_base), tmp_path / "model.safetensors")
    with pytest.raises(RequestError, match="put the model's configuration and tokenizer into"):
        locate(str(tmp_path / "model.safetensors"), storage)
    shutil.copytree(tiny_base, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    found = locate(str(tmp_path / "model.safetensors"), storage).folder
    for part in ("unet", "vae", "text_encoder"):
        [ours] = (found / part).glob("*.safetensors")
        [theirs] = (tiny_base / part).glob("*.safetensors")
        ours, theirs = load_file(ours), load_file(theirs)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), part
    (tmp_path / "model.safetensors").write_bytes(b"no checkpoint")
    with pytest.raises(RequestError, match="not loadable as a single-file checkpoint"):
        locate(str(tmp_path / "model.safetensors"), storage)


def test_a_single_file_is_opened_by_the_family_whose_names_it_has(tiny_base, storage, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, seen = tmp_path / "model.safetensors", []
    save_file({"conditioner.embedders.0.x": torch.ones(2)}, file)
    with pytest.raises(RequestError, match="holds no model of a supported family; supported families: sd"):
        locate(str(file), storage)

    def open_single_file(path, configurations):
        seen.append((path, configurations))
        return SimpleNamespace(save_pretrained=lambda folder, **_: shutil.copytree(tiny_base, folder))

    other = SimpleNamespace(single_file_prefix="conditioner.", open_single_file=open_single_file)
    monkeypatch.setitem(FAMILIES, "other", other)
    assert identity(locate(str(file), storage).folder) == identity(tiny_base)
    assert seen == [(file, None)]


def test_a_version_refuses_another_base_than_the_one_it_was_trained_on(tiny_base, storage, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "pytorch_lora_weights.safetensors"
    shutil.copytree(tiny_base, base)
    save_file({"unet.x": torch.ones(2)}, adapter)
    record = {"base": str(base), "base_digest": identity(base)}
    version = Registry(storage).publish("cats", {adapter.name: adapter}, record, key="one")
    assert locate(version.ref, storage).lora.read_bytes() == adapter.read_bytes()
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights)
    with pytest.raises(IntegrityError, match="is not the one it was trained on"):
        locate(version.ref, storage)


def test_identity_reads_only_what_is_the_model(tiny_base, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base, copy)
    (copy / ".gitattributes").write_text("x")
    (copy / "sample.png").write_bytes(b"x")
    assert identity(copy) == identity(tiny_base)
    index = copy / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"x": 1}))
    assert identity(copy) != identity(tiny_base)
    assert os.path.isdir(copy)


def test_a_folder_of_pictures_does_not_hide_the_model_of_its_name(tiny_base, storage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats").mkdir()
    with pytest.raises(NotFound, match="cats"):
        locate("cats", storage)  # in the registry, which has none
    with pytest.raises(RequestError, match="not a diffusers model"):
        locate("./cats", storage)
    shutil.copytree(tiny_base, tmp_path / "dogs")
    assert locate("dogs", storage).ref == str(tmp_path / "dogs")


def test_what_is_no_part_of_a_model_does_not_change_what_it_is(tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "notes.txt").write_text("mine")
    (base / "safety_checker").mkdir()
    (base / "safety_checker" / "config.json").write_text("{}")
    shutil.copy(next((base / "unet").glob("*.safetensors")), base / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert identity(base) == identity(tiny_base)
    (base / "unet" / "config.json").write_text((base / "unet" / "config.json").read_text() + " ")
    assert identity(base) != identity(tiny_base)


DENOISER = "unet/diffusion_pytorch_model.safetensors"


def _move(base, old, new):
    (base / old).rename(base / new)


def _fp16_alone(base):
    _move(base, DENOISER, DENOISER.replace(".safetensors", ".fp16.safetensors"))


def _cut(base):
    (base / DENOISER).write_bytes((base / DENOISER).read_bytes()[:-100])


def _pointer(base):
    (base / DENOISER).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4464800\n")


def _empty_vocabulary(base):
    file = base / "tokenizer" / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model": {"type": "BPE", "vocab": {}, "merges": []}}))


def _no_shard(base):
    _shard(base)
    next((base / "unet").glob("*-of-00002.safetensors")).unlink()


def _shard(base):
    """As diffusers writes weights of more than 10 GB."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    (base / DENOISER).unlink()
    total = sum(parameter.numel() for parameter in unet.parameters()) * 4
    unet.save_pretrained(base / "unet", max_shard_size=total * 2 // 3)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda base: (base / "tokenizer/tokenizer.json").unlink(), "tokenizer/tokenizer.json is missing or holds no"),
        (lambda base: shutil.rmtree(base / "tokenizer"), "tokenizer/tokenizer.json is missing or holds no vocabulary"),
        (_empty_vocabulary, "tokenizer/tokenizer.json is missing or holds no vocabulary"),
        (lambda base: shutil.rmtree(base / "scheduler"), "scheduler/scheduler_config.json is missing or not readable"),
        (lambda base: (base / "unet/config.json").unlink(), "unet/config.json is missing or not readable"),
        (lambda base: (base / "vae/config.json").write_text("[]"), "vae/config.json is missing or not readable"),
        (
            lambda base: (base / "text_encoder/model.safetensors").unlink(),
            "text_encoder/model.safetensors is missing: ",
        ),
        (lambda base: (base / DENOISER).unlink(), f"{DENOISER} is missing: put the model's own there"),
        (lambda base: (base / DENOISER).write_bytes(b""), f"{DENOISER} is damaged or cut short"),
        (_cut, f"{DENOISER} is damaged or cut short"),
        (_pointer, f"{DENOISER} is damaged or cut short.*git lfs pull"),
        (_fp16_alone, rf"{DENOISER} is missing, and .fp16 files are not read; convert them:\n.*variant='fp16'\)"),
        (_no_shard, "unet/diffusion_pytorch_model-0000[12]-of-00002.safetensors is missing"),
        (lambda base: (base / "model_index.json").write_text("[]"), "not a diffusers model"),
    ],
)
def test_a_base_that_would_not_train_is_refused_by_its_file(tiny_base, storage, tmp_path, harm, said):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    harm(base)
    with pytest.raises(RequestError, match=said) as refused:
        locate(str(base), storage)
    assert str(base) in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 3


def test_a_base_in_other_layouts_that_the_libraries_load_is_taken(tiny_base, storage, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    _shard(base)
    model = json.loads((base / "tokenizer/tokenizer.json").read_text())["model"]
    (base / "tokenizer/vocab.json").write_text(json.dumps(model["vocab"]))
    (base / "tokenizer/merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in model["merges"]))
    (base / "tokenizer/tokenizer.json").unlink()
    located = locate(str(base), storage)
    family = located.family
    ours, theirs = (family.tokens(family.tokenizer(folder), ["a red circle"]) for folder in (located.folder, tiny_base))
    assert torch.equal(ours, theirs)
    assert torch.equal(family.denoiser(base).conv_in.weight, family.denoiser(tiny_base).conv_in.weight)


def test_a_folder_of_configurations_will_do_where_nothing_is_loaded(tiny_base, storage, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base, ignore=shutil.ignore_patterns("*.safetensors"))
    assert locate(str(base), storage, whole=False).folder == base
    with pytest.raises(RequestError, match="is missing"):
        locate(str(base), storage)


def test_pickled_weights_are_refused_with_what_to_do(tiny_base, storage, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    weights = next((base / "vae").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(RequestError, match=r"vae/.* is missing, and pickled weights \(.bin\)") as refused:
        locate(str(base), storage)
    assert len(str(refused.value).splitlines()) <= 3
