"""What a newcomer types first. It takes minutes: by hand, and before each release."""

import json
import re

import pytest
from PIL import Image

from tests.cluster import json_of, raysd

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]


def test_the_demo_teaches_something_visible_and_says_what_to_type_next(tmp_path, monkeypatch, found):
    monkeypatch.chdir(tmp_path)
    store = tmp_path / "store"
    done = raysd("demo", storage=store)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    shown = json_of(raysd("runs", "show", "demo", "--json", storage=store))
    assert shown["version"] in said
    assert f"{shown['base_loss']:.4f}" in said
    assert f"{shown['loss']:.4f}" in said
    assert shown["loss"] < shown["base_loss"]
    assert str(tmp_path / "demo.png") in said
    picture = Image.open(tmp_path / "demo.png").convert("RGB")
    before, after = (
        picture.crop((0, top, picture.width, top + picture.height // 2)) for top in (0, picture.height // 2)
    )
    assert before.tobytes() != after.tobytes()
    command = re.search(r"raysd generate (\S+) --prompt '([^']+)' --out (\S+)", said)
    assert command is not None, said
    words = ["generate", command[1], "--prompt", command[2], "--out", command[3]]
    assert raysd(*words, storage=store).returncode == 0
    assert (tmp_path / command[3]).exists()
    again = raysd("demo", storage=store)
    assert again.returncode == 0
    assert [row["versions"] for row in json_of(raysd("models", "list", "--json", storage=store))] == [[1]]
    rows = [json.loads(line) for line in (store / "runs/demo/metrics.jsonl").read_text().splitlines()]
    found["seconds of training"] = round(rows[-1]["time"] - rows[1]["time"])
    found["validation loss, before and after"] = f"{shown['base_loss']:.4f}, {shown['loss']:.4f}"
