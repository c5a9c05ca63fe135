"""A service on real Ray Serve: it draws, rolls to other versions, splits traffic, and loses nothing when processes die."""

import base64
import io
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from sqlalchemy import select

from raysd.config import load
from raysd.config.serving import ServingSpec
from raysd.database import Database
from raysd.feedback.tables import FeedbackRow, GenerationRow
from raysd.references import identity
from raysd.registry import Registry, Version, traffic
from raysd.storage import Storage
from tests.adapters import publish_lora
from tests.ports import free_port
from tests.postgres import Postgres

WISH = {"prompt": "a red circle", "seed": 7, "num_inference_steps": 3, "guidance_scale": 3.0}
PATIENCE = 300.0


class Service:
    """A running service, its registry and versions 1 to 3 of cats."""

    def __init__(self, url: str, registry: Registry, versions: list[Version], base: Path, database: str):
        self.url, self.registry, self.versions, self.base = url, registry, versions, base
        self.database = Database(database, registry.storage)
        self.client = httpx.Client(base_url=url, timeout=PATIENCE)

    def draw(self, model: str = "cats", **more: Any) -> dict[str, Any]:
        """One picture through the Images API: its item of `data`."""
        answer = self.client.post("/v1/images/generations", json={"model": model, **WISH, **more})
        assert answer.status_code == 200, answer.text
        item: dict[str, Any] = answer.json()["data"][0]
        return item

    def begin(self, **more: Any) -> str:
        """A prediction accepted: its id."""
        asked = {"version": "cats", "input": {**WISH, **more}}
        answer = self.client.post("/v1/predictions", json=asked)
        assert answer.status_code in (201, 202), answer.text
        return str(answer.json()["id"])

    def end(self, id: str) -> dict[str, Any]:
        """The prediction once it has ended."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            answer = self.client.get(f"/v1/predictions/{id}")
            patient(answer)
            if answer.status_code == 200 and answer.json()["status"] not in ("starting", "processing"):
                found: dict[str, Any] = answer.json()
                return found
            time.sleep(0.1)
        raise AssertionError(f"{id} has not ended: {answer.text}")

    def rate(self, id: str, stars: int) -> str:
        """Say the same of a prediction's picture twice, once it is there: the feedback's id."""
        assert self.end(id)["status"] == "succeeded"
        headers, told = {"Idempotency-Key": f"opinion-{id}"}, {"generation": f"{id}-0", "stars": stars}
        answers = [self.client.post("/v1/feedback", json=told, headers=headers) for _ in range(2)]
        assert {answer.status_code for answer in answers} <= {200, 201}, [answer.text for answer in answers]
        (kept,) = {str(answer.json()["id"]) for answer in answers}
        return kept

    def check_each_once(self, ids: list[str], opinions: dict[str, str]) -> None:
        """Each accepted prediction has one generation and one picture, and each opinion (by prediction) is kept once."""
        assert len(set(ids)) == len(ids)
        expected = sorted(f"{id}-0" for id in ids)
        with self.database.reading() as session:
            made = select(GenerationRow.id, GenerationRow.path).where(GenerationRow.prediction_id.in_(ids))
            pictures = [tuple(row) for row in session.execute(made)]
            about = select(FeedbackRow.generation_id, FeedbackRow.id).where(FeedbackRow.generation_id.in_(expected))
            said = sorted(tuple(row) for row in session.execute(about))
        assert sorted(name for name, _ in pictures) == expected
        assert said == sorted((f"{id}-0", opinion) for id, opinion in opinions.items())
        kept = {entry.path for entry in self.registry.storage.list("generated")}
        assert len({path for _, path in pictures} & kept) == len(ids)

    def until(self, ref: str) -> None:
        """Wait until that version draws."""
        end = time.monotonic() + PATIENCE
        while self.draw()["version"] != ref:
            assert time.monotonic() < end
            time.sleep(0.2)


def patient(answer: httpx.Response) -> None:
    """The one thing besides an answer that a service in trouble may say: come back."""
    later = answer.status_code == 503 and "Retry-After" in answer.headers
    assert answer.status_code == 200 or later, f"{answer.status_code} {answer.text}"


@pytest.fixture(scope="module")
def service(ray_address: str, postgres: Postgres, tiny_base: Path, tmp_path_factory: Any) -> Iterator[Service]:
    """cats:production on two replicas, with PostgreSQL."""
    from ray import serve

    from raysd.serve.app import build

    place = tmp_path_factory.mktemp("service")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    registry = Registry(Storage(str(place / "store")))
    versions = [publish_lora(registry, tiny_base, place / str(seed), seed) for seed in (1, 2, 3)]
    registry.alias(versions[0], "production")
    cats = {"ref": "cats:production", "cpus": 0.5, "replicas": {"least": 2, "most": 2}}
    base = {"ref": str(tiny_base), "name": "base", "cpus": 0.5}
    rare = {"ref": str(tiny_base), "name": "rare", "cpus": 0.5, "replicas": {"least": 0, "most": 1, "idle_seconds": 10}}
    values = {"storage": registry.storage.url, "database": postgres.url(), "models": [cats, base, rare]}
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    serve.run(build(load(ServingSpec, values)), name="raysd", route_prefix="/")
    running = Service(f"http://127.0.0.1:{port}", registry, versions, tiny_base, values["database"])
    yield running
    running.client.close()
    running.database.close()
    serve.shutdown()
    patch.undo()


def picture(item: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))), dtype=int)


def theirs(base: Path) -> np.ndarray:
    """WISH drawn by diffusers' own pipeline."""
    import torch

    from raysd.models import family_of

    image = (
        family_of(base)
        .pipeline(base)(
            WISH["prompt"],
            generator=torch.Generator().manual_seed(WISH["seed"]),
            num_inference_steps=WISH["num_inference_steps"],
            guidance_scale=WISH["guidance_scale"],
        )
        .images[0]
    )
    return np.asarray(image, dtype=int)


