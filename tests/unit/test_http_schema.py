"""The OpenAPI document says what is taken and answered: schemathesis tries it, and nothing ends in a 5xx."""

import base64
import collections
import io

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving import CATS, listening, parts

EXAMPLES = 8
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
BOUNDS = {"most_steps": 2, "most_pictures": 2, "most_pixels": 64 * 64}
"""Of a service that draws little, so that what is in order ends soon."""


def png(mode):
    body = io.BytesIO()
    Image.new(mode, (64, 64)).save(body, "PNG")
    return body.getvalue()


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """The document of a service, and by place the values that it knows and no generator would find."""
    with listening(parts(tmp_path_factory.mktemp("service"), http=BOUNDS)) as url:
        asked = {"version": "cats", "input": {"prompt": "x", "num_inference_steps": 1}}
        made, doomed = (
            httpx.post(f"{url}/v1/predictions", json=asked, headers={"Prefer": "wait"}, timeout=60).json()
            for _ in range(2)
        )
        link = httpx.URL(made["output"][0])
        uri = "data:image/png;base64," + base64.b64encode(png("RGB")).decode()
        picture = {"id": made["id"], "generation": f"{made['id']}-0", "picture": link.path.rpartition("/")[2]}
        model = {"owner": "raysd", "name": "cats", "model": "cats", "version": CATS.digest}
        drawing = {"num_inference_steps": 1, "n": 1, "num_outputs": 1, "width": 64, "height": 64, "size": "64x64"}
        absent = (
            "lora",
            "webhook",
            "webhook_completed",
            "webhook_events_filter",
            "stream",
            "output_compression",
            "pair",
        )
        yield (
            schemathesis.openapi.from_url(f"{url}/openapi.json"),
            {
                "path": picture | model,
                "DELETE": {"id": doomed["id"], "generation": f"{doomed['id']}-0"},
                "query": dict(link.params),
                "body": drawing | model | {"image": uri, "mask": uri, "partial_images": 0} | dict.fromkeys(absent),
                "form": {"image": [png("RGB")], "image[]": None, "mask": png("RGBA"), "content": png("RGB")},
                "POST /v1/feedback": {"generation": f"{made['id']}-0", "thumb": "up"},
                "POST /v1/comparisons": {"model": "cats", "versions": None},
                "POST /v1/images/generations": {"model": "cats"},
                "POST /v1/images/edits": {"model": "cats", "image": [png("RGB")], "prompt": "x"},
            },
        )


def likely(case, values):
    """The case with values that the service knows, where it has a field of that name."""
    in_path = values["path"] | (values["DELETE"] if case.method == "DELETE" else {})
    case.path_parameters = put(case.path_parameters or {}, in_path)
    case.query = put(case.query or {}, values["query"])
    if isinstance(case.body, dict):
        known = values["body"] | (values["form"] if case.media_type == "multipart/form-data" else {})
        case.body = put(case.body, known)
        if isinstance(case.body.get("input"), dict):
            case.body["input"] = put(case.body["input"], known)
        case.body = without_none(case.body | values.get(case.operation.label, {}))
    for header in ("Idempotency-Key", "Cancel-After", "Prefer"):
        (case.headers or {}).pop(header, None)
    return case


def put(given, known):
    return without_none({name: known.get(name, value) for name, value in given.items()})


def without_none(values):
    return {name: value for name, value in values.items() if value is not None}


def test_what_the_document_describes(service):
    document, values = service
    answered = collections.defaultdict(set)
    for operation in (found.ok() for found in document.get_all_operations()):

        @settings(
            max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(), known=st.booleans())
        def conforms(case, known):
            answer = (likely(case, values) if known else case).call_and_validate(checks=CHECKS)
            answered[case.operation.label].add(answer.status_code)

        conforms()
    assert len(answered) >= 20
    never = {label for label, statuses in answered.items() if min(statuses) >= 300}
    assert never == set(), "no request was in order"
