"""The models of a replica: versions share their base, what is in use stays, what was tampered with is not loaded."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image

from raysd.config.serving import ModelSpec
from raysd.database import Database
from raysd.errors import IntegrityError, RequestError, StorageError
from raysd.models import family_of
from raysd.references import Located, identity
from raysd.registry import Registry, signing
from raysd.serve import pool as pools
from raysd.serve.drawing import Drawing
from raysd.serve.pool import GIB, Pool, Ready, weight
from raysd.serve.predictor import Predictor
from raysd.serve.replica import Replica
from raysd.serve.scheduler import Busy, Picture, Scheduler
from raysd.serve.torch_backend import TorchBackend
from raysd.storage import Storage
from tests.adapters import publish_lora
from tests.versions import flip
from tests.waiting import until

WISH = Drawing(prompt="a red circle", seed=1, steps=3, guidance=3)


class Opener:
    """Opens bases, and counts them."""

    def __init__(self) -> None:
        self.opened: list[Path] = []

    def __call__(self, located: Located) -> Predictor:
        self.opened.append(located.folder)
        backend = TorchBackend(located.family, located.folder, torch.device("cpu"))
        return Predictor(located.family, located.folder, backend)


def drawn(ready: Ready) -> np.ndarray:
    scheduler, picture = Scheduler(), Picture(ready.predictor, WISH, adapter=ready.adapter)
    scheduler.submit([picture])
    while scheduler.turn():
        pass
    return np.asarray(picture.future.result(0), dtype=int)


def theirs(base: Path, lora: Path | None) -> np.ndarray:
    """The picture of diffusers' pipeline."""
    pipeline = family_of(base).pipeline(base, lora)
    image: Image.Image = pipeline(
        WISH.prompt,
        generator=torch.Generator().manual_seed(WISH.seed),
        num_inference_steps=WISH.steps,
        guidance_scale=WISH.guidance,
    ).images[0]
    return np.asarray(image, dtype=int)


def test_lora_versions_share_one_base_and_draw_what_diffusers_draws(
    registry: Registry, tiny_base: Path, tmp_path: Path
) -> None:
    first = publish_lora(registry, tiny_base, tmp_path / "1", seed=1)
    second = publish_lora(registry, tiny_base, tmp_path / "2", seed=2, rank=4)
    opener = Opener()
    pool = Pool(registry.storage, opener)
    pictures = {}
    for ref, digest in ((first.ref, first.digest), (second.ref, second.digest), (str(tiny_base), identity(tiny_base))):
        with pool.use(ref, digest) as ready:
            pictures[ref] = drawn(ready)
    with pool.use(first.ref, first.digest) as ready:  # again, after the others
        assert np.array_equal(drawn(ready), pictures[first.ref])
    assert opener.opened == [tiny_base]
    file = "pytorch_lora_weights.safetensors"
    for ref, lora in ((first.ref, tmp_path / "1" / file), (second.ref, tmp_path / "2" / file), (str(tiny_base), None)):
        assert np.abs(pictures[ref] - theirs(tiny_base, lora)).max() <= 1, ref
    assert np.abs(pictures[first.ref] - pictures[second.ref]).max() > 10


def test_strangers_with_other_adapters_do_not_change_a_picture(
    registry: Registry, tiny_base: Path, tmp_path: Path
) -> None:
    versions = [publish_lora(registry, tiny_base, tmp_path / str(seed), seed) for seed in (1, 2)]
    pool = Pool(registry.storage, Opener())
    with pool.use(versions[0].ref, versions[0].digest) as one, pool.use(versions[1].ref, versions[1].digest) as two:
        alone = [drawn(ready) for ready in (one, two)]
        scheduler = Scheduler()
        pictures = [Picture(ready.predictor, WISH, adapter=ready.adapter) for ready in (one, two, one, two)]
        scheduler.submit(pictures)
        while scheduler.turn():
            pass
    for picture, wanted in zip(pictures, alone * 2, strict=True):
        assert np.abs(np.asarray(picture.future.result(0), dtype=int) - wanted).max() <= 1