def test_a_picture_over_http_is_the_one_diffusers_draws(service: Service) -> None:
    item = service.draw("base")
    assert np.abs(picture(item) - theirs(service.base)).max() <= 1
    assert item["digest"] == identity(service.base)
    assert item["seed"] == WISH["seed"]


@pytest.mark.long
def test_a_rare_model_has_a_replica_only_while_it_is_asked_for(service: Service) -> None:
    from ray import serve

    def replicas() -> dict[str, int]:
        return serve.status().applications["raysd"].deployments["model-rare"].replica_states

    assert not replicas()
    assert np.abs(picture(service.draw("rare")) - picture(service.draw("base"))).max() <= 1
    assert replicas() == {"RUNNING": 1}
    end = time.monotonic() + PATIENCE
    while replicas():
        assert time.monotonic() < end, "it stays"
        time.sleep(0.5)
    assert np.abs(picture(service.draw("rare")) - picture(service.draw("base"))).max() <= 1


def test_a_lora_version_is_asked_for_by_name(service: Service) -> None:
    second = service.versions[1]
    item = service.draw("base", lora=second.ref)
    assert (item["version"], item["digest"]) == (second.ref, second.digest)
    assert np.abs(picture(item) - picture(service.draw("base"))).max() > 10
    refused = service.client.post("/v1/images/generations", json={"model": "base", **WISH, "lora": "cats@99"})
    assert refused.status_code == 404


def test_what_the_model_cannot_do_is_the_clients_error(service: Service) -> None:
    answer = service.client.post("/v1/images/generations", json={"model": "base", **WISH, "sampler": "flow_euler"})
    assert answer.status_code == 400
    assert "sampler flow_euler" in answer.text


def test_an_alias_moves_under_load_and_no_request_fails(service: Service) -> None:
    """Then back by a rollback."""
    stop, seen = threading.Event(), Counter[str]()

    def keep_asking(number: int) -> int:
        count = 0
        while not stop.is_set():
            seen[service.draw(seed=number * 1000 + count)["version"]] += 1
            count += 1
        return count

    with ThreadPoolExecutor(8) as people:
        asking = [people.submit(keep_asking, number) for number in range(8)]
        try:
            service.until("cats@1")
            service.registry.alias(service.versions[1], "production")
            service.until("cats@2")
            service.registry.rollback("cats", "production")
            service.until("cats@1")
        finally:
            stop.set()
        assert sum(person.result() for person in asking) == sum(seen.values())
    assert set(seen) == {"cats@1", "cats@2"}


