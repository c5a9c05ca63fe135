"""The official Replicate client against the service, unmodified, and what its API says beyond it."""

import io
import re
import threading
import time

import httpx
import numpy as np
import pytest
from PIL import Image
from replicate.client import Client
from replicate.exceptions import ModelError, ReplicateError

from raysd.config.serving import HttpSpec
from raysd.errors import RequestError
from raysd.serve.http.application import secret_in
from raysd.serve.http.links import user_digest
from raysd.serve.http.wire import Input, drawing
from raysd.serve.queue import Queue
from tests.serving import CATS, DIGESTS, SIDE

FAST = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 5}


@pytest.fixture
def client(service):
    client = Client(api_token="anything on loopback", base_url=service[1])
    client.poll_interval = 0.05
    return client


@pytest.fixture
def held(service, monkeypatch):
    """Drawing stops before its first step until this is set."""
    go_on = threading.Event()
    monkeypatch.setattr(service[0].desk, "step", lambda: go_on.wait(60))
    yield go_on
    go_on.set()


def png(picture):
    body = io.BytesIO()
    picture.save(body, "PNG")
    body.seek(0)
    return body


def test_run_waits_for_pictures(client):
    links = client.run("raysd/cats", input={**FAST, "num_outputs": 2})
    pictures = [Image.open(io.BytesIO(httpx.get(link).content)) for link in links]
    assert [picture.size for picture in pictures] == [(SIDE, SIDE)] * 2
    by_version = client.run(f"raysd/cats:{DIGESTS[1]}", input={**FAST, "seed": 6})
    assert np.array_equal(pictures[1], Image.open(io.BytesIO(httpx.get(by_version[0]).content)))


@pytest.mark.parametrize("version", ["cats", "cats@2", DIGESTS[1], "raysd/cats"])
def test_a_prediction_from_its_beginning_to_its_end(client, version):
    prediction = client.predictions.create(version=version, input=FAST)
    assert prediction.status == "starting"
    prediction.wait()
    assert prediction.status == "succeeded"
    assert prediction.model == "raysd/cats"
    assert prediction.version == (DIGESTS[1] if "2" in version else CATS.digest)
    assert len(prediction.output) == 1
    assert prediction.input["prompt"] == FAST["prompt"]
    assert (prediction.input["num_inference_steps"], prediction.input["seed"]) == (2, 5)
    assert prediction.metrics["image_count"] == 1
    assert prediction.metrics["predict_time"] <= prediction.metrics["total_time"]
    assert prediction.created_at < prediction.completed_at
    assert prediction.created_at.endswith("Z")
    assert client.predictions.get(prediction.id).output is not None


def test_a_wait_that_is_too_short(client, service, held):
    _, url = service
    answer = httpx.post(f"{url}/v1/predictions", json={"version": "cats", "input": FAST}, headers={"Prefer": "wait=1"})
    assert answer.status_code == 202
    assert answer.headers["preference-applied"] == "wait=1"
    # As Replicate does it: their client takes anything else for the end.
    assert answer.json()["status"] == "starting"
    held.set()
    prediction = client.predictions.get(answer.json()["id"])
    prediction.wait()
    assert prediction.status == "succeeded"


def test_cancel(client, service, held):
    prediction = client.predictions.create(version="cats", input=FAST)
    prediction.cancel()
    held.set()
    prediction.wait()
    assert prediction.status == "canceled"
    prediction.cancel()  # again
    assert prediction.status == "canceled"
    assert prediction.output is None


def test_what_is_past_its_time_is_canceled_also_in_the_clients_words(client, service, held):
    _, url = service
    first = client.predictions.create(version="cats", input=FAST)  # holds the only worker
    asked = {"json": {"version": "cats", "input": FAST}, "headers": {"Cancel-After": "5s"}}
    late = httpx.post(f"{url}/v1/predictions", **asked).json()
    queue = service[0].queue
    deadline = queue.get(late["id"]).deadline
    assert deadline - queue.get(late["id"]).created == pytest.approx(5, abs=2)
    Queue(service[0].database, clock=lambda session: deadline + 1).expire()
    assert queue.get(late["id"]).status == "aborted"
    assert client.predictions.get(late["id"]).status == "canceled"
    held.set()
    first.wait()