def test_what_is_in_use_survives_pressure(
    registry: Registry, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "PATIENCE", 0.2)
    versions = [publish_lora(registry, tiny_base, tmp_path / str(seed), seed) for seed in range(4)]
    pool = Pool(registry.storage, Opener(), adapters=2)
    with pool.use(versions[0].ref, versions[0].digest) as held:
        before = drawn(held)
        for version in versions[1:]:
            with pool.use(version.ref, version.digest):
                assert versions[0].digest in pool.loaded()
        assert np.array_equal(drawn(held), before)
        with (
            pool.use(versions[1].ref, versions[1].digest),
            pytest.raises(Busy),
            pool.use(versions[2].ref, versions[2].digest),
        ):
            pass
    with pool.use(versions[2].ref, versions[2].digest), pool.use(versions[3].ref, versions[3].digest):
        assert versions[0].digest not in pool.loaded()


def test_a_load_waits_until_something_becomes_unused(registry: Registry, tiny_base: Path, tmp_path: Path) -> None:
    versions = [publish_lora(registry, tiny_base, tmp_path / str(seed), seed) for seed in range(2)]
    pool, leave = Pool(registry.storage, Opener(), adapters=1), threading.Event()
    taken = threading.Event()

    def hold() -> None:
        with pool.use(versions[0].ref, versions[0].digest):
            taken.set()
            leave.wait(60)

    with ThreadPoolExecutor(1) as hands:
        holding = hands.submit(hold)
        assert taken.wait(60)
        threading.Timer(0.3, leave.set).start()
        with pool.use(versions[1].ref, versions[1].digest):
            assert versions[0].digest not in pool.loaded()
        holding.result(0)


def test_a_base_that_waits_for_room_keeps_no_lora_version_waiting(
    registry: Registry, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_base, tmp_path / "other")
    config = tmp_path / "other/unet/config.json"
    config.write_text(config.read_text() + " ")
    lora = publish_lora(registry, tiny_base, tmp_path / "1", seed=1)
    pool, waits, aside = Pool(registry.storage, Opener(), bases=1), threading.Event(), Pool._stand_aside

    def told(pool: Pool, met: Callable[[], bool], end: float) -> None:
        waits.set()
        aside(pool, met, end)

    monkeypatch.setattr(Pool, "_stand_aside", told)

    def other() -> str:
        with pool.use(str(tmp_path / "other"), identity(tmp_path / "other")):
            return ",".join(pool.loaded())

    with ThreadPoolExecutor(1) as hands:
        with pool.use(str(tiny_base), identity(tiny_base)):
            waiting = hands.submit(other)
            assert waits.wait(60)
            with pool.use(lora.ref, lora.digest) as ready:
                assert ready.adapter == lora.digest
            assert not waiting.done()
        assert waiting.result(60) == str(tmp_path / "other")


def test_several_that_wait_for_the_same_base_load_it_once(registry: Registry, tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "other")
    config = tmp_path / "other/unet/config.json"
    config.write_text(config.read_text() + " ")
    opener, digest = Opener(), identity(tmp_path / "other")
    pool = Pool(registry.storage, opener, bases=1)

    def other() -> None:
        with pool.use(str(tmp_path / "other"), digest):
            pass

    with ThreadPoolExecutor(3) as hands:
        with pool.use(str(tiny_base), identity(tiny_base)):
            waiting = [hands.submit(other) for _ in range(3)]
            time.sleep(0.5)
        for each in waiting:
            each.result(60)
    assert opener.opened == [tiny_base, tmp_path / "other"]


def test_a_version_in_use_is_pinned_against_collection(registry: Registry, tiny_base: Path, tmp_path: Path) -> None:
    version = publish_lora(registry, tiny_base, tmp_path / "1", seed=1)
    pool = Pool(registry.storage, Opener())
    with pool.use(version.ref, version.digest):
        registry.storage.delete(f"models/cats/versions/{version.number}.json")  # as if it were no version any more
        registry.collect(grace=0)
        assert all(registry.storage.exists(f"blobs/sha256/{f.sha256[:2]}/{f.sha256}") for f in version.files)


