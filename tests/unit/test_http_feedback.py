"""Feedback, generations and blind comparisons over HTTP."""

import io
import threading
import time

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from raysd.serve.http.desk import Busy
from tests.serving import CATS, SIDE, TINY, parts

BODY = {"prompt": "a red circle", "model": "cats", "num_inference_steps": 1}
ABSENT = "a" * 26 + "-0"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    service = parts(tmp_path_factory.mktemp("service"))
    with TestClient(service.app, base_url="http://127.0.0.1:8000", client=("127.0.0.1", 1)) as client:
        yield service, client


@pytest.fixture
def client(service):
    return service[1]


@pytest.fixture
def generation(client):
    return client.post("/v1/images/generations", json=BODY).json()["data"][0]["generation"]


def compared(client, **more):
    answer = client.post("/v1/comparisons", json={**BODY, **more})
    assert answer.status_code == 201, answer.text
    return answer.json()


def drawn(client, generation):
    end = time.monotonic() + 60
    while (answer := client.get(f"/v1/generations/{generation}/picture")).status_code == 404:
        assert time.monotonic() < end
        time.sleep(0.02)
    return Image.open(io.BytesIO(answer.content))


@pytest.mark.parametrize("said", [{"thumb": "up"}, {"stars": 4, "tags": ["hands"]}, {"text": "ä"}, {"report": "x"}])
def test_an_opinion_is_kept_once(client, generation, said):
    about = {"generation": generation, **said}
    first = client.post("/v1/feedback", json=about, headers={"Idempotency-Key": f"k-{generation}"})
    again = client.post("/v1/feedback", json=about, headers={"Idempotency-Key": f"k-{generation}"})
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]
    other = {"generation": generation, "thumb": "down"}
    assert client.post("/v1/feedback", json=other, headers={"Idempotency-Key": f"k-{generation}"}).status_code == 400
    assert client.post("/v1/feedback", json=about).json()["id"] != first.json()["id"]


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ({}, 400),
        ({"generation": ABSENT, "thumb": "up"}, 404),
        ({"generation": "x", "thumb": "up"}, 400),
        ({"generation": ABSENT}, 400),
        ({"generation": ABSENT, "stars": 6}, 400),
        ({"generation": ABSENT, "stars": True}, 400),
        ({"generation": ABSENT, "text": "a\0b"}, 400),
        ({"generation": ABSENT, "text": "x" * 2001}, 400),
        ({"pair": {"left": ABSENT, "right": ABSENT, "choice": "left"}}, 400),
        ({"pair": {"left": ABSENT, "right": "b" * 26 + "-0", "choice": "left"}}, 404),
        ({"pair": {"left": ABSENT, "right": "b" * 26 + "-0", "choice": "best"}}, 400),
        ({"generation": ABSENT, "thumb": "up", "mood": "good"}, 400),
    ],
)
def test_feedback_that_is_refused(client, said, status):
    answer = client.post("/v1/feedback", json=said)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_a_generation_and_its_end(client, generation):
    kept = client.get(f"/v1/generations/{generation}").json()
    assert (kept["prompt"], kept["model"], kept["version"], kept["digest"]) == (
        BODY["prompt"],
        "cats",
        "cats@1",
        CATS.digest,
    )
    assert (kept["width"], kept["height"], kept["parameters"]["steps"]) == (SIDE, SIDE, 1)
    picture = drawn(client, generation)
    assert "cats@1" in picture.text["raysd"]
    for _ in range(2):
        assert client.delete(f"/v1/generations/{generation}").status_code == 204
    assert client.get(f"/v1/generations/{generation}/picture").status_code == 404
    tombstone = client.get(f"/v1/generations/{generation}").json()
    assert tombstone["prompt"] is None
    assert tombstone["deleted"] > tombstone["created"]
    assert client.post("/v1/feedback", json={"generation": generation, "thumb": "up"}).status_code == 404


