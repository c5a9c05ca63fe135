"""The official OpenAI client against the service, unmodified."""

import asyncio
import base64
import functools
import io
import itertools
import threading
import typing

import httpx
import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient
from openai.types.image_edit_params import ImageEditParamsNonStreaming
from openai.types.image_generate_params import ImageGenerateParamsNonStreaming
from PIL import Image

from raysd.serve.http.links import Links
from tests.serving import CATS, SIDE, TINY, listening, parts
from tests.waiting import until

FAST = {"num_inference_steps": 2}


@pytest.fixture
def client(service):
    return openai.OpenAI(base_url=f"{service[1]}/v1", api_key="anything on loopback", max_retries=0)


def opened(body, kind="PNG"):
    picture = Image.open(io.BytesIO(body))
    assert picture.format == kind
    return picture


def png(picture):
    body = io.BytesIO()
    picture.save(body, "PNG")
    return body.getvalue()


def test_pictures_of_following_seeds_and_what_drew_them(client):
    answer = client.images.with_raw_response.generate(
        prompt="a red circle", model="cats", n=2, extra_body={**FAST, "seed": 7}
    )
    made = answer.parse()
    first, second = (base64.b64decode(image.b64_json) for image in made.data)
    assert opened(first).size == (SIDE, SIDE)
    assert first != second
    assert [image.seed for image in made.data] == [7, 8]
    assert [image.generation[-2:] for image in made.data] == ["-0", "-1"]
    assert {(image.version, image.digest) for image in made.data} == {("cats@1", CATS.digest)}
    assert made.size == f"{SIDE}x{SIDE}"
    assert answer.headers["x-raysd-version"] == "cats@1"
    assert answer.headers["x-raysd-digest"] == CATS.digest
    again = client.images.generate(prompt="a red circle", model="cats@2", extra_body={**FAST, "seed": 8})
    assert np.array_equal(opened(second), opened(base64.b64decode(again.data[0].b64_json)))
    assert again.data[0].version == "cats@2"


def test_seeds_are_by_lot_unless_given(client):
    asked = [client.images.generate(prompt="x", model="cats", extra_body={"num_inference_steps": 1}) for _ in range(2)]
    assert asked[0].data[0].seed != asked[1].data[0].seed


def test_everything_that_can_be_said_of_a_picture_reaches_it(client, service):
    more = {"negative_prompt": "a dog", "guidance_scale": 3.0, "sampler": "euler", "lora": "style@2", **FAST, "seed": 1}
    client.images.generate(
        prompt="a cat",
        model="cats",
        size="64x128",
        user="somebody",
        quality="auto",
        background="opaque",
        extra_body=more,
        extra_headers={"X-Raysd-Withhold": "true", "X-Request-Id": "abc-1"},
    )
    ask = service[0].desk.asks[-1]
    drawing = ask.drawing
    assert (drawing.prompt, drawing.negative, drawing.guidance, drawing.steps) == ("a cat", "a dog", 3.0, 2)
    assert (drawing.sampler, drawing.seed, drawing.width, drawing.height) == ("euler", 1, 64, 128)
    assert (ask.api, ask.lora, ask.withhold, ask.request_id) == ("openai", "style@2", True, "abc-1")
    assert ask.user is not None
    assert "somebody" not in ask.user
    assert ask.deadline is not None


def test_the_same_user_has_the_same_digest_and_the_newer_name_goes_before(client, service):
    for names in ({"user": "anna"}, {"user": "bert", "safety_identifier": "anna"}, {"user": "bert"}):
        client.images.generate(
            prompt="x", model="cats", user=names["user"], extra_body={"num_inference_steps": 1, **names}
        )
    first, second, third = (ask.user for ask in service[0].desk.asks[-3:])
    assert first == second != third


