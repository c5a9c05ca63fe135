"""A whole evaluation in this process: what it says of two models, what it keeps, and its report."""

import io
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from raysd.cli import evaluate as cli
from raysd.config import EvaluationSpec
from raysd.data.dataset import prepare
from raysd.errors import DataError, NotFound, RequestError, SpecError
from raysd.evaluate.evaluation import _public, _Work, evaluate, spec_of
from raysd.evaluate.kept import of_version
from raysd.evaluate.reference import data_spec
from raysd.evaluate.report import Training, page, table
from raysd.models.base import Geometry
from raysd.references import identity, locate
from raysd.registry import Registry
from raysd.storage import Storage
from raysd.train import runs

MARKUP = '<script>alert("x")</script><img src=x onerror=alert(1)>'


@pytest.fixture(scope="module")
def damaged(tiny_base, tmp_path_factory):
    """The base with noise in the weights that draw."""
    folder = tmp_path_factory.mktemp("damaged") / "model"
    shutil.copytree(tiny_base, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.manual_seed(0)
    save_file({name: t + 0.1 * torch.randn_like(t) for name, t in load_file(weights).items()}, weights)
    return folder


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return Storage(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(f"a red circle\na blue star {MARKUP}\n")
    return str(path)


@pytest.fixture(scope="module")
def seen():
    return []


@pytest.fixture(scope="module")
def found(tiny_base, damaged, tiny_pictures, storage, prompts, seen):
    given = {"prompts": prompts, "count": 6, "steps": 2, "workers": 0, "timesteps": 1, "inception": None}
    spec = spec_of(str(tiny_base), str(tiny_pictures), given, storage)
    assert spec.data.resolution == 64, "the model's own"
    return evaluate(str(tiny_base), str(damaged), spec, storage, seen.append)


def test_pictures_are_read_at_the_size_that_the_family_says():
    family = SimpleNamespace(geometry=lambda folder: Geometry(channels=4, factor=8, size=96, unit=8))
    assert data_spec("x", SimpleNamespace(version=None, folder=None, family=family)).resolution == 96


def test_both_models_get_every_score_with_its_n(found):
    names = ["clip_score", "inception_score", "diversity", "fid", "kid", "precision", "recall"]
    for judged in (found.model, found.against):
        assert [score.name for score in judged.scores] == [*names, "subject_fidelity", "nearest_training"]
        by_name = {score.name: score for score in judged.scores}
        assert by_name["fid"].n == 5, "half of ten pictures"
        assert by_name["fid"].null is not None
        assert judged.losses.validation.n == 1
        assert judged.losses.train.n == 9
        assert len(judged.losses.bands) == 4
        assert len(judged.nearest) == 6
    assert (found.features, found.matcher) == ("bundled judge tiny-clip",) * 2
    assert [score.name for score in found.differences] == ["clip_score", "validation_loss"]
    assert any("bundled judge" in line for line in found.warnings)
    assert found.data["train"] == 9


def test_it_says_what_happens(found, seen):
    counts = {event["text"] for event in seen if event["kind"] == "count"}
    assert {"check pictures", "features of the data"} <= counts
    assert any(text.startswith("draw with") for text in counts)
    assert {event["kind"] for event in seen} == {"phase", "data", "count"}


def test_a_second_call_gives_the_same_numbers_and_draws_nothing(
    found, tiny_base, damaged, tiny_pictures, storage, monkeypatch
):
    monkeypatch.setattr("raysd.evaluate.pictures._here", lambda *_: pytest.fail("draws again"))
    again = evaluate(str(tiny_base), str(damaged), EvaluationSpec(**found.spec), storage, lambda event: None)
    assert again.key == found.key
    assert again.to_json()["model"] == found.to_json()["model"]


def test_the_result_is_kept_as_json_without_infinities(found, storage):
    body = json.loads(
        storage.read(f"{found.model.album}/{found.key}.json"), parse_constant=lambda name: pytest.fail(name)
    )
    assert body | {"created": ""} == json.loads(json.dumps(found.to_json())) | {"created": ""}
    assert body["model"]["losses"]["validation"]["low"] is None, "one held-out picture has no interval"


def test_without_data_it_says_what_is_left_out(tiny_base, storage, prompts):
    spec = EvaluationSpec(count=4, steps=1, workers=0, prompts=prompts)
    found = evaluate(str(tiny_base), None, spec, storage, lambda event: None)
    assert [score.name for score in found.model.scores] == ["clip_score", "inception_score", "diversity"]
    assert (found.against, found.data, found.model.losses, found.differences) == (None, None, None, ())
    assert any("--data" in line for line in found.warnings)
    console = Console(file=io.StringIO(), width=140)
    console.print(table(found))
    assert "clip_score" in console.file.getvalue()


def test_a_wrong_request_is_refused_before_anything_is_drawn(tiny_base, tmp_path):
    storage = Storage(str(tmp_path / "fresh"))
    plain = EvaluationSpec(count=4, workers=0)

    def refuse(kind, match, ref=str(tiny_base), against=None, **fields):
        with pytest.raises(kind, match=match):
            evaluate(ref, against, plain.model_copy(update=fields), storage, lambda event: None)

    refuse(RequestError, "the same model", against=str(tiny_base))
    refuse(NotFound, "absent.txt: no such file", prompts="absent.txt")
    refuse(NotFound, "nowhere: no such folder", against="./nowhere")
    refuse(NotFound, "clip nowhere", clip="nowhere")
    refuse(NotFound, "inception nowhere", inception="nowhere.safetensors")
    with pytest.raises(DataError, match="no such folder or zip"):
        evaluate(str(tiny_base), None, spec_of(str(tiny_base), "./nowhere", {}, storage), storage, lambda event: None)
    with pytest.raises(SpecError, match="count"):
        spec_of(str(tiny_base), None, {"count": 1}, storage)
    assert not storage.list("evaluations")


def test_a_version_is_read_as_it_was_trained_and_keeps_its_evaluations(tiny_base, tmp_path, prompts, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    storage = Storage(str(tmp_path / "store"))
    files = {
        p.relative_to(tiny_base).as_posix(): p for p in tiny_base.rglob("*") if p.suffix in (".json", ".safetensors")
    }
    files |= {p.relative_to(tiny_base).as_posix(): p for p in tiny_base.rglob("*.txt")}
    data = {"source": "old", "prompt": "a zorb", "resolution": 72, "validation": 0.3}
    record = {"base": str(tiny_base), "base_digest": identity(tiny_base), "spec": {"data": data}}
    version = Registry(storage).publish("cats", files, record, key="one")
    spec = spec_of("cats@1", "new", {}, storage)
    assert spec.data.model_dump(include={"source", "prompt", "resolution", "validation"}) == {**data, "source": "new"}
    assert of_version(version, storage) == []
    spec = EvaluationSpec(count=2, steps=1, workers=0, prompts=prompts)
    found = evaluate("cats", None, spec, storage, lambda event: None)
    [row] = of_version(version, storage)
    assert found.model.ref == "cats@1"
    assert (row["pictures"], row["against"], row["matcher"]) == (2, None, "bundled judge tiny-clip")
    assert row["scores"]["clip_score"] == found.model.scores[0].value
    assert locate("cats", storage).version.digest[:32] == found.model.digest
    for key in ("two", "three"):  # the same files again, and a record of their own: other versions
        Registry(storage).publish("cats", files, {**record, "key": key}, key=key)
    evaluate("cats@2", None, spec, storage, lambda event: None)
    page(evaluate("cats@3", "cats@2", spec, storage, lambda event: None), storage, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text("utf-8")
    order = re.findall(r"<figcaption>(cats@\d)</figcaption>", html)
    assert order == ["cats@1", "cats@2", "cats@3"] * 2, "all that drew the same prompts, before and after last"


def test_the_page_opens_from_disk_and_holds_no_foreign_markup(found, storage, tmp_path):
    page(found, storage, tmp_path / "out" / "page.html")
    html = (tmp_path / "out" / "page.html").read_text("utf-8")
    assert MARKUP not in html
    assert "<script" not in html
    assert "onerror=alert(1)&gt;" in html
    assert "default-src 'none'; img-src data:" in html
    urls = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert not [url for url in urls if not url.startswith(("data:image/png;base64,", "#"))]
    assert html.count("<svg") == 1 + 3 + 9, "bands, losses and every score"
    assert html.count("<img") == 2 * 2 + 2 * 6, "before and after of two prompts, six nearest pairs"
    assert "&#34;steps&#34;: 2" in html, "the spec"
    for value in ("bundled judge tiny-clip", "equal sets: ", found.model.ref, found.against.ref):
        assert value in html


def test_the_page_shows_how_the_version_was_trained(found, storage, tmp_path):
    body = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(body, "PNG")
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4, "validation_loss": 0.3}]
    page(found, storage, tmp_path / "plain.html")
    page(found, storage, tmp_path / "page.html", Training("zorbs", rows, {0: [body.getvalue()], 2: [body.getvalue()]}))
    plain, html = ((tmp_path / name).read_text("utf-8") for name in ("plain.html", "page.html"))
    assert "Training run zorbs" in html
    assert html.count("<svg") == plain.count("<svg") + 1
    assert html.count("<img") == plain.count("<img") + 2
    assert html.index("step 0") < html.index("step 2")


def test_the_table_shows_intervals_and_escapes_foreign_text(found):
    console = Console(file=io.StringIO(), width=220, force_terminal=True)
    console.print(table(found))
    shown = console.file.getvalue()
    for word in ("validation_loss", "training_loss", "overfitting_gap", "fid", "equal sets", "paired"):
        assert word in shown


def test_losses_of_models_that_predict_different_things_are_not_compared(tiny_base, tiny_pictures, tmp_path):
    other = tmp_path / "velocity"
    shutil.copytree(tiny_base, other)
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": "v_prediction"}))
    given = {"count": 2, "steps": 1, "workers": 0, "timesteps": 1}
    store = Storage(str(tmp_path / "store"))
    spec = spec_of(str(tiny_base), str(tiny_pictures), given, store)
    found = evaluate(str(tiny_base), str(other), spec, store, lambda event: None)
    assert found.against.losses.validation.value != found.model.losses.validation.value
    assert [score.name for score in found.differences] == ["clip_score"]
    assert any(line.startswith("validation losses are not compared") for line in found.warnings)
    assert any(line.startswith("no diversity") for line in found.warnings)


@pytest.mark.parametrize("known", [None, "same", "other"])
def test_losses_of_pictures_that_one_may_have_seen_are_not_compared(tiny_pictures, storage, known):
    """A version that was trained on all pictures, or before the folder changed."""
    spec = spec_of("tiny-sd", str(tiny_pictures), {}, storage)
    dataset = prepare(spec.data, storage, lambda *_: None)
    digest = {"same": dataset.digest, "other": "0" * 64}.get(known)
    version = SimpleNamespace(record={"data_digest": digest}) if known else None
    work = _Work(spec, storage, print, (), SimpleNamespace(name="", scale=1), SimpleNamespace(name=""), dataset)
    work.alike, work.other_split = True, []
    if work._learnt_otherwise(SimpleNamespace(ref="cats@2", version=version)):
        work.other_split.append("cats@2")
    assert any("cats@2 was trained on other pictures, or another split" in text for text in work._warnings()) is (
        known == "other"
    )
    drawn = SimpleNamespace(images=torch.ones(2, 3), texts=torch.ones(2, 3))
    errors = np.ones((3, 4, 2))
    compared = [score.name for score in work._differences([drawn, drawn], [(errors, None)] * 2)]
    assert ("validation_loss" in compared) is (known != "other")


def test_what_is_kept_of_a_source_has_no_secret(tiny_pictures, storage):
    spec = spec_of("tiny-sd", str(tiny_pictures), {}, storage)
    secret = "https://user:word@host.test/x.zip?X-Amz-Signature=deadbeef"
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"source": secret})})
    assert _public(spec)["data"]["source"] == "https://host.test/x.zip"


