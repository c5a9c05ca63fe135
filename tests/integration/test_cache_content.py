"""What an edit costs: an edited caption encodes no picture again, an edited picture no caption; and pairs stay pairs."""

import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raysd.config import TrainingSpec, load, override
from raysd.data.cache import TensorCache
from raysd.data.dataset import prepare
from raysd.data.sampler import Sampler
from raysd.diffusion import sample_posterior
from raysd.errors import TrainingFailed
from raysd.references import locate
from raysd.storage import Storage
from raysd.train import encode
from raysd.train.batches import Batches, Source, draw_randomness
from raysd.train.encode import PictureEncoder
from raysd.train.frozen import captions, freeze
from tests.pictures import photo


@pytest.fixture
def world(tiny_base, tmp_path):
    """(spec, root, folder of pictures): filled caches of six pictures with two variants each."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        photo(number, 72).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    values = {"source": str(folder), "resolution": 64, "validation": 0.0, "augment": {"variants": 2}}
    spec = load(TrainingSpec, {"base": str(tiny_base), "data": values, "optim": {"steps": 1, "batch_size": 3}})
    root = Storage(str(tmp_path / "store"))
    assert fill(spec, root) == (12, 7)
    return spec, root, folder


def frozen_of(spec, root):
    return freeze(prepare(spec.data, root), locate(spec.base, root), spec)


def fill(spec, root):
    """(pictures encoded, captions encoded)"""
    frozen = frozen_of(spec, root)
    nothing = lambda what, done, of: None  # noqa: E731
    return encode.fill_latents(frozen, root, spec, nothing), encode.fill_text(frozen, root, spec, nothing)


def test_a_second_run_encodes_nothing_whatever_its_learning_rate(world):
    spec, root, _ = world
    assert fill(override(spec, {"optim.lr": 1.0, "method.kind": "full", "optim.batch_size": 2}), root) == (0, 0)


def test_an_edited_caption_recomputes_its_text_alone(world):
    spec, root, folder = world
    (folder / "3.txt").write_text("something else")
    assert fill(spec, root) == (0, 1)


def test_an_edited_picture_recomputes_its_latents_alone(world):
    spec, root, folder = world
    photo(99, 72).save(folder / "3.png")
    assert fill(spec, root) == (2, 0)


def test_crop_and_resolution_are_in_the_key(world):
    spec, root, _ = world
    assert fill(override(spec, {"data.resolution": 32}), root)[0] == 12
    # the plain variant is the same whatever the others do
    assert fill(override(spec, {"data.augment.crop": 0.3}), root)[0] == 6


def test_what_is_kept_are_mean_and_log_variance(world, tiny_base):
    from diffusers import AutoencoderKL

    from raysd.data.augment import apply, variant
    from raysd.data.source import read_picture

    spec, root, _ = world
    frozen = frozen_of(spec, root)
    cache = TensorCache(root.child(frozen.latents)).refresh()
    vae = AutoencoderKL.from_pretrained(tiny_base, subfolder="vae")
    for item in frozen.train:
        for index, key in enumerate(item.latents):
            chosen = variant(spec.data.augment, item.example, index, spec.seed)
            pixels = apply(read_picture(item.path), chosen, 64)[None]
            with torch.no_grad():
                distribution = vae.encode(pixels).latent_dist
            [moments] = cache.read([key])
            mean, log_variance = moments.chunk(2)
            assert torch.allclose(mean, distribution.mean[0], atol=1e-4)
            assert torch.allclose(log_variance, distribution.logvar[0], atol=1e-4)


def test_what_ray_data_encodes_is_what_one_process_encodes(world, ray_address, tmp_path, monkeypatch):
    """The same pictures and captions into a second store, as a large data set's: shards of several workers."""

    def not_here(*arguments):
        raise AssertionError("encoded in this process")

    spec, root, _ = world
    monkeypatch.setattr(encode, "_most_here", lambda: 2)
    monkeypatch.setattr(encode, "ROWS_A_SHARD", 8)
    monkeypatch.setattr(encode, "_here", not_here)
    other = Storage(str(tmp_path / "other"))
    assert fill(spec, other) == (12, 7)
    frozen = frozen_of(spec, root)
    latents = {key for item in frozen.train for key in item.latents}
    for space, keys in ((frozen.latents, sorted(latents)), (frozen.text, sorted(captions(frozen)))):
        caches = [TensorCache(storage.child(space)).refresh() for storage in (root, other)]
        expected, got = (cache.read(keys) for cache in caches)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(expected, got, strict=True))
        assert not torch.allclose(expected[0], expected[1], rtol=1e-2, atol=1e-3), "one row is told from another"