def test_what_is_not_the_version_asked_for_is_not_loaded(registry: Registry, tiny_base: Path, tmp_path: Path) -> None:
    version = publish_lora(registry, tiny_base, tmp_path / "1", seed=1)
    pool = Pool(registry.storage, Opener())
    with pytest.raises(IntegrityError, match="was asked for"), pool.use(version.ref, "0" * 64):
        pass
    registry.withdraw(version)
    with pytest.raises(RequestError, match="withdrawn"), pool.use(version.ref, version.digest):
        pass
    other = publish_lora(registry, tiny_base, tmp_path / "2", seed=2)
    root = Path(registry.storage.url)
    flip(root / "blobs" / "sha256" / other.files[0].sha256[:2] / other.files[0].sha256)
    with pytest.raises(IntegrityError, match="damaged"), pool.use(other.ref, other.digest):
        pass


def test_a_version_that_is_withdrawn_while_it_is_held_is_drawn_with_no_more(
    registry: Registry, tiny_base: Path, tmp_path: Path
) -> None:
    gone, kept = (publish_lora(registry, tiny_base, tmp_path / str(seed), seed) for seed in (1, 2))
    pool = Pool(registry.storage, Opener())
    with pool.use(kept.ref, kept.digest), pool.use(gone.ref, gone.digest) as held:
        registry.withdraw(gone, "leaked")
        pool.review()
        drawn(held)  # what was begun ends
        with pytest.raises(RequestError, match=r"cats@1 was withdrawn \(leaked\)"), pool.use(gone.ref, gone.digest):
            pass
    with pool.use(kept.ref, kept.digest):
        pass


def test_a_lora_version_goes_with_the_version_that_is_its_base(
    registry: Registry, tiny_base: Path, tmp_path: Path
) -> None:
    files = {path.relative_to(tiny_base).as_posix(): path for path in tiny_base.rglob("*") if path.is_file()}
    base = registry.publish("dogs", files, {}, key="dogs")
    lora = publish_lora(registry, tiny_base, tmp_path / "1", seed=1)
    record = {"base": base.ref, "base_digest": identity(registry.fetch(base))}
    lora = registry.publish(
        "cats", {"pytorch_lora_weights.safetensors": registry.fetch(lora) / lora.files[0].path}, record, "on"
    )
    pool = Pool(registry.storage, Opener())
    with pool.use(lora.ref, lora.digest):
        pass
    registry.withdraw(base)
    pool.review()
    with pytest.raises(RequestError, match="dogs@1 was withdrawn"), pool.use(lora.ref, lora.digest):
        pass


