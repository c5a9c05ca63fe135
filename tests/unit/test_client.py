"""raysd's own client against a service, and against one that is away for a moment."""

import io
import itertools
import json
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image
from sqlalchemy import select

from raysd import cli
from raysd import client as raysd_client
from raysd.cli import output, predictions
from raysd.client import Client
from raysd.errors import NotFound, RaysdError, RequestError, TooMany
from raysd.feedback.tables import FeedbackRow
from raysd.serve.http import predictions as routes
from tests.ports import free_port
from tests.serving import SIDE, listening, parts

FAST = {"model": "cats", "num_inference_steps": 1}


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


def test_each_user_is_heard_for_himself(client, service):
    one, two = (client.generate("x", seed=seed, **FAST)[0].generation for seed in (1, 2))
    assert client.compare(one, two, "left", user="anna") == ("cats@1", "cats@1")
    client.feedback(one, thumb="up", user="anna")
    client.feedback(one, thumb="up", user="bert")
    with service[0].database.reading() as session:
        anna, again, bert = session.scalars(
            select(FeedbackRow.user).order_by(FeedbackRow.created.desc()).limit(3)
        ).all()[::-1]
    assert anna == again != bert
    client.predict("x", user="anna", **FAST)
    assert service[0].desk.asks[-1].user == anna
    with pytest.raises(RequestError, match="user: printable ASCII"):
        client.feedback(one, thumb="up", user="a\nb")


def test_what_is_deleted_is_gone(client):
    asked = client.wait(client.predict("a red circle", **FAST).id, timeout=60)
    client.delete(asked.id)
    assert client.get(asked.id).generations == []
    with pytest.raises(NotFound):
        client.picture(f"{asked.id}-0")


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

    def sleep(seconds):
        assert seconds >= 0, "time.sleep refuses what is negative or no number"

    monkeypatch.setattr(raysd_client.time, "sleep", sleep)
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


@pytest.mark.parametrize(
    "said", ["-5", "nan", "inf", "soon", "", "Wed, 99 Oct 2026", "0", "Wed, 21 Oct 2015 07:28:00 GMT"]
)
def test_it_comes_back_by_itself_where_no_time_is_said_or_it_is_past(answering, said):
    client, keys = answering([(503, {"Retry-After": said}), (429, {"Retry-After": said}), (400, {})])
    with pytest.raises(RequestError, match="answered 400"):
        client.feedback("x", thumb="up")
    assert len(keys) == 3


@pytest.mark.parametrize("form", ["%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y"])
def test_a_date_says_as_well_when_to_come_back(answering, form):
    """In the three forms of RFC 9110, section 5.6.7."""
    date = (datetime.now(UTC) + timedelta(days=1)).strftime(form)
    client, keys = answering([(429, {"Retry-After": date}), (503, {"Retry-After": date})])
    with pytest.raises(TooMany) as refused:
        client.feedback("x", thumb="up")
    assert refused.value.retry_after == pytest.approx(86400, abs=60)
    with pytest.raises(RaysdError, match="answered 503"):
        client.feedback("x", thumb="up")
    assert len(keys) == 2


@pytest.mark.parametrize("setting", [{"response_format": "url"}, {"stream": True}])
def test_what_would_give_no_pictures_is_refused_before_it_is_drawn(setting):
    (field,) = setting
    with pytest.raises(RequestError, match=field):
        Client().generate("x", **setting)


@pytest.mark.parametrize(
    "url", ["nonsense", "ftp://host", "http://", "http://host:port", "http://me:hunter2@host", "http://xn--/"]
)
def test_what_is_no_address_is_refused_at_once(url):
    with pytest.raises(RequestError, match="url") as refused:
        Client(url)
    assert "hunter2" not in str(refused.value)


def test_what_cannot_be_a_key_is_not_repeated():
    with pytest.raises(RequestError, match="RAYSD_KEY") as refused:
        Client(key="hunter2\n")
    assert "hunter2" not in str(refused.value)


def test_an_id_is_no_other_address(client):
    for id in ("", "../models", "a?b"):
        with pytest.raises(NotFound):
            client.get(id)


# The command line


@pytest.fixture
def run(monkeypatch, capsys, service, tmp_path):
    """Runs `raysd predictions` as `main` does. Its exit status, standard output and standard error."""
    monkeypatch.setenv("RAYSD_URL", service[1])
    monkeypatch.setattr(predictions, "PATIENCE", 0.5)

    def run(*words):
        monkeypatch.setattr(output, "RESULT", sys.stdout)
        monkeypatch.setattr(output.out, "file", sys.stdout)
        monkeypatch.setattr(sys, "argv", ["raysd", "predictions", *words])
        return cli._run(tmp_path / "log"), *capsys.readouterr()

    return run


