"""The router over a real queue, with no replica: bounds, shadows, and what becomes of a model whose version is withdrawn."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import select

from raysd import __version__
from raysd.config.serving import ModelSpec
from raysd.database import Database
from raysd.errors import NotFound, RequestError, StorageError
from raysd.export.kept import MANIFEST, REFUSED, place_of
from raysd.feedback.generations import Generations
from raysd.references import identity, identity_of
from raysd.registry import Registry, Version, signing, traffic
from raysd.registry.records import blob_path
from raysd.serve import router as routers
from raysd.serve import routes as routing
from raysd.serve.drawing import Drawing
from raysd.serve.http.catalog import find
from raysd.serve.http.desk import Busy, Served
from raysd.serve.metrics import Metrics
from raysd.serve.predictions import Ask, NewPrediction, Picture, Prediction
from raysd.serve.queue import Queue
from raysd.serve.router import Router
from raysd.serve.routes import Routes, Target
from raysd.serve.tables import PredictionRow
from raysd.serve.uploads import Uploads
from raysd.storage import Storage
from tests.adapters import publish_lora
from tests.versions import files_of, safetensors
from tests.waiting import until

ASK = Ask("predictions", "cats", Drawing(prompt="a cat", steps=2), user="somebody", webhook="https://example.org/hook")


class Nobody:
    """A deployment's handle whose replicas never take anything. `called` has what they were called for."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.draw, self.cancel = SimpleNamespace(remote=self._draw), SimpleNamespace(remote=lambda id: None)

    def options(self, **_: Any) -> "Nobody":
        return self

    async def _draw(self, id: str) -> AsyncIterator[tuple[int, int, bytes]]:
        self.called.append(id)
        await asyncio.Event().wait()
        yield 0, 0, b""


class Desk:
    """A router for `cats`, and what it works on."""

    def __init__(self, registry: Registry, ref: str, most: int = 99):
        storage = registry.storage
        self.database, self.replicas = Database(None, storage), Nobody()
        self.database.migrate()
        self.queue, self.routes = Queue(self.database), Routes(storage, [ModelSpec(ref=ref)])
        generations, replicas = Generations(self.database, storage), {"cats": self.replicas}
        self.router = Router(self.queue, storage, self.routes, replicas, Metrics.off(), {"cats": most}, generations)

    def run(self, work: Callable[[Router], Awaitable[Any]]) -> Any:
        """What `work` returns for the router while it is open."""

        async def session() -> Any:
            self.router.start()
            try:
                return await work(self.router)
            finally:
                await self.router.close()

        return asyncio.run(session())

    def rows(self) -> list[PredictionRow]:
        with self.database.reading() as session:
            found = list(session.scalars(select(PredictionRow).order_by(PredictionRow.created)))
            session.expunge_all()
            return found


@pytest.mark.parametrize("at_once", [True, False])
def test_a_burst_does_not_pass_the_bound(registry: Registry, put: Callable[[int], Version], at_once: bool) -> None:
    """Between two counts as well, and while none of it is written yet."""
    put(1)
    desk = Desk(registry, "cats", most=3)

    async def burst(router: Router) -> list[Prediction | BaseException]:
        if at_once:
            return await asyncio.gather(*(router.submit(ASK) for _ in range(4)), return_exceptions=True)
        return [(await asyncio.gather(router.submit(ASK), return_exceptions=True))[0] for _ in range(4)]

    async def work(router: Router) -> None:
        taken = await burst(router)
        assert [type(answer) for answer in taken] == [Prediction] * 3 + [Busy]
        assert len(desk.rows()) == 3
        for answer in taken[:3]:
            assert isinstance(answer, Prediction)
            await router.cancel(answer.id)
        await asyncio.sleep(routers.COUNT_AGAIN)  # and not until the next count, a second later
        assert await router.submit(ASK)

    desk.run(work)


def test_what_was_claimed_meanwhile_waits_no_more(registry: Registry, put: Callable[[int], Version]) -> None:
    """A service that keeps up is not taken for full because much came since the last count."""
    put(1)
    desk = Desk(registry, "cats", most=3)

    async def work(router: Router) -> None:
        for _ in range(8):
            await router.submit(ASK)
            await asyncio.to_thread(desk.queue.claim, "somebody", "cats")
            await asyncio.sleep(routers.COUNT_AGAIN)

    desk.run(work)
    assert len(desk.rows()) == 8


