"""What nobody sends by mistake: each is refused with a reason, and the service goes on."""

import base64
import io
import json
import logging
import random
import re
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from raysd.serve.http import pictures, webhooks
from raysd.serve.http.errors import Refused
from tests.pictures import scanned
from tests.serving import listening, parts

HERE = "http://127.0.0.1:8000"
SECRET = "a very private prompt"
PLAIN = {"prompt": "x", "model": "cats", "num_inference_steps": 1}
WAYS = ["/v1/images/generations", "/v1/predictions", "/v1/comparisons", "/v1/feedback"]


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    service = parts(tmp_path_factory.mktemp("service"))
    with TestClient(service.app, base_url=HERE, client=("::1", 1), raise_server_exceptions=False) as client:
        yield service, client


@pytest.fixture
def client(service):
    """Nothing of what it sends may come to the desk."""
    asked = len(service[0].desk.asks)
    yield service[1]
    assert len(service[0].desk.asks) == asked


def sent(way, **fields):
    """A request for pictures in the words of that API."""
    return {"version": "cats", "input": {"prompt": "x", **fields}} if way == "/v1/predictions" else {**PLAIN, **fields}


def reason(answer):
    """Checks that it is a refusal in the shape of its API; what it says."""
    assert 400 <= answer.status_code < 500, answer.text
    said = answer.json()
    if re.match("/v1/(predictions|files|models/[^/]+/)", answer.request.url.path):
        assert said["status"] == answer.status_code
        assert said["title"]
        text = said["detail"]
    else:
        assert set(said["error"]) == {"message", "type", "param", "code"}
        text = said["error"]["message"]
    assert 0 < len(text) < 600
    assert text.count("\n") <= 2
    assert answer.headers["x-request-id"]
    return text


# Bodies


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe\x00",
        b'{"prompt": "\xff"}',
        b"[" * 200_000,
        b'{"a":' * 40_000,
        b"1" * 5000,
        b'{"prompt": "x", "prompt": ' + b'"y"' * 2 + b"}",
    ],
)
def test_what_is_no_json_object(client, way, body):
    reason(client.post(way, content=body, headers={"Content-Type": "application/json"}))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [None, "text/plain", "application/xml", "multipart/form-data", "x"])
def test_what_does_not_say_that_it_is_json(client, way, kind):
    headers = {"Content-Type": kind} if kind else {}
    reason(client.post(way, content=json.dumps(sent(way)).encode(), headers=headers))


@pytest.mark.parametrize("way", [*WAYS, "/v1/images/edits", "/v1/files"])
@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_that_are_too_large(client, way, chunked):
    taken = []

    def chunks():
        for _ in range(40):
            taken.append(1)
            yield b" " * 2**20

    body = chunks() if chunked else b" " * 20 * 2**20
    form = "multipart/form-data; boundary=x" if way in ("/v1/images/edits", "/v1/files") else "application/json"
    assert client.post(way, content=body, headers={"Content-Type": form}).status_code == 413


def test_a_long_prompt(client):
    for way in WAYS[:3]:
        body = json.dumps(sent(way, prompt="x" * 10_000_000))
        answer = client.post(way, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == (422 if way == "/v1/predictions" else 413)  # which takes pictures in its bodies
        reason(answer)
        assert "prompt: " in reason(client.post(way, json=sent(way, prompt="x" * 4001)))


@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("guidance_scale", "NaN"),
        ("guidance_scale", "Infinity"),
        ("guidance_scale", "-1"),
        ("guidance_scale", "1e999"),
        ("guidance_scale", '"7"x'),
        ("guidance_scale", "{}"),
        ("num_inference_steps", "0"),
        ("num_inference_steps", "1e9"),
        ("num_inference_steps", "1.5"),
        ("num_inference_steps", "NaN"),
        ("seed", "-1"),
        ("seed", str(2**48)),
        ("seed", "9" * 4400),
        ("prompt", r'"\u0000"'),
        ("prompt", r'"\ud800"'),
        ("negative_prompt", r'"a\u0000b"'),
        ("sampler", r'"\udfff"'),
        ("lora", '"../../etc/passwd"'),
        ("lora", '"a\\u0000"'),
        ("user", r'"\u0000"'),
        ("user", r'"\ud83d"'),
        ("safety_identifier", r'"\ud83d"'),
        ("image", '"/etc/passwd"'),
        ("__class__", '"x"'),
    ],
)
def test_values_that_are_none(client, way, field, value):
    body = json.dumps(sent(way, **{field: "HERE"})).replace('"HERE"', value)
    said = reason(client.post(way, content=body, headers={"Content-Type": "application/json"}))
    assert field in said or "JSON" in said or "parsing" in said


@pytest.mark.parametrize(
    "size", ["1000000x1000000", "99999x8", "0x0", "8x", "-8x8", "8 x8", "8x8x8", "12x12", "²x8", "a" * 999]
)
def test_sizes(client, size):
    assert reason(client.post(WAYS[0], json={**PLAIN, "size": size})).startswith("size: ")


