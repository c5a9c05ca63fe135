"""Who may use a service: keys, roles, limits, owners; and on loopback nobody from elsewhere."""

import base64

import pytest
from fastapi.testclient import TestClient

from raysd.serve import keys as raysd_keys
from raysd.serve.http.application import secret_in
from raysd.serve.http.links import Links, user_digest
from raysd.serve.keys import Keys
from raysd.storage import Storage
from tests.records import png
from tests.serving import parts

BODY = {"prompt": "a red circle", "model": "cats", "num_inference_steps": 1}
HERE = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    service = parts(tmp_path_factory.mktemp("public"), public=True, http={"origins": ["https://site.example"]})
    with TestClient(service.app, base_url="https://pictures.example") as client:
        yield service, client


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    service = parts(tmp_path_factory.mktemp("local"))
    with TestClient(service.app, base_url=HERE, client=("127.0.0.1", 1)) as client:
        yield service, client


@pytest.fixture(autouse=True)
def known_at_once(monkeypatch):
    """Else a new key is known after a second, and a revoked one for three."""
    monkeypatch.setattr(raysd_keys, "KNOWN_FOR", 0)
    monkeypatch.setattr(raysd_keys, "UNKNOWN_FOR", 0)


def bearer(key, scheme="Bearer"):
    return {"Authorization": f"{scheme} {key}"}


def generate(client, headers, **more):
    return client.post("/v1/images/generations", json={**BODY, **more}, headers=headers)


# Keys


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer "},
        bearer("raysd_" + "x" * 43),
        bearer("\x00"),
        bearer("x" * 5000),
        {"Authorization": "Basic eDp5"},
        {"Authorization": "Bearer \xff".encode("latin-1")},
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/predictions", "/v1/nothing"])
def test_without_a_key_nothing_is_told(public, headers, path):
    answer = public[1].get(path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert "cats" not in answer.text
    said = answer.json()
    assert said["status"] == 401 if path == "/v1/predictions" else said["error"]["code"] == "invalid_api_key"


def test_a_large_body_is_not_read_without_a_key(public):
    sent = []

    def body():
        for _ in range(100):
            sent.append(1)
            yield b"x" * 1000

    assert public[1].post("/v1/images/edits", content=body()).status_code == 401


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "Token"])
def test_a_key_comes_in_until_it_is_revoked(public, scheme):
    service, client = public
    key, secret = Keys(service.database).create("somebody", ["generate"])
    assert client.get("/v1/models", headers=bearer(secret, scheme)).status_code == 200
    assert client.get("/v1/models", headers=bearer(secret[:-1], scheme)).status_code == 401
    Keys(service.database).revoke(key.id)
    assert client.get("/v1/models", headers=bearer(secret, scheme)).status_code == 401


def test_roles(public):
    service, client = public
    rate, draw, admin = (bearer(service.key(role)) for role in ("feedback", "generate", "admin"))
    assert generate(client, rate).status_code == 403
    assert client.post("/v1/feedback", json={}, headers=draw).status_code == 403
    assert client.post("/v1/feedback", json={}, headers=rate).status_code == 400
    assert client.post("/v1/feedback", json={}, headers=admin).status_code == 400
    made = generate(client, admin)
    assert made.status_code == 200
    about = {"generation": made.json()["data"][0]["generation"], "thumb": "up"}
    assert client.post("/v1/feedback", json=about, headers=rate).status_code == 201


def test_what_needs_no_key(public):
    service, client = public
    for path in ("/", "/healthz", "/readyz", "/openapi.json"):
        assert client.get(path).status_code == 200
    made = generate(client, bearer(service.key()), response_format="url").json()
    link = made["data"][0]["url"]
    assert link.startswith("https://pictures.example/v1/pictures/")
    assert client.get(link).status_code == 200


# Owners