def test_the_same_request_again_takes_no_place(
    registry: Registry, put: Callable[[int], Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routers, "COUNT", 3600)  # no count in between puts it right
    monkeypatch.setattr(routers, "COUNT_AGAIN", 3600)
    put(1)
    desk = Desk(registry, "cats", most=3)
    keyed = Ask("predictions", "cats", ASK.drawing, idempotency_key="once")

    async def work(router: Router) -> None:
        assert len({(await router.submit(keyed)).id for _ in range(3)}) == 1
        await router.submit(ASK)
        await router.submit(ASK)

    desk.run(work)


def test_the_same_request_again_is_answered_whatever_became_of_what_it_needs(
    registry: Registry, put: Callable[[int], Version]
) -> None:
    """Its upload removed, the service full, its version withdrawn: it was accepted before all that."""
    first = put(1)
    desk = Desk(registry, "cats", most=1)

    async def work(router: Router) -> None:
        drawing = ASK.drawing.model_copy(update={"image": await router.keep_upload(b"png", None)})
        keyed = replace(ASK, drawing=drawing, idempotency_key="once")
        made = await router.submit(keyed)
        Uploads(registry.storage, None).delete(str(drawing.image))
        with pytest.raises(Busy):
            await router.submit(ASK)
        assert (await router.submit(keyed)).id == made.id
        put(2)
        registry.withdraw(first)
        await happens(lambda: router.routes.choose(ASK)[0].ref == "cats@2")
        assert (await router.submit(keyed)).ref == first.ref
        with pytest.raises(RequestError, match="was used for another request"):
            await router.submit(replace(keyed, drawing=ASK.drawing))

    desk.run(work)
    assert len(desk.rows()) == 1


def test_the_bound_is_on_pictures(registry: Registry, put: Callable[[int], Version]) -> None:
    put(1)
    desk = Desk(registry, "cats", most=4)
    many = replace(ASK, drawing=ASK.drawing.model_copy(update={"count": 2}))

    async def work(router: Router) -> None:
        for _ in range(2):
            await router.submit(many)
        with pytest.raises(Busy, match="4 pictures wait"):
            await router.submit(ASK)
        assert desk.queue.waiting("cats") == 4

    desk.run(work)


@pytest.fixture
def shadowed(registry: Registry, put: Callable[[int], Version]) -> Desk:
    """A desk whose every request is drawn by version 2 as well."""
    put(1), put(2)
    traffic.change(registry.storage, "cats", {}, {2: 100})
    return Desk(registry, "cats@1")


KEYED = Ask(
    "predictions", "cats", ASK.drawing, user="somebody", idempotency_key="once", body="digest",
    webhook="https://example.org/hook", webhook_events=("completed",), comparison="pair", withhold=True,
)  # fmt: skip


def test_a_shadow_draws_the_same_and_nobody_hears_of_it(shadowed: Desk) -> None:
    async def work(router: Router) -> Prediction:
        answer = await router.submit(KEYED)
        await happens(lambda: len(shadowed.rows()) == 2)
        assert (await router.submit(KEYED)).id == answer.id  # which is no reason for a second shadow
        await asyncio.sleep(0.2)
        return answer

    answer = shadowed.run(work)
    assert answer.ref == "cats@1"
    row, shadow = sorted(shadowed.rows(), key=lambda row: row.ref)
    assert (row.id, shadow.ref, shadow.shadow_of) == (answer.id, "cats@2", answer.id)
    assert (shadow.drawing, shadow.user, shadow.withhold) == (row.drawing, "somebody", True)
    assert (row.webhook, row.comparison) == ("https://example.org/hook", "pair")
    assert row.seal_name is not None
    assert (shadow.webhook, shadow.webhook_events, shadow.comparison) == (None, [], None)
    assert (shadow.seal_name, shadow.seal_body) == (None, None)
    assert [found.id for found in shadowed.queue.find(None, None, 9)] == [answer.id]
    assert shadowed.replicas.called == [row.id], "a shadow waits for a replica that has nothing else to do"


def test_shadows_take_no_place_and_are_dropped_where_there_is_none(shadowed: Desk) -> None:
    shadowed.router._backlogs["cats"].most = 2

    async def work(router: Router) -> None:
        await router.submit(ASK)
        await happens(lambda: len(shadowed.rows()) == 2)
        await router.submit(ASK)
        await asyncio.sleep(0.2)
        with pytest.raises(Busy, match="2 pictures wait for cats"):
            await router.submit(ASK)

    shadowed.run(work)
    assert [row.shadow_of is None for row in shadowed.rows()] == [True, False, True]


def test_what_is_late_ends_although_there_is_no_replica(
    registry: Registry, put: Callable[[int], Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routers, "COUNT", 0.05)
    put(1)
    desk = Desk(registry, "cats")

    async def work(router: Router) -> Prediction:
        return await router.wait((await router.submit(replace(ASK, deadline=time.time() + 0.2))).id, 60)

    assert desk.run(work).status == "aborted"


@pytest.mark.parametrize("left", ["waiting", "claimed"])
def test_what_an_ingress_left_another_one_calls_for(
    registry: Registry, put: Callable[[int], Version], monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """A model that has no replica starts one when it is called, and not before; one call at a time is enough."""
    monkeypatch.setattr(routers, "COUNT", 0.05)
    put(1)
    first, second = Desk(registry, "cats"), Desk(registry, "cats")

    async def accept(router: Router) -> list[str]:
        return [(await router.submit(ASK)).id for _ in range(2)]

    async def called(router: Router) -> None:
        await happens(lambda: bool(second.replicas.called))
        assert await asyncio.to_thread(second.queue.claim, "somebody", "cats", id=ids[0])
        await asyncio.sleep(0.3)

    ids = first.run(accept)
    if left == "claimed":  # by a replica that died with the ingress
        late = Queue(first.database, clock=lambda session: time.time() - 60)
        assert late.claim("somebody", "cats", most=2)
    second.run(called)
    assert second.replicas.called == ids[:1]


def test_what_one_ingress_accepted_another_one_knows(registry: Registry, put: Callable[[int], Version]) -> None:
    """Behind a balancer the next request of a client goes anywhere: asking again, waiting for the end, cancelling."""
    put(1)
    desk, other = Desk(registry, "cats"), Desk(registry, "cats")
    keyed = replace(ASK, idempotency_key="once")

    async def work(router: Router) -> None:
        other.router.start()
        try:
            begun = [await router.submit(keyed), await router.submit(ASK)]
            assert (await other.router.submit(keyed)).id == begun[0].id
            assert len(desk.rows()) == 2
            waiting = [asyncio.create_task(other.router.wait(one.id, 30)) for one in begun]
            await asyncio.sleep(0.1)
            (claim,) = await asyncio.to_thread(desk.queue.claim, "somebody", "cats", id=begun[0].id)
            await asyncio.to_thread(desk.queue.finish, claim, [], {})
            await router.cancel(begun[1].id)
            assert [(await one).status for one in waiting] == ["succeeded", "canceled"]
        finally:
            await other.router.close()

    desk.run(work)


def test_what_is_deleted_takes_its_files_along(registry: Registry, put: Callable[[int], Version]) -> None:
    put(1)
    desk, storage = Desk(registry, "cats"), registry.storage
    picture = Picture(0, "generated/2026-01-02/x.png", "a" * 64, 1, 64, 64)

    async def work(router: Router) -> None:
        drawing = ASK.drawing.model_copy(update={"image": await router.keep_upload(b"png", None)})
        made = await router.submit(replace(ASK, drawing=drawing))
        storage.write(picture.path, b"png")
        (claim,) = desk.queue.claim("somebody", "cats")
        desk.queue.finish(claim, [picture], {})
        await router.delete(made.id)
        assert not storage.exists(picture.path)
        assert not storage.exists(f"serving/uploads/anybody/{drawing.image}.png")
        with pytest.raises(NotFound):
            await router.delete("x" * 26)

    desk.run(work)


@pytest.mark.parametrize("error", [StorageError("away"), RuntimeError("anything")])
def test_a_shadow_that_cannot_be_written_harms_nothing(
    shadowed: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    true, tried = shadowed.queue.submit, threading.Event()

    def submit(new: NewPrediction) -> tuple[Prediction, bool]:
        if new.shadow_of is None:
            return true(new)
        tried.set()
        raise error

    monkeypatch.setattr(shadowed.queue, "submit", submit)

    async def work(router: Router) -> Prediction:
        answer = await router.submit(KEYED)
        await happens(tried.is_set)
        await router.submit(ASK)
        return answer

    answer = shadowed.run(work)
    assert [row.ref for row in shadowed.rows()] == ["cats@1"] * 2
    assert not answer.ended
    assert f"shadow of {answer.id}: {error}" in caplog.text


def test_nobody_waits_for_a_shadow(shadowed: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    true, leave = shadowed.queue.submit, threading.Event()

    def submit(new: NewPrediction) -> tuple[Prediction, bool]:
        if new.shadow_of is not None:
            leave.wait(60)
        return true(new)

    monkeypatch.setattr(shadowed.queue, "submit", submit)

    async def work(router: Router) -> None:
        try:
            async with asyncio.timeout(30):
                await router.submit(KEYED)
            assert len(shadowed.rows()) == 1
        finally:
            leave.set()

    shadowed.run(work)


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "REFRESH", 0.02)


@pytest.mark.usefixtures("quickly")
def test_a_model_whose_version_is_withdrawn_is_not_served_until_it_has_another(
    registry: Registry, put: Callable[[int], Version]
) -> None:
    """An alias cannot be left on it; a number, or the newest of none, can."""
    version, told = put(1), list[Target]()
    with served(registry, "cats@1", "cats") as (fixed, newest):
        newest.on_change = told.append
        registry.withdraw(version, "leaked")
        for routes in (fixed, newest):
            until(lambda routes=routes: routes.served()[0].withdrawn is not None)  # type: ignore[misc]
            with pytest.raises(NotFound, match=r"model: cats is not served now: .*cats@1 was withdrawn \(leaked\)"):
                routes.choose(ASK)
            assert not routes.targets()
        put(2)
        until(lambda: newest.served()[0].withdrawn is None)
        assert newest.choose(ASK)[0].ref == "cats@2"
        until(lambda: [target.ref for target in told] == ["cats@2"])
        assert "leaked" in str(fixed.served()[0].withdrawn)
        for name in ("cats", "cats@1", None):
            with pytest.raises(NotFound, match=r"is not served now: .*leaked|served here: none"):
                find(fixed.served(), name)
        with pytest.raises(RequestError, match="model: required"):  # not the other one, for want of choice
            find([*fixed.served(), Served("dogs", "dogs@1", "1" * 64, 0.0)], None)


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("gone", [StorageError("the store does not answer"), NotFound("no such object")])
def test_a_store_that_is_away_for_a_moment_changes_nothing(
    registry: Registry, put: Callable[[int], Version], monkeypatch: pytest.MonkeyPatch, gone: Exception
) -> None:
    """Nor does one that looks empty, as a disk that is not mounted."""
    put(1), put(2)
    traffic.change(registry.storage, "cats", {2: 50}, {})
    asked = []

    def away(storage: Storage, path: str) -> bytes:
        asked.append(path)
        raise gone

    with served(registry, "cats@1") as (routes,):
        before = routes.served()
        assert len(before[0].traffic) == 2
        with monkeypatch.context() as broken:
            broken.setattr(Storage, "read", away)
            until(lambda: len(asked) > 3)
            assert routes.served() == before
            assert routes.choose(ASK)[0].ref in ("cats@1", "cats@2")


@pytest.mark.usefixtures("quickly")
def test_a_share_stays_while_the_store_does_not_say_that_its_version_was_withdrawn(
    registry: Registry, put: Callable[[int], Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(1), put(2)
    traffic.change(registry.storage, "cats", {2: 100}, {})
    true, asked = Storage.read, []

    def read(storage: Storage, path: str) -> bytes:
        if path.endswith("versions/2.json"):
            asked.append(path)
            raise StorageError("the store does not answer")
        return true(storage, path)

    with served(registry, "cats@1") as (routes,):
        with monkeypatch.context() as broken:
            broken.setattr(Storage, "read", read)
            until(lambda: len(asked) > 3)
            assert routes.choose(ASK)[0].ref == "cats@2"
        registry.withdraw(registry.resolve("cats@2"))
        until(lambda: routes.choose(ASK)[0].ref == "cats@1")


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("fault", ["unsigned", "cut off", "too large"])
def test_an_alias_that_moves_to_what_cannot_be_loaded_moves_no_traffic(
    registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    """Until it can; a canary's share goes to the deployed version meanwhile."""
    key, told = Ed25519PrivateKey.generate(), list[str]()
    sound, bad = (registry.publish("cats", files_of(tmp_path / str(n), n, 64 * n), {}, key=str(n)) for n in (1, 2))
    blob = Path(registry.storage.url) / blob_path(next(f.sha256 for f in bad.files if f.path.startswith("unet/")))
    whole, signers = blob.read_bytes(), ()
    spec = ModelSpec(ref="cats:production", memory=1.5 * len(whole) / 2**30)
    if fault == "unsigned":
        signing.sign(registry.storage, sound, key)
        signers = (signing.public_name(key),)
    elif fault == "cut off":
        blob.write_bytes(whole[:-1])
    else:
        spec = ModelSpec(ref="cats:production", memory=(len(whole) - 1) / 2**30)
    registry.alias(sound, "production")
    routes = Routes(registry.storage, [spec], signers)
    try:
        routes.on_refused = lambda target: told.append(target.ref)
        registry.alias(bad, "production")
        until(lambda: told == [bad.ref])
        traffic.change(registry.storage, "cats", {2: 100}, {})
        time.sleep(0.2)
        assert routes.choose(ASK)[0].ref == sound.ref
        assert [record.levelname for record in caplog.records] == ["ERROR"]  # and not at each look
        if fault == "unsigned":
            signing.sign(registry.storage, bad, key)
        elif fault == "cut off":
            blob.write_bytes(whole)
        else:
            return
        until(lambda: routes.choose(ASK)[0].ref == bad.ref)
        assert routes.served()[0].traffic[0].ref == bad.ref
        assert told == [bad.ref]
    finally:
        routes.close()


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("of", ["whole", "LoRA"])
def test_with_onnx_an_alias_moves_when_the_export_is_there_and_never_where_it_was_refused(
    registry: Registry, put: Callable[[int], Version], tmp_path: Path, caplog: pytest.LogCaptureFixture, of: str
) -> None:
    """Else requests would wait for it for a minute, or fail one after the other."""
    first, second = put(1), put(2)
    source, moved = second.digest, second
    if of == "LoRA":
        (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(safetensors(3))
        files = {"pytorch_lora_weights.safetensors": tmp_path / "pytorch_lora_weights.safetensors"}
        moved = registry.publish("cats", files, {"base": second.ref, "base_digest": "0" * 64}, key="lora")
    place = place_of(source, "fp32")
    registry.alias(first, "production")
    missing, refused = list[str](), list[str]()
    routes = Routes(registry.storage, [ModelSpec(ref="cats:production", backend="onnx")])
    try:
        assert routes.choose(ASK)[0].ref == first.ref, "what a service starts with has its replicas make its export"
        routes.on_unexported, routes.on_refused = lambda t: missing.append(t.ref), lambda t: refused.append(t.ref)
        registry.alias(moved, "production")
        until(lambda: missing[:2] == [moved.ref] * 2)  # again and again: a replica may have been starting
        traffic.change(registry.storage, "cats", {moved.number: 100}, {})
        time.sleep(0.2)
        assert routes.choose(ASK)[0].ref == first.ref
        begins = Routes(registry.storage, [ModelSpec(ref="cats@1", backend="onnx")])
        begins.close()
        assert begins.choose(ASK)[0].ref == first.ref, "nor does it draw as a canary, whoever looks first"
        registry.storage.write(f"{place}/{REFUSED}", json.dumps({"reason": "too far", "raysd": __version__}).encode())
        until(lambda: refused == [moved.ref])
        assert routes.choose(ASK)[0].ref == first.ref
        assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "ERROR"]  # one is of `begins`
        registry.storage.create(f"{place}/{MANIFEST}", b"{}")
        until(lambda: routes.choose(ASK)[0].ref == moved.ref)
    finally:
        routes.close()


@pytest.mark.usefixtures("quickly")
def test_a_rare_model_whose_replicas_are_none_is_switched_without_an_export(
    registry: Registry, put: Callable[[int], Version]
) -> None:
    """Nobody would be there to make it."""
    first, second = put(1), put(2)
    registry.alias(first, "production")
    routes = Routes(registry.storage, [ModelSpec(ref="cats:production", backend="onnx", replicas={"least": 0})])
    try:
        registry.alias(second, "production")
        until(lambda: routes.choose(ASK)[0].ref == second.ref)
    finally:
        routes.close()


def test_a_service_that_starts_on_a_bad_version_starts(registry: Registry, put: Callable[[int], Version]) -> None:
    """There is nothing else to serve, and other models are served beside it."""
    put(1)
    routes = Routes(registry.storage, [ModelSpec(ref="cats@1")], ["A" * 43 + "="])
    routes.close()
    assert routes.choose(ASK)[0].ref == "cats@1"


def test_more_bases_than_a_replica_holds_are_said(
    registry: Registry, put: Callable[[int], Version], caplog: pytest.LogCaptureFixture
) -> None:
    put(1), put(2), put(3)
    traffic.change(registry.storage, "cats", {2: 10}, {})
    with served(registry, "cats@1"):
        assert not caplog.records
    traffic.change(registry.storage, "cats", {2: 10}, {3: 10})
    with served(registry, "cats@1"):
        assert "cats: its versions need `bases: 3`, and it is 2" in caplog.text


def test_the_ingress_knows_a_base_without_its_weights(
    registry: Registry, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.relative_to(tiny_base).as_posix(): path for path in tiny_base.rglob("*") if path.is_file()}
    beside = {
        "unet/other.fp16.safetensors": files["unet/diffusion_pytorch_model.safetensors"],
        "README.md": tmp_path / "x",
    }
    beside["README.md"].write_text("no part of the model")
    version = registry.publish("whole", files | beside, {}, key="whole")
    wanted = identity(registry.fetch(version))
    monkeypatch.setattr(Registry, "fetch", None)
    assert identity_of(version, registry.storage) == wanted == identity(tiny_base)
    with served(registry, "whole") as (routes,):
        assert routes._routes["whole"].base == wanted


def test_a_version_that_cannot_be_looked_up_now_is_no_version_that_is_not_there(
    registry: Registry, put: Callable[[int], Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(1), put(2)
    with served(registry, "cats@1") as (routes,):
        assert routes.choose(replace(ASK, version="cats@2"))[0].ref == "cats@2"
        with pytest.raises(NotFound, match="cats has no version cats@9"):
            routes.choose(replace(ASK, version="cats@9"))

        def away(*_: Any) -> Version:
            raise StorageError("the store does not answer")

        monkeypatch.setattr(routes.registry, "resolve", away)
        with pytest.raises(StorageError):
            routes.choose(replace(ASK, version="cats@2"))


def test_a_lora_is_drawn_over_the_version_that_was_asked_for_or_not_at_all(
    registry: Registry, tiny_base: Path, tmp_path: Path
) -> None:
    style = publish_lora(registry, tiny_base, tmp_path / "style", 1)
    files = {path.relative_to(tiny_base).as_posix(): path for path in tiny_base.rglob("*") if path.is_file()}
    same = registry.publish("whole", files, {}, key="same")
    config = tmp_path / "config.json"
    config.write_text((tiny_base / "unet/config.json").read_text() + " ")
    other = registry.publish("whole", {**files, "unet/config.json": config}, {}, key="other")
    with served(registry, same.ref) as (routes,):
        ask = replace(ASK, model="whole", lora=style.ref)
        for version in (None, same.ref, same.digest):
            assert routes.choose(replace(ask, version=version))[0].ref == style.ref
        with pytest.raises(NotFound, match=r"^lora: there is no zz@1$"):  # and nothing of what else the registry has
            routes.choose(replace(ask, lora="zz@1"))
        with pytest.raises(RequestError, match=f"lora: {style.ref} was trained on another base than {other.ref}'s"):
            routes.choose(replace(ask, version=other.ref))


def test_an_upload_that_is_not_there_is_said_before_anything_is_accepted(
    registry: Registry, put: Callable[[int], Version]
) -> None:
    put(1)
    desk = Desk(registry, "cats@1")
    ask = replace(ASK, drawing=ASK.drawing.model_copy(update={"image": "a" * 64}))

    async def work(router: Router) -> None:
        with pytest.raises(NotFound, match="image: no such upload"):
            await router.submit(ask)

    desk.run(work)
    assert not desk.rows()


def test_a_prediction_of_a_model_that_is_served_elsewhere_can_be_cancelled(
    registry: Registry, put: Callable[[int], Version]
) -> None:
    put(1)
    desk = Desk(registry, "cats@1")

    async def work(router: Router) -> None:
        prediction = await router.submit(ASK)
        await asyncio.to_thread(desk.queue.claim, "another", "cats")
        router._replicas = {}
        assert (await router.cancel(prediction.id)).id == prediction.id

    desk.run(work)


@contextlib.contextmanager
def served(registry: Registry, *refs: str) -> Any:
    routes = [Routes(registry.storage, [ModelSpec(ref=ref)]) for ref in refs]
    try:
        yield routes
    finally:
        for each in routes:
            each.close()


async def happens(met: Callable[[], bool]) -> None:
    await asyncio.to_thread(until, met)