@pytest.mark.parametrize(("life", "seconds"), [(None, 3600), ("2h", 7200)])
def test_whoever_says_nothing_waits_an_hour(service, life, seconds):
    headers = {"X-Raysd-User": "anna", **({"Cancel-After": life} if life else {})}
    asked = {"version": "cats", "input": {**FAST, "num_inference_steps": 1}}
    httpx.post(f"{service[1]}/v1/predictions", json=asked, headers=headers)
    ask = service[0].desk.asks[-1]
    assert ask.deadline - time.time() == pytest.approx(seconds, abs=30)
    assert ask.user == user_digest(secret_in(service[0].storage), None, "anna")


@pytest.mark.parametrize("how", ["drawn", "held"])
def test_a_prediction_is_deleted_for_good(client, service, held, how):
    url = f"{service[1]}/v1/predictions"
    if how == "drawn":
        held.set()
    prediction = client.predictions.create(version="cats", input={**FAST, "prompt": "Q9"})
    if how == "drawn":
        prediction.wait()
    for _ in range(2):
        assert httpx.delete(f"{url}/{prediction.id}").status_code == 204
    held.set()
    prediction.wait()
    told = httpx.get(f"{url}/{prediction.id}").json()
    assert (told["data_removed"], told["generations"], told["input"]["prompt"]) == (True, [], "")
    assert told["status"] == ("succeeded" if how == "drawn" else "canceled")
    assert "Q9" not in httpx.get(url).text
    if how == "drawn":
        assert httpx.get(prediction.output[0]).status_code == 404
    assert httpx.delete(f"{url}/{'a' * 26}").status_code == 404


@pytest.mark.parametrize("life", ["4s", "25h", "1d", "0", "s5", "-5"])
def test_a_life_that_is_no_duration(service, life):
    _, url = service
    asked = {"version": "cats", "input": FAST}
    answer = httpx.post(f"{url}/v1/predictions", json=asked, headers={"Cancel-After": life})
    assert answer.status_code in (400, 422)
    assert "Cancel-After" in answer.json()["detail"]


@pytest.mark.parametrize("wait", ["wait=0", "wait=61", "wait=x", "wait=-1", "wait=1.5"])
def test_a_wait_that_is_none(service, wait):
    _, url = service
    answer = httpx.post(f"{url}/v1/predictions", json={"version": "cats", "input": FAST}, headers={"Prefer": wait})
    assert answer.status_code == 400
    assert "Prefer" in answer.json()["detail"]


def test_a_failure_is_the_clients_model_error(client, service, monkeypatch):
    monkeypatch.setattr(service[0].desk, "step", lambda: 1 / 0)
    with pytest.raises(ModelError, match="ZeroDivisionError"):
        client.run("raysd/cats", input=FAST)


def test_pages_of_a_list(client, service, monkeypatch):
    monkeypatch.setattr("raysd.serve.http.predictions.PAGE", 2)
    made = [client.predictions.create(version="cats", input={**FAST, "num_inference_steps": 1}).id for _ in range(5)]
    seen, cursor = [], ...
    while cursor is not None and len(seen) < 5:
        page = client.predictions.list(cursor)
        assert len(page) == 2
        seen += [prediction.id for prediction in page]
        cursor = page.next
    assert seen[:5] == made[::-1]
    for wrong in ("x", "AAAA", "MS4wIGFiYw", "%00"):
        with pytest.raises(ReplicateError, match="cursor: not one"):
            client.predictions.list(f"/v1/predictions?cursor={wrong}")


