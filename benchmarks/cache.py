"""Filling the latent cache of 5,000 rendered pictures at 64 px, beside a bare encoding loop; and filling it again.

raysd's side is `fill_latents`, reading, decoding, resizing and writing included: in one process, as it is on a lone machine
of few CPUs, and with Ray Data, its start and that of its encoders included, as on any other. The
bare loop encodes pictures that are tensors in memory already, in batches of the same size, on all cores, and keeps
nothing. The bundled base's autoencoder, fp32.
"""

import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import bases, hardware, spawned
from benchmarks.options import Options
from benchmarks.results import Result, Table, Target

SPEED_BOUND = 0.8
AGAIN_BOUND = 2.0
SIDE = 64

HERE, RAY_DATA = "one process", "Ray Data"

Figures = dict[str, float]


def run(options: Options) -> Result:
    from raysd.assets.make.renderer import write_dataset

    pictures, repeats = (320, 1) if options.quick else (5000, 2)
    base, folder = bases.tiny(options.work / "base"), options.work / "pictures"
    write_dataset(folder, pictures, seed=0, resolution=SIDE)
    fills: dict[str, list[Figures]] = {HERE: [], RAY_DATA: []}
    bare: list[float] = []
    for number in range(repeats):
        for how, found in fills.items():
            found.append(spawned.alone(_fill_twice, base, folder, options.work / f"store{number}-{len(how)}", how))
        bare.append(spawned.alone(_bare, base, pictures))
    return _result(fills, bare, pictures)


def _fill_twice(base: Path, folder: Path, store: Path, how: str) -> Figures:
    """Seconds of checking, of starting Ray, of filling an empty cache, and of filling it again."""
    from raysd import cluster
    from raysd.config import TrainingSpec, load
    from raysd.data.dataset import prepare
    from raysd.references import locate
    from raysd.storage import Storage
    from raysd.train import encode
    from raysd.train.encode import fill_latents
    from raysd.train.frozen import freeze

    encode._most_here = lambda: 10**9 if how == HERE else 0
    data = {"source": str(folder), "resolution": SIDE, "validation": 0.0, "duplicates": "keep"}
    spec = load(TrainingSpec, {"base": str(base), "data": data, "optim": {"steps": 1}})
    storage, seen = Storage(str(store)), Marks()
    frozen = freeze(prepare(spec.data, storage), locate(spec.base, storage), spec)
    seen.mark("check")
    importing = threading.Thread(target=locate(spec.base, storage).family.import_libraries)  # meanwhile, as a run does
    importing.start()
    cluster.join(1)
    importing.join()
    seen.mark("start_ray")
    written: list[tuple[float, int]] = []
    fill_latents(frozen, storage, spec, lambda what, done, of: written.append((time.perf_counter(), done)))
    seen.mark("first")
    fill_latents(frozen, storage, spec, lambda what, done, of: None)
    seen.mark("second")
    return {**seen.seconds, "steady_rate": _steady(written), "pictures": float(len(frozen.train))}


class Marks:
    """Seconds from one mark to the next."""

    def __init__(self) -> None:
        self.seconds: Figures = {}
        self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def _steady(written: list[tuple[float, int]]) -> float:
    """Pictures/s between the first and the last shard that were written."""
    done = [(when, count) for when, count in written if count]
    (first, before), (last, after) = done[0], done[-1]
    return (after - before) / (last - first) if last > first else 0.0


def _bare(base: Path, pictures: int) -> float:
    """Pictures/s of encoding tensors in memory."""
    import torch

    from raysd.models import family_of
    from raysd.train.encode import PIXELS_A_CALL

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autoencoder: Any = family_of(base).autoencoder(base)
    autoencoder = autoencoder.to(device, memory_format=torch.channels_last)
    pixels = (torch.rand(pictures, 3, SIDE, SIDE) * 2 - 1).contiguous(memory_format=torch.channels_last)
    size = PIXELS_A_CALL // SIDE**2
    with torch.inference_mode():
        autoencoder.encode(pixels[:size].to(device))
        began = time.perf_counter()
        for batch in pixels.split(size):
            autoencoder.encode(batch.to(device)).latent_dist.parameters.cpu()
    return pictures / (time.perf_counter() - began)


def _result(fills: dict[str, list[Figures]], bare: list[float], pictures: int) -> Result:
    limit = median(bare)

    def typical(how: str, name: str) -> float:
        return median(fill[name] for fill in fills[how])

    targets = [
        *(
            Target(
                f"{how}: pictures/s, raysd / bare encoding loop",
                pictures / typical(how, "first") / limit,
                SPEED_BOUND,
                True,
            )
            for how in fills
        ),
        Target(
            "filling it again, % of the first time",
            100 * max(typical(how, "second") / typical(how, "first") for how in fills),
            AGAIN_BOUND,
            at_least=False,
            unit="%",
        ),
    ]
    rates = {how: (pictures / typical(how, "first"), typical(how, "steady_rate")) for how in fills}
    rows = [
        row
        for how, (rate, steady) in rates.items()
        for row in (
            [f"{how}, all", round(rate, 1), round(rate / limit, 3)],
            [f"{how}, between the first and the last shard", round(steady, 1), round(steady / limit, 3)],
        )
    ]
    parts = ("check", "start_ray", "first", "second")
    return Result(
        targets,
        [
            Table(
                "Encoding pictures", ["what", "pictures/s", "of the bare loop"], [*rows, ["bare", round(limit, 1), 1.0]]
            ),
            Table(
                "Seconds",
                ["part", *fills],
                [[name, *(round(typical(how, name), 2) for how in fills)] for name in parts],
            ),
        ],
        {f"{how}: {name}": [fill[name] for fill in fills[how]] for how in fills for name in fills[how][0]}
        | {"bare": bare},
        {"pictures": pictures, "resolution": SIDE, "precision": "fp32", "repeats": len(bare)},
        gpu=hardware.gpu_name() is not None,
    )
