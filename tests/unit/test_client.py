"""raysd's own client against a service, and against one that is away for a moment."""

import io
import itertools
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image

from raysd import client as raysd_client
from raysd.client import Client
from raysd.errors import NotFound, RaysdError, RequestError, TooMany
from tests.serving import SIDE, listening, parts

FAST = {"model": "cats", "num_inference_steps": 1}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    service = parts(tmp_path_factory.mktemp("service"))
    with listening(service) as url:
        yield service, url


@pytest.fixture
def client(service):
    return Client(service[1])


def test_draw_and_say_what_one_thinks(client, tmp_path):
    assert client.models() == ["tiny-sd", "cats"]
    first, second = client.generate("a red circle", n=2, seed=3, **FAST)
    assert (first.seed, second.seed, first.version) == (3, 4, "cats@1")
    first.save(tmp_path / "one.png")
    assert Image.open(tmp_path / "one.png").size == (SIDE, SIDE)
    assert client.picture(first.generation) == first.png
    ids = {client.feedback(first.generation, thumb="up"), client.feedback(second.generation, stars=2, tags=["blurry"])}
    assert len(ids) == 2


def test_ask_now_and_fetch_later(client):
    asked = client.predict("a red circle", seed=3, num_outputs=2, **FAST)
    assert not asked.ended
    done = client.wait(asked.id, timeout=60)
    assert (done.status, len(done.output), len(done.generations)) == ("succeeded", 2, 2)
    assert Image.open(io.BytesIO(client.picture(done.generations[1]))).size == (SIDE, SIDE)


def test_what_takes_too_long_and_is_stopped(client, service, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(service[0].desk, "step", lambda: go_on.wait(60))
    asked = client.predict("a red circle", **FAST)
    with pytest.raises(TimeoutError, match=asked.id):
        client.wait(asked.id, timeout=0.2)
    client.cancel(asked.id)
    go_on.set()
    assert client.wait(asked.id, timeout=60).status == "canceled"


def test_refusals_are_errors_with_their_reason(client):
    with pytest.raises(RequestError, match="num_inference_steps"):
        client.generate("x", model="cats", num_inference_steps=0)
    with pytest.raises(NotFound, match="served here"):
        client.predict("x", model="dogs")
    with pytest.raises(NotFound):
        client.picture("a" * 26 + "-0")


@pytest.fixture
def answering(monkeypatch):
    """Starts a server that gives these answers in turn, None for a connection that is cut, and keeps their keys."""
    monkeypatch.setattr(raysd_client.time, "sleep", lambda seconds: None)
    servers = []

    def start(answers):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                keys.append(self.headers["Idempotency-Key"])
                status, more = next(turn) or (None, None)
                if status is None:
                    return
                self.send_response(status)
                for name, value in {"Content-Length": "0", **more}.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *args):
                pass

        keys, turn = [], iter(answers)
        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        servers.append(server)
        return Client(f"http://127.0.0.1:{server.server_port}"), keys

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_it_comes_back_with_the_same_key(answering):
    client, keys = answering([(503, {"Retry-After": "2"}), None, (429, {}), (400, {})])
    with pytest.raises(RequestError, match="answered 400"):
        client.feedback("x", thumb="up")
    assert len(keys) == 4
    assert len(set(keys)) == 1


def test_it_gives_up(answering, monkeypatch):
    monkeypatch.setattr(raysd_client, "PATIENCE", 0)
    client, _ = answering([(429, {"Retry-After": "7"}), (503, {}), None])
    with pytest.raises(TooMany) as refused:
        client.feedback("x", thumb="up")
    assert refused.value.retry_after == 7
    for _ in range(2):
        with pytest.raises(RaysdError) as failed:
            client.feedback("x", thumb="up")
        assert not isinstance(failed.value, RequestError)


def test_it_does_not_wait_longer_than_it_may(answering):
    client, keys = answering(itertools.repeat((429, {"Retry-After": "86400"})))
    with pytest.raises(TooMany):
        client.feedback("x", thumb="up")
    assert len(keys) == 1