@pytest.mark.parametrize("how", ["file", "base64"])
def test_a_picture_to_start_from(client, service, how):
    given = Image.new("RGB", (SIDE, SIDE), (10, 200, 30))
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, SIDE // 2, SIDE))  # the left half is drawn anew
    wanted = {**FAST, "image": png(given), "mask": png(mask)}
    prediction = client.models.predictions.create(
        "raysd/cats", input=wanted, wait=True, file_encoding_strategy=how if how == "base64" else None
    )
    after = np.asarray(Image.open(io.BytesIO(httpx.get(prediction.output[0]).content)))
    assert np.array_equal(after[:, SIDE // 2 :], np.asarray(given)[:, SIDE // 2 :])
    assert not np.array_equal(after[:, : SIDE // 2], np.asarray(given)[:, : SIDE // 2])


def test_pictures_that_are_refused(client):
    small, large = png(Image.new("RGB", (32, 32))), png(Image.new("RGB", (64, 64)))
    for how in (None, "base64"):
        with pytest.raises(ReplicateError, match="mask: "):
            client.models.predictions.create(
                "raysd/cats", input={**FAST, "image": small, "mask": large}, file_encoding_strategy=how
            )
    for wrong in ("http://127.0.0.1/x.png", "data:image/png,abc", "data:image/png;base64,####", "data:;base64,AAAA"):
        with pytest.raises(ReplicateError, match="image: "):
            client.predictions.create(version="cats", input={**FAST, "image": wrong})
    with pytest.raises(ReplicateError, match="mask: needs image"):
        client.predictions.create(version="cats", input={**FAST, "mask": "data:;base64,AAAA"})
    for given, missing in (("width", "height"), ("height", "width")):
        with pytest.raises(ReplicateError, match=f"{missing}: give both sides"):
            client.predictions.create(version="cats", input={**FAST, "image": small, given: 64})
    with pytest.raises(ReplicateError, match="content: not a readable"):
        client.files.create(io.BytesIO(b"text"))


def test_a_null_is_as_good_as_absent():
    few = HttpSpec(most_steps=3)
    for values in ({}, {"num_inference_steps": None}):
        assert drawing(Input(prompt="a", **values), few).steps == 3


@pytest.mark.parametrize("side", ["width", "height"])
def test_one_side_alone_is_bounded_as_well(side):
    small = HttpSpec(most_pixels=512 * 512)
    assert getattr(drawing(Input(prompt="a", **{side: 512}), small), side) == 512
    with pytest.raises(RequestError, match=f"{side}: at most 262,144 pixels here"):
        drawing(Input(prompt="a", **{side: 2048}), small)


def test_the_models_that_are_served(client):
    assert [model.name for model in client.models.list()] == ["tiny-sd", "cats"]
    model = client.models.get("raysd/cats")
    assert (model.owner, model.name, model.latest_version.id) == ("raysd", "cats", CATS.digest)
    assert [version.id for version in model.versions.list()] == list(DIGESTS)
    assert model.versions.get(DIGESTS[1]).id == DIGESTS[1]
    assert "guidance_scale" in str(model.latest_version.openapi_schema)
    for name in ("raysd/dogs", "others/cats"):
        with pytest.raises(ReplicateError) as refused:
            client.models.get(name)
        assert refused.value.status == 404


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"input": {**FAST, "guidance_scale": 51}}, "input.guidance_scale: "),
        ({"input": {"num_outputs": 1}}, "input.prompt: required"),
        ({"input": {**FAST, "width": 65}}, "input.width: "),
        ({"input": {**FAST, "magic": 1}}, "input.magic: unknown"),
        ({"stream": True}, "stream: "),
        ({"webhook_events_filter": ["end"]}, "webhook_events_filter"),
        ({"webhook_events_filter": ["completed"]}, "webhook_events_filter: needs webhook"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(client, wrong, said):
    with pytest.raises(ReplicateError) as refused:
        client.predictions.create(**{"version": "cats", "input": FAST, **wrong})
    assert said in refused.value.detail
    assert refused.value.status in (400, 422)


def test_a_prediction_that_is_not_there(client):
    for wrong in ("x", "a" * 26, "a/b", "%00"):
        with pytest.raises(ReplicateError) as refused:
            client.predictions.get(wrong)
        assert refused.value.status == 404


def test_withheld_prompts_are_gone_when_it_is_done(service):
    _, url = service
    asked = {"json": {"version": "cats", "input": FAST}, "headers": {"X-Raysd-Withhold": "1", "Prefer": "wait"}}
    answer = httpx.post(f"{url}/v1/predictions", **asked, timeout=60).json()
    assert answer["status"] == "succeeded"
    assert answer["data_removed"]
    assert FAST["prompt"] not in str(answer)


def test_the_same_key_is_the_same_prediction(service):
    _, url = service
    asked = {"json": {"version": "cats", "input": FAST}, "headers": {"Idempotency-Key": "p-1"}}
    first, second = (httpx.post(f"{url}/v1/predictions", **asked).json() for _ in range(2))
    assert first["id"] == second["id"]
    assert re.fullmatch("[a-z2-7]{26}", first["id"])
