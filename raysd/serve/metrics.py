"""What the service counts and times, for Prometheus: each metric's name, labels and buckets, and what has to happen.

Ray puts `ray_` before each name and adds the process (WorkerId), so queries sum or take the largest over processes.
No label ever holds a prompt, a user or a request.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
STEP_SECONDS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
PICTURES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

Outcome = Literal["succeeded", "failed", "canceled", "aborted", "refused", "flagged"]
"""Of a request; aborted: its deadline passed before anyone began it; refused: turned away with 429 or 503 before it was
written down; flagged: drawn, and none was shown."""
Opinion = Literal["up", "down", "stars", "tags", "text", "report", "choice"]


@dataclass(frozen=True)
class Metric:
    """A metric. Those with buckets are histograms."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    meaning: str
    labels: tuple[str, ...] = ("model", "version")
    buckets: tuple[float, ...] = ()

    @property
    def exported(self) -> tuple[str, ...]:
        """Its names in Prometheus."""
        endings = ("_bucket", "_count", "_sum") if self.kind == "histogram" else ("",)
        return tuple(f"ray_{self.name}{ending}" for ending in endings)


BY_OUTCOME = ("model", "version", "outcome")
REQUESTS = Metric("counter", "raysd_requests_total", "Requests that ended", BY_OUTCOME)
DURATION = Metric(
    "histogram", "raysd_request_duration_seconds", "From acceptance to the end of a request", BY_OUTCOME, SECONDS
)
WAIT = Metric(
    "histogram", "raysd_queue_wait_seconds", "From acceptance to a request's first denoising step", buckets=SECONDS
)
STEP = Metric("histogram", "raysd_denoise_step_seconds", "One denoising step of a batch", buckets=STEP_SECONDS)
BATCH = Metric("histogram", "raysd_batch_size", "Pictures in the batch of a denoising step", buckets=PICTURES)
IMAGES = Metric("counter", "raysd_images_total", "Pictures drawn")
NAN_PICTURES = Metric("counter", "raysd_nan_pictures_total", "Pictures given up because their latents were not finite")
FLAGGED = Metric("counter", "raysd_flagged_pictures_total", "Pictures that the safety classifier held back")
IN_PROGRESS = Metric("gauge", "raysd_images_in_progress", "Pictures being drawn by this process", ("model",))
DEPTH = Metric("gauge", "raysd_queue_depth", "Pictures asked for and not yet claimed, in the whole service", ("model",))
REPLICAS = Metric("gauge", "raysd_replicas", "1 from each process that is ready to draw the model", ("model",))
LOADS = Metric("counter", "raysd_model_loads_total", "Models loaded, or refused at load", BY_OUTCOME)
LORA_LOAD = Metric("histogram", "raysd_lora_load_seconds", "Putting a LoRA version onto its base", buckets=SECONDS)
FEEDBACK = Metric("counter", "raysd_feedback_total", "What people said of pictures; the outcome says which", BY_OUTCOME)
DATABASE_ERRORS = Metric("counter", "raysd_database_errors_total", "Tries that did not reach the database", ())

METRICS = (
    REQUESTS,
    DURATION,
    WAIT,
    STEP,
    BATCH,
    IMAGES,
    NAN_PICTURES,
    FLAGGED,
    IN_PROGRESS,
    DEPTH,
    REPLICAS,
    LOADS,
    LORA_LOAD,
    FEEDBACK,
    DATABASE_ERRORS,
)

Record = Callable[[Metric, float, dict[str, str]], None]


class Metrics:
    """What happened, told once. Any thread may call; a call takes microseconds.

    `version` is a reference such as cats@3; `seconds` are seconds.
    """

    def __init__(self, record: Record):
        self._record = record

    @classmethod
    def off(cls) -> "Metrics":
        """Tell nobody: where there is no Ray."""
        return cls(lambda metric, value, labels: None)

    @classmethod
    def to_ray(cls) -> "Metrics":
        """Export through Ray's agent on this node. Only in a process of a Ray cluster."""
        return cls(_ray_recorder())

    def ended(self, model: str, version: str, outcome: Outcome, seconds: float) -> None:
        """A request ended, so many seconds after it was accepted."""
        self._tell(REQUESTS, 1, model, version, outcome)
        self._tell(DURATION, seconds, model, version, outcome)

    def refused(self, model: str, version: str) -> None:
        """A request was turned away because there was too much to do."""
        self._tell(REQUESTS, 1, model, version, "refused")

    def waited(self, model: str, version: str, seconds: float) -> None:
        """A request took its first denoising step, so many seconds after it was accepted."""
        self._tell(WAIT, seconds, model, version)

    def stepped(self, model: str, version: str, seconds: float, batch: int) -> None:
        """A batch of so many pictures took a denoising step."""
        self._tell(STEP, seconds, model, version)
        self._tell(BATCH, batch, model, version)

    def drawn(self, model: str, version: str, pictures: int = 1) -> None:
        """Pictures were drawn to their end."""
        self._tell(IMAGES, pictures, model, version)

    def not_finite(self, model: str, version: str, pictures: int = 1) -> None:
        """Pictures were given up because their latents held NaN or infinity."""
        self._tell(NAN_PICTURES, pictures, model, version)

    def flagged(self, model: str, version: str, pictures: int = 1) -> None:
        """Pictures were held back by the safety classifier."""
        self._tell(FLAGGED, pictures, model, version)

    def in_progress(self, model: str, pictures: int) -> None:
        """How many pictures this process is drawing now."""
        self._tell(IN_PROGRESS, pictures, model)

    def queued(self, model: str, pictures: int) -> None:
        """How many pictures of the whole service wait now."""
        self._tell(DEPTH, pictures, model)

    def ready(self, model: str, yes: bool = True) -> None:
        """This process can draw the model now, or no longer can."""
        self._tell(REPLICAS, int(yes), model)

    def loaded(self, model: str, version: str, outcome: Literal["succeeded", "failed"]) -> None:
        """A model was loaded, or could not be (missing, changed since it was published, too large)."""
        self._tell(LOADS, 1, model, version, outcome)

    def lora_loaded(self, model: str, version: str, seconds: float) -> None:
        """A LoRA version was put onto its base."""
        self._tell(LORA_LOAD, seconds, model, version)

    def told(self, model: str, version: str, opinion: Opinion) -> None:
        """Somebody said something of a picture."""
        self._tell(FEEDBACK, 1, model, version, opinion)

    def database_failed(self) -> None:
        """A call did not reach the database; it may be tried again."""
        self._tell(DATABASE_ERRORS, 1)

    def _tell(self, metric: Metric, value: float, *labels: str) -> None:
        self._record(metric, value, dict(zip(metric.labels, labels, strict=True)))


def _ray_recorder() -> Record:
    from ray.util import metrics as ray_metrics

    sinks: dict[Metric, Callable[..., None]] = {}
    for metric in METRICS:
        about = {"name": metric.name, "description": metric.meaning, "tag_keys": metric.labels}
        if metric.kind == "counter":
            sinks[metric] = ray_metrics.Counter(**about).inc
        elif metric.kind == "gauge":
            sinks[metric] = ray_metrics.Gauge(**about).set
        else:
            sinks[metric] = ray_metrics.Histogram(boundaries=list(metric.buckets), **about).observe
    return lambda metric, value, labels: sinks[metric](value, tags=labels)