def test_each_latent_keeps_its_own_caption_after_shuffling(world):
    spec, root, _ = world
    frozen = frozen_of(spec, root)
    latents, text = TensorCache(root.child(frozen.latents)).refresh(), TensorCache(root.child(frozen.text)).refresh()
    family = locate(spec.base, root).family
    schedule = family.noise_schedule(locate(spec.base, root).folder)
    sampler = Sampler(len(frozen.train), 3, seed=5, variants=2)
    batches = Batches(frozen.train, frozen.empty, Source(latents, text, (1.0, 0.0)), sampler, schedule, spec, 0, 1)
    for step in range(8):
        [batch] = batches.of(step)
        for row, draw in enumerate(sampler.batch(step)):
            item = frozen.train[draw.example]
            assert torch.equal(batch.text[row], text.read([item.text])[0])
            moments = latents.read([item.latents[draw.variant]])[0]
            drawn = draw_randomness((spec.seed, "step", step, draw.index), (4, 16, 16), 1000, 0.0, 0.0)
            assert torch.equal(batch.latents[row], sample_posterior(moments[None], drawn.posterior[None], 1.0)[0])


def test_the_thread_that_reads_ahead_has_no_pool_of_threads(world):
    """With one, OpenMP would count more threads than cores, and the model's own pool would sleep between two pieces of work."""
    spec, root, _ = world
    frozen = frozen_of(spec, root)
    source = Source(TensorCache(root.child(frozen.latents)), TensorCache(root.child(frozen.text)), (1.0, 0.0))
    schedule = locate(spec.base, root).family.noise_schedule(locate(spec.base, root).folder)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        batches = Batches(frozen.train, frozen.empty, source, Sampler(6, 6, seed=0), schedule, spec, 0, 1)
        assert batches._reader.submit(torch.get_num_threads).result() == 1
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 2, "nor does one that computes later lose its own"
        assert torch.get_num_threads() == 2, "the model keeps its own"
    finally:
        torch.set_num_threads(before)


def test_caption_dropout_is_drawn_each_step(world):
    spec, root, _ = world
    spec = override(spec, {"loss.caption_dropout": 0.5, "optim.batch_size": 6})
    frozen = frozen_of(spec, root)
    text = TensorCache(root.child(frozen.text)).refresh()
    source = Source(TensorCache(root.child(frozen.latents)).refresh(), text, (1.0, 0.0))
    schedule = locate(spec.base, root).family.noise_schedule(locate(spec.base, root).folder)
    batches = Batches(frozen.train, frozen.empty, source, Sampler(6, 6, seed=0), schedule, spec, 0, 1)
    [empty] = text.read([frozen.empty])
    dropped = [[torch.equal(row, empty) for row in batches.of(step)[0].text] for step in range(40)]
    assert len({tuple(row) for row in dropped}) > 20
    assert 0.35 < sum(map(sum, dropped)) / 240 < 0.65


def test_samples_have_noise_of_their_own_on_every_rank_and_the_same_at_every_world_size(world):
    spec, root, _ = world
    spec = override(spec, {"optim.batch_size": 6})
    frozen = frozen_of(spec, root)
    text = TensorCache(root.child(frozen.text)).refresh()
    source = Source(TensorCache(root.child(frozen.latents)).refresh(), text, (1.0, 0.0))
    schedule = locate(spec.base, root).family.noise_schedule(locate(spec.base, root).folder)

    def noise(world_size):
        ranks = [
            Batches(frozen.train, frozen.empty, source, Sampler(6, 6, seed=0), schedule, spec, rank, world_size)
            for rank in range(world_size)
        ]
        return torch.cat([rank.of(4)[0].noise for rank in ranks])

    alone = noise(1)
    assert all(not torch.equal(alone[a], alone[b]) for a in range(6) for b in range(a))
    assert torch.equal(noise(2), alone)
    assert torch.equal(noise(3), alone)


def test_an_autoencoder_that_gives_nan_is_said_and_nothing_of_it_is_kept(tiny_base, tmp_path):
    """SDXL's does in fp16: latents that are no numbers would train the denoiser to draw none."""
    spec = load(
        TrainingSpec, {"base": str(tiny_base), "data": {"source": "x", "resolution": 64}, "optim": {"steps": 1}}
    )
    encoder = PictureEncoder(str(tmp_path), str(tiny_base), "cache/latents/x", spec)
    moments = torch.zeros(2, 8, 8, 8)
    moments[1, 3, 2, 2] = math.nan
    encoder.family = SimpleNamespace(moments=lambda *_: moments)
    encoder._pixels = lambda rows, n: torch.zeros(3, 64, 64)
    rows = {"key": np.array(["a", "b"], dtype=object), "path": np.array(["1.png", "2.png"], dtype=object)}
    with pytest.raises(TrainingFailed, match=r"2\.png: the autoencoder of .* gives NaN"):
        encoder(rows)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