def test_links_hold_for_anybody_and_for_this_picture_alone(client, service):
    made = client.images.generate(prompt="x", model="cats", n=2, response_format="url", extra_body=FAST)
    first, second = (image.url for image in made.data)
    assert made.data[0].b64_json is None
    answer = httpx.get(first)
    assert opened(answer.content).size == (SIDE, SIDE)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
    path, query = first.split("?")
    for changed in (
        f"{second.split('?')[0]}?{query}",
        first[:-1] + ("0" if first[-1] != "0" else "1"),
        first.replace("expires=", "expires=9"),
        f"{path.replace('.png', '.webp')}?{query}",
    ):
        assert httpx.get(changed).status_code == 403
    assert httpx.get(path).status_code == 400


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_other_formats(client, kind):
    asked = {"prompt": "x", "model": "cats", "output_format": kind, "extra_body": {**FAST, "seed": 7}}
    made = client.images.generate(**asked, output_compression=50, response_format="b64_json")
    assert made.output_format == kind
    body = base64.b64decode(made.data[0].b64_json)
    assert opened(body, kind.upper()).size == (SIDE, SIDE)
    link = client.images.generate(**asked, output_compression=50, response_format="url").data[0].url
    assert httpx.get(link).content == body, "of the quality that was asked for"
    assert httpx.get(link.replace("quality=50", "quality=51")).status_code == 403
    plain = httpx.get(client.images.generate(**asked, response_format="url").data[0].url)
    assert plain.headers["content-type"] == f"image/{kind}"
    assert len(plain.content) > len(body)


def test_a_link_of_no_quality_is_signed_as_ever():
    """Those that were given before links had one hold for their time."""
    links = Links(b"0" * 32, 60, clock=lambda: 1e9)
    signature = "1e9b1b2a7fff7c38d2d137f0fc1213af02741de6d9dc1184711bfdbee2f7103d"
    assert links.to("a-0.png") == f"/v1/pictures/a-0.png?expires=1000000060&signature={signature}"
    assert links.holds("a-0.png", 1_000_000_060, signature)
    assert not links.holds("a-0.png", 1_000_000_060, signature, quality=50)


def test_a_stream_has_previews_and_then_each_picture(client):
    more = {**FAST, "seed": 3, "num_inference_steps": 4}
    stream = client.images.generate(
        prompt="a red circle", model="cats", n=2, stream=True, partial_images=2, extra_body=more
    )
    events = list(stream)
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds == ["partial_image"] * 4 + ["completed"] * 2
    assert [event.partial_image_index for event in events[:4]] == [0, 1, 0, 1]
    assert [event.image_index for event in events] == [0, 0, 1, 1, 0, 1]
    assert all(opened(base64.b64decode(event.b64_json)).size == (SIDE, SIDE) for event in events)
    assert events[-1].usage.total_tokens == 0
    assert (events[-1].seed, events[-1].version) == (4, "cats@1")
    plain = client.images.generate(
        prompt="a red circle", model="cats", extra_body={**FAST, "seed": 3, "num_inference_steps": 4}
    )
    assert plain.data[0].b64_json == events[4].b64_json


def test_a_stream_that_fails_says_so(client, service, monkeypatch):
    def broken():
        raise RuntimeError("no")

    monkeypatch.setattr(service[0].desk, "step", broken)
    with pytest.raises(openai.APIError, match="RuntimeError: no"):
        list(client.images.generate(prompt="x", model="cats", stream=True, extra_body=FAST))
    with pytest.raises(openai.InternalServerError, match="RuntimeError: no"):
        client.images.generate(prompt="x", model="cats", extra_body=FAST)


@pytest.mark.parametrize(("how", "status"), [("failed", 500), ("canceled", 409)])
def test_what_has_ended_badly_is_not_asked_for_again(client, service, monkeypatch, how, status):
    """The client's own retries, which it makes at 409 and 500, would draw it anew."""
    desk = service[0].desk

    def step():
        if how == "failed":
            raise ZeroDivisionError
        desk.queue.cancel(desk.queue.find(None, None, 1)[0].id)

    monkeypatch.setattr(desk, "step", step)
    asked = len(desk.asks)
    with pytest.raises(openai.APIStatusError) as error:
        client.with_options(max_retries=2).images.generate(prompt="x", model="cats", extra_body=FAST)
    assert (error.value.status_code, len(desk.asks) - asked) == (status, 1)


