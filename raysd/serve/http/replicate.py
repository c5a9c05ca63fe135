"""A prediction as Replicate's clients know it."""

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel

from raysd.serve.http.catalog import OWNER
from raysd.serve.http.links import Links
from raysd.serve.http.wire import INSIDE
from raysd.serve.predictions import Prediction


class Urls(BaseModel):
    get: str
    cancel: str


class Drawn(BaseModel):
    """One picture of a prediction, as feedback names it."""

    generation: str
    seed: int
    url: str


class PredictionAnswer(BaseModel):
    """A prediction. Until the choice of a comparison is made, its `model` and `version` say nothing."""

    id: str
    model: str
    version: str
    version_ref: str | None
    input: dict[str, Any]
    output: list[str] | None
    generations: list[Drawn]
    logs: str
    error: str | None
    status: Literal["starting", "processing", "succeeded", "failed", "canceled"]
    created_at: str
    started_at: str | None
    completed_at: str | None
    data_removed: bool
    metrics: dict[str, Any]
    urls: Urls
    webhook: str | None
    webhook_events_filter: list[str]
    source: Literal["api"] = "api"


def said(links: Links, base: str, prediction: Prediction) -> PredictionAnswer:
    """A prediction as Replicate's clients know it."""
    drawn = [
        Drawn(generation=generation, seed=picture.seed, url=base + links.to(f"{generation}.png"))
        for picture in prediction.pictures
        for generation in [f"{prediction.id}-{picture.number}"]
    ]
    here = f"{base}/v1/predictions/{prediction.id}"
    return PredictionAnswer(
        id=prediction.id,
        model=f"{OWNER}/{'hidden' if prediction.blind else prediction.model}",
        version="hidden" if prediction.blind else prediction.digest,
        version_ref=None if prediction.blind else prediction.ref,
        input=_input(prediction),
        output=[picture.url for picture in drawn] if prediction.status == "succeeded" else None,
        generations=drawn,
        logs="",
        error=prediction.error,
        status="canceled" if prediction.status == "aborted" else prediction.status,  # their Python client knows no more
        created_at=_iso(prediction.created) or "",
        started_at=_iso(prediction.started),
        completed_at=_iso(prediction.completed),
        data_removed=prediction.deleted is not None or (prediction.ended and prediction.withhold),
        metrics=_metrics(prediction),
        urls=Urls(get=here, cancel=f"{here}/cancel"),
        webhook=prediction.webhook,
        webhook_events_filter=prediction.webhook_events,
    )


def _input(prediction: Prediction) -> dict[str, Any]:
    outside = {inside: name for name, inside in INSIDE.items()}
    return {outside.get(name, name): value for name, value in prediction.drawing.items() if value is not None}


def _metrics(prediction: Prediction) -> dict[str, Any]:
    times = {}
    if prediction.completed is not None:
        times["total_time"] = round(prediction.completed - prediction.created, 3)
        if prediction.started is not None:
            times["predict_time"] = round(prediction.completed - prediction.started, 3)
    return {**prediction.metrics, **times, "image_count": len(prediction.pictures)}


def _iso(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
