"""Splits of traffic: shares are what they say, users stay where they are, and a change is one step for all."""

from collections import Counter
from collections.abc import Callable

import pytest

from raysd.errors import NotFound, RequestError, Stale
from raysd.registry import Registry, Version, traffic
from raysd.registry.traffic import Traffic
from raysd.storage import Storage
from tests.cluster import raysd

USERS = [f"user{number}" for number in range(20_000)]


def test_ten_percent_are_ten_percent() -> None:
    split = Traffic({8: 10.0, 9: 25.0})
    counts = Counter(split.version(user) for user in USERS)
    for number, share in ((8, 0.10), (9, 0.25), (None, 0.65)):
        deviation = (share * (1 - share) / len(USERS)) ** 0.5
        assert abs(counts[number] / len(USERS) - share) < 4 * deviation


def test_a_user_stays_and_a_growing_canary_keeps_its_users() -> None:
    small, large = Traffic({8: 10.0}), Traffic({8: 40.0})
    had = {user for user in USERS if small.version(user) == 8}
    assert had == {user for user in USERS if small.version(user) == 8}
    assert had < {user for user in USERS if large.version(user) == 8}


def test_shadows_are_drawn_beside_whoever_draws() -> None:
    split = Traffic({8: 50.0}, {9: 20.0})
    shadowed = [user for user in USERS if split.shadows(user) == [9]]
    assert len(shadowed) / len(USERS) == pytest.approx(0.2, abs=0.012)
    canary = sum(split.version(user) == 8 for user in shadowed) / len(shadowed)
    assert canary == pytest.approx(0.5, abs=0.04)  # one lot does not decide the other


def test_a_change_is_read_back_and_counted(registry: Registry, put: Callable[[int], Version]) -> None:
    put(1), put(2)
    assert traffic.read(registry.storage, "cats") == Traffic()
    traffic.change(registry.storage, "cats", {2: 10}, {1: 5})
    now = traffic.read(registry.storage, "cats")
    assert (now.shares, now.shadow, now.seq) == ({2: 10.0}, {1: 5.0}, 1)
    traffic.change(registry.storage, "cats", {}, {})
    assert traffic.read(registry.storage, "cats").seq == 2
    assert not traffic.read(registry.storage, "cats").shares
    assert [model.name for model in registry.models()] == ["cats"]


@pytest.mark.parametrize("share", [40, 100])
def test_where_nothing_is_left_to_the_alias_that_is_said(
    registry: Registry, put: Callable[[int], Version], share: int
) -> None:
    put(1)
    done = raysd("traffic", "cats", f"v1={share}", storage=registry.storage.url)
    assert done.returncode == 0, done.stderr
    said = "an alias that moves changes nothing that is drawn, until raysd traffic cats --clear"
    assert (said in done.stderr) == (share == 100)


def test_wrong_shares_are_refused(registry: Registry, put: Callable[[int], Version]) -> None:
    version = put(1)
    for shares in ({1: 101.0}, {1: -1.0}, {1: float("nan")}):
        with pytest.raises(RequestError, match="percent"):
            traffic.change(registry.storage, "cats", shares, {})
    with pytest.raises(NotFound):
        traffic.change(registry.storage, "cats", {7: 10}, {})
    registry.withdraw(version)
    with pytest.raises(RequestError, match="withdrawn"):
        traffic.change(registry.storage, "cats", {1: 10}, {})


def test_of_two_changes_at_once_one_is_refused(
    registry: Registry, put: Callable[[int], Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(1)
    true = Storage.swap

    def late(storage: Storage, path: str, data: bytes, tag: str | None) -> str:
        monkeypatch.setattr(Storage, "swap", true)
        traffic.change(registry.storage, "cats", {1: 20}, {})
        return true(storage, path, data, tag)

    monkeypatch.setattr(Storage, "swap", late)
    with pytest.raises(Stale):
        traffic.change(registry.storage, "cats", {1: 10}, {})
    assert traffic.read(registry.storage, "cats").shares == {1: 20.0}
