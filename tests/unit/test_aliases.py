"""Aliases move atomically, keep their history, and never point at what was withdrawn."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from raysd.errors import IntegrityError, NotFound, RequestError, Stale
from raysd.registry import Registry, Version
from raysd.storage import Storage


def test_an_alias_moves_and_keeps_its_history(registry: Registry, put: Any) -> None:
    one, two = put(1), put(2)
    assert registry.alias(one, "production").previous is None
    moved = registry.alias(two, "production")
    assert (moved.seq, moved.version, moved.previous, moved.digest) == (2, 2, 1, two.digest)
    assert registry.alias(two, "production") == moved
    assert registry.resolve("cats:production") == two
    assert registry.models()[0].aliases == {"production": 2}
    assert [move.version for move in registry.history("cats", "production")] == [1, 2]
    with pytest.raises(RequestError, match="alias 'Prod'"):
        registry.alias(one, "Prod")
    with pytest.raises(IntegrityError):
        registry.alias(replace(one, digest="0" * 64), "production")


def test_rollback_goes_back_step_by_step(registry: Registry, put: Any) -> None:
    for seed in (1, 2, 3):
        registry.alias(put(seed), "production")
    assert [registry.rollback("cats", "production").version for _ in range(2)] == [2, 1]
    with pytest.raises(RequestError, match="cats@1 is its first version"):
        registry.rollback("cats", "production")
    registry.alias(registry.resolve("cats@3"), "production")
    assert registry.rollback("cats", "production").version == 1
    history = registry.history("cats", "production")
    assert [(move.seq, move.kind, move.version, move.previous) for move in history] == [
        (1, "move", 1, None),
        (2, "move", 2, 1),
        (3, "move", 3, 2),
        (4, "rollback", 2, 3),
        (5, "rollback", 1, 2),
        (6, "move", 3, 1),
        (7, "rollback", 1, 3),
    ]
    with pytest.raises(NotFound, match="no such alias"):
        registry.rollback("cats", "beta")


def test_a_stale_alias_move_is_refused(registry: Registry, put: Any) -> None:
    one, two = put(1), put(2)
    registry.alias(one, "production", expect=0)
    with pytest.raises(Stale, match="cats:production: is at move 1, not 0"):
        registry.alias(two, "production", expect=0)
    registry.alias(two, "production", expect=1)
    assert [move.version for move in registry.history("cats", "production")] == [1, 2]


def test_of_racing_moves_with_one_expectation_one_wins(registry: Registry, put: Any) -> None:
    versions = [put(seed) for seed in range(1, 7)]
    start = threading.Barrier(6)

    def move(version: Version) -> bool:
        start.wait()
        try:
            registry.alias(version, "production", expect=0)
        except Stale:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        won = [version for version, winner in zip(versions, pool.map(move, versions), strict=True) if winner]
    assert [registry.resolve("cats:production")] == won


def test_racing_moves_and_rollbacks_leave_a_history_that_adds_up(registry: Registry, put: Any) -> None:
    versions = [put(seed) for seed in range(1, 5)]
    registry.alias(versions[0], "production")

    def move(version: Version) -> None:
        for _ in range(5):
            registry.alias(version, "production")
            try:
                registry.rollback("cats", "production")
            except (Stale, RequestError):
                continue

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(move, versions))
    history = registry.history("cats", "production")
    assert [move.seq for move in history] == list(range(1, len(history) + 1))
    assert all(after.previous == before.version for before, after in itertools.pairwise(history))
    assert registry.resolve("cats:production").number == history[-1].version


def test_a_withdrawn_version_is_out_of_use(registry: Registry, put: Any) -> None:
    one, two = put(1), put(2)
    registry.alias(two, "production")
    with pytest.raises(RequestError, match="cats@2: cats:production points at it: move or roll back"):
        registry.withdraw(two)
    registry.alias(one, "production")
    registry.withdraw(two, "draws dogs")
    registry.withdraw(two)
    with pytest.raises(RequestError, match=r"cats@2 was withdrawn \(draws dogs\)"):
        registry.resolve("cats@2")
    assert registry.resolve("cats@2", withdrawn_ok=True).withdrawn
    assert registry.resolve("cats") == one
    with pytest.raises(RequestError, match="cats@2: was withdrawn"):
        registry.alias(two, "production")
    assert registry.models()[0].withdrawn == [2]
    three = put(3)
    for version in (three, one):
        registry.alias(version, "beta")
    registry.withdraw(three)
    with pytest.raises(RequestError, match="cats@3: was withdrawn"):
        registry.rollback("cats", "beta")


def test_an_alias_never_stays_on_a_version_that_is_withdrawn_meanwhile(
    registry: Registry, put: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = put(1), put(2)
    registry.alias(one, "production")
    real = Storage.swap

    def withdraw_first(self: Storage, path: str, data: bytes, tag: str | None) -> str:
        monkeypatch.setattr(Storage, "swap", real)
        registry.withdraw(two)
        return self.swap(path, data, tag)

    monkeypatch.setattr(Storage, "swap", withdraw_first)
    with pytest.raises(RequestError, match="was withdrawn"):
        registry.alias(two, "production")
    assert registry.resolve("cats:production") == one