def test_a_generation_is_not_there_before_it_is_drawn(service, client, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(service[0].desk, "step", lambda: go_on.wait(60))
    id = client.post("/v1/predictions", json={"version": "cats", "input": {"prompt": "x"}}).json()["id"]
    assert client.get(f"/v1/generations/{id}-0/picture").status_code == 404
    go_on.set()
    drawn(client, f"{id}-0")


def test_nothing_tells_two_versions_apart_before_the_choice(service, client):
    pair = compared(client)
    pictures = [drawn(client, pair[side]) for side in ("left", "right")]
    # The test's desk draws both with one model, so that the files alone could differ.
    assert pictures[0].tobytes() == pictures[1].tobytes()
    assert pictures[0].text == {}
    for side in ("left", "right"):
        generation = client.get(f"/v1/generations/{pair[side]}")
        prediction = client.get(f"/v1/predictions/{pair[side].partition('-')[0]}")
        for answer in (generation, prediction):
            said = answer.text + str(answer.headers)
            assert all(word not in said for word in ("cats@", CATS.digest, CATS.traffic[1].digest))
    sides = {ask.version for ask in service[0].desk.asks[-2:]}
    assert sides == {"cats@1", "cats@2"}
    told = client.post("/v1/feedback", json={"pair": {"left": pair["left"], "right": pair["right"], "choice": "left"}})
    assert told.status_code == 201
    assert {told.json()["left"], told.json()["right"]} == {"cats@1", "cats@2"}
    left = client.get(f"/v1/generations/{pair['left']}").json()
    assert left["version"] == told.json()["left"]
    assert drawn(client, pair["left"]).text != {}


def test_nothing_tells_two_models_apart_before_the_choice(service, client):
    pair = compared(client, versions=["cats@1", "tiny-sd"])
    ask = service[0].desk.asks[-1]
    assert ask.deadline - time.time() == pytest.approx(3600, abs=30)
    for side in ("left", "right"):
        drawn(client, pair[side])
        for path in (f"generations/{pair[side]}", f"predictions/{pair[side].partition('-')[0]}"):
            said = client.get(f"/v1/{path}").text
            assert "cats" not in said
            assert "tiny-sd" not in said
    chosen = {"pair": {"left": pair["left"], "right": pair["right"], "choice": "tie"}}
    assert client.post("/v1/feedback", json=chosen).status_code == 201
    told = {client.get(f"/v1/generations/{pair[side]}").json()["model"] for side in ("left", "right")}
    assert told == {"cats", "tiny-sd"}


def test_sides_are_by_lot(service, client):
    """Each version on the left in 40 comparisons: never has a chance of 2^-40."""
    first = set()
    for _ in range(40):
        compared(client)
        first.add(service[0].desk.asks[-2].version)
        if len(first) == 2:
            break
    assert first == {"cats@1", "cats@2"}


def test_both_have_the_same_noise_and_the_versions_that_were_named(service, client):
    compared(client, versions=["cats@2", "tiny-sd"], user="anna")
    asks = service[0].desk.asks[-2:]
    assert {ask.version for ask in asks} == {"cats@2", "tiny-sd"} or {ask.model for ask in asks} == {"cats", "tiny-sd"}
    assert asks[0].drawing == asks[1].drawing
    assert asks[0].comparison == asks[1].comparison
    assert asks[0].user == asks[1].user is not None


def test_a_comparison_with_a_key_is_made_once(service, client):
    answers = [
        client.post("/v1/comparisons", json=BODY, headers={"Idempotency-Key": "pair-1"}).json() for _ in range(2)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("key", [None, "pair-2"])
def test_a_comparison_of_which_half_was_accepted(service, client, monkeypatch, key):
    """With a key the other half comes at the next try, of the same noise; without one the first is stopped."""
    desk, asks, go_on = service[0].desk, [], threading.Event()
    monkeypatch.setattr(desk, "step", lambda: go_on.wait(60))
    submit = desk.submit

    async def full_at_the_second(ask):
        asks.append(ask)
        if len(asks) == 2:
            raise Busy("full", 3)
        return await submit(ask)

    monkeypatch.setattr(desk, "submit", full_at_the_second)
    headers = {"Idempotency-Key": key} if key else {}
    refused = client.post("/v1/comparisons", json=BODY, headers=headers)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "3")
    first = service[0].queue.find(None, None, 1)[0]
    pair = client.post("/v1/comparisons", json=BODY, headers=headers).json()
    go_on.set()
    left, right = (drawn(client, pair[side]).tobytes() for side in ("left", "right"))
    assert left == right
    assert (pair["left"] == f"{first.id}-0") == (key is not None)
    assert service[0].queue.get(first.id).status == ("succeeded" if key else "canceled")


@pytest.mark.parametrize(
    ("wrong", "status", "said"),
    [
        ({"model": "tiny-sd"}, 400, "versions: tiny-sd has one version"),
        ({"versions": ["cats@1", "cats@1"]}, 400, "versions: "),
        ({"versions": ["cats@1"]}, 400, "versions: "),
        ({"versions": ["cats@1", "cats@9"]}, 404, "version: "),
        ({"versions": ["cats@1", "dogs@1"]}, 404, "no dogs@1 is served"),
        ({"n": 2}, 400, "n: unknown"),
        ({"versions": ["cats@1", "cats@2"], "lora": "style@1"}, 400, "lora: both sides would be drawn by it"),
    ],
)
def test_comparisons_that_are_refused(service, client, wrong, status, said):
    answer = client.post("/v1/comparisons", json={**BODY, **wrong})
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]


def test_health(tmp_path):
    service = parts(tmp_path, served=(TINY,))
    with TestClient(service.app, base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as client:
        assert client.get("/readyz").json() == {"status": "ready", "models": ["tiny-sd"]}
        service.desk.served.clear()
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200