def test_a_canary_draws_its_share_and_users_stay(service: Service) -> None:
    traffic.change(service.registry.storage, "cats", {3: 30}, {})
    end = time.monotonic() + PATIENCE
    while len(service.client.get("/v1/models/cats").json().get("traffic", [])) != 2 and time.monotonic() < end:
        if any(service.draw(user=f"wait{number}", num_inference_steps=1)["version"] == "cats@3" for number in range(9)):
            break
    with ThreadPoolExecutor(8) as people:
        users = [f"user{number}" for number in range(60)]
        first = list(people.map(lambda user: service.draw(user=user, num_inference_steps=1)["version"], users))
        again = list(people.map(lambda user: service.draw(user=user, num_inference_steps=1)["version"], users))
    traffic.change(service.registry.storage, "cats", {}, {})
    assert first == again
    share = first.count("cats@3") / len(users)
    assert abs(share - 0.3) < 3.3 * (0.3 * 0.7 / len(users)) ** 0.5
    end = time.monotonic() + PATIENCE
    while any(service.draw(user=user, num_inference_steps=1)["version"] == "cats@3" for user in users[:20]):
        assert time.monotonic() < end, "the canary is still there"


def test_replicas_die_the_database_restarts_and_nothing_is_lost_or_doubled(
    service: Service, postgres: Postgres
) -> None:
    """64 clients, and the alias moves meanwhile. Each accepted prediction ends once, with its own version's picture."""
    wish, clients = {"num_inference_steps": 20}, 64
    first, second = (version.ref for version in service.versions[:2])
    service.until(first)
    with ThreadPoolExecutor(clients) as people:
        ids = list(people.map(lambda seed: service.begin(seed=seed, **wish), range(clients)))
        saying = {id: people.submit(service.rate, id, 1 + number % 5) for number, id in enumerate(ids[::8])}
        os.kill(a_replica(), signal.SIGKILL)
        later = people.submit(lambda: [service.begin(seed=seed, **wish) for seed in range(clients, clients + 8)])
        postgres.stop()
        service.registry.alias(service.versions[1], "production")
        time.sleep(2)
        postgres.start()
        service.until(second)
        moved = [service.begin(seed=seed, **wish) for seed in range(100, 104)]
        every = [*ids, *later.result(), *moved]
        ended = list(people.map(service.end, every))
        opinions = {id: opinion.result() for id, opinion in saying.items()}
    service.registry.rollback("cats", "production")
    service.until(first)
    assert [prediction["status"] for prediction in ended] == ["succeeded"] * len(every)
    drew = [prediction["version_ref"] for prediction in ended]
    assert (set(drew[:clients]), set(drew[clients:]) | {first}, set(drew[-4:])) == ({first}, {first, second}, {second})
    service.check_each_once(every, opinions)


@pytest.mark.soak
def test_sixty_four_clients_for_two_minutes_of_trouble(service: Service, postgres: Postgres) -> None:
    """While the alias moves, replicas are killed and the database restarts: nothing lost, nothing doubled, no 5xx."""
    stop = time.monotonic() + 120
    opinions: dict[str, str] = {}
    ids: list[str] = []
    bad: list[str] = []

    def client(number: int) -> None:
        count = 0
        while time.monotonic() < stop:
            count += 1
            try:
                ids.append(id := service.begin(seed=number * 1000 + count))
                opinions[id] = service.rate(id, 1 + count % 5)
            except AssertionError as error:
                bad.append(str(error))

    def trouble() -> None:
        while time.monotonic() < stop - 20:
            for act in (lambda: os.kill(a_replica(), signal.SIGKILL), postgres.stop, postgres.start):
                act()
                time.sleep(5)
            for version in service.versions:
                service.registry.alias(version, "production")
                time.sleep(3)

    with ThreadPoolExecutor(65) as people:
        work = [people.submit(trouble), *(people.submit(client, number) for number in range(64))]
        for one in work:
            one.result()
    assert not bad
    service.check_each_once(ids, opinions)
    assert set(opinions) == set(ids)


def a_replica() -> int:
    """The process id of one that draws cats."""
    import psutil

    found = [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any("ServeReplica:raysd:model-cats" in word for word in process.info["cmdline"] or ())
    ]
    return found[0]


def test_an_idempotent_request_is_drawn_once(service: Service) -> None:
    headers = {"Idempotency-Key": "one-and-only"}
    asked = {"version": "cats", "input": {**WISH, "seed": 99}}
    first, again = (service.client.post("/v1/predictions", json=asked, headers=headers) for _ in range(2))
    assert first.json()["id"] == again.json()["id"]
    assert service.end(first.json()["id"])["status"] == "succeeded"


def test_a_cancelled_prediction_ends_soon(service: Service) -> None:
    id = service.begin(num_inference_steps=200)
    assert service.client.post(f"/v1/predictions/{id}/cancel").status_code == 200
    assert service.end(id)["status"] == "canceled"