def test_a_store_that_is_away_withdraws_nothing_and_is_not_asked_at_each_use(
    registry: Registry, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = publish_lora(registry, tiny_base, tmp_path / "1", seed=1)
    pool = Pool(registry.storage, Opener())
    with pool.use(version.ref, version.digest):
        pass
    asked: list[str] = []

    def away(storage: Storage, path: str) -> bool:
        asked.append(path)
        raise StorageError("the store does not answer")

    monkeypatch.setattr(pools, "REVIEW", 0.01)
    with monkeypatch.context() as broken:
        broken.setattr(Storage, "exists", away)
        broken.setattr(Storage, "read", away)
        with pool.use(version.ref, version.digest):
            assert not asked
        pool.watch()
        until(lambda: len(asked) > 2)  # it goes on looking
        with pool.use(version.ref, version.digest):
            pass
    registry.withdraw(version)
    until(lambda: version.digest not in pool._known)
    pool.close()
    with pytest.raises(RequestError, match="withdrawn"), pool.use(version.ref, version.digest):
        pass


def test_memory_is_bounded_by_letting_go_of_what_was_used_longest_ago(
    registry: Registry, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "PATIENCE", 0.1)
    small = [publish_lora(registry, tiny_base, tmp_path / str(seed), seed) for seed in range(3)]
    one = weight(tmp_path / "0" / "pytorch_lora_weights.safetensors")
    pool = Pool(registry.storage, Opener(), memory=weight(tiny_base) + 2.5 * one)
    for version in (small[0], small[1], small[0]):
        with pool.use(version.ref, version.digest):
            pass
    with pool.use(small[2].ref, small[2].digest):  # as many adapters as it likes, but no room for three
        assert pool.loaded()[1:] == [small[0].digest, small[2].digest]
        with pool.use(small[0].ref, small[0].digest), pytest.raises(Busy), pool.use(small[1].ref, small[1].digest):
            pass


def test_a_base_that_fits_no_more_takes_the_place_of_an_unused_one(
    registry: Registry, tiny_base: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    (other / "unet/config.json").write_text((other / "unet/config.json").read_text() + " ")
    pool = Pool(registry.storage, Opener(), bases=9, memory=1.5 * weight(tiny_base))
    for base in (tiny_base, other, tiny_base):
        with pool.use(str(base), identity(base)):
            assert pool.loaded() == [str(base)]


def test_what_can_never_fit_is_refused_and_costs_nobody_their_place(
    registry: Registry, tiny_base: Path, tmp_path: Path
) -> None:
    large = publish_lora(registry, tiny_base, tmp_path / "1", seed=1, rank=8)
    pool = Pool(registry.storage, Opener(), memory=weight(tiny_base) + 1)
    with pool.use(str(tiny_base), identity(tiny_base)):
        pass
    with pytest.raises(RequestError, match=r"cats@1: .* GiB .*raise `memory`"), pool.use(large.ref, large.digest):
        pass
    assert pool.loaded() == [str(tiny_base)]


def test_the_memory_of_a_served_model_is_its_replicas_budget(
    registry: Registry, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the configuration to the pool, by the replica itself."""
    Database(None, registry.storage).migrate()
    size = weight(tiny_base) / GIB
    for memory, here in ((2 * size, [str(tiny_base)]), (size / 2, [])):
        spec = ModelSpec(ref=str(tiny_base), name="cats", memory=memory)
        replica = Replica(spec, registry.storage.url, None, 60.0)
        assert replica._pool.loaded() == here
        replica.__del__()


def test_where_signatures_are_demanded_the_unsigned_and_the_forged_are_refused(
    registry: Registry, tiny_base: Path, tmp_path: Path
) -> None:
    ours, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    pool = Pool(registry.storage, Opener(), signers=(signing.public_name(ours),))
    version = publish_lora(registry, tiny_base, tmp_path / "1", seed=1)

    def refused(message: str) -> None:
        with pytest.raises(IntegrityError, match=message), pool.use(version.ref, version.digest):
            pass

    refused("signed by none")
    signing.sign(registry.storage, version, other)
    refused("signed by none")
    path = f"models/cats/signatures/{version.number}.json"
    forged = {signing.public_name(ours): json.loads(registry.storage.read(path))[signing.public_name(other)]}
    registry.storage.write(path, json.dumps(forged).encode())
    refused("signed by none")
    signing.sign(registry.storage, version, ours)
    with pool.use(version.ref, version.digest):
        pass
    second = publish_lora(registry, tiny_base, tmp_path / "2", seed=2)  # with the first one's signature
    registry.storage.write(f"models/cats/signatures/{second.number}.json", registry.storage.read(path))
    with pytest.raises(IntegrityError, match="signed by none"), pool.use(second.ref, second.digest):
        pass
    with pytest.raises(IntegrityError, match="not in the registry"), pool.use(str(tiny_base), identity(tiny_base)):
        pass


def test_a_key_that_is_none_is_said_in_a_line(tmp_path: Path) -> None:
    for name, content in (("empty", b""), ("rsa", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RequestError, match="openssl genpkey"):
            signing.read_key(tmp_path / name)
    with pytest.raises(RequestError, match="no such file"):
        signing.read_key(tmp_path / "none")
