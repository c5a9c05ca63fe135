"""Telling an address of the client's that a prediction began or ended, signed as Svix does and Replicate's clients check.

Each message is posted until it is taken, with growing pauses, and only to public addresses: judged when the webhook is
given, and again on the very address that is connected to. Redirects are not followed.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal

import httpx

from raysd.data.download import Guard, public_address
from raysd.errors import DataError, RaysdError, RequestError
from raysd.serve.http.aside import Aside
from raysd.serve.http.links import derived
from raysd.serve.http.outbox import Message, Outbox
from raysd.serve.predictions import Prediction
from raysd.serve.queue import Queue

log = logging.getLogger("raysd.serve.http")
Event = Literal["start", "output", "logs", "completed"]
EVENTS: tuple[Event, ...] = ("start", "output", "logs", "completed")
"""Replicate's. Pictures come all at the end, so `output` is told where `completed` is not wanted; there are no logs."""
PAUSES = (1.0, 5.0, 30.0, 120.0, 600.0)
"""Seconds between two tries, each up to a quarter longer or shorter."""
TIMEOUT = httpx.Timeout(10.0, connect=5.0)
TRY_SECONDS = 30.0
"""For which one try may last, however slowly the answer comes. Shorter than a message's lease."""
RESOLVE_SECONDS = 5.0
LOOK = 0.5
"""Seconds between looks for what is to be told."""
AT_ONCE = 8
LONGEST_URL = 2000


def secret_of(secret: bytes, owner: str | None) -> str:
    """What an owner's webhooks are signed with, as `whsec_…`: his alone, so that no other can sign in its name."""
    return "whsec_" + base64.b64encode(derived(secret, f"webhooks of {owner or ''}")).decode()


def signed(secret: str, id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers of a message: its id (the same at every try), the time of this try, and the signature over both."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signature = hmac.new(key, f"{id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return {
        "webhook-id": id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": "v1," + base64.b64encode(signature).decode(),
    }


async def check(url: str, aside: Aside) -> str:
    """A webhook's address as it is given. Raises RequestError where it may not be reached."""
    parsed = _parsed(url)
    port = parsed.port or (443 if parsed.scheme == "https" else 80)
    judged = aside.resolve(public_address, parsed.raw_host.decode("ascii"), port)
    try:
        await asyncio.wait_for(judged, RESOLVE_SECONDS)
    except TimeoutError:
        raise RequestError("webhook: its host did not resolve in time; check the URL") from None
    except DataError as error:
        raise RequestError(f"webhook: {str(error).splitlines()[0]}") from None
    return url


def _parsed(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
        whole = parsed.scheme in ("http", "https") and parsed.host and not parsed.userinfo
    except (httpx.InvalidURL, ValueError):  # the latter of a host that is no international name, as xn--a.example
        raise RequestError("webhook: not a URL") from None
    if not whole or len(url) > LONGEST_URL or not 0 < (parsed.port or 80) < 2**16:
        raise RequestError("webhook: give http(s)://host/… without a user, of at most 2,000 characters")
    return parsed


class Courier:
    """Tells webhooks what the outbox holds, in the event loop. `body_of` says a prediction as GET does."""

    def __init__(
        self,
        outbox: Outbox,
        queue: Queue,
        secret: bytes,
        body_of: Callable[[str, Prediction], dict[str, Any]],
        pauses: Sequence[float] = PAUSES,
    ) -> None:
        self._outbox, self._queue, self._secret, self._body_of = outbox, queue, secret, body_of
        self._pauses = pauses
        self._threads = ThreadPoolExecutor(AT_ONCE, "webhook")
        self._look: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look for what is to be told."""
        self._look = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """What was not told yet, another process tells, or this one after its next start."""
        if self._look is not None:
            self._look.cancel()
            await asyncio.gather(self._look, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def follow(self, prediction: Prediction, base: str) -> None:
        """Have a new prediction's webhook told what it asked for. `base`: what addresses in the messages begin with."""
        wanted = set(prediction.webhook_events)
        if "completed" in wanted:
            wanted.discard("output")
        self._outbox.add(prediction.id, sorted(wanted - {"logs"}), base)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        under_way: set[asyncio.Future[None]] = set()
        while True:
            await asyncio.sleep(LOOK)
            try:
                for message in await asyncio.to_thread(self._outbox.take, AT_ONCE - len(under_way)):
                    telling = loop.run_in_executor(self._threads, self._tell, message)
                    under_way.add(telling)
                    telling.add_done_callback(under_way.discard)
            except RaysdError as error:
                log.warning("webhooks: %s", type(error).__name__)

    def _tell(self, message: Message) -> None:
        """One try, and what comes after it."""
        try:
            prediction = self._queue.get(message.prediction_id)
            if message.event == "output" and prediction.status != "succeeded":
                self._outbox.put_off(message.id, None)
                return
            body = json.dumps(self._body_of(message.base, prediction)).encode()
            headers = signed(secret_of(self._secret, prediction.owner), message.id, int(time.time()), body)
            outcome = deliver(str(prediction.webhook), headers, body)
            again = outcome == "again" and message.tries <= len(self._pauses)
            pause = self._pauses[message.tries - 1] * random.uniform(0.75, 1.25) if again else None
            self._outbox.put_off(message.id, pause)
            if outcome is not None and not again:
                log.warning("webhook: %s was not taken", message.id)
        except RaysdError as error:  # it is due again after its lease
            log.warning("webhook: %s: %s", message.id, type(error).__name__)


def deliver(url: str, headers: dict[str, str], body: bytes) -> Literal["again", "refused"] | None:
    """Post it once. None: it was taken."""
    plain = {"Content-Type": "application/json", "User-Agent": "raysd", **headers}
    try:
        # A client each: a connection that was kept open would be used for another name without checking its certificate.
        client = httpx.Client(transport=Guard(), timeout=TIMEOUT, follow_redirects=False, trust_env=False)
        with (
            client,
            _closed_after(client, TRY_SECONDS),
            client.stream("POST", url, content=body, headers=plain) as answer,
        ):
            status = answer.status_code
    except (
        httpx.HTTPError,
        httpx.InvalidURL,
        DataError,
        OSError,
        RuntimeError,
    ):  # the last: of a client that was closed
        return "again"
    if 200 <= status < 300:
        return None
    return "again" if status in (408, 425, 429) or status >= 500 else "refused"


@contextmanager
def _closed_after(client: httpx.Client, seconds: float) -> Iterator[None]:
    timer = threading.Timer(seconds, client.close)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
