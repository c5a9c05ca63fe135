"""The classifier: both layouts, and that it fails closed: what is not whole does not start, what is no number does not pass."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from raysd.config.serving import ModelSpec, SafetySpec
from raysd.errors import RequestError
from raysd.serve.finish import open_finish
from raysd.serve.safety import Classifier, check
from tests.classifiers import image_classifier, safety_checker

TWO = [Image.new("RGB", (64, 64), "red"), Image.new("RGB", (96, 64), "white")]
Make = Callable[..., Path]


@pytest.mark.parametrize("make", [image_classifier, safety_checker])
@pytest.mark.parametrize("flags", [True, False])
def test_both_layouts_say_what_their_weights_say(tmp_path: Path, make: Make, flags: bool) -> None:
    classifier = Classifier(SafetySpec(path=str(make(tmp_path / "it", flags=flags))))
    assert classifier.flagged(TWO) == [flags, flags]
    assert classifier.flagged(TWO[:1]) == [flags]


def test_the_spec_decides_labels_and_threshold(tmp_path: Path) -> None:
    folder = image_classifier(tmp_path / "it", flags=True, labels=("Drawing", "Photo"))
    flagged = {
        labels: Classifier(SafetySpec(path=str(folder), labels=labels)).flagged(TWO[:1])[0]
        for labels in (("photo",), ("drawing",), ("drawing", "photo"))
    }
    assert flagged == {("photo",): True, ("drawing",): False, ("drawing", "photo"): True}
    assert not Classifier(SafetySpec(path=str(folder), labels=("drawing",), threshold=0.01)).flagged(TWO[:1])[0]


def test_several_labels_at_once_are_each_judged_alone(tmp_path: Path) -> None:
    folder = image_classifier(tmp_path / "it", flags=True)
    rewrite(folder, problem_type="multi_label_classification")
    assert Classifier(SafetySpec(path=str(folder))).flagged(TWO[:1]) == [True]
    assert Classifier(SafetySpec(path=str(folder), labels=("normal",))).flagged(TWO[:1]) == [False]


def test_what_is_no_number_does_not_pass(tmp_path: Path) -> None:
    classifier = Classifier(SafetySpec(path=str(image_classifier(tmp_path / "it", flags=False))))
    assert classifier._judged(torch.tensor([[float("nan"), float("nan")], [9.0, -9.0]])) == [True, False]


@pytest.mark.parametrize("make", [image_classifier, safety_checker])
@pytest.mark.parametrize("damage", ["lacks a tensor", "holds NaN", "is cut off"])
def test_weights_that_are_not_whole_do_not_start(tmp_path: Path, make: Make, damage: str) -> None:
    folder = make(tmp_path / "it", flags=False)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("layernorm_after.bias") or name == "concept_embeds")
    if damage == "lacks a tensor":
        del tensors[name]
        save_file(tensors, path, {"format": "pt"})
    elif damage == "holds NaN":
        tensors[name].fill_(float("nan"))
        save_file(tensors, path, {"format": "pt"})
    else:
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RequestError, match=r"safety\.path") as refused:
        Classifier(SafetySpec(path=str(folder)))
    assert len(str(refused.value).splitlines()) <= 3
    short = ".".join(name.split(".")[-2:])  # what lies before it is named otherwise in the file
    assert damage == "is cut off" or short in str(refused.value)


def test_what_is_no_classifier_names_its_field(tmp_path: Path) -> None:
    spec = SafetySpec(path=str(tmp_path / "it"))
    with pytest.raises(RequestError, match=r"safety\.path .* has no config\.json"):
        check(spec)
    folder = image_classifier(tmp_path / "it", flags=False)
    check(spec)
    with pytest.raises(RequestError, match=r"safety\.labels: .* knows no 'gore'; it has normal, nsfw"):
        check(SafetySpec(path=str(folder), labels=("gore",)))
    rewrite(folder, architectures=["UNet2DConditionModel"])
    with pytest.raises(RequestError, match="is a UNet2DConditionModel"):
        check(spec)
    shutil.rmtree(folder)
    (image_classifier(folder, flags=False) / "preprocessor_config.json").unlink()
    with pytest.raises(RequestError, match=r"has no preprocessor_config\.json"):
        check(spec)


def test_no_pickle_and_no_code_of_the_folder_is_run(tmp_path: Path) -> None:
    folder = image_classifier(tmp_path / "it", flags=False)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(tmp_path / "away")
    with pytest.raises(RequestError, match="pickles are not loaded"):
        Classifier(SafetySpec(path=str(folder)))
    (tmp_path / "away").rename(folder / "model.safetensors")
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    rewrite(
        folder, model_type="mine", auto_map={"AutoModelForImageClassification": "code.Mine", "AutoConfig": "code.C"}
    )
    with pytest.raises(RequestError, match=r"safety\.path"):
        Classifier(SafetySpec(path=str(folder)))
    assert not (tmp_path / "ran").exists()


def test_a_model_has_neither_unless_it_is_asked_for(tmp_path: Path) -> None:
    plain = open_finish(ModelSpec(ref="cats"))
    assert plain.classifier is None
    assert plain.previews
    assert plain.flagged(TWO) == [False, False]
    assert plain.marked(TWO[0], "f" * 64) is TWO[0]
    safety = SafetySpec(path=str(image_classifier(tmp_path / "it", flags=True)))
    both = open_finish(ModelSpec(ref="cats", safety=safety, watermark="dct"))
    assert both.classifier is not None
    assert not both.previews
    assert both.marked(TWO[0], "f" * 64) is not TWO[0]


def rewrite(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