def test_a_version_is_shown_with_its_own_run_alone(tmp_path, monkeypatch):
    """A run's name is free when the run is deleted."""
    storage = Storage(str(tmp_path))
    first = runs.RunRecord("zorbs", {})
    monkeypatch.setattr(cli, "open_storage", lambda: storage)
    made = SimpleNamespace(record={"run": {"name": "zorbs", "id": first.id}})
    monkeypatch.setattr(cli, "open_registry", lambda: SimpleNamespace(resolve=lambda ref: made))
    runs.write(runs.storage_of(storage, "zorbs"), first)
    assert cli._training("zorbs@1").run == "zorbs"
    runs.write(runs.storage_of(storage, "zorbs"), runs.RunRecord("zorbs", {}))
    assert cli._training("zorbs@1") is None


def test_what_was_measured_is_shown_before_the_page_is_written(monkeypatch):
    """Whatever may go wrong with that."""
    done = []
    found = SimpleNamespace(model=SimpleNamespace(ref="tiny-sd"), to_json=dict)
    monkeypatch.setattr("raysd.evaluate.evaluation.evaluate", lambda *_: found)
    monkeypatch.setattr("raysd.evaluate.report.page", lambda *_: done.append("page"))
    monkeypatch.setattr(cli, "show", lambda *_: done.append("table"))
    monkeypatch.setattr(cli, "reserve_output", lambda: None)
    CliRunner().invoke(cli.app, ["tiny-sd", "--html", "x.html"], catch_exceptions=False)
    assert done == ["table", "page"]