def test_an_edit_draws_anew_where_the_mask_is_transparent(client, service):
    given = Image.new("RGB", (SIDE, SIDE), (10, 200, 30))
    mask = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (SIDE // 2, 0, SIDE, SIDE))  # the right half
    for image in (png(given), [png(given)], ("picture.png", png(given), "image/png")):
        made = client.images.edit(
            image=image, mask=png(mask), prompt="a red circle", model="cats", n=1, extra_body={**FAST, "strength": 0.5}
        )
    after = np.asarray(opened(base64.b64decode(made.data[0].b64_json)))
    before = np.asarray(given)
    assert np.array_equal(after[:, : SIDE // 2], before[:, : SIDE // 2])
    assert not np.array_equal(after[:, SIDE // 2 :], before[:, SIDE // 2 :])
    assert service[0].desk.asks[-1].drawing.strength == 0.5


def test_an_edit_can_be_a_stream(client):
    stream = client.images.edit(
        image=png(Image.new("RGB", (80, 60))), prompt="x", model="cats", stream=True, partial_images=1, extra_body=FAST
    )
    assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]


def test_the_models_that_are_served(client):
    assert {model.id for model in client.models.list()} == {"cats", "tiny-sd"}
    model = client.models.retrieve("cats")
    assert (model.id, model.object, model.version) == ("cats", "model", "cats@1")
    assert [(share["version"], share["weight"]) for share in model.traffic] == [("cats@1", 0.9), ("cats@2", 0.1)]
    with pytest.raises(openai.NotFoundError, match="served here: tiny-sd, cats"):
        client.models.retrieve("dogs")


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"size": "100x100"}, "size"),
        ({"size": "9000x9000"}, "size"),
        ({"size": "large"}, "size"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"prompt": "x" * 4001}, "prompt"),
        ({"output_format": "svg"}, "output_format"),
        ({"background": "transparent"}, "background"),
        ({"extra_body": {"quality": "best"}}, "quality"),
        ({"frame_count": 3}, "frame_count"),
        ({"extra_body": {"svg": {"model": "x"}}}, "svg"),
        ({"partial_images": 2}, None),
        ({"extra_body": {"num_inference_steps": 201}}, "num_inference_steps"),
        ({"extra_body": {"sampler": "magic"}}, "sampler"),
        ({"extra_body": {"seed": -1}}, "seed"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(client, service, wrong, param):
    asked = len(service[0].desk.asks)
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(**{"prompt": "x", "model": "cats", **wrong})
    assert refused.value.type == "invalid_request_error"
    assert refused.value.param == param or param is None
    assert len(service[0].desk.asks) == asked


def allowed(kind):
    """All literal values of a type of the client's, and None where it may be given."""
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)
    inside = (allowed(one) for one in typing.get_args(kind))
    return (None,) if kind is type(None) else tuple(dict.fromkeys(itertools.chain.from_iterable(inside)))


def offered(how):
    """(method, field, value) of every value that the client's types name; models and files apart."""
    types = {"generate": ImageGenerateParamsNonStreaming, "edit": ImageEditParamsNonStreaming}[how]
    hints = typing.get_type_hints(types)
    named = {name: kind for name, kind in hints.items() if name not in ("model", "image", "mask", "markup")}
    return [(how, name, value) for name, kind in named.items() for value in allowed(kind)]


def test_what_belongs_to_other_formats_is_refused_with_that_reason(client):
    with pytest.raises(openai.BadRequestError, match="frame_count: belongs to output_format gif or svg"):
        client.images.generate(prompt="x", model="cats", frame_count=3)


NEVER = {("background", "transparent"), ("output_format", "gif"), ("output_format", "svg")}


@pytest.mark.parametrize(("how", "field", "value"), [*offered("generate"), *offered("edit")])
def test_each_value_of_the_clients_types_is_taken_or_refused_with_a_reason(
    client, service, monkeypatch, how, field, value
):
    desk = service[0].desk

    def blank(claim, drawing, number):
        return Image.new("RGB", (drawing.width or SIDE, drawing.height or SIDE))

    monkeypatch.setattr(desk, "_drawn", blank)
    given = {"image": png(Image.new("RGB", (SIDE, SIDE)))} if how == "edit" else {}
    ask = functools.partial(getattr(client.images, how), prompt="x", model="cats", extra_body={"seed": 1}, **given)
    if (field, value) in NEVER:
        with pytest.raises(openai.BadRequestError, match=f"{field}: {value}: ") as refused:
            ask(**{field: value})
        assert refused.value.param == field
        return
    ask()
    made = ask(**{field: value})
    plain, drawing = (ask.drawing for ask in desk.asks[-2:])
    if field == "size" and value not in ("auto", None):
        assert made.size == value
        plain = plain.model_copy(update={"width": drawing.width, "height": drawing.height})
    assert drawing == plain, "it changes nothing"


@pytest.mark.parametrize("how", ["generate", "edit"])
def test_the_clients_types_were_read(how):
    assert {"quality", "background", "complexity", "output_format", "size"} <= {name for _, name, _ in offered(how)}


def test_a_page_of_another_site_may_send_every_header_that_is_read(tmp_path):
    app = parts(tmp_path, http={"origins": ["https://site.example"]}).app
    named = [
        parameter["name"]
        for path in app.openapi()["paths"].values()
        for operation in path.values()
        for parameter in operation.get("parameters", [])
        if parameter["in"] == "header"
    ]
    assert {"X-Raysd-Withhold", "Idempotency-Key"} <= set(named)
    asked = {"Origin": "https://site.example", "Access-Control-Request-Method": "POST"}
    browser = TestClient(app, base_url="http://127.0.0.1")  # not entered: a preflight needs no running service

    def preflight(name):
        return browser.options(
            "/v1/images/generations", headers={**asked, "Access-Control-Request-Headers": name.lower()}
        )

    for name in (*named, "Authorization", "Content-Type", "X-Request-Id"):
        assert preflight(name).status_code == 200, name
        assert name.lower() in preflight(name).headers["access-control-allow-headers"].lower()
    assert preflight("X-Other").status_code == 400


def test_a_model_that_is_not_served(client):
    for name in ("dogs", "cats@9"):
        with pytest.raises(openai.NotFoundError):
            client.images.generate(prompt="x", model=name)
    with pytest.raises(openai.BadRequestError, match="model: required; served here: tiny-sd, cats"):
        client.images.generate(prompt="x")


def test_the_only_model_needs_no_name(tmp_path):
    service = parts(tmp_path, served=(TINY,))
    with listening(service) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        made = client.images.generate(prompt="x", model=None, extra_body={"num_inference_steps": 1, "size": None})
    assert made.data[0].version == "tiny-sd"


def test_the_same_key_gives_the_same_pictures(client, service):
    key = {"Idempotency-Key": "once"}
    made = [
        client.images.generate(prompt="x", model="cats", extra_body=FAST, extra_headers=key).data[0].generation
        for _ in range(2)
    ]
    assert made[0] == made[1]
    with pytest.raises(openai.BadRequestError, match="Idempotency-Key"):
        client.images.generate(prompt="another", model="cats", extra_body=FAST, extra_headers=key)
    image = png(Image.new("RGB", (64, 64)))
    edits = [
        client.images.edit(image=image, prompt="x", model="cats", extra_body=FAST, extra_headers={"Idempotency-Key": "e"})
        for _ in range(2)  # each with a multipart boundary of its own
    ]  # fmt: skip
    assert edits[0].data[0].generation == edits[1].data[0].generation


@pytest.mark.parametrize("how", ["plain", "stream", "key"])
def test_a_client_that_goes_away_stops_the_drawing_unless_it_may_come_back(service, monkeypatch, how):
    _, url = service
    desk, begun, go_on = service[0].desk, threading.Event(), threading.Event()
    monkeypatch.setattr(desk, "step", lambda: (begun.set(), go_on.wait(60)))
    body = {"prompt": "x", "model": "cats", "num_inference_steps": 3, "stream": how == "stream"}
    headers = {"Idempotency-Key": f"away {how}".replace(" ", "-")} if how == "key" else {}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/images/generations", json=body, headers=headers, timeout=httpx.Timeout(30, read=1))
    assert begun.wait(60)
    (prediction,) = [p for p in service[0].queue.find(None, None, 1)]
    if how != "key":
        until(lambda: service[0].queue.get(prediction.id).cancel_requested)
    go_on.set()
    until(lambda: service[0].queue.get(prediction.id).ended)
    assert service[0].queue.get(prediction.id).status == ("succeeded" if how == "key" else "canceled")


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_cancelled_stops_the_drawing(tmp_path, stream):
    """Ray Serve cancels the task of a request whose client went away."""
    service, begun, go_on = parts(tmp_path), threading.Event(), threading.Event()
    service.desk.step = lambda: (begun.set(), go_on.wait(60))
    body = {"prompt": "x", "model": "cats", "num_inference_steps": 3, "stream": stream}

    async def cancelled():
        service.desk.start()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(service.app), base_url="http://127.0.0.1") as client:
            asking = asyncio.create_task(client.post("/v1/images/generations", json=body))
            await asyncio.to_thread(begun.wait, 60)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        (prediction,) = service.queue.find(None, None, 1)
        await asyncio.to_thread(until, lambda: service.queue.get(prediction.id).cancel_requested)
        go_on.set()
        last = await service.desk.wait(prediction.id, 60)
        await service.desk.close()
        return last.status

    assert asyncio.run(cancelled()) == "canceled"
