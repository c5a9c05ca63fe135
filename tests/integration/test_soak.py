"""The long ones, by hand (`make soak`): random kills, and a large data set on S3. Seeds and results are printed."""

import os
import random
import signal
import time

import fsspec
import psutil
import pytest

from raysd.assets.make.renderer import caption, render, scenes
from tests.base import toml
from tests.cluster import json_of, raysd, start
from tests.integration.test_survive import (
    SPEC,
    assert_as_undisturbed,
    losses,
    reached,
    tensors,
    train_workers,
    wait_until,
)

pytestmark = [pytest.mark.soak, pytest.mark.timeout(5400)]
KILLS = int(os.environ.get("RAYSD_SOAK_KILLS", "20"))


def test_random_kills_end_in_the_weights_of_an_undisturbed_run(tiny_base, tiny_pictures, ray_address, tmp_path):
    seed = int(os.environ.get("RAYSD_SOAK_SEED", time.time_ns() % 10**6))
    print(f"seed {seed}: repeat with RAYSD_SOAK_SEED={seed}")
    chooser = random.Random(seed)
    path = toml(tmp_path, tiny_base, tiny_pictures, **SPEC)
    json_of(raysd("train", str(path), "--name", "run", "--json", storage=tmp_path / "whole", address=ray_address))
    expected = tensors(tmp_path / "whole"), losses(tmp_path / "whole")
    done = 0
    while done < KILLS:
        store = tmp_path / f"killed-{done}"
        done += _disturbed_run(path, store, ray_address, chooser)
        assert_as_undisturbed(store, expected)
    print(f"{done} kills, weights equal to the bit after each")


def _disturbed_run(path, store, address, chooser) -> int:
    """One run, killed now and then until it is finished; returns how often."""
    kills = 0
    while True:
        process = start("train", str(path), "--name", "run", "--json", storage=store, address=address)
        if kills < 3:
            wait_until(reached(store, 0 if not kills else 2), process) if kills else time.sleep(chooser.uniform(1, 30))
            time.sleep(chooser.uniform(0, 3))
            victim = chooser.choice(["driver", "worker"])
            workers = train_workers()
            if victim == "worker" and workers:
                chooser.choice(workers).send_signal(signal.SIGKILL)
            elif process.poll() is None:
                process.kill()
            kills += 1
            print(f"  kill {kills}: {victim}")
        process.communicate(timeout=400)
        if process.returncode == 0:
            return kills


def test_20_000_pictures_on_s3_train_with_bounded_memory(tiny_base, s3, tmp_path):
    files = fsspec.filesystem("s3")
    rows = []
    for place, scene in enumerate(scenes(1, 20_000)):
        rng = random.Random(place)
        local = tmp_path / "picture.png"
        render(scene, 64, rng).save(local)
        files.pipe_file(f"{s3}/pictures/{place:05d}.png", local.read_bytes())
        rows.append(f'{{"file_name": "{place:05d}.png", "text": "{caption(scene, rng)}"}}')
    files.pipe_file(f"{s3}/pictures/metadata.jsonl", "\n".join(rows).encode())

    path = toml(tmp_path, tiny_base, tmp_path, scale__workers=2, scale__zero_stage=2, data__duplicates="keep")
    words = [
        "train",
        str(path),
        "--name",
        "run",
        "--json",
        "--data.source",
        f"{s3}/pictures",
        "--data.augment.variants",
        "1",
    ]
    before = psutil.disk_usage("/tmp").used
    process = start(*words, storage=f"{s3}/store")
    peaks: dict[str, int] = {}
    while process.poll() is None:
        for worker in psutil.process_iter(["cmdline", "memory_info"]):
            name = " ".join(worker.info["cmdline"] or [""])
            if "RayTrainWorker" in name or "PictureEncoder" in name or worker.pid == process.pid:
                kind = "driver" if worker.pid == process.pid else name.split("(")[0]
                peaks[kind] = max(peaks.get(kind, 0), worker.info["memory_info"].rss)
        time.sleep(0.2)
    out, err = process.communicate()
    assert process.returncode == 0, err
    grown = psutil.disk_usage("/tmp").used - before
    print({kind: f"{peak / 2**20:.0f} MiB" for kind, peak in peaks.items()}, f"disk {grown / 2**20:.0f} MiB")
    assert max(peaks.values()) < 2 * 2**30
    assert grown < 500 * 2**20, "no node holds a copy"
    assert '"finished"' in out
