"""What the HTTP application asks of the service behind it, and the values that pass between the two."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from raysd.errors import RaysdError
from raysd.serve.predictions import Ask, Prediction


class Busy(RaysdError):
    """The service has too much to do: the same request may be taken in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float = 2.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Share:
    """One version in a model's traffic; the weights of a model's versions sum up to 1."""

    ref: str
    digest: str
    weight: float = 1.0


@dataclass(frozen=True)
class Served:
    """A model as it is offered under `name`. `ref` and `digest` are those of its largest share; `created` is epoch seconds."""

    name: str
    ref: str
    digest: str
    created: float
    loras: bool = False
    """Whether a request may name a LoRA version to draw with."""
    traffic: tuple[Share, ...] = ()
    """All its versions, the largest share first."""
    withdrawn: str | None = None
    """Why nothing draws it any more."""


@dataclass(frozen=True)
class Preview:
    """Picture `number` of a prediction as far as it is: its preview `index` (from 0), as PNG."""

    number: int
    index: int
    png: bytes


@dataclass(frozen=True)
class Ended:
    prediction: Prediction


Event = Preview | Ended


class Desk(Protocol):
    """Takes requests and gives pictures. All its methods may be called by many requests at once, in one event loop."""

    def start(self) -> None:
        """Begin, in the event loop of the application."""

    async def close(self) -> None:
        """End what was begun."""

    def models(self) -> Sequence[Served]:
        """What is served now."""

    async def submit(self, ask: Ask) -> Prediction:
        """Decide which version draws it and write it down. The same idempotency key gives the former prediction.

        Raises NotFound (model, version, LoRA, upload), RequestError (the model cannot draw that), TooMany, Busy.
        """

    async def wait(self, id: str, timeout: float | None) -> Prediction:
        """The prediction once it has ended, or as it is after `timeout` seconds. Raises NotFound."""

    def events(self, id: str) -> AsyncIterator[Event]:
        """Previews as they come, then `Ended`. There may be no previews: of a prediction that another process took."""

    async def cancel(self, id: str) -> Prediction:
        """Stop it if it has not ended. Raises NotFound."""

    async def delete(self, id: str) -> None:
        """Stop it, and remove prompt, user and pictures, also those that it started from. Raises NotFound."""

    async def read(self, path: str) -> bytes:
        """A generated picture. Raises NotFound."""

    async def keep_upload(self, png: bytes, owner: str | None) -> str:
        """Keep a normalised picture for a while, for its owner's requests, and say its sha256."""
