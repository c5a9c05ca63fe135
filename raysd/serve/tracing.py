"""Traces (OpenTelemetry): a request's way from the gate to its pictures' denoising steps, as spans of one trace.

Off unless OpenTelemetry's own environment variables ask for it, and then nothing is made or kept: every function here
returns at its first line. No attribute ever holds a prompt, a user, a key or the text of an error, which may quote them.
"""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context, get_current
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from raysd.errors import RequestError

log = logging.getLogger(__name__)
MOST_EVENTS = 256
"""Of a span: a picture of the most steps has fewer. The SDK's own bound, 128, would drop the first ones."""
Values = Mapping[str, str | int | float | bool | None]

_w3c = TraceContextTextMapPropagator()
_nothing: AbstractContextManager[Any] = nullcontext()
_tracer: trace.Tracer | None = None


class Trail:
    """When a picture took its steps and was decoded, in epoch nanoseconds. Written by the scheduler's thread alone."""

    def __init__(self) -> None:
        self.submitted = time.time_ns()
        self.steps: list[tuple[int, int, float]] = []
        """Of each step: when it ended, pictures in its batch, its seconds."""
        self.decoding: tuple[int, int] | None = None
        self.ended = 0

    def stepped(self, pictures: int, seconds: float) -> None:
        self.steps.append((time.time_ns(), pictures, seconds))

    def decoded(self, seconds: float) -> None:
        now = time.time_ns()
        self.decoding = now - int(seconds * 1e9), now

    def end(self) -> None:
        self.ended = time.time_ns()


def on() -> bool:
    return _tracer is not None


def configure(part: str) -> None:
    """Begin to trace in this process (`part`: ingress, replica), if the environment or the process' host asks for it.

    A provider that is there already is used; else OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_TRACES_EXPORTER (otlp, console)
    make one. Raises RequestError for an exporter that is not known or not installed.
    """
    kind = _wanted(os.environ)
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        if kind is None:
            return
        trace.set_tracer_provider(_provider(kind, part))
    use(trace.get_tracer_provider())


def use(provider: trace.TracerProvider | None) -> None:
    """Trace with that provider; None: not at all."""
    global _tracer
    _tracer = provider.get_tracer("raysd", version("raysd")) if provider is not None else None


def flush() -> None:
    """Hand over what is finished: before a process ends."""
    provider = trace.get_tracer_provider()
    if on() and hasattr(provider, "force_flush"):
        provider.force_flush(5000)


def trail() -> Trail | None:
    """For a picture that is to be drawn; None where nothing is traced."""
    return Trail() if on() else None


def span(
    name: str,
    values: Values | None = None,
    *,
    parent: str | None = None,
    headers: Mapping[str, str] | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
) -> AbstractContextManager[Any]:
    """A span while the block lasts, below the one that is current, or `parent` (a traceparent), or who sent `headers`.

    Gives the span, or None where nothing is traced. What is raised is marked and goes on; its text is not kept.
    """
    if _tracer is None:
        return _nothing
    return _span(_tracer, name, values, parent, headers, kind)


@contextmanager
def _span(
    tracer: trace.Tracer,
    name: str,
    values: Values | None,
    parent: str | None,
    headers: Mapping[str, str] | None,
    kind: SpanKind,
) -> Iterator[Any]:
    carrier = headers if headers is not None else {"traceparent": parent} if parent else None
    context = _w3c.extract(carrier, get_current()) if carrier is not None else None
    with tracer.start_as_current_span(
        name,
        context,
        kind,
        attributes=_given(values),
        record_exception=False,
        set_status_on_exception=False,
    ) as found:
        try:
            yield found
        except BaseException as error:
            failed(found, type(error).__name__)
            raise


def failed(found: Any, kind: str) -> None:
    """Mark a span (or None) as failed with an error of that kind."""
    if found is not None:
        found.set_status(Status(StatusCode.ERROR))
        found.set_attribute("error.type", kind)


def current() -> Any:
    """The current span, or None where nothing is traced."""
    return trace.get_current_span() if on() else None


def note(values: Values) -> None:
    """Say it of the current span."""
    if on():
        trace.get_current_span().set_attributes(_given(values))


def told(name: str, began: int, ended: int, values: Values | None = None, *, parent: str | None = None) -> None:
    """A span of what is over, from and to epoch nanoseconds; below the current one, or `parent` (a traceparent)."""
    if _tracer is not None:
        _over(_tracer, name, began, ended, values, _w3c.extract({"traceparent": parent}) if parent else None)


def told_of_picture(trail: Trail | None, values: Values) -> None:
    """A picture's span below the current one: an event a denoising step, and decoding as a child.

    Steps are events, not spans: while a picture is drawn, one costs an entry in a list.
    """
    if _tracer is None or trail is None:
        return
    events = [
        ("step", {"raysd.step": number, "raysd.batch_size": pictures, "raysd.seconds": round(seconds, 6)}, at)
        for number, (at, pictures, seconds) in enumerate(trail.steps, 1)
    ]
    ended = trail.ended or time.time_ns()
    inside = _over(_tracer, "picture", trail.submitted, ended, {**values, "raysd.steps": len(events)}, None, events)
    if trail.decoding is not None:
        _over(_tracer, "decode", *trail.decoding, None, inside)


def carried() -> str | None:
    """The current span as a traceparent (W3C Trace Context), to be continued elsewhere; None where nothing is traced."""
    carrier: dict[str, str] = {}
    if _tracer is not None:
        _w3c.inject(carrier)
    return carrier.get("traceparent")


def _over(
    tracer: trace.Tracer,
    name: str,
    began: int,
    ended: int,
    values: Values | None,
    context: Context | None,
    events: Sequence[tuple[str, dict[str, Any], int]] = (),
) -> Context:
    made = tracer.start_span(name, context, attributes=_given(values), start_time=began)
    for event, about, at in events:
        made.add_event(event, about, at)
    made.end(ended)
    return trace.set_span_in_context(made, context)


def _given(values: Values | None) -> dict[str, str | int | float | bool]:
    return {name: value for name, value in (values or {}).items() if value is not None}


def _wanted(environment: Mapping[str, str]) -> str | None:
    """The exporter that the standard variables ask for."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    named = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if not named:
        return "otlp" if any(environment.get(name) for name in endpoints) else None
    if named not in ("otlp", "console", "none"):
        raise RequestError(f"OTEL_TRACES_EXPORTER {named}: give otlp, console or none")
    return None if named == "none" else named


def _provider(kind: str, part: str) -> trace.TracerProvider:
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import SpanLimits, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise _not_installed() from None
    about = {"service.version": version("raysd"), "raysd.part": part}
    if "OTEL_SERVICE_NAME" not in os.environ:
        about["service.name"] = "raysd"
    most = None if "OTEL_SPAN_EVENT_COUNT_LIMIT" in os.environ else MOST_EVENTS
    provider = TracerProvider(resource=Resource.create(about), span_limits=SpanLimits(max_events=most))
    provider.add_span_processor(BatchSpanProcessor(_exporter(kind)))
    log.info("traces go to %s", kind)
    return provider


def _exporter(kind: str) -> Any:
    if kind == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    if os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf") != "http/protobuf":
        raise RequestError("OTEL_EXPORTER_OTLP_PROTOCOL: traces go by http/protobuf (port 4318 of a collector)")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise _not_installed() from None
    return OTLPSpanExporter()


def _not_installed() -> RequestError:
    return RequestError("OTEL_TRACES_EXPORTER: the exporter is not installed: pip install 'raysd[tracing]'")