def test_an_owner_sees_his_own_and_the_admin_all(public):
    service, client = public
    mine, others, admin = (bearer(service.key(role)) for role in ("generate", "generate", "admin"))
    generation = generate(client, mine).json()["data"][0]["generation"]
    id = generation.partition("-")[0]
    for path in (f"/v1/predictions/{id}", f"/v1/generations/{generation}", f"/v1/generations/{generation}/picture"):
        assert [client.get(path, headers=who).status_code for who in (mine, others, admin)] == [200, 404, 200]
    assert client.post(f"/v1/predictions/{id}/cancel", headers=others).status_code == 404
    assert client.delete(f"/v1/generations/{generation}", headers=others).status_code == 404
    assert client.delete(f"/v1/predictions/{id}", headers=others).status_code == 404
    pages = [client.get("/v1/predictions", headers=who).json()["results"] for who in (mine, others, admin)]
    listed = [[each["id"] for each in page] for page in pages]
    assert (listed[0], listed[1]) == ([id], [])
    assert id in listed[2]
    assert client.delete(f"/v1/generations/{generation}", headers=mine).status_code == 204
    assert client.get(f"/v1/generations/{generation}/picture", headers=mine).status_code == 404


def test_each_owner_has_a_secret_for_webhooks_of_its_own(public):
    service, client = public
    mine, others = (bearer(service.key()) for _ in range(2))
    secrets = [client.get("/v1/webhooks/default/secret", headers=who).json()["key"] for who in (mine, mine, others)]
    assert secrets[0] == secrets[1] != secrets[2]
    assert secrets[0].startswith("whsec_")


def test_a_key_of_idempotency_is_its_owners(public):
    service, client = public
    made = [
        generate(client, {**bearer(key), "Idempotency-Key": "same"}).json()["data"][0]["generation"]
        for key in [service.key()] * 2 + [service.key()]
    ]
    assert made[0] == made[1] != made[2]


# Limits


@pytest.mark.parametrize(
    ("limits", "allowed", "longest"),
    [({"requests_per_minute": 2}, 2, 60), ({"pictures_per_day": 3}, 3, 86400)],
)
def test_a_limit_is_429_and_says_when_to_come_back(public, limits, allowed, longest):
    service, client = public
    headers = bearer(service.key(**limits))
    for _ in range(allowed):
        assert generate(client, headers).status_code == 200
    refused = generate(client, headers)
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= longest
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    asked = {"version": "cats", "input": {"prompt": "x"}}
    refused = client.post("/v1/predictions", json=asked, headers=headers)
    assert (refused.status_code, refused.json()["title"]) == (429, "Too many requests")


