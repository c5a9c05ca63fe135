"""API keys: made once, checked often, revoked for good."""

import json

import pytest

from raysd import cli
from raysd.cli import output
from raysd.errors import NotFound, RequestError
from raysd.serve.keys import KNOWN_FOR, UNKNOWN_FOR, Checker, Keys, Limits
from raysd.serve.tables import KeyRow
from tests.records import Clock


class Counted(Keys):
    """Counts how often the database is read."""

    reads = 0

    def live(self):
        self.reads += 1
        return super().live()


@pytest.fixture
def keys(database, clock):
    return Counted(database, clock=clock)


def test_a_key_is_made_found_and_checked(keys, clock, database):
    limits = Limits(requests_per_minute=60, in_flight=4)
    key, secret = keys.create("Anna's site", ["feedback", "generate"], limits)
    assert (key.owner, key.roles, key.limits) == ("Anna's site", ("generate", "feedback"), limits)
    assert (key.created, key.revoked) == (clock.now, None)
    assert secret.startswith("raysd_")
    assert len(secret) == len("raysd_") + 43, "256 bits"
    assert keys.list() == [key]
    assert Checker(keys).check(secret) == key
    with database.reading() as session:
        kept = str(vars(session.get(KeyRow, key.id)))
    assert secret not in kept
    assert secret.removeprefix("raysd_") not in kept


def test_other_secrets_are_nobodys(keys):
    _, secret = keys.create("anna", ["generate"])
    checker = Checker(keys)
    for wrong in ("", "raysd_", secret[:-1], secret + "A", secret.upper(), " " + secret, "é\ud800\0"):
        assert checker.check(wrong) is None
    assert checker.check(secret) is not None


def test_the_beginning_of_a_digest_is_not_enough(keys, monkeypatch):
    keys.create("anna", ["generate"])
    (digest,) = keys.live()
    monkeypatch.setattr("raysd.serve.keys._digest", lambda _: digest[:-1] + "x")
    assert Checker(keys).check("whatever") is None


def test_roles(keys):
    plain, _ = keys.create("anna", ["feedback"])
    admin, _ = keys.create("root", ["admin"])
    assert [plain.may(role) for role in ("generate", "feedback", "train", "admin")] == [False, True, False, False]
    assert all(admin.may(role) for role in ("generate", "feedback", "train", "admin"))


def test_a_revoked_key_is_refused_and_stays_in_the_list(keys, clock):
    key, secret = keys.create("anna", ["generate"])
    ticks = Clock(0.0)
    checker = Checker(keys, clock=ticks)
    assert checker.check(secret) == key
    clock.now += 1
    revoked = keys.revoke(key.id)
    assert revoked.revoked == clock.now
    clock.now += 1
    assert keys.revoke(key.id) == revoked, "again does nothing"
    ticks.now = KNOWN_FOR + 0.01
    assert checker.check(secret) is None
    assert keys.list() == [revoked]
    assert KNOWN_FOR <= 4, "promised: within five seconds"


@pytest.mark.parametrize("id", ["nothing", "a\0b"])
def test_an_unknown_key_cannot_be_revoked(keys, id):
    with pytest.raises(NotFound, match="raysd keys list shows them"):
        keys.revoke(id)


def test_checking_reads_seldom_and_sees_a_new_key_soon(keys):
    _, secret = keys.create("anna", ["generate"])
    ticks = Clock(0.0)
    checker = Checker(keys, clock=ticks)
    for _ in range(50):
        assert checker.check(secret)
        assert checker.check("raysd_wrong") is None
    assert keys.reads == 1
    _, second = keys.create("bert", ["generate"])
    assert checker.check(second) is None
    ticks.now += UNKNOWN_FOR + 0.01
    assert checker.check(second) is not None
    for _ in range(50):
        checker.check("raysd_wrong")
    assert keys.reads == 2, "wrong keys make it read no more"


@pytest.mark.parametrize(
    ("owner", "roles", "limits", "message"),
    [
        ("", ["generate"], Limits(), "owner: 1 to 100"),
        ("x" * 101, ["generate"], Limits(), "owner: 1 to 100"),
        ("a\nb", ["generate"], Limits(), "owner: 1 to 100"),
        ("anna", ["draw"], Limits(), "role draw: one or more of generate, feedback, train, admin"),
        ("anna", [], Limits(), "role missing"),
        ("anna", ["admin"], Limits(in_flight=0), "in_flight: 0: a number from 1"),
        ("anna", ["admin"], Limits(pictures_per_day=2**31), "pictures_per_day"),
    ],
)
def test_what_is_no_key_is_refused(keys, owner, roles, limits, message):
    with pytest.raises(RequestError, match=message):
        keys.create(owner, roles, limits)
    assert keys.list() == []


def test_a_lost_answer_to_a_creation_makes_one_key(keys, database):
    database.lose = True
    key, secret = keys.create("anna", ["generate"])
    assert keys.list() == [key]
    assert Checker(keys).check(secret) == key


def test_the_command_line_prints_a_key_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RAYSD_STORAGE", str(tmp_path))
    monkeypatch.delenv("RAYSD_DATABASE", raising=False)

    def run(*words):
        monkeypatch.setattr(output, "RESULT", output.sys.stdout)
        cli.app([*words, "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    made = run("keys", "create", "anna", "--role", "generate", "--role", "feedback", "--in-flight", "2")
    assert made["key"].startswith("raysd_")
    (listed,) = run("keys", "list")
    assert listed == {name: value for name, value in made.items() if name != "key"}
    assert (listed["owner"], listed["roles"], listed["in_flight"]) == ("anna", ["generate", "feedback"], 2)
    assert run("keys", "revoke", listed["id"])["revoked"] is not None
    with pytest.raises(RequestError, match="role draw"):
        run("keys", "create", "anna", "--role", "draw")
