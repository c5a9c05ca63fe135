"""A spot machine's notice, as the metadata services of EC2 and Compute Engine give it, reaches Ray once."""

import json
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from raysd import notice


class Metadata(BaseHTTPRequestHandler):
    """Both services. `action` and `preempted` are what they say."""

    action: str | None = None
    broken = False
    preempted = "FALSE"

    def do_PUT(self) -> None:
        asked = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer(200 if asked else 403, "word")

    def do_GET(self) -> None:
        if self.broken:
            self.wfile.write(b"garbage\r\n\r\n")
        elif self.path == "/latest/meta-data/spot/instance-action":
            allowed = self.headers["X-aws-ec2-metadata-token"] == "word"
            self._answer((200 if self.action else 404) if allowed else 401, self.action or "")
        elif self.path == "/computeMetadata/v1/instance/preempted" and self.headers["Metadata-Flavor"] == "Google":
            self._answer(200, self.preempted)
        else:
            self._answer(404, "")

    def _answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[tuple[str, type[Metadata]]]:
    kind = type("Metadata", (Metadata,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", kind
    server.shutdown()
    server.server_close()


def test_ec2_says_when_and_gcp_that(service: tuple[str, type[Metadata]]) -> None:
    root, said = service
    assert notice.aws(root) is None
    assert notice.gcp(root) is None
    at = datetime.now(UTC) + timedelta(seconds=100)
    said.action = json.dumps({"action": "terminate", "time": at.strftime("%Y-%m-%dT%H:%M:%SZ")})
    said.preempted = "TRUE"
    left = notice.aws(root)
    assert left is not None
    assert 90 < left <= 100
    assert notice.gcp(root) == 30


def test_the_node_is_drained_once_though_the_service_was_away(service: tuple[str, type[Metadata]]) -> None:
    root, said = service
    said.preempted = "TRUE"
    looks = iter(["http://127.0.0.1:9", root])
    drained: list[int] = []
    notice.watch(lambda: notice.gcp(next(looks)), drained.append, period=0.01)
    assert drained == [30]


@pytest.mark.parametrize(
    "nonsense",
    [
        {"broken": True},
        *({"action": it} for it in ("null", "[]", '{"action": "terminate"}', '{"time": null}', "{", "ä")),
    ],
)
def test_an_answer_that_is_no_notice_is_said_once_and_asked_again(
    service: tuple[str, type[Metadata]], capsys: pytest.CaptureFixture[str], nonsense: dict[str, Any]
) -> None:
    root, said = service
    drained: list[int] = []
    looks = iter([nonsense, nonsense, {"broken": False, "action": '{"time": "2020-01-01T00:00:00Z"}'}])

    def look() -> int | None:
        for name, value in next(looks).items():
            setattr(said, name, value)
        return notice.aws(root)

    notice.watch(look, drained.append, period=0.01)
    assert drained == [0]
    assert capsys.readouterr().err.count("no notice could be read") == 1


def test_a_drain_that_fails_is_tried_again_while_there_is_time(capsys: pytest.CaptureFixture[str]) -> None:
    tried: list[int] = []

    def drain(left: int) -> None:
        tried.append(left)
        if len(tried) < 3:
            raise subprocess.CalledProcessError(1, "ray drain-node")

    notice.watch(lambda: 30, drain, period=0.01)
    assert len(tried) == 3
    assert max(tried) == tried[0] == 30
    assert capsys.readouterr().err.count("not drained") == 2
    tried.clear()
    notice.watch(lambda: 0, drain, period=0.01)
    assert tried == [0]


def test_a_cloud_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert notice.main(["azure"]) == 2
    assert "aws|gcp" in capsys.readouterr().err
