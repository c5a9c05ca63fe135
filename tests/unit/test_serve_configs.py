"""The committed Serve configs are what Ray and raysd take; wrong ones say which field is wrong."""

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from raysd.config import override
from raysd.config.serving import ServingSpec
from raysd.errors import SpecError
from raysd.serve.run import BUILDER, read_config

FOLDER = Path(__file__).parents[2] / "serve"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_each_config_is_taken(path: Path) -> None:
    spec, http = read_config(path)
    assert spec.models
    assert http["port"] == 8000
    assert spec.public == (http["host"] != "127.0.0.1")
    assert ServeDeploySchema.model_validate(yaml.safe_load(path.read_text())).applications[0].import_path == BUILDER


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": []}, "models: Tuple should have at least 1 item"),
        ({"models": [{"ref": "tiny-sd", "batch": 3}]}, "batch: unknown"),
        ({"models": [{"ref": "cats@1"}, {"ref": "cats:production"}]}, "cats is served twice"),
        ({"models": [{"ref": "cats", "replicas": {"least": 3, "most": 1}}]}, "least: is more than most"),
        ({"models": [{"ref": "cats", "precision": "int8"}]}, "precision: torch has no int8"),
        ({"models": [{"ref": "cats", "backend": "onnx", "precision": "bf16"}]}, "precision: onnx has no bf16"),
        ({"models": [{"ref": "cats", "backend": "onnx", "compile": True}]}, "compile: is for backend torch"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    application = {"name": "raysd", "import_path": BUILDER, "args": change}
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump({"applications": [application]}))
    with pytest.raises(SpecError) as error:
        read_config(path)
    assert message in str(error.value)
    assert "serve.yaml" in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_a_config_that_names_no_host_is_for_this_machine(tmp_path: Path) -> None:
    """Ray's own default would be every address."""
    application = {"name": "raysd", "import_path": BUILDER, "args": {"models": [{"ref": "tiny-sd"}]}}
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump({"applications": [application]}))
    _, http = read_config(path)
    assert "host" not in http


def test_what_is_no_config_is_said_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    for text in ("a: [", "applications: 3", "applications: [{name: x, import_path: other.module:app}]"):
        path.write_text(text)
        with pytest.raises(SpecError, match=r"serve\.yaml"):
            read_config(path)
    with pytest.raises(SpecError, match="no such file"):
        read_config(tmp_path / "none.yaml")


def test_names_come_from_references() -> None:
    names = {
        "cats:production": "cats",
        "cats@3": "cats",
        "./models/dog": "dog",
        "org/model": "model",
        "tiny-sd": "tiny-sd",
    }
    for ref, name in names.items():
        spec = ServingSpec(models=({"ref": ref},))  # type: ignore[arg-type]
        assert spec.models[0].served_name == name
    assert override(spec, {"public": True}).public
