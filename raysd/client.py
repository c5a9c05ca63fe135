"""A client of a raysd service: draw, wait, say what one thinks of it.

client = Client("http://127.0.0.1:8000")
drawn = client.generate("a red circle", model="cats", seed=1)[0]
drawn.save("circle.png")
client.feedback(drawn.generation, thumb="up", user="anna")
"""

import base64
import math
import os
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx

from raysd.errors import NotFound, RaysdError, RequestError, TooMany

HERE = "http://127.0.0.1:8000"
PATIENCE = 60.0
"""Seconds for which a request is made again where the service is away, or says to come back."""
_KEY = re.compile(r"[!-~]{1,512}")
_ID = re.compile(r"[\w-]{1,100}", re.ASCII)


@dataclass(frozen=True)
class Drawn:
    """A picture: PNG, and what drew it. `generation` is what feedback is given to."""

    png: bytes
    generation: str
    seed: int
    version: str | None
    digest: str | None

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self.png)


@dataclass(frozen=True)
class Prediction:
    """A request as it stands. `output` are links of its pictures that hold for a while; `generations` name them.

    `created` is a date and time (ISO 8601, UTC).
    """

    id: str
    status: str
    output: list[str]
    generations: list[str]
    error: str | None
    version: str | None
    metrics: Mapping[str, Any]
    model: str
    created: str

    @property
    def ended(self) -> bool:
        return self.status in ("succeeded", "failed", "canceled")


class Client:
    """Speaks to the service at `url` (RAYSD_URL), with an API `key` (RAYSD_KEY) unless it is this machine's own.

    Every method raises RequestError (NotFound, TooMany) for what is refused, and RaysdError where the service failed or
    stayed away for `patience` seconds (a minute). What is sent twice because an answer was lost is done once.
    Raises RequestError for what is no http address, and for what cannot be a key.
    """

    def __init__(
        self, url: str | None = None, key: str | None = None, *, timeout: float = 600.0, patience: float | None = None
    ) -> None:
        url, key = url or os.environ.get("RAYSD_URL") or HERE, key or os.environ.get("RAYSD_KEY")
        if key and _KEY.fullmatch(key) is None:  # httpx would quote it
            raise RequestError("RAYSD_KEY: an API key has no spaces, and ASCII characters alone")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Timeout(timeout, connect=10.0)
        self._patience = PATIENCE if patience is None else patience
        self._http = httpx.Client(base_url=_address(url), headers=headers, timeout=limits)

    def models(self) -> list[str]:
        """The names of the models that are served."""
        return [model["id"] for model in self._ask("GET", "/v1/models")["data"]]

    def generate(self, prompt: str, *, model: str | None = None, n: int = 1, **settings: Any) -> list[Drawn]:
        """Draw and wait. `settings` as in OpenAI's Images API, and negative_prompt, num_inference_steps, seed, …

        Raises RequestError for those that ask for links or a stream, as the pictures themselves are returned.
        """
        if settings.get("response_format") not in (None, "b64_json"):
            raise RequestError("response_format: b64_json alone, for pictures are returned; predict gives links")
        if settings.get("stream"):
            raise RequestError("stream: the pictures are returned once all are drawn; leave it out")
        body = {"prompt": prompt, "model": model, "n": n, **settings}
        made = self._ask("POST", "/v1/images/generations", body)["data"]
        fields = ("generation", "seed", "version", "digest")
        return [Drawn(base64.b64decode(image["b64_json"]), *(image[name] for name in fields)) for image in made]

    def predict(self, prompt: str, *, model: str | None = None, user: str | None = None, **settings: Any) -> Prediction:
        """Ask for pictures and come back for them. `settings` are those of /v1/predictions' input.

        `user` is your name for who asks: the same user is drawn for by the same version.
        """
        asked = {"model": model, "input": {"prompt": prompt, **settings}}
        return _prediction(self._ask("POST", "/v1/predictions", asked, user))

    def get(self, id: str) -> Prediction:
        """A prediction as it stands."""
        return _prediction(self._ask("GET", f"/v1/predictions/{_known(id)}"))

    def predictions(self, limit: int = 100) -> list[Prediction]:
        """Those of this key, the newest first; with the role admin and on loopback those of all."""
        found: list[Prediction] = []
        path: str | None = "/v1/predictions"
        while path is not None and len(found) < limit:
            page = self._ask("GET", path)
            found += map(_prediction, page["results"])
            following = page["next"]  # by its query alone: it may name the service as others reach it
            path = f"/v1/predictions?{httpx.URL(following).query.decode()}" if following else None
        return found[:limit]

    def wait(self, id: str, timeout: float | None = None) -> Prediction:
        """A prediction once it has ended. Raises TimeoutError after `timeout` seconds."""
        began, pause = time.monotonic(), 0.05
        while not (prediction := self.get(id)).ended:
            if timeout is not None and time.monotonic() + pause > began + timeout:
                raise TimeoutError(f"prediction {id}: {prediction.status} after {timeout:g} s")
            time.sleep(pause)
            pause = min(1.5 * pause, 1.0)
        return prediction

    def cancel(self, id: str) -> Prediction:
        """Stop a prediction."""
        return _prediction(self._ask("POST", f"/v1/predictions/{_known(id)}/cancel"))

    def delete(self, id: str) -> None:
        """Stop a prediction, and remove its prompt, its pictures and what was written of them, for good."""
        self._send("DELETE", f"/v1/predictions/{_known(id)}")

    def picture(self, generation: str) -> bytes:
        """The PNG of a generation. Raises NotFound before it is drawn, and when it is kept no longer."""
        return self._send("GET", f"/v1/generations/{_known(generation)}/picture").content

    def feedback(self, generation: str, *, user: str | None = None, **said: Any) -> str:
        """Say something of a generation: thumb ("up", "down"), stars (1 to 5), tags, text, report. Returns its id.

        `user` is your name for who says it: each one's opinions count once.
        """
        return str(self._ask("POST", "/v1/feedback", {"generation": generation, **said}, user)["id"])

    def compare(self, left: str, right: str, choice: str, *, user: str | None = None) -> tuple[str, str]:
        """Say which of two generations is better: "left", "right" or "tie". Returns the versions that drew them."""
        pair = {"left": left, "right": right, "choice": choice}
        told = self._ask("POST", "/v1/feedback", {"pair": pair}, user)
        return told["left"], told["right"]

    def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, user: str | None = None
    ) -> dict[str, Any]:
        sent = self._send(method, path, body, user)
        try:
            answer: dict[str, Any] = sent.json()
        except ValueError:
            raise RaysdError(f"{self._http.base_url}: does not answer as a raysd service does") from None
        return answer

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, user: str | None = None
    ) -> httpx.Response:
        body = {name: value for name, value in (body or {}).items() if value is not None} or None
        headers = {"Idempotency-Key": uuid.uuid4().hex} if method == "POST" else {}
        if user is not None:
            if not (user.isascii() and user.isprintable()):
                raise RequestError("user: printable ASCII characters alone; send a digest of other names")
            headers["X-Raysd-User"] = user
        end, pause = time.monotonic() + self._patience, 0.2
        while True:
            try:
                answer = self._http.request(method, path, json=body, headers=headers)
                wait = _retry_after(answer) or pause
                if answer.status_code not in (429, 502, 503) or time.monotonic() + wait > end:
                    return _checked(answer)
            except httpx.TransportError as error:
                wait = pause
                if time.monotonic() + wait > end:
                    raise RaysdError(f"{self._http.base_url}: {str(error) or type(error).__name__}") from None
            time.sleep(wait)
            pause = min(2 * pause, 5.0)