def test_draw_at_a_service_and_write_the_pictures(run, service, client, tmp_path):
    to = tmp_path / "new folder" / "one.png"
    more = ["--seed", "5", "--steps", "2", "--guidance", "3", "--negative", "a dog", "--count", "2"]
    status, said, errors = run("create", "cats", "--prompt", "a cat", "--out", str(to), *more)
    assert status == 0, errors
    files = [to.with_stem("one-1"), to.with_stem("one-2")]
    assert said.split("\n") == [*map(str, files), ""]
    id = errors.removeprefix("prediction ").strip()
    assert [file.read_bytes() for file in files] == [client.picture(f"{id}-{number}") for number in range(2)]
    drawing = service[0].desk.asks[-1].drawing
    assert (drawing.prompt, drawing.negative, drawing.seed, drawing.steps) == ("a cat", "a dog", 5, 2)
    assert (drawing.guidance, drawing.count) == (3.0, 2)
    body = json.loads(run("get", id, "--json")[1])
    assert (body["id"], body["status"], body["model"], body["version"]) == (id, "succeeded", "cats", "cats@1")
    assert "succeeded" in run("get", id)[1]
    again = json.loads(run("get", id, "--out", str(tmp_path / "two.png"), "--json")[1])
    assert again["files"] == [str(tmp_path / f"two-{number}.png") for number in (1, 2)]
    assert (tmp_path / "two-2.png").read_bytes() == files[1].read_bytes()


def test_one_picture_has_the_name_that_was_given(run, tmp_path):
    to = tmp_path / "one.png"
    body = json.loads(run("create", "cats", "--prompt", "x", "--steps", "1", "--out", str(to), "--json")[1])
    assert body["files"] == [str(to)]
    assert Image.open(to).size == (SIDE, SIDE)


def test_list_the_newest_and_stop_one(run, client, service, monkeypatch, tmp_path):
    go_on = threading.Event()
    monkeypatch.setattr(service[0].desk, "step", lambda: go_on.wait(60))
    monkeypatch.setattr(routes, "PAGE", 2)  # so that the list has several pages
    ids = [client.predict("x", **FAST).id for _ in range(4)]
    rows = json.loads(run("list", "--limit", "3", "--json")[1])
    assert [row["id"] for row in rows] == ids[:0:-1]
    assert ids[3] in run("list")[1]
    assert json.loads(run("cancel", ids[3], "--json")[1])["id"] == ids[3]
    go_on.set()
    assert client.wait(ids[3], timeout=60).status == "canceled"
    status, said, errors = run("get", ids[3], "--out", str(tmp_path / "x.png"))
    assert (status, said) == (1, "")
    assert "was canceled" in errors


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["list", "--url", "nonsense"], 2, "url (RAYSD_URL): give an address"),
        (["list", "--url", f"http://127.0.0.1:{free_port()}"], 1, "Connection refused"),
        (["create", "cats", "--prompt", "x", "--out", "x.gif"], 2, "--out x.gif: name a .png file"),
        (["create", "dogs", "--prompt", "x", "--out", "x.png"], 2, "served here: tiny-sd, cats"),
        (["create", "cats", "--prompt", "x", "--steps", "999", "--out", "x.png"], 2, "num_inference_steps"),
        (["get", "a" * 26], 2, "there is none of that id"),
        (["cancel", "../models"], 2, "there is nothing of that id"),
    ],
    ids=lambda value: " ".join(value)[:20] if isinstance(value, list) else "",
)
def test_what_goes_wrong_is_said_in_a_line(run, words, status, message):
    began = time.monotonic()
    came, said, errors = run(*words)
    assert time.monotonic() - began < 4, "it stayed for longer than somebody who waits would"
    assert (came, said) == (status, "")
    assert message in errors
    assert len(errors.strip().splitlines()) == 1


def test_a_key_is_taken_from_the_environment_and_never_shown(run, monkeypatch, tmp_path):
    public = parts(tmp_path, public=True)
    secret = public.key()
    with listening(public) as url:
        for key, status, message in (
            (secret, 0, ""),
            (secret[:-1], 2, "unknown or was revoked"),
            ("", 2, "give an API"),
        ):
            monkeypatch.setenv("RAYSD_KEY", key)
            came, said, errors = run("list", "--url", url)
            assert came == status
            assert message in errors
            assert key == "" or key not in said + errors


def test_what_answers_otherwise_is_no_service(answering):
    client, _ = answering([(200, {})])
    with pytest.raises(RaysdError, match="does not answer as a raysd service"):
        client.feedback("x", thumb="up")
