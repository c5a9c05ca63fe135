"""Webhooks: who is told what, signed, tried again, and never at a private address."""

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from replicate.client import Client
from replicate.webhook import InvalidSignatureError, Webhooks, WebhookSigningSecret

from raysd.data.download import ALLOW_PRIVATE
from raysd.database import Database
from raysd.serve.drawing import Drawing
from raysd.serve.http import webhooks
from raysd.serve.http.outbox import Outbox
from raysd.serve.predictions import Ask, NewPrediction
from raysd.serve.queue import Queue
from raysd.storage import Storage
from tests.serving import listening, parts

FAST = {"prompt": "a red circle", "num_inference_steps": 1}


class Receiver(HTTPServer):
    """Keeps what it is sent. `answers` are the statuses of the next answers; 200 after them."""

    def __init__(self):
        self.got, self.answers, self.arrived = [], [], threading.Condition()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/told"

    def wait_for(self, count):
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.got) >= count, 60)
        return self.got


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        with self.server.arrived:
            self.server.got.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(self.server.answers.pop(0) if self.server.answers else 200)
            self.send_header("Location", f"{self.server.url}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()
            self.server.arrived.notify_all()

    def log_message(self, *args):
        pass


@pytest.fixture
def receiver():
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def client(service):
    return Client(api_token="x", base_url=service[1])


@pytest.fixture
def private(monkeypatch):
    monkeypatch.setenv(ALLOW_PRIVATE, "1")


def test_the_end_is_told_and_signed_as_the_official_client_checks(client, receiver, private):
    made = client.predictions.create(
        version="cats", input=FAST, webhook=receiver.url, webhook_events_filter=["completed"]
    )
    ((path, headers, body),) = receiver.wait_for(1)
    told, secret = json.loads(body), client.webhooks.default.secret()
    assert path == "/told"
    assert (told["id"], told["status"]) == (made.id, "succeeded")
    assert told == client.predictions.get(made.id).dict() | told
    assert httpx.get(told["output"][0]).status_code == 200
    Webhooks.validate(headers=headers, body=body, secret=secret, tolerance=300)
    for wrong in ({"body": body + " "}, {"secret": WebhookSigningSecret(key="whsec_" + "A" * 43 + "=")}):
        with pytest.raises(InvalidSignatureError):
            Webhooks.validate(**{"headers": headers, "body": body, "secret": secret, **wrong})
    with pytest.raises(InvalidSignatureError):
        Webhooks.validate(headers={**headers, "webhook-id": "msg_other"}, body=body, secret=secret)


@pytest.mark.parametrize(
    ("asked", "statuses"),
    [
        ({}, ["processing", "succeeded"]),
        ({"webhook_events_filter": ["start"]}, ["processing"]),
        ({"webhook_events_filter": ["output"]}, ["succeeded"]),
        ({"webhook_events_filter": []}, []),
    ],
)
def test_what_is_told(client, service, receiver, private, monkeypatch, asked, statuses):
    go_on = threading.Event()
    monkeypatch.setattr(service[0].desk, "step", lambda: go_on.wait(60))
    made = client.predictions.create(version="cats", input=FAST, webhook=receiver.url, **asked)
    if "processing" in statuses:
        receiver.wait_for(1)
    go_on.set()
    made.wait()
    got = receiver.wait_for(len(statuses))
    # Those that come after are told of another prediction: nothing else came of this one before.
    client.predictions.create(version="cats", input=FAST, webhook=receiver.url, webhook_events_filter=["completed"])
    receiver.wait_for(len(statuses) + 1)
    assert [json.loads(body)["status"] for _, _, body in got[: len(statuses)]] == statuses
    assert [json.loads(body)["id"] == made.id for _, _, body in got] == [True] * len(statuses) + [False]


def test_the_older_word_for_a_webhook_of_the_end(client, receiver, private):
    made = client.predictions.create(version="cats", input=FAST, webhook_completed=receiver.url)
    ((_, _, body),) = receiver.wait_for(1)
    assert json.loads(body)["id"] == made.id


def test_a_message_is_tried_again_under_its_id_until_it_is_taken(client, receiver, private):
    receiver.answers = [500, 429]
    client.predictions.create(version="cats", input=FAST, webhook_completed=receiver.url)
    got = receiver.wait_for(3)
    assert len({headers["webhook-id"] for _, headers, _ in got}) == 1
    secret = client.webhooks.default.secret()
    for _, headers, body in got:
        Webhooks.validate(headers=headers, body=body, secret=secret)


def test_what_was_not_told_is_told_by_the_next_process(tmp_path, receiver, private):
    receiver.answers = [500]
    asked = {"version": "cats", "input": FAST, "webhook_completed": receiver.url}
    with listening(parts(tmp_path, pauses=(0.5,))) as url:
        made = httpx.post(f"{url}/v1/predictions", json=asked).json()
        receiver.wait_for(1)
    assert len(receiver.got) == 1
    with listening(parts(tmp_path)):
        (_, first, _), (_, second, body) = receiver.wait_for(2)
    assert json.loads(body)["id"] == made["id"]
    assert first["webhook-id"] == second["webhook-id"]


def test_it_is_given_up_after_the_last_pause(tmp_path, receiver, private, caplog):
    receiver.answers = [500] * 10
    asked = {"version": "cats", "input": FAST, "webhook_completed": receiver.url}
    service = parts(tmp_path, pauses=(0.0, 0.0))
    with listening(service) as url:
        httpx.post(f"{url}/v1/predictions", json=asked)
        receiver.wait_for(3)
        end = time.monotonic() + 60
        while "was not taken" not in caplog.text:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert Outbox(service.database, lambda session: 1e12).take(9) == []
    assert len(receiver.got) == 3


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_two_processes_do_not_take_the_same_message(kind, tmp_path, request):
    storage = Storage(str(tmp_path))
    url = request.getfixturevalue("postgres").url() if kind == "postgres" else f"sqlite:///{tmp_path}/raysd.db"
    database = Database(url, storage)
    database.migrate()
    queue, outbox = Queue(database), Outbox(database)
    new = NewPrediction(Ask("predictions", "cats", Drawing(prompt="x")), "cats@1", "0" * 64)
    for _ in range(12):
        prediction, _ = queue.submit(new)
        for _ in range(2):
            outbox.add(prediction.id, ["start", "completed"], "")
    assert outbox.take(100) == []  # nothing has happened
    for claim in queue.claim("w", "cats", most=12):
        queue.fail(claim, "x")
    taken = []
    takers = [threading.Thread(target=lambda: taken.extend(Outbox(database).take(3))) for _ in range(12)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join()
    rest = outbox.take(100)
    assert len({message.id for message in [*taken, *rest]}) == len(taken) + len(rest) == 24
    outbox.put_off(rest[0].id if rest else taken[0].id, 0.0)
    (again,) = outbox.take(100)
    assert again.tries == 2
    database.close()


def test_an_answer_that_drips_does_not_hold_a_thread(private, monkeypatch):
    monkeypatch.setattr(webhooks, "TRY_SECONDS", 0.3)
    monkeypatch.setattr(webhooks, "TIMEOUT", httpx.Timeout(1.0))
    dripping = threading.Event()

    def drip(server):
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            for _ in range(200):
                if dripping.wait(0.05):
                    return
                connection.sendall(b"x")
            connection.sendall(b"\r\nContent-Length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=drip, args=(server,))
        thread.start()
        try:
            assert webhooks.deliver(f"http://127.0.0.1:{server.getsockname()[1]}/", {}, b"") == "again"
        finally:
            dripping.set()
            thread.join()


@pytest.mark.parametrize("status", [302, 307, 400, 410])
def test_a_redirect_is_not_followed_and_a_refusal_is_not_tried_again(receiver, private, status):
    receiver.answers = [status]
    assert webhooks.deliver(receiver.url, {}, b"{}") == "refused"
    assert [path for path, _, _ in receiver.got] == ["/told"]


def test_nothing_listens(private):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert webhooks.deliver(f"http://127.0.0.1:{port}/", {}, b"{}") == "again"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/x",
        "http://localhost/x",
        "http://10.0.0.1/x",
        "http://192.168.1.1/x",
        "http://169.254.169.254/latest/meta-data",
        "http://[::1]/x",
        "http://[::ffff:10.0.0.1]/x",
        "http://[fd00::1]/x",
        "http://2130706433/x",
        "http://0x7f.1/x",
        "http://0/x",
        "http://user:password@93.184.216.34/x",
        "ftp://93.184.216.34/x",
        "file:///etc/passwd",
        "//93.184.216.34/x",
        "http://",
        "http://[::1",
        "http://a b/",
        "http://93.184.216.34:99999/",
        "http://nowhere.invalid/",
        "http://xn--/",
        "https://xn--a.example/hook",
        "http://" + "a" * 300 + "/",
        "\0",
        "x" * 3000,
    ],
)
def test_addresses_that_may_not_be_reached(service, url):
    queue = service[0].queue
    before = [prediction.id for prediction in queue.find(None, None, 1)]
    answer = httpx.post(f"{service[1]}/v1/predictions", json={"version": "cats", "input": FAST, "webhook": url})
    assert answer.status_code in (400, 422)
    assert answer.json()["detail"].startswith("webhook: ")
    assert "RAYSD" not in answer.text
    assert [prediction.id for prediction in queue.find(None, None, 1)] == before


def test_the_address_connected_to_is_judged(receiver, monkeypatch):
    """A name that was public when the webhook was given, and is private when it is told."""
    real = socket.getaddrinfo

    def rebound(host, *more, **named):
        return real("127.0.0.1" if host == "changes.example" else host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", rebound)
    url = receiver.url.replace("127.0.0.1", "changes.example")
    assert webhooks.deliver(url, {}, b"{}") == "again"
    assert receiver.got == []
    monkeypatch.setenv(ALLOW_PRIVATE, "1")
    assert webhooks.deliver(url, {}, b"{}") is None
    ((_, headers, _),) = receiver.got
    assert headers["host"].startswith("changes.example:")


def test_a_service_without_webhooks(tmp_path):
    service = parts(tmp_path, http={"webhooks": False})
    with listening(service) as url:
        answer = httpx.post(
            f"{url}/v1/predictions", json={"version": "cats", "input": FAST, "webhook": "http://93.184.216.34/"}
        )
    assert answer.status_code == 400
    assert "this service tells none" in answer.json()["detail"]


def test_the_signature_as_svix_publishes_it():
    """The example in Svix's documentation of its signatures."""
    body = b'{"test": 2432232314}'
    headers = webhooks.signed(
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert time.time() > int(headers["webhook-timestamp"])
