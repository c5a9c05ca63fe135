"""One request's spans are one trace from the gate to the denoising steps, whoever began it, and tell nothing they must not."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from raysd.errors import RequestError
from raysd.serve import tracing, worker
from raysd.serve.predictor import Predictor
from tests.house import House

SECRETS = {"prompt": "a purple walrus", "negative_prompt": "no seal", "user": "mallory@example.org"}
CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
BODY = {"model": "cats", "seed": 1, "num_inference_steps": 4, "n": 2, **SECRETS}


@pytest.fixture
def house(tmp_path: Path, tiny_base: Path) -> Iterator[House]:
    found = House(tmp_path, tiny_base)
    yield found
    found.worker.stop()
    found.database.close()


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider)
    yield exporter
    tracing.use(None)


def by_name(exporter: InMemorySpanExporter) -> dict[str, list[ReadableSpan]]:
    found: dict[str, list[ReadableSpan]] = {}
    for span in exporter.get_finished_spans():
        found.setdefault(span.name, []).append(span)
    return found


def test_one_request_is_one_trace_down_to_its_steps(house: House, spans: InMemorySpanExporter) -> None:
    answer = asyncio.run(house.ask("/v1/images/generations", BODY, **{"X-Request-Id": "order-7"}))
    assert answer.status_code == 200, answer.text
    found = by_name(spans)
    assert {name: len(each) for name, each in found.items()} == {
        "POST /v1/images/generations": 1,
        "accept": 1,
        "queue": 1,
        "predict": 1,
        "picture": 2,
        "decode": 2,
        "store": 1,
    }
    everything = spans.get_finished_spans()
    assert len({span.context.trace_id for span in everything}) == 1
    (request,), (predict,) = found["POST /v1/images/generations"], found["predict"]
    assert request.parent is None
    parents = {"accept": request, "queue": request, "predict": request, "picture": predict, "store": predict}
    for name, parent in parents.items():
        assert {span.parent.span_id for span in found[name] if span.parent} == {parent.context.span_id}, name
    assert {span.parent.span_id for span in found["decode"]} == {span.context.span_id for span in found["picture"]}
    for picture in found["picture"]:
        assert [event.attributes["raysd.step"] for event in picture.events] == [1, 2, 3, 4]
        assert all(event.attributes["raysd.batch_size"] in (1, 2) for event in picture.events)
        assert all(picture.start_time <= event.timestamp <= picture.end_time for event in picture.events)
    assert request.attributes["raysd.request_id"] == predict.attributes["raysd.request_id"] == "order-7"
    assert request.attributes["http.response.status_code"] == 200
    assert predict.attributes["raysd.outcome"] == "succeeded"
    assert all(span.status.status_code != trace.StatusCode.ERROR for span in everything)


def test_a_callers_trace_is_continued(house: House, spans: InMemorySpanExporter) -> None:
    body = {"input": {"prompt": SECRETS["prompt"], "num_inference_steps": 2}, "model": "raysd/cats"}
    answer = asyncio.run(house.ask("/v1/predictions", body, traceparent=CALLER, Prefer="wait"))
    assert answer.status_code == 201, answer.text
    trace_id, span_id = (int(part, 16) for part in CALLER.split("-")[1:3])
    assert {span.context.trace_id for span in spans.get_finished_spans()} == {trace_id}
    (request,) = by_name(spans)["POST /v1/predictions"]
    assert request.parent
    assert request.parent.span_id == span_id
    assert request.kind == trace.SpanKind.SERVER
    assert len(by_name(spans)["picture"][0].events) == 2


def test_a_trace_that_its_caller_does_not_keep_is_not_kept_here(house: House, spans: InMemorySpanExporter) -> None:
    answer = asyncio.run(house.ask("/v1/images/generations", BODY, traceparent=CALLER[:-2] + "00"))
    assert answer.status_code == 200
    assert spans.get_finished_spans() == ()


@pytest.mark.parametrize("broken", [False, True])
def test_nothing_that_a_client_wrote_is_in_a_span(
    house: House, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    if broken:

        def fail(*_: object) -> None:
            raise ValueError(f"cannot draw {SECRETS['prompt']} for {SECRETS['user']}")

        monkeypatch.setattr(Predictor, "advance", fail)
        monkeypatch.setattr(worker, "MOST_ATTEMPTS", 1)
    answer = asyncio.run(house.ask("/v1/images/generations?prompt=walrus", BODY))
    assert answer.status_code == (500 if broken else 200)
    written = "\n".join(span.to_json() for span in spans.get_finished_spans())
    assert "predict" in written
    for secret in (*SECRETS.values(), house.key, house.key[-12:], "walrus", "mallory", "Bearer", "somebody"):
        assert secret not in written
    if broken:
        (predict,) = by_name(spans)["predict"]
        assert predict.status.status_code == trace.StatusCode.ERROR
        assert predict.status.description is None


def test_what_is_refused_and_what_watches_over_it(house: House, spans: InMemorySpanExporter) -> None:
    async def look() -> list[int]:
        transport = httpx.ASGITransport(house.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return [(await client.get(path)).status_code for path in ("/healthz", "/v1/models", "/secret/walrus")]

    assert asyncio.run(look()) == [200, 401, 401]
    assert {name for name in by_name(spans)} == {"GET no route"}


def test_off_nothing_is_made_and_the_callers_trace_is_kept_with_the_prediction(house: House) -> None:
    assert not tracing.on()
    assert tracing.trail() is None
    assert tracing.carried() is None
    with tracing.span("any", {"x": 1}) as found:
        assert found is None
    answer = asyncio.run(house.ask("/v1/images/generations", BODY, traceparent=CALLER))
    id = answer.json()["data"][0]["generation"].rpartition("-")[0]
    assert house.queue.get(id).traceparent == CALLER
    assert house.queue.get(id).request_id == answer.headers["X-Request-Id"]


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, "otlp"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, "otlp"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"}, None),
    ],
)
def test_the_standard_variables_decide(environment: dict[str, str], kind: str | None) -> None:
    assert tracing._wanted(environment) == kind


def test_an_exporter_that_is_not_known_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="OTEL_TRACES_EXPORTER zipkin"):
        tracing._wanted({"OTEL_TRACES_EXPORTER": "zipkin"})
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(RequestError, match="OTEL_EXPORTER_OTLP_PROTOCOL"):
        tracing._exporter("otlp")


def test_spans_arrive_at_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over OTLP, as a process does that is told where its collector is; all steps of the longest drawing."""
    with collector() as (url, bodies):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
        provider = tracing._provider("otlp", "replica")
        assert isinstance(provider, TracerProvider)
        tracing.use(provider)
        try:
            trail = tracing.trail()
            assert trail is not None
            for _ in range(200):
                trail.stepped(3, 0.1)
            tracing.told_of_picture(trail, {"raysd.picture": 0})
            provider.force_flush()
        finally:
            tracing.use(None)
            provider.shutdown()
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    (sent,) = ExportTraceServiceRequest.FromString(bodies[0]).resource_spans
    about = {each.key: each.value.string_value for each in sent.resource.attributes}
    assert (about["service.name"], about["raysd.part"]) == ("raysd", "replica")
    assert len(sent.scope_spans[0].spans[0].events) == 200


@contextlib.contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    import gzip
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            bodies.append(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", bodies
    server.shutdown()
    thread.join()
    server.server_close()
