"""`raysd export --format onnx` with the bundled base and a LoRA version on it: minutes, most of them tracing."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bases import lora_of
from raysd.assets import asset
from raysd.draw import Request, draw
from raysd.export.kept import MANIFEST, Export, kept
from raysd.references import Located, identity, locate
from raysd.registry import Registry
from raysd.serve.drawing import Drawing
from raysd.serve.onnx import OnnxBackend
from raysd.serve.predictor import Predictor
from raysd.storage import Storage
from tests.cluster import raysd

pytestmark = pytest.mark.soak
WISH = Drawing(prompt="a red circle", negative="a star", seed=5, steps=8, guidance=3)


def drawn(located: Located, export: Export) -> np.ndarray:
    backend = OnnxBackend(export.folder, located.family, located.family.geometry(located.folder))
    predictor = Predictor(located.family, located.folder, backend)
    sample = predictor.begin(WISH)
    while not sample.done:
        predictor.advance([sample], None)
    return np.asarray(predictor.pictures([sample.latents])[0], int)


def written(folder: Path) -> Export:
    return Export(folder, json.loads((folder / MANIFEST).read_text()))


def pytorchs(located: Located) -> np.ndarray:
    request = Request(WISH.prompt, WISH.negative, WISH.seed, WISH.steps, WISH.guidance)
    return np.asarray(draw(located, [request])[0], int)


def test_what_serves_a_lora_version_is_kept_and_it_goes_merged_into_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = tmp_path / "store"
    storage = Storage(str(store))
    base = asset("tiny-sd")
    file = lora_of(base, tmp_path / "lora", 1)
    record = {"base": "tiny-sd", "base_digest": identity(base)}
    version = Registry(storage).publish("cats", {file.name: file}, record, key="1")

    done = raysd("export", version.ref, "--format", "onnx", storage=store)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{store}/exports/{identity(base)}/fp32"
    assert "graphs: 4/4" in done.stderr
    export = kept(storage, locate("tiny-sd", storage), "fp32")
    assert export is not None
    assert export.manifest["adapters"] == "inputs"

    done = raysd("export", version.ref, "--format", "onnx", "--out", str(tmp_path / "merged"), storage=store)
    assert done.returncode == 0, done.stderr
    located, export = locate(version.ref, storage), written(tmp_path / "merged")
    assert export.manifest["adapters"] == "merged"
    assert np.abs(drawn(located, export) - pytorchs(located)).max() <= 2

    for precision, apart in (("fp32", 2), ("fp16", 16), ("int8", 32)):
        folder = tmp_path / precision
        words = ["export", "tiny-sd", "--format", "onnx", "--precision", precision, "--out", str(folder)]
        done = raysd(*words, storage=store)
        assert done.returncode == 0, done.stderr
        bare = locate("tiny-sd", storage)
        assert np.abs(drawn(bare, written(folder)) - pytorchs(bare)).max() <= apart
