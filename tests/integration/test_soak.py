"""The long ones, by hand (`make soak`): random kills, and a large data set on S3. Seeds and results are printed."""

import os
import random
import signal
import time
from contextlib import suppress

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
OTHERS = 64 * 2**20
"""Bytes that a disk may grow by besides: Ray's logs, the command's, and what the rest of the machine writes meanwhile."""
KILLS = int(os.environ.get("RAYSD_SOAK_KILLS", "20"))


def test_random_kills_end_in_the_weights_of_an_undisturbed_run(tiny_base, tiny_pictures, ray_address, tmp_path, found):
    seed = int(os.environ.get("RAYSD_SOAK_SEED", time.time_ns() % 10**6))
    found["seed"] = seed
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
    found["kills"] = done


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


def test_20_000_pictures_on_s3_train_with_bounded_memory(tiny_base, s3, tmp_path, found):
    """No node holds a copy of the data: what grows on this machine's disk is less than half of what was uploaded, and OTHERS."""
    files = fsspec.filesystem("s3")
    rows, uploaded = [], 0
    for place, scene in enumerate(scenes(1, 20_000)):
        rng = random.Random(place)
        local = tmp_path / "picture.png"
        render(scene, 64, rng).save(local, compress_level=0)  # 12 KB each: a copy of all would be seen
        uploaded += local.stat().st_size
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
    before, cache = psutil.disk_usage("/tmp").used, tmp_path / "cache"
    process = start(*words, storage=f"{s3}/store", XDG_CACHE_HOME=str(cache))
    peaks: dict[str, int] = {}
    grown = {"/tmp": 0, "XDG_CACHE_HOME": 0}
    while process.poll() is None:
        for worker in psutil.process_iter(["cmdline", "memory_info"]):
            name = " ".join(worker.info["cmdline"] or [""]).strip()
            if "RayTrainWorker" in name or "PictureEncoder" in name or worker.pid == process.pid:
                kind = "driver" if worker.pid == process.pid else name.split("(")[0]
                peaks[kind] = max(peaks.get(kind, 0), worker.info["memory_info"].rss)
        now = {"/tmp": psutil.disk_usage("/tmp").used - before, "XDG_CACHE_HOME": _size(cache)}
        grown = {place: max(grown[place], now[place]) for place in now}
        time.sleep(0.2)
    out, err = process.communicate()
    assert process.returncode == 0, err
    bound = uploaded // 2 + OTHERS
    assert bound < uploaded, "a whole copy would be over it"
    found |= {"memory, peaks:": _mib(peaks), "disk, grown by": _mib(grown), "of uploaded MiB": uploaded // 2**20}
    assert max(peaks.values()) < 2 * 2**30
    assert max(grown.values()) < bound, "no node holds a copy"
    assert '"finished"' in out


def _size(folder) -> int:
    """Bytes of the files in it, also while some of them go."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.path.getsize(os.path.join(place, name))
    return total


def _mib(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in sizes.items())
