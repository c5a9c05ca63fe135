"""What the queue takes and gives: requests that were accepted, the pictures that came of them, and the right to draw them."""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from raysd.serve.drawing import Drawing

Api = Literal["openai", "predictions"]
Status = Literal["starting", "processing", "succeeded", "failed", "canceled", "aborted"]
"""Replicate's words: `starting` waits in the queue; `aborted` met its deadline before anyone began it."""
POLICY = "content_policy_violation"
"""What the error of a prediction begins with (OpenAI's code) if all its pictures were held back."""
LIVE: tuple[Status, ...] = ("starting", "processing")


@dataclass(frozen=True)
class Ask:
    """A request that was found to be in order. `user` is a digest, the same for the same user of the same owner."""

    api: Api
    model: str
    drawing: Drawing
    owner: str | None = None
    user: str | None = None
    idempotency_key: str | None = None
    body: str | None = None
    """What was sent, as a digest: another request with the same key has to be the same. None: API, model and drawing are."""
    version: str | None = None
    """A reference or digest that must draw it; else the model's traffic decides."""
    lora: str | None = None
    deadline: float | None = None
    """Epoch seconds after which it is given up."""
    webhook: str | None = None
    webhook_events: tuple[str, ...] = ()
    withhold: bool = False
    """The prompt is not kept once it is drawn."""
    comparison: str | None = None
    """What joins the two predictions of a blind comparison."""
    request_id: str | None = None
    traceparent: str | None = None
    """Trace Context (W3C) of the request, or of its caller where nothing is traced here."""


@dataclass(frozen=True)
class NewPrediction:
    """A request to be accepted, and the version that draws it.

    `shadow_of`: drawn for its own sake, beside the prediction of that id, and seen by no client.
    """

    ask: Ask
    ref: str
    digest: str
    shadow_of: str | None = None


@dataclass(frozen=True)
class Picture:
    """Picture `number` of a prediction; `path` is in the storage, `sha256` of the file."""

    number: int
    path: str
    sha256: str
    seed: int
    width: int
    height: int


@dataclass(frozen=True)
class Prediction:
    """A request as it stands. Times are epoch seconds; `pictures` are those that there are (still).

    `drawing` is what `Drawing` takes; a prompt that is withheld or deleted is "" in it. `blind`: nobody may be told
    which version draws it, until a choice was kept. `deleted`: when prompt, user and pictures were removed.
    """

    id: str
    api: Api
    owner: str | None
    user: str | None
    model: str
    ref: str
    digest: str
    drawing: dict[str, Any]
    status: Status
    error: str | None
    pictures: list[Picture]
    metrics: dict[str, Any]
    created: float
    started: float | None
    completed: float | None
    deadline: float | None
    cancel_requested: bool
    attempt: int
    webhook: str | None
    webhook_events: list[str]
    withhold: bool
    shadow_of: str | None
    comparison: str | None
    blind: bool
    request_id: str | None
    traceparent: str | None
    deleted: float | None

    @property
    def ended(self) -> bool:
        return self.status not in LIVE


@dataclass(frozen=True)
class Claim:
    """A replica's right to work on a prediction: until its lease ends, or for longer if nobody else claims it."""

    id: str
    token: int
    prediction: Prediction = field(compare=False)


class Cursor(NamedTuple):
    """Where a page of a list ended: the creation time and the id of its last prediction."""

    created: float
    id: str