def _address(url: str) -> str:
    """Raises RequestError for what is no address of a service. It is shown in errors, so it may hold no password."""
    try:
        parsed = httpx.URL(url)
        whole = parsed.scheme in ("http", "https") and parsed.host and not parsed.userinfo
    except (httpx.InvalidURL, ValueError):  # the latter of a host that is no international name, as xn--a.example
        whole = False
    if not whole:
        raise RequestError("url (RAYSD_URL): give an address like http://127.0.0.1:8000, without user and password")
    return url


def _known(id: str) -> str:
    """Raises NotFound for what is no id: as a part of an address it could be another address."""
    if _ID.fullmatch(id) is None:
        raise NotFound("there is nothing of that id")
    return id


def _retry_after(answer: httpx.Response) -> float | None:
    """Seconds until one may come back, said as such or as a date (RFC 9110). None where neither is said."""
    said = answer.headers.get("Retry-After", "")
    try:
        seconds = float(said)
    except ValueError:
        return _until(said)
    return seconds if 0 <= seconds < math.inf else None


def _until(date: str) -> float | None:
    try:
        moment = parsedate_to_datetime(date)
    except (ValueError, OverflowError):
        return None
    moment = moment.replace(tzinfo=moment.tzinfo or UTC)  # the oldest form of a date in HTTP names no zone
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.is_success:
        return answer
    try:
        said = answer.json()
        reason = said["error"]["message"] if "error" in said else said["detail"]
    except (ValueError, KeyError, TypeError):
        reason = f"answered {answer.status_code}"
    if answer.status_code == 429:
        wait = _retry_after(answer)
        raise TooMany(reason, 60.0 if wait is None else wait)
    raise (NotFound if answer.status_code == 404 else RequestError if answer.is_client_error else RaysdError)(reason)


def _prediction(said: Mapping[str, Any]) -> Prediction:
    return Prediction(
        id=said["id"],
        status=said["status"],
        output=said["output"] or [],
        generations=[each["generation"] for each in said["generations"]],
        error=said["error"],
        version=said["version_ref"],
        metrics=said["metrics"],
        model=said["model"].rpartition("/")[2],
        created=said["created_at"],
    )