def test_the_operators_bounds(tmp_path):
    bounds = {"most_steps": 10, "most_pixels": 64 * 64, "most_pictures": 2}
    with TestClient(parts(tmp_path, http=bounds).app, base_url=HERE, client=("::1", 1)) as client:
        for wrong, field in (
            ({"num_inference_steps": 11}, "num_inference_steps"),
            ({"size": "64x128"}, "size"),
            ({"n": 3}, "n"),
        ):
            assert reason(client.post(WAYS[0], json={**PLAIN, **wrong})).startswith(f"{field}: at most")
        wrong = sent(WAYS[1], num_outputs=3)
        assert reason(client.post(WAYS[1], json=wrong)).startswith("num_outputs: at most 2")


# Pictures


def png(picture):
    body = io.BytesIO()
    picture.save(body, "PNG")
    return body.getvalue()


def bomb(width, height):
    """A PNG of black pixels that says it is so large; a few hundred bytes where its pixels are missing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * min((width + 1) * height, 30_000_000), 9)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


SMALL = png(Image.new("RGB", (64, 64), "red"))
GIF = io.BytesIO()
Image.new("RGB", (8, 8)).save(GIF, "GIF")
WRONG_PICTURES = {
    "empty": b"",
    "text": b"not a picture",
    "markup": b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>",
    "GIF": GIF.getvalue(),
    "cut off": SMALL[:100],
    "beginning alone": SMALL[:8],
    "changed": SMALL[:60] + bytes(40) + SMALL[100:],
    "bomb": bomb(60_000, 60_000),
    "large": bomb(5_000, 5_000),
    "scans": scanned(200),
    "noise": random.Random(0).randbytes(5000),
}


@pytest.mark.parametrize("name", WRONG_PICTURES)
def test_pictures_that_are_none(client, name):
    wrong = WRONG_PICTURES[name]
    form = {"prompt": "x", "model": "cats"}
    said = reason(client.post("/v1/images/edits", data=form, files={"image": ("a.png", wrong)}))
    assert said.startswith("image: ")
    said = reason(client.post("/v1/images/edits", data=form, files={"image": ("a", SMALL), "mask": ("b", wrong)}))
    assert said.startswith("mask: ")
    assert reason(client.post("/v1/files", files={"content": ("a.png", wrong)})).startswith("content: ")
    uri = "data:image/png;base64," + base64.b64encode(wrong).decode()
    assert "image: " in reason(client.post("/v1/predictions", json=sent("/v1/predictions", image=uri)))


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (Image.new("RGBA", (32, 64)), "is 32x64, the picture 64x64"),
        (Image.new("RGB", (64, 64)), "has no transparency"),
        (Image.new("L", (64, 64)), "has no transparency"),
    ],
)
def test_masks_that_do_not_fit(client, mask, said):
    files = {"image": ("a.png", SMALL), "mask": ("b.png", png(mask))}
    assert said in reason(client.post("/v1/images/edits", data={"prompt": "x", "model": "cats"}, files=files))


@pytest.mark.parametrize(
    "files",
    [
        [],
        [("image", ("a", SMALL)), ("image", ("b", SMALL))],
        [("image", ("a", SMALL)), ("image[]", ("b", SMALL))],
        [("image[]", ("a", SMALL)), ("image[]", ("b", SMALL))],
        [("image", ("a", SMALL)), ("markup", ("b", SMALL))],
        [("image", ("a", SMALL)), ("mask", (None, "text"))],
        [("image", (None, "text"))],
        [(f"f{number}", ("a", b"x")) for number in range(1200)],
    ],
)
def test_forms_that_are_wrong(client, files):
    reason(client.post("/v1/images/edits", data={"prompt": "x", "model": "cats"}, files=files or {"x": b"x"}))


@pytest.mark.parametrize("field", ["seed", "n", "strength", "stream", "guidance_scale"])
def test_form_fields_that_are_wrong(client, field):
    for wrong in ("NaN", "x", "1e400", "-1e9"):
        form = {"prompt": "x", "model": "cats", field: wrong}
        assert field in reason(client.post("/v1/images/edits", data=form, files={"image": ("a.png", SMALL)}))


# What takes long


def silent_name_server(monkeypatch, end):
    real = socket.getaddrinfo

    def resolve(host, *more, **named):
        if host == "silent.example":
            end.wait(60)
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return real(host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return "/v1/predictions", {"json": {**sent("/v1/predictions"), "webhook": "http://silent.example/"}}, 400


def slow_picture(monkeypatch, end):
    def upload(body, field):
        end.wait(60)
        return SMALL, (64, 64)

    monkeypatch.setattr(pictures, "upload", upload)
    return "/v1/files", {"files": {"content": ("a.png", SMALL)}}, 201


@pytest.mark.parametrize("slow", [silent_name_server, slow_picture])
def test_those_who_ask_for_something_else_do_not_wait(tmp_path, monkeypatch, slow):
    """More requests than the event loop has threads, each for as long as somebody else wants."""
    monkeypatch.setattr(webhooks, "RESOLVE_SECONDS", 0.5)
    end = threading.Event()
    path, body, status = slow(monkeypatch, end)
    with listening(parts(tmp_path)) as url, ThreadPoolExecutor(40) as senders:
        try:
            answers = [senders.submit(httpx.post, url + path, **body, timeout=60) for _ in range(40)]
            for _ in range(10):
                time.sleep(0.1)
                assert httpx.get(f"{url}/v1/predictions", timeout=15).status_code == 200
        finally:
            end.set()
        assert {each.result().status_code for each in answers} == {status}


# Addresses and headers


@pytest.mark.parametrize(
    "path",
    [
        "/v1/generations/x",
        "/v1/generations/%00/picture",
        f"/v1/generations/{'a' * 26}-0",
        "/v1/generations/..%2f..%2fetc%2fpasswd",
        f"/v1/pictures/{'a' * 26}-0.png?expires=99999999999&signature={'0' * 64}",
        "/v1/pictures/x?expires=1&signature=%00",
        "/v1/pictures/x?expires=99999999999999999999999&signature=x",
        "/v1/pictures/x",
        "/v1/models/%00",
        f"/v1/models/{'x' * 5000}",
        "/v1/models/a/b/c",
        "/v1/predictions?cursor=%ff%00",
        f"/v1/predictions?cursor={'A' * 150}",
        "/v1/predictions/x/y",
        "/.env",
        "//evil.example/",
    ],
)
def test_addresses_of_nothing(client, path):
    reason(client.get(HERE + path))


def test_other_methods(client):
    for method in ("PUT", "PATCH", "TRACE", "OPTIONS", "FOO"):
        assert client.request(method, "/v1/images/generations").status_code == 405


@pytest.mark.parametrize(
    "headers",
    [
        {"Idempotency-Key": "x" * 256},
        {"Idempotency-Key": "a b"},
        {"Idempotency-Key": "ä".encode()},
        {"X-Raysd-Withhold": "perhaps"},
        {"X-Large": "x" * 40_000},
        {"Host": "["},
        {"Host": "[::1"},
        {"Host": "127.0.0.1:99999999"},
        {"Host": ""},
    ],
)
def test_headers(client, headers):
    reason(client.post("/v1/images/generations", json=PLAIN, headers=headers))


# What is said of it


def test_prompts_are_in_no_log_and_an_error_of_ours_tells_nothing(service, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    direct, client = service
    asked = {**PLAIN, "prompt": SECRET}
    assert client.post(WAYS[0], json=asked).status_code == 200
    assert client.post(WAYS[0], json={**asked, "seed": -1}).status_code == 400

    async def broken(ask):
        raise ValueError(ask.drawing.prompt)

    monkeypatch.setattr(direct.desk, "submit", broken)
    answer = client.post(WAYS[0], json=asked, headers={"X-Request-Id": "r1"})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "failed; the service's log has more under r1"
    said = "\n".join([record.getMessage() + str(record.exc_info) for record in caplog.records])
    assert "request r1: ValueError" in said
    assert "in submit" in said
    assert SECRET not in said + answer.text


@pytest.mark.parametrize("status", [404, 409])
def test_an_answer_that_a_route_refused_keeps_its_status(service, monkeypatch, status):
    async def refused(ask):
        raise Refused(status, "no")

    monkeypatch.setattr(service[0].desk, "submit", refused)
    assert service[1].post(WAYS[0], json=PLAIN).status_code == status


def test_a_body_that_does_not_come(tmp_path):
    with listening(parts(tmp_path, http={"body_seconds": 0.2})) as url, socket.create_connection(
        ("127.0.0.1", httpx.URL(url).port), timeout=60
    ) as connection:  # fmt: skip
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_says_it_is_too_large_is_not_waited_for(raw_service):
    with socket.create_connection(("127.0.0.1", raw_service), timeout=60) as connection:
        connection.sendall(b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /v1/models HTTP/1.1\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n",
        b"GET http://evil.example/v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"POST /v1/predictions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/predictions HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x00\xa5\x01\x00\x00",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    ],
)
def test_what_is_hardly_http(raw_service, raw):
    with socket.create_connection(("127.0.0.1", raw_service), timeout=60) as connection:
        connection.sendall(raw)
        answer = connection.recv(4096)
    assert not answer or answer.split(b" ")[1][:1] == b"4"
    assert httpx.get(f"http://127.0.0.1:{raw_service}/healthz").status_code == 200


@pytest.fixture(scope="module")
def raw_service(tmp_path_factory):
    with listening(parts(tmp_path_factory.mktemp("raw"))) as url:
        yield httpx.URL(url).port