def test_what_draws_nothing_is_limited_too(public):
    """Whoever it is said for; and no picture is kept of a request that is refused."""
    service, client = public
    made = generate(client, bearer(service.key())).json()["data"][0]["generation"]
    files = {"content": ("a.png", png(1), "image/png")}

    def rate(headers, user):
        about = {"generation": made, "thumb": "up"}
        return client.post("/v1/feedback", json=about, headers={**headers, "X-Raysd-User": user})

    headers = bearer(service.key(requests_per_minute=2))
    said = [rate(headers, "a"), rate(headers, "b"), rate(headers, "c"), generate(client, headers)]
    assert [answer.status_code for answer in said] == [201, 201, 429, 429]
    headers = bearer(service.key(requests_per_minute=1))
    sent = [client.post("/v1/files", files=files, headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in sent] == [201, 429]
    kept = list(service.storage.list("serving/uploads"))
    assert len(kept) == 1
    link = "data:image/png;base64," + base64.b64encode(png(9)).decode()
    asked = {"version": "cats", "input": {"prompt": "x", "image": link}}
    assert client.post("/v1/predictions", json=asked, headers=headers).status_code == 429
    form = {"data": {"prompt": "x", "model": "cats"}, "files": {"image": ("a.png", png(9), "image/png")}}
    assert client.post("/v1/images/edits", **form, headers=headers).status_code == 429
    assert list(service.storage.list("serving/uploads")) == kept


@pytest.mark.parametrize("way", ["edit", "prediction"])
def test_a_request_with_a_picture_that_was_accepted_is_answered_again(public, way):
    """Although the key may have nothing more drawn."""
    service, client = public
    headers = bearer(service.key(pictures_per_day=1)) | {"Idempotency-Key": way}

    def ask(headers):
        if way == "edit":
            form = {"data": {"prompt": "x", "model": "cats"}, "files": {"image": ("a.png", png(9), "image/png")}}
            return client.post("/v1/images/edits", **form, headers=headers)
        link = "data:image/png;base64," + base64.b64encode(png(9)).decode()
        asked = {"version": "cats", "input": {"prompt": "x", "image": link, "num_inference_steps": 1}}
        return client.post("/v1/predictions", json=asked, headers={**headers, "Prefer": "wait"})

    first, second = ask(headers), ask(headers)
    assert (first.status_code, second.status_code) in ((200, 200), (201, 201))
    assert second.json() == first.json()
    assert ask({**headers, "Idempotency-Key": "another"}).status_code == 429


def test_what_was_deleted_is_not_answered_as_if_it_had_no_pictures(public):
    service, client = public
    headers = bearer(service.key()) | {"Idempotency-Key": "once"}
    drawn = generate(client, headers).json()["data"][0]["generation"]
    assert client.delete(f"/v1/predictions/{drawn.rpartition('-')[0]}", headers=headers).status_code == 204
    again = generate(client, headers)
    assert (again.status_code, again.json()["error"]["message"]) == (404, "its pictures are kept no longer")


def test_a_key_that_may_not_have_two_drawn_compares_nothing(public):
    """And pays nothing for having asked."""
    service, client = public
    for limit, status in (({"in_flight": 1}, 400), ({"pictures_per_day": 1}, 400), ({"pictures_per_day": 3}, 201)):
        headers = bearer(service.key(**limit))
        assert client.post("/v1/comparisons", json=BODY, headers=headers).status_code == status
        listed = client.get("/v1/predictions", headers=headers).json()["results"]
        assert len(listed) == (2 if status == 201 else 0)
    assert client.post("/v1/comparisons", json=BODY, headers=headers).status_code == 429
    assert len(client.get("/v1/predictions", headers=headers).json()["results"]) == 2


def test_the_same_picture_of_two_keys_is_two_uploads(public):
    """What one of them deletes the other one still has."""
    service, client = public
    mine, theirs = bearer(service.key()), bearer(service.key())
    sent = {"content": ("a.png", png(7), "image/png")}
    urls = [client.post("/v1/files", files=sent, headers=key).json()["urls"]["get"] for key in (mine, theirs)]

    def draw(url, key):
        asked = {"version": "cats", "input": {"prompt": "x", "image": url, "num_inference_steps": 1}}
        return client.post("/v1/predictions", json=asked, headers={**key, "Prefer": "wait"}).json()

    first, second = draw(urls[0], mine), draw(urls[0], mine)
    client.delete(f"/v1/predictions/{first['id']}", headers=mine)
    assert len(service.storage.list(f"serving/uploads/{_owner(service, second)}")) == 1, "its other one needs it"
    client.delete(f"/v1/predictions/{second['id']}", headers=mine)
    assert service.storage.list(f"serving/uploads/{_owner(service, second)}") == []
    assert draw(urls[1], theirs)["status"] == "succeeded"


def _owner(service, prediction):
    return service.queue.get(prediction["id"]).owner


# On loopback


def test_on_loopback_any_key_will_do_and_a_known_one_is_itself(local):
    service, client = local
    assert client.get("/v1/models").status_code == 200
    assert client.get("/v1/models", headers=bearer("sk-whatever")).status_code == 200
    rate = service.key("feedback")
    assert client.get("/v1/models", headers=bearer(rate)).status_code == 403


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1:8000", "localhost.evil.example"])
def test_other_names_are_not_answered(local, host):
    answer = local[1].get("/v1/models", headers={"Host": host})
    assert answer.status_code == 421
    assert "cats" not in answer.text


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8000", "[::1]:8000", "LOCALHOST"])
def test_names_of_this_machine_are(local, host):
    assert local[1].get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:9999"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": HERE, "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
    ],
)
def test_a_page_of_another_site_cannot_have_anything_drawn(local, headers, status):
    service, client = local
    asked = len(service.desk.asks)
    assert generate(client, headers).status_code == status
    assert len(service.desk.asks) - asked == (1 if status == 200 else 0)


