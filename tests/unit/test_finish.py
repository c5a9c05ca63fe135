"""A service with classifier and mark: what is flagged is neither kept nor shown, in no preview either; the rest is marked."""

import asyncio
import base64
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from raysd.config.serving import SafetySpec
from raysd.references import identity
from raysd.serve import watermark
from raysd.serve.finish import Finish
from raysd.serve.safety import Classifier
from tests.classifiers import image_classifier
from tests.house import House

BODY = {"model": "cats", "prompt": "a red circle", "seed": 1, "num_inference_steps": 3, "n": 3}
INPUT = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 3, "num_outputs": 3}


class Some(Classifier):
    """Flags the pictures of these numbers."""

    def __init__(self, *numbers: int):
        self.numbers = numbers

    def flagged(self, images: Sequence[Image.Image]) -> list[bool]:
        return [number in self.numbers for number in range(len(images))]


def ask(house: House, path: str, body: Any, **headers: str) -> Any:
    answer = asyncio.run(house.ask(path, body, **headers))
    house.worker.stop()
    house.database.close()
    return answer


def files(house: House) -> list[str]:
    return [entry.path for entry in house.storage.list("generated")]


@pytest.fixture(scope="module")
def flags_all(tmp_path_factory: pytest.TempPathFactory) -> Finish:
    folder = image_classifier(tmp_path_factory.mktemp("classifier") / "it", flags=True)
    return Finish(Classifier(SafetySpec(path=str(folder))))


def test_openai_is_told_of_a_violation(tmp_path: Path, tiny_base: Path, flags_all: Finish) -> None:
    house = House(tmp_path, tiny_base, flags_all)
    answer = ask(house, "/v1/images/generations", BODY)
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "code": "content_policy_violation",
        "type": "invalid_request_error",
        "param": None,
        "message": "the safety classifier held it back; try another prompt or seed",
    }
    assert files(house) == []
    told = {name: (value, labels) for name, value, labels in house.told}
    assert told["raysd_flagged_pictures_total"] == (3, {"model": "cats", "version": str(tiny_base)})
    assert told["raysd_requests_total"][1]["outcome"] == "flagged"
    assert "raysd_images_total" not in told


def test_a_stream_shows_nothing_and_says_why(tmp_path: Path, tiny_base: Path, flags_all: Finish) -> None:
    body = {**BODY, "n": 1, "stream": True, "partial_images": 2}
    text = ask(House(tmp_path, tiny_base, flags_all), "/v1/images/generations", body).text
    (event,) = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    assert event["error"]["code"] == "content_policy_violation"
    assert "partial_image" not in text


def test_replicates_clients_see_it_failed(tmp_path: Path, tiny_base: Path, flags_all: Finish) -> None:
    body = {"model": "raysd/cats", "input": INPUT}
    said = ask(House(tmp_path, tiny_base, flags_all), "/v1/predictions", body, Prefer="wait").json()
    assert (said["status"], said["output"], said["generations"]) == ("failed", None, [])
    assert said["error"].startswith("content_policy_violation: ")


def test_of_several_the_others_are_shown(tmp_path: Path, tiny_base: Path) -> None:
    house = House(tmp_path, tiny_base, Finish(Some(1)))
    answer = asyncio.run(house.ask("/v1/images/generations", BODY))
    made = answer.json()["data"]
    assert [(each["seed"], each["generation"][-2:]) for each in made] == [(1, "-0"), (3, "-2")]
    assert len(files(house)) == 2
    found = house.queue.get(made[0]["generation"][:-2])
    assert (found.status, found.metrics["flagged"]) == ("succeeded", 1)
    assert [picture.number for picture in found.pictures] == [0, 2]
    house.worker.stop()
    house.database.close()


def test_a_classifier_that_breaks_down_lets_nothing_through(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Some, images: Sequence[Image.Image]) -> list[bool]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Some, "flagged", broken)
    house = House(tmp_path, tiny_base, Finish(Some()))
    assert ask(house, "/v1/images/generations", BODY).status_code == 500
    assert files(house) == []


def test_each_picture_and_preview_bears_its_versions_mark(tmp_path: Path, tiny_base: Path) -> None:
    house = House(tmp_path, tiny_base, Finish(mark=watermark.mark))
    body = {**BODY, "n": 1, "stream": True, "partial_images": 1}
    text = ask(house, "/v1/images/generations", body).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    assert [event["type"] for event in events] == ["image_generation.partial_image", "image_generation.completed"]
    for event in events:
        image = Image.open(io.BytesIO(base64.b64decode(event["b64_json"])))
        assert watermark.drawn_by(image, identity(tiny_base))
    (path,) = files(house)
    found = house.queue.get(events[1]["generation"][:-2])
    assert hashlib.sha256(house.storage.read(path)).hexdigest() == found.pictures[0].sha256


def test_a_picture_too_small_for_the_mark_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    house = House(tmp_path, tiny_base, Finish(mark=watermark.mark))
    answer = ask(house, "/v1/images/generations", {**BODY, "size": "32x32", "n": 1})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in (None, "width")
    assert "too small to be marked" in answer.text
