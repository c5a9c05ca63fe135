"""The queue of predictions, on SQLite and PostgreSQL: who may work on what, and what becomes of it."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest
from sqlalchemy import select, text

from raysd import patience
from raysd.errors import NotFound, RequestError, StorageError, TooMany
from raysd.feedback.tables import GenerationRow
from raysd.serve.claims import LEASE, MOST_ATTEMPTS
from raysd.serve.drawing import Drawing
from raysd.serve.keys import Keys, Limits
from raysd.serve.metrics import Metrics
from raysd.serve.predictions import Cursor, Picture
from raysd.serve.queue import Queue
from raysd.serve.tables import PredictionRow
from raysd.storage import Storage
from tests.records import Forgetful, drawn, new, pictures

PICTURE = Picture(0, "generated/2026-01-02/x-0.png", "a" * 64, 1, 64, 64)


@pytest.fixture
def queue(database, clock):
    return Queue(database, keep_pictures=100.0, clock=clock)


def submitted(queue, *names, **changes):
    return [queue.submit(new(name, **changes))[0].id for name in names]


def all_rows(database, kind):
    with database.reading() as session:
        return session.scalars(select(kind)).all()


def everything(database):
    """All that the tables of predictions and generations hold, as one text."""
    with database.reading() as session:
        rows = [session.execute(text(f"SELECT * FROM {name}")).all() for name in ("predictions", "generations")]  # noqa: S608
    return str(rows)


# Submitting and finding


def test_the_oldest_is_what_has_been_free_longest(queue, clock):
    first = submitted(queue, "first")[0]
    clock.now += 1
    shadow, second = submitted(queue, "shadow", shadow_of=first)[0], submitted(queue, "second")[0]
    assert queue.oldest("cats") == first
    assert queue.oldest("dogs") is None
    (claim,) = queue.claim("w", "cats", but=lambda: [second])
    assert (claim.id, queue.oldest("cats")) == (first, second)
    assert [claim.id for claim in queue.claim("w", "cats", most=9)] == [second, shadow]
    assert queue.oldest("cats") is None
    queue.release(claim, counts=True)
    assert (queue.oldest("cats"), queue.get(first).attempt) == (first, 1)
    queue.release(queue.claim("w", "cats", id=first)[0])
    assert queue.get(first).attempt == 1
    assert not queue.claim("w", "cats", id=first, but=lambda: [first])
    clock.now += LEASE + 1
    queue.claim("w", "cats", id=first)
    assert queue.oldest("cats") == second


def test_what_is_submitted_is_found(queue, clock):
    given = new("a cat", negative="dogs", count=2, user="u", webhook="https://x.test/", webhook_events=("completed",))
    prediction, is_new = queue.submit(given)
    assert is_new
    assert queue.get(prediction.id) == prediction
    assert Drawing.model_validate(prediction.drawing) == given.ask.drawing
    assert (prediction.status, prediction.ended, prediction.attempt) == ("starting", False, 0)
    assert (prediction.created, prediction.user, prediction.webhook_events) == (clock.now, "u", ["completed"])
    assert len(prediction.id) == 26
    assert prediction.id.isalnum()


@pytest.mark.parametrize("id", ["nothing", "a\0b", "\ud800", "x" * 1000])
def test_an_unknown_prediction_is_not_found(queue, id):
    for call in (queue.get, queue.cancel):
        with pytest.raises(NotFound, match="there is none of that id"):
            call(id)


def test_pages_are_newest_first_and_of_one_owner(queue, clock):
    ids = []
    for number in range(5):
        clock.now += number % 2  # some at the same time
        ids += submitted(queue, f"p{number}", owner="anna" if number != 2 else "bert")
    submitted(queue, "beside", owner="anna", shadow_of=ids[0])
    found = queue.find("anna", None, 2)
    for _ in range(2):
        found += queue.find("anna", Cursor(found[-1].created, found[-1].id), 2)
    assert sorted(p.id for p in found) == sorted(ids[:2] + ids[3:])
    assert [p.created for p in found] == sorted((p.created for p in found), reverse=True)
    assert len(queue.find(None, None, 10)) == 5
    assert queue.waiting("cats") == 5, "shadows hold up nobody"
    assert (queue.in_flight("anna"), queue.in_flight("bert")) == (4, 1)


def test_text_that_cannot_be_kept_is_refused(queue):
    for field in ("prompt", "negative"):
        with pytest.raises(RequestError, match=f"{field}: holds a NUL"):
            queue.submit(new(**{field: "a\0b"}))


def test_a_key_submits_once(queue, database):
    first, is_new = queue.submit(new("a secret cat", idempotency_key="once", owner="anna"))
    assert is_new
    again, is_new = queue.submit(new("a secret cat", idempotency_key="once", owner="anna", ref="cats@4"))
    assert (again, is_new) == (first, False)
    with pytest.raises(RequestError, match="Idempotency-Key: was used for another request"):
        queue.submit(new("a dog", idempotency_key="once", owner="anna"))
    for other in (new("a dog", idempotency_key="once", owner="bert"), new("a dog", idempotency_key="once")):
        assert queue.submit(other)[1]
    assert len(all_rows(database, PredictionRow)) == 3
    assert "once" not in everything(database)


def test_what_the_request_was_is_for_the_caller_to_say(queue):
    """A seed that was drawn by lot differs from one time to the next."""
    first, _ = queue.submit(new(seed=1, idempotency_key="k", body="as sent"))
    assert queue.submit(new(seed=2, idempotency_key="k", body="as sent")) == (first, False)


def test_a_key_submitted_at_once_submits_once(queue, database):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: queue.submit(new(idempotency_key="k")), range(16)))
    assert len({prediction.id for prediction, _ in answers}) == 1
    assert sum(is_new for _, is_new in answers) == 1
    assert len(all_rows(database, PredictionRow)) == 1


# Claims


def test_the_oldest_of_a_model_is_claimed_first_and_by_one(queue, clock):
    ids = []
    for number in range(4):
        clock.now += 1
        ids += submitted(queue, f"p{number}")
    (other,) = submitted(queue, "dog", model="dogs")
    assert [claim.id for claim in queue.claim("a", "cats", most=2)] == ids[:2]
    (third,) = queue.claim("b", "cats", id=ids[3])
    assert (third.id, third.prediction.status, third.prediction.attempt) == (ids[3], "processing", 1)
    assert queue.claim("a", "cats", id=ids[3]) == []
    assert [claim.id for claim in queue.claim("b", "cats", most=9)] == ids[2:3]
    assert queue.claim("b", "cats", most=9) == []
    assert [claim.id for claim in queue.claim("b", "dogs", most=9)] == [other]


def test_shadows_are_claimed_last(queue, clock):
    (shadow,) = submitted(queue, "p", shadow_of="x")
    clock.now += 1
    seen = submitted(queue, "q", "r")
    assert [claim.id for claim in queue.claim("a", "cats", most=2)] == sorted(seen)
    assert [claim.id for claim in queue.claim("a", "cats", most=2)] == [shadow]


def test_many_claim_each_exactly_once(database):
    queue = Queue(database)
    ids = submitted(queue, *(f"p{number}" for number in range(60)))
    start, taken = threading.Barrier(6), []

    def work(name):
        start.wait()
        while claims := queue.claim(name, "cats", most=3):
            taken.extend(claims)
            assert all(queue.finish(claim, [replace(PICTURE, path=claim.id)], {}) for claim in claims)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, "abcdef"))
    assert sorted(claim.id for claim in taken) == sorted(ids)
    assert sorted(row.prediction_id for row in all_rows(database, GenerationRow)) == sorted(ids)


def test_a_lapsed_lease_is_claimed_again_and_its_former_holder_is_fenced(queue, clock, database):
    (id,) = submitted(queue, "p")
    (first,) = queue.claim("a", "cats")
    clock.now += LEASE - 1
    assert queue.renew([first]) == {id}
    clock.now += LEASE - 1
    assert queue.claim("b", "cats") == [], "it was renewed"
    clock.now += 2
    (second,) = queue.claim("b", "cats")
    assert (second.id, second.prediction.attempt, second.token > first.token) == (id, 2, True)
    assert queue.renew([first, second]) == {id}
    assert queue.renew([first]) == set()
    assert not queue.finish(first, [PICTURE], {})
    assert not queue.fail(first, "late")
    assert not queue.canceled(first)
    queue.release(first)
    assert queue.get(id).status == "processing"
    assert queue.finish(second, [PICTURE], {"predict_time": 2.0})
    assert not queue.finish(first, [PICTURE], {}), "nor after the other's success"
    assert len(all_rows(database, GenerationRow)) == 1


def test_a_lapsed_lease_that_nobody_claimed_is_still_good(queue, clock):
    (id,) = submitted(queue, "p")
    (claim,) = queue.claim("a", "cats")
    clock.now += 10 * LEASE
    assert queue.renew([claim]) == {id}
    assert queue.claim("b", "cats") == []
    assert queue.finish(claim, [PICTURE], {})


def test_what_is_given_back_waits_again_and_counts_no_attempt(queue, clock):
    (id,) = submitted(queue, "p")
    for _ in range(MOST_ATTEMPTS + 2):
        (claim,) = queue.claim("a", "cats")
        queue.release(claim)
        queue.release(claim)
        assert not queue.finish(claim, [PICTURE], {})
    found = queue.get(id)
    assert (found.status, found.attempt, queue.waiting("cats")) == ("starting", 0, 1)
    (claim,) = queue.claim("a", "cats")
    assert queue.finish(claim, [PICTURE], {})


def test_what_nobody_gets_done_is_given_up(queue, clock):
    (id,) = submitted(queue, "p")
    for _ in range(MOST_ATTEMPTS):
        assert queue.claim("a", "cats")
        assert queue.expire() == 0
        clock.now += LEASE + 1
    assert queue.claim("a", "cats") == []
    assert queue.expire() == 1
    assert queue.expire() == 0
    assert (queue.get(id).status, queue.get(id).completed) == ("failed", clock.now)
    assert f"claimed {MOST_ATTEMPTS} times" in queue.get(id).error


# Ends


def test_a_finished_prediction_has_its_pictures_and_records(queue, clock, database):
    prediction, _ = queue.submit(new("a cat", negative="dogs", seed=7, count=2, owner="anna", user="u"))
    clock.now += 1
    (claim,) = queue.claim("a", "cats")
    clock.now += 2
    made = [replace(PICTURE, number=n, path=f"generated/d/{n}.png", seed=7 + n) for n in range(2)]
    assert queue.finish(claim, made, {"predict_time": 2.0})
    found = queue.get(prediction.id)
    assert found.pictures == made
    assert (found.status, found.ended, found.metrics) == ("succeeded", True, {"predict_time": 2.0})
    assert (found.started, found.completed) == (clock.now - 2, clock.now)
    assert Drawing.model_validate(found.drawing) == new("a cat", negative="dogs", seed=7, count=2).ask.drawing
    assert queue.find("anna", None, 5) == [found]
    one, two = sorted(all_rows(database, GenerationRow), key=lambda row: row.number)
    assert (one.id, two.id) == (f"{found.id}-0", f"{found.id}-1")
    assert (two.prompt, two.negative, two.seed, two.ref, two.digest) == ("a cat", "dogs", 8, "cats@3", "3" * 64)
    assert (two.owner, two.user, two.kept_until) == ("anna", "u", clock.now + 100)
    assert (two.parameters["steps"], "prompt" in two.parameters) == (4, False)
    assert everything(database).count("a cat") == 2, "once for each picture, and nowhere else"


def test_a_failure_says_why(queue):
    (id,) = submitted(queue, "p")
    (claim,) = queue.claim("a", "cats")
    assert queue.fail(claim, "NaN in the picture\0\x1b[31m")
    assert queue.fail(claim, "again")
    assert not queue.finish(claim, [PICTURE], {})
    assert (queue.get(id).status, queue.get(id).error) == ("failed", "NaN in the picture  [31m")


def test_what_waits_is_cancelled_at_once(queue):
    (id,) = submitted(queue, "p")
    assert queue.cancel(id).status == "canceled"
    assert queue.claim("a", "cats") == []
    assert queue.cancel(id) == queue.get(id)


def test_what_is_worked_on_is_cancelled_by_its_holder(queue):
    (id,) = submitted(queue, "p")
    (claim,) = queue.claim("a", "cats")
    asked = queue.cancel(id)
    assert (asked.status, asked.cancel_requested) == ("processing", True)
    assert queue.renew([claim]) == set()
    assert queue.canceled(claim)
    assert queue.canceled(claim)
    assert queue.get(id).status == "canceled"


def test_what_was_to_be_cancelled_and_given_back_ends(queue):
    (id,) = submitted(queue, "p")
    (claim,) = queue.claim("a", "cats")
    queue.cancel(id)
    queue.release(claim)
    assert queue.get(id).status == "canceled"


def test_what_was_left_is_cancelled_without_its_holder(queue, clock):
    before, after = submitted(queue, "p", "q")
    assert len(queue.claim("a", "cats", most=2)) == 2
    queue.cancel(before)
    clock.now += LEASE + 1
    assert queue.cancel(after).status == "canceled"
    assert queue.claim("b", "cats") == []
    assert queue.expire() == 1
    assert queue.get(before).status == "canceled"


def test_a_holder_that_came_too_late_is_told_that_another_ended_it(queue, clock):
    """It would count that end once more."""
    cancelled, late = submitted(queue, "p"), submitted(queue, "q", deadline=clock.now + 20)
    claims = queue.claim("w", "cats", most=2)
    clock.now += LEASE + 1
    assert queue.cancel(cancelled[0]).status == "canceled"
    clock.now += 20
    assert queue.expire() == 1
    assert queue.get(late[0]).status == "canceled"
    for claim in claims:
        assert not queue.canceled(claim)
        assert not queue.finish(claim, [], {})


def test_what_has_ended_is_not_cancelled(queue):
    (id,) = submitted(queue, "p")
    (claim,) = queue.claim("a", "cats")
    queue.finish(claim, [PICTURE], {})
    assert queue.cancel(id).status == "succeeded"


def test_a_deadline_ends_what_waits_and_what_is_worked_on(queue, clock):
    due = clock.now + 5
    worked_on, waits, has_time = submitted(queue, "p", "q", "r", deadline=due)[:2] + submitted(queue, "s")
    (claim,) = queue.claim("a", "cats", id=worked_on)
    assert queue.expire() == 0
    clock.now = due
    assert queue.claim("b", "cats", id=waits) == [], "not even before it is noticed"
    assert queue.expire() == 3
    assert (queue.get(worked_on).status, queue.get(waits).status) == ("canceled", "aborted")
    assert queue.get(waits).error == "its deadline passed"
    assert queue.renew([claim]) == set()
    assert not queue.finish(claim, [PICTURE], {})
    assert queue.get(has_time).status == "starting"


SHADOWS = {
    "waiting": lambda queue, id: None,
    "drawn": lambda queue, id: queue.finish(*queue.claim("a", "cats", id=id), [PICTURE], {}),
    "failed": lambda queue, id: queue.fail(*queue.claim("a", "cats", id=id), "no"),
}


@pytest.mark.parametrize("how", [*SHADOWS, "drawn after it"])
@pytest.mark.parametrize("call", ["cancel", "delete"])
def test_nothing_is_left_of_the_shadow_of_what_was_cancelled(queue, database, call, how):
    (id,) = submitted(queue, "a cat")
    (shadow,) = submitted(queue, "Q9", negative="Q9", user="Q9", shadow_of=id)
    claims = queue.claim("b", "cats", id=shadow) if how == "drawn after it" else []
    SHADOWS.get(how, SHADOWS["waiting"])(queue, shadow)
    getattr(queue, call)(id)
    for claim in claims:
        assert queue.renew([claim]) == set()
        assert queue.finish(claim, [PICTURE], {})
    assert "Q9" not in everything(database)
    assert queue.claim("a", "cats") == []
    assert all(row.kept_until is not None and row.deleted for row in all_rows(database, GenerationRow))
    with pytest.raises(NotFound, match="was cancelled or deleted"):
        queue.submit(new(shadow_of=id))


def test_what_has_ended_keeps_its_shadow(queue):
    (id,) = submitted(queue, "p")
    (claim,) = queue.claim("a", "cats")
    queue.finish(claim, [PICTURE], {})
    (shadow,) = submitted(queue, "p", shadow_of=id)
    queue.cancel(id)
    assert [claim.id for claim in queue.claim("a", "cats")] == [shadow]


@pytest.mark.parametrize("how", ["waiting", "drawn", "failed", "canceled"])
def test_what_is_deleted_is_gone_but_for_a_tombstone(queue, database, clock, how):
    drawing = Drawing(prompt="Q9-prompt", negative="Q9-negative", image="c9" * 32)
    prediction, _ = queue.submit(new(drawing=drawing, user="Q9-user"))
    if how == "canceled":
        queue.cancel(prediction.id)
    else:
        SHADOWS[how](queue, prediction.id)
    assert "Q9" in everything(database)
    assert queue.delete(prediction.id) == {"c9" * 32}
    assert queue.delete(prediction.id) == set()
    assert "Q9" not in everything(database)
    assert "c9" * 32 not in everything(database)
    found = queue.get(prediction.id)
    ended = {"waiting": "canceled", "drawn": "succeeded"}.get(how, how)
    assert (found.status, found.deleted, found.pictures, found.user) == (ended, clock.now, [], None)
    with pytest.raises(NotFound):
        queue.delete("x")


def test_what_is_deleted_while_it_is_drawn_is_gone_when_it_is_done(queue, database):
    (id,) = submitted(queue, "Q9", user="Q9")
    (claim,) = queue.claim("a", "cats")
    queue.delete(id)
    assert "Q9" not in everything(database)
    assert queue.renew([claim]) == set()
    assert queue.finish(claim, [PICTURE], {})
    (row,) = all_rows(database, GenerationRow)
    assert (row.prompt, row.deleted) == (None, row.created)
    assert queue.get(id).pictures == []


def test_an_upload_stays_while_another_is_drawn_from_it(queue):
    ids = submitted(queue, "p", "q", drawing=Drawing(prompt="p", image="a" * 64, mask="b" * 64))
    assert queue.delete(ids[0]) == set()
    assert queue.delete(ids[1]) == {"a" * 64, "b" * 64}


def test_ends_that_no_holder_tells_are_counted_once(database, clock):
    told = []
    metrics = Metrics(lambda metric, value, labels: told.append((metric.name, value, labels["outcome"])))
    queue = Queue(database, metrics=metrics, clock=clock)
    waits, drawn_late = submitted(queue, "p", "q", deadline=clock.now + 5)
    asked, released, hopeless = submitted(queue, "r", "s", "t")
    (late,) = queue.claim("a", "cats", id=drawn_late)
    (held,) = queue.claim("a", "cats", id=released)
    for _ in range(2):
        queue.cancel(asked)
    queue.cancel(released)
    queue.release(held)
    clock.now += 5
    for _ in range(2):
        queue.expire()
    assert not queue.canceled(late), "else its holder would count it again"
    for _ in range(MOST_ATTEMPTS):
        assert queue.claim("a", "cats", id=hopeless)
        clock.now += LEASE + 1
    queue.expire()
    counted = [outcome for name, value, outcome in told if name == "raysd_requests_total"]
    assert (sorted(counted[:4]), counted[4:]) == (["aborted", "canceled", "canceled", "canceled"], ["failed"])
    assert (queue.get(waits).status, queue.get(drawn_late).status) == ("aborted", "canceled")
    assert [value for name, value, _ in told if name == "raysd_request_duration_seconds"][2:4] == [5, 5]


ENDS = {
    "finished": lambda queue, claim: queue.finish(claim, [PICTURE], {}),
    "without pictures": lambda queue, claim: queue.finish(claim, [], {}),
    "failed": lambda queue, claim: queue.fail(claim, "no"),
    "canceled": lambda queue, claim: queue.canceled(claim),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_withheld_prompt_is_gone_when_it_ends(queue, database, how):
    prediction, _ = queue.submit(new("Q9-prompt", negative="Q9-negative", withhold=True, idempotency_key="Q9-key"))
    (claim,) = queue.claim("a", "cats")
    assert claim.prediction.drawing["prompt"] == "Q9-prompt"
    ENDS[how](queue, claim)
    assert "Q9" not in everything(database)
    found = queue.get(prediction.id)
    assert (found.drawing["prompt"], found.withhold) == ("", True)
    Drawing.model_validate(found.drawing)


def test_a_withheld_prompt_is_gone_when_it_is_cancelled_or_expires(queue, database, clock):
    first, _ = submitted(queue, "Q9", "Q9", withhold=True, deadline=clock.now + 1)
    queue.cancel(first)
    clock.now += 2
    queue.expire()
    assert "Q9" not in everything(database)


def test_the_prompt_of_what_failed_stays_if_it_may(queue):
    (id,) = submitted(queue, "a cat")
    (claim,) = queue.claim("a", "cats")
    queue.fail(claim, "no")
    assert queue.get(id).drawing["prompt"] == "a cat"


# Answers that are lost


def lost(queue, database, call):
    """What `call` answers when its first answer was lost, after it was done."""
    database.lose = True
    answer = call()
    assert database.lose is False
    return answer


def test_a_lost_answer_to_a_submission_submits_once(queue, database):
    plain, keyed = new("p"), new("q", idempotency_key="k")
    for request in (plain, keyed):
        prediction, is_new = lost(queue, database, lambda request=request: queue.submit(request))
        assert (is_new, queue.get(prediction.id)) == (True, prediction)
    assert len(all_rows(database, PredictionRow)) == 2


def test_a_lost_answer_to_a_claim_claims_once(queue, database):
    ids = submitted(queue, "p", "q", "r")
    claims = lost(queue, database, lambda: queue.claim("a", "cats", most=2))
    assert len(claims) == 2
    assert all(claim.prediction.attempt == 1 for claim in claims)
    assert queue.waiting("cats") == 1
    assert queue.renew(claims) == {claim.id for claim in claims} < set(ids)


@pytest.mark.parametrize("how", ["finished", "failed", "canceled"])
def test_a_lost_answer_to_an_end_ends_once(queue, database, how):
    submitted(queue, "p")
    (claim,) = queue.claim("a", "cats")
    assert lost(queue, database, lambda: ENDS[how](queue, claim)) is True
    assert len(all_rows(database, GenerationRow)) == (how == "finished")


def test_a_lost_answer_to_giving_back_gives_back_once(queue, database):
    (id,) = submitted(queue, "p")
    (claim,) = queue.claim("a", "cats")
    lost(queue, database, lambda: queue.release(claim))
    assert (queue.get(id).status, queue.get(id).attempt) == ("starting", 0)


def test_a_restart_of_postgres_loses_and_doubles_nothing(postgres, storage, monkeypatch):
    database = Forgetful(postgres.url(), storage)
    database.migrate()
    queue, count = Queue(database), 150
    retries, finished, ids = [], [], []
    middle = threading.Event()
    judge = patience.passing
    monkeypatch.setattr(patience, "PATIENCE", 120.0)  # for a busy machine
    monkeypatch.setattr(patience, "passing", lambda error: retries.append(error) or judge(error))

    def submit(first):
        for number in range(first, count, 3):
            ids.append(queue.submit(new(f"p{number}", idempotency_key=str(number)))[0].id)

    def work(name):
        while len(finished) < count:
            for claim in queue.claim(name, "cats", most=2):
                if queue.finish(claim, pictures(storage, claim), {}):
                    finished.append(claim.id)
            if len(finished) > count / 3:
                middle.set()

    with ThreadPoolExecutor(7) as pool:
        jobs = [pool.submit(submit, first) for first in range(3)] + [pool.submit(work, name) for name in "abcd"]
        try:
            assert middle.wait(60)
            postgres.stop()
        finally:
            postgres.start()
        for job in jobs:
            job.result(120)
    assert retries, "nobody noticed"
    assert len(ids) == len(set(ids)) == count
    assert sorted(finished) == sorted(ids)
    assert {row.status for row in all_rows(database, PredictionRow)} == {"succeeded"}
    assert sorted(row.prediction_id for row in all_rows(database, GenerationRow)) == sorted(ids)
    assert len(all_rows(database, PredictionRow)) == count
    database.close()


def test_only_a_database_that_may_come_back_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(patience.time, "sleep", lambda _: pytest.fail("waited"))
    (tmp_path / "raysd.db").write_bytes(b"no database, but long enough to be read as a header " * 20)
    queue = Queue(Forgetful(f"sqlite:///{tmp_path}/raysd.db", Storage(str(tmp_path))))
    with pytest.raises(StorageError, match="not a database"):
        queue.get("x")


def test_patience_ends(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(patience.time, "sleep", waits.append)
    monkeypatch.setattr(patience.time, "monotonic", lambda: sum(waits))
    queue = Queue(Forgetful("postgresql://u@127.0.0.1:1/x", Storage(str(tmp_path))))
    with pytest.raises(StorageError, match="RAYSD_DATABASE"):
        queue.get("x")
    assert 25 < sum(waits) <= patience.PATIENCE
    assert waits[0] < 0.1
    assert 0.5 <= max(waits) <= 1.5


# Limits


@pytest.fixture
def limited(database):
    return lambda **limits: Keys(database).create("anna", ["generate"], Limits(**limits))[0].id


def test_requests_a_minute_slide(queue, clock, limited):
    key = limited(requests_per_minute=2)
    submitted(queue, "p", owner=key, idempotency_key="k")
    clock.now += 40
    submitted(queue, "p", owner=key)
    with pytest.raises(TooMany, match="requests: this key may make 2 a minute") as caught:
        queue.submit(new(owner=key))
    assert caught.value.retry_after == pytest.approx(20)
    assert queue.submit(new("p", owner=key, idempotency_key="k"))[1] is False, "what was accepted is answered"
    queue.submit(new(owner=key, shadow_of="x"))
    queue.submit(new(owner="another"))
    clock.now += 20
    submitted(queue, "p", owner=key)
    with pytest.raises(TooMany):
        queue.submit(new(owner=key))


def test_what_draws_nothing_counts_as_a_request(queue, clock, limited):
    key, free = limited(requests_per_minute=3), limited(pictures_per_day=1)
    submitted(queue, "p", owner=key)
    clock.now += 20
    for _ in range(2):
        queue.admit(key)
    for call in (lambda: queue.admit(key), lambda: queue.submit(new(owner=key)), lambda: queue.hold(key)):
        with pytest.raises(TooMany, match="requests: this key may make 3 a minute") as caught:
            call()
        assert caught.value.retry_after == pytest.approx(40)
    clock.now += 40
    queue.hold(key)
    queue.admit(key)
    with pytest.raises(TooMany) as caught:
        queue.admit(key)
    assert caught.value.retry_after == pytest.approx(20)
    for _ in range(9):
        queue.admit(free)
        queue.admit("no key")
        queue.hold(free)
    submitted(queue, "p", owner=free)
    with pytest.raises(TooMany, match="pictures"):
        queue.hold(free)


def test_a_lost_answer_counts_once(queue, database, limited):
    key = limited(requests_per_minute=2)
    lost(queue, database, lambda: queue.admit(key) or True)
    queue.admit(key)
    with pytest.raises(TooMany):
        queue.admit(key)


def test_pictures_a_day_are_counted(queue, clock, limited):
    key = limited(pictures_per_day=5)
    for id in submitted(queue, "p", "q", owner=key, count=2):
        queue.cancel(id)
    with pytest.raises(TooMany, match="pictures: this key may ask for 5 in 24 hours and did for 4") as caught:
        queue.submit(new(owner=key, count=2))
    assert caught.value.retry_after == pytest.approx(86400)
    submitted(queue, "r", owner=key)
    clock.now += 86400
    submitted(queue, "s", owner=key, count=5)


@pytest.mark.parametrize(
    ("limit", "more", "message"),
    [
        (
            {"pictures_per_day": 5},
            {"count": 6},
            "pictures in 24 hours: this key may have 5, and this asks for 6 at once",
        ),
        ({"in_flight": 1}, {}, "requests in flight: this key may have 1, and this asks for 2 at once"),
        ({"requests_per_minute": 1}, {}, "requests a minute: this key may have 1, and this asks for 2 at once"),
    ],
)
def test_what_a_limit_will_never_allow_is_not_to_be_tried_again(queue, limited, limit, more, message):
    key = limited(**limit)
    call = (lambda: queue.submit(new(owner=key, **more))) if more else (lambda: queue.hold(key, 2))
    with pytest.raises(RequestError, match=message):
        call()


def test_several_are_held_together(queue, limited):
    key = limited(in_flight=2, pictures_per_day=3)
    queue.hold(key, 2)
    (first,) = submitted(queue, "p", owner=key)
    with pytest.raises(TooMany, match="in flight"):
        queue.hold(key, 2)
    queue.cancel(first)
    queue.hold(key, 2)
    (second,) = submitted(queue, "q", owner=key)
    queue.cancel(second)
    with pytest.raises(TooMany, match="pictures"):
        queue.hold(key, 2)


def test_many_at_once_pass_no_limit(queue, limited):
    key = limited(in_flight=3)
    start = threading.Barrier(8)

    def submit(_):
        start.wait()
        try:
            return queue.submit(new(owner=key))[0].id
        except TooMany:
            return None

    with ThreadPoolExecutor(8) as pool:
        accepted = [id for id in pool.map(submit, range(8)) if id]
    assert len(accepted) == queue.in_flight(key) == 3
    queue.cancel(accepted[0])
    submitted(queue, "p", owner=key)


# Values


def test_predictions_are_plain_values(queue, storage, database):
    drawn(queue, storage, new(comparison="c"))
    (found,) = queue.find(None, None, 1)
    assert json.loads(json.dumps(asdict(found)))["pictures"][0]["number"] == 0
    assert (found.blind, found.comparison) == (True, "c")
    assert queue.one_node == database.name.endswith(".db")