def test_a_form_of_another_site_is_no_request(local):
    answer = local[1].post("/v1/images/generations", content='{"prompt": "x"}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 400


@pytest.mark.parametrize(
    ("client", "status"),
    [
        (("127.0.0.1", 1), 200),
        (("127.8.0.1", 1), 200),
        (("::1", 1), 200),
        (("10.0.0.7", 1), 403),
        (("2001:db8::1", 1), 403),
    ],
)
def test_who_comes_from_elsewhere_is_refused_whatever_name_he_calls(local, client, status):
    """Serve listens on every address where nothing else is said."""
    elsewhere = TestClient(local[0].app, base_url="http://localhost:8000", client=client)
    key = bearer(local[0].key("admin"))
    answers = [elsewhere.get("/v1/predictions", headers=headers) for headers in ({}, key)]
    assert [answer.status_code for answer in answers] == [status] * 2
    assert ("public: true" in answers[0].text) == (status == 403)


# Headers


def test_cors_is_closed_but_for_the_sites_that_are_named(public, local):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    opened = public[1].options("/v1/images/generations", headers={"Origin": "https://site.example", **asked})
    assert opened.headers["access-control-allow-origin"] == "https://site.example"
    for client, origin in ((public[1], "https://evil.example"), (local[1], HERE)):
        closed = client.options("/v1/images/generations", headers={"Origin": origin, **asked})
        assert "access-control-allow-origin" not in closed.headers
        assert closed.status_code >= 400
    key = bearer(public[0].key())
    answer = public[1].get("/v1/models", headers={"Origin": "https://site.example", **key})
    assert answer.headers["access-control-allow-origin"] == "https://site.example"
    assert "X-Request-Id" in answer.headers["access-control-expose-headers"]


def test_every_answer_has_an_id_and_says_how_it_may_be_used(local):
    client = local[1]
    assert client.get("/healthz", headers={"X-Request-Id": "mine.1"}).headers["x-request-id"] == "mine.1"
    for given in ("a b", "x" * 65, "ä".encode(), "<script>"):
        made = client.get("/nothing", headers={"X-Request-Id": given}).headers["x-request-id"]
        assert len(made) == 32
    answer = client.get("/v1/models")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert answer.headers["cache-control"] == "no-store"
    assert "script-src" in client.get("/").headers["content-security-policy"]


# What is signed


def test_links_end(tmp_path):
    now = [1000.0]
    links = Links(b"secret", 60, clock=lambda: now[0])
    path, query = links.to("a-0.png").split("?")
    values = dict(part.split("=") for part in query.split("&"))
    assert path == "/v1/pictures/a-0.png"
    asked = ("a-0.png", int(values["expires"]), values["signature"])
    assert links.holds(*asked)
    assert not Links(b"other", 60, clock=lambda: now[0]).holds(*asked)
    assert not links.holds("a-0.png", asked[1] + 60, asked[2])
    assert not links.holds("a-0.png", asked[1], "ä")
    now[0] += 60
    assert not links.holds(*asked)


def test_the_secret_is_the_same_in_all_processes_and_after_a_restart(tmp_path):
    first = secret_in(Storage(str(tmp_path)))
    assert len(first) == 32
    assert secret_in(Storage(str(tmp_path))) == first
    assert secret_in(Storage(str(tmp_path / "other"))) != first


def test_users_of_two_owners_are_not_known_as_the_same():
    assert user_digest(b"s", "a", "anna") == user_digest(b"s", "a", "anna")
    digests = {user_digest(b"s", *who) for who in (("a", "anna"), ("b", "anna"), ("a", "bert"), (None, "anna"))}
    assert len(digests) == 4
    assert user_digest(b"t", "a", "anna") not in digests
