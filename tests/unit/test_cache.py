"""The tensor cache: what is written is read, by range, and what is old goes; and what its keys depend on."""

import os
import shutil
import time

import pytest
import torch

from raysd.config import TrainingSpec, load
from raysd.data.cache import FRESH_SECONDS, TensorCache, evict
from raysd.data.dataset import Dataset, prepare
from raysd.errors import StorageError
from raysd.models.sd import StableDiffusion
from raysd.references import Located, identity, locate
from raysd.storage import Storage
from raysd.train.frozen import freeze
from tests.versions import flip


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path))


def test_tensors_come_back_under_their_own_keys_in_any_order(storage):
    records = {f"key{n}": torch.full((2, n + 1), float(n)) for n in range(9)}
    cache = TensorCache(storage.child("cache/latents/space"))
    cache.write({key: records[key] for key in list(records)[:4]})
    cache.write({key: records[key] for key in list(records)[4:]})
    reader = TensorCache(storage.child("cache/latents/space")).refresh()
    for key, tensor in zip(
        ["key7", "key1", "key1", "key4"], reader.read(["key7", "key1", "key1", "key4"]), strict=True
    ):
        assert torch.equal(tensor, records[key])
    assert reader.missing(["key8", "other", "other"]) == ["other"]


def test_a_reader_sees_what_another_wrote_after_a_refresh(storage):
    reader, writer = TensorCache(storage.child("space")).refresh(), TensorCache(storage.child("space"))
    writer.write({"a": torch.ones(3)})
    with pytest.raises(StorageError, match="1 cached tensors are gone"):
        reader.read(["a"])
    assert torch.equal(reader.refresh().read(["a"])[0], torch.ones(3))


def test_a_shard_without_its_index_does_not_exist(storage):
    writer = TensorCache(storage.child("space"))
    writer.write({"a": torch.ones(3)})
    [index] = storage.list("space/index")
    storage.delete(index.path)
    assert TensorCache(storage.child("space")).refresh().missing(["a"]) == ["a"]


def test_eviction_takes_the_longest_unused_and_nothing_of_today(storage, tmp_path):
    cache = TensorCache(storage.child("cache/latents/space"))
    for name in ("old", "older", "new"):
        cache.write({name: torch.ones(1000)})
    by_key = {key: place.shard for key, place in cache._places.items()}
    for name, days in (("old", 3), ("older", 5)):
        index = by_key[name].replace("shards/", "index/").replace(".safetensors", ".json")
        when = time.time() - days * FRESH_SECONDS
        os.utime(tmp_path / "cache/latents/space" / index, (when, when))
    assert evict(storage.child("cache"), max_bytes=9000, max_age=90 * FRESH_SECONDS) > 4000
    left = TensorCache(storage.child("cache/latents/space")).refresh()
    assert left.missing(["old", "older", "new"]) == ["older"]
    assert evict(storage.child("cache"), max_bytes=0, max_age=0) > 4000
    assert TensorCache(storage.child("cache/latents/space")).refresh().missing(["old", "new"]) == ["old"]


def test_a_cache_is_named_by_the_parts_that_the_family_encodes_with(tiny_base, tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "text_encoder_2").mkdir()
    (base / "text_encoder_2" / "config.json").write_text("{}")
    located, spec = Located("base", base), load(TrainingSpec, {"data": {"source": "x"}, "optim": {"steps": 1}})

    def names():
        frozen = freeze(Dataset((), (), None, "digest"), located, spec)
        return frozen.latents, frozen.text

    def name(kind, *parts):
        return f"cache/{kind}/{identity(base, *parts)[:16]}-fp32"

    latents, text = name("latents", "vae"), name("text", "text_encoder", "tokenizer")
    assert names() == (latents, text)
    monkeypatch.setattr(StableDiffusion, "text_parts", ("text_encoder", "tokenizer", "text_encoder_2"))
    assert names() == (latents, name("text", "text_encoder", "tokenizer", "text_encoder_2"))
    monkeypatch.setattr(StableDiffusion, "autoencoder_part", "text_encoder_2")
    assert names()[0] == name("latents", "text_encoder_2")


@pytest.mark.parametrize(
    ("component", "latents_change", "texts_change"),
    [("vae", True, False), ("text_encoder", False, True), ("tokenizer", False, True), ("unet", False, False)],
)
def test_editing_a_part_of_the_base_changes_the_keys_of_what_that_part_encodes(
    tiny_base, tiny_pictures, tmp_path, component, latents_change, texts_change
):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    values = {"source": str(tiny_pictures), "resolution": 64, "augment": {"variants": 2}}
    spec = load(TrainingSpec, {"base": str(base), "data": values, "optim": {"steps": 1}})
    storage = Storage(str(tmp_path / "store"))
    dataset = prepare(spec.data, storage)

    def keys():
        frozen = freeze(dataset, locate(spec.base, storage), spec)
        items = (*frozen.train, *frozen.validation)
        latents = {f"{frozen.latents}/{key}" for item in items for key in item.latents}
        return latents, {f"{frozen.text}/{key}" for key in (frozen.empty, *(item.text for item in items))}

    latents, texts = keys()
    assert min(len(latents), len(texts)) > 10
    flip(max((base / component).iterdir(), key=lambda path: path.stat().st_size))
    edited_latents, edited_texts = keys()
    for before, after, change in ((latents, edited_latents, latents_change), (texts, edited_texts, texts_change)):
        assert before.isdisjoint(after) if change else before == after
