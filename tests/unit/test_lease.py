"""One holder at a time, whatever dies, hangs or sleeps."""

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from raysd import lease as module
from raysd.errors import IntegrityError, LeaseHeld, LeaseLost, StorageError
from raysd.lease import Lease, check_fence, holder
from raysd.storage import Storage

PATH = "runs/x/lease.json"


class Faulty(Storage):
    """A store whose conditional writes can be made to fail, to hang, or to lose their answer."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.failing = threading.Event()
        self.deaf = threading.Event()
        self.hanging: threading.Event | None = None

    def patient(self, deadline: float) -> "Faulty":
        return self

    def swap(self, path: str, data: bytes, tag: str | None) -> str:
        if self.hanging is not None:
            self.hanging.wait(60)
        if self.failing.is_set():
            raise StorageError("cut off")
        new = super().swap(path, data, tag)
        if self.deaf.is_set():
            raise StorageError("no answer")
        return new


@pytest.fixture
def store(tmp_path: Path) -> Faulty:
    return Faulty(str(tmp_path))


def edit(store: Storage, **changes: Any) -> None:
    store.write(PATH, json.dumps(json.loads(store.read(PATH)) | changes).encode())


def age(store: Storage, seconds: float) -> None:
    local = store.local_path(PATH)
    assert local is not None
    os.utime(local, (time.time() - seconds,) * 2)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes what follows happen on another machine."""

    def go(machine: str = "elsewhere") -> None:
        monkeypatch.setattr(module, "_machine", lambda: machine)

    return go


def test_the_second_is_refused_with_name_and_remedy(store: Faulty) -> None:
    with Lease.acquire(store, PATH) as lease:
        with pytest.raises(LeaseHeld, match=rf"held by \S+, process {os.getpid()}, renewed 0 s ago: stop that process"):
            Lease.acquire(store, PATH)
        assert lease.token == 1
        found = holder(store, PATH)
        assert found is not None
        assert (found.pid, found.token, found.alive) == (os.getpid(), 1, True)
        assert abs(found.renewed - time.time()) < 60


def test_release_lets_the_next_one_in_and_the_token_grows(store: Faulty) -> None:
    assert holder(store, PATH) is None
    for token in (1, 2, 3):
        with Lease.acquire(store, PATH) as lease:
            assert lease.token == token
            check_fence(store, PATH, token, lease.nonce)
        assert holder(store, PATH) is None
        with pytest.raises(LeaseLost, match="was released"):
            check_fence(store, PATH, token, lease.nonce)
        with pytest.raises(LeaseLost, match="was released"):
            lease.renew()


def test_one_of_many_wins(store_url: str) -> None:
    store, count = Storage(store_url), 8
    store.require_swap()
    start = threading.Barrier(count)

    def acquire(_: int) -> Lease | None:
        start.wait()
        try:
            return Lease.acquire(store, PATH)
        except LeaseHeld:
            return None

    for token in (1, 2, 3):
        with ThreadPoolExecutor(count) as pool:
            held = [lease for lease in pool.map(acquire, range(count)) if lease is not None]
        assert [lease.token for lease in held] == [token]
        held[0].renew()
        held[0].release()


def test_another_thread_that_is_quicker_than_the_answer_is_refused(
    store: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Storage.swap

    def answer_late(self: Storage, path: str, data: bytes, tag: str | None) -> str:
        new = real(self, path, data, tag)
        with pytest.raises(LeaseHeld):
            Lease.acquire(Storage(store.url), PATH)
        return new

    monkeypatch.setattr(Storage, "swap", answer_late)
    assert Lease.acquire(store, PATH).token == 1


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_holder_is_succeeded_at_once(store: Faulty, reaped: bool) -> None:
    script = f"""
        import time
        from raysd.lease import Lease
        from raysd.storage import Storage
        lease = Lease.acquire(Storage({store.url!r}), {PATH!r})
        lease.start(print)
        print("held", flush=True)
        time.sleep(60)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    with pytest.raises(LeaseHeld, match=f"process {child.pid}"):
        Lease.acquire(store, PATH)
    child.kill()
    if reaped:
        child.wait()
    else:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    found = holder(store, PATH)
    assert found is not None
    assert not found.alive
    with Lease.acquire(store, PATH) as lease:
        assert lease.token == 2
    child.wait()


def test_a_pid_that_another_process_has_now_is_nobody(store: Faulty) -> None:
    Lease.acquire(store, PATH)
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    edit(store, pid=other.pid)
    with Lease.acquire(store, PATH) as lease:
        assert lease.token == 2
    other.kill()
    other.wait()


def test_a_living_process_of_this_machine_holds_it_however_long_it_slept(store: Faulty) -> None:
    Lease.acquire(store, PATH)
    age(store, 1e6)
    with pytest.raises(LeaseHeld):
        Lease.acquire(store, PATH)


def test_another_machines_lease_ends_by_the_stores_clock_alone(store: Faulty, elsewhere: Any) -> None:
    Lease.acquire(store, PATH, ttl=30)
    elsewhere()
    for written in (0.0, 4e9):  # a holder whose clock is decades off is neither dead nor eternal
        edit(store, renewed=written)
        with pytest.raises(LeaseHeld, match=r"\(free 30 s after its last renewal if it died\)"):
            Lease.acquire(store, PATH)
        found = holder(store, PATH)
        assert found is not None
        assert found.alive
    age(store, 31)
    with pytest.raises(LeaseHeld):  # stores give whole seconds
        Lease.acquire(store, PATH)
    age(store, 33)
    assert Lease.acquire(store, PATH).token == 2


def test_a_lease_is_kept_while_its_holder_renews_it(store: Faulty, elsewhere: Any) -> None:
    lease, lost = Lease.acquire(store, PATH, ttl=6), threading.Event()
    lease.start(lambda reason: lost.set())
    elsewhere()
    for _ in range(2):
        age(store, 1000)
        before = json.loads(store.read(PATH))["renewals"]
        while json.loads(store.read(PATH))["renewals"] <= before:
            time.sleep(0.02)
        with pytest.raises(LeaseHeld):
            Lease.acquire(store, PATH)
    lease.renew()
    lease.release()
    assert not lost.is_set()


def test_a_holder_that_is_cut_off_stops_before_another_may_start(store: Faulty, elsewhere: Any) -> None:
    events: list[str] = []
    lease = Lease.acquire(store, PATH, ttl=1.5)
    lease.start(lambda reason: events.append(reason))
    elsewhere()
    store.failing.set()
    other = Storage(store.url)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            successor = Lease.acquire(other, PATH, ttl=1.5)
            events.append("successor")
            break
        except LeaseHeld:
            time.sleep(0.01)
    assert [event.partition(": ")[2][:30] or event for event in events] == [
        "the lease could not be renewed",
        "successor",
    ]
    assert "(cut off), another may take it" in events[0]
    store.failing.clear()
    with pytest.raises(LeaseLost):
        lease.renew()
    with pytest.raises(LeaseLost, match="went to"):
        check_fence(other, PATH, lease.token, lease.nonce)
    check_fence(other, PATH, successor.token, successor.nonce)
    lease.release()
    check_fence(other, PATH, successor.token, successor.nonce)


def test_a_holder_whose_store_hangs_is_told(store: Faulty) -> None:
    lease, lost = Lease.acquire(store, PATH, ttl=0.6), threading.Event()
    store.hanging = threading.Event()
    lease.start(lambda reason: lost.set())
    assert lost.wait(60)
    with pytest.raises(LeaseLost):
        lease.check()
    store.hanging.set()


def test_it_counts_from_the_start_of_a_renewal(store: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    """A renewal that takes long was asked for long ago: another host may count from nearly then."""
    now = 100.0
    monkeypatch.setattr(module, "clock", lambda: now)
    lease = Lease.acquire(store, PATH, ttl=30)
    real = Storage.swap

    def slow(self: Storage, path: str, data: bytes, tag: str | None) -> str:
        nonlocal now
        now += 19
        return real(self, path, data, tag)

    monkeypatch.setattr(Faulty, "swap", slow)
    lease.renew()
    now += 0.9
    lease.check()
    now += 0.2
    with pytest.raises(LeaseLost, match="in time"):
        lease.check()


def test_the_old_holder_learns_who_took_it(store: Faulty) -> None:
    reasons: list[str] = []
    told = threading.Event()
    lease = Lease.acquire(store, PATH, ttl=0.6)
    edit(store, token=2, nonce="other", host="otherhost", pid=77)
    lease.start(lambda reason: (reasons.append(reason), told.set())[0])
    assert told.wait(60)
    time.sleep(0.3)
    assert reasons == [f"{PATH}: the lease was taken by otherhost, process 77"]
    with pytest.raises(LeaseLost, match="went to otherhost, process 77"):
        check_fence(store, PATH, 1, lease.nonce)
    lease.release()
    assert json.loads(store.read(PATH))["released"] is False


def test_a_renewal_whose_answer_was_lost_is_no_loss(store: Faulty) -> None:
    lease = Lease.acquire(store, PATH)
    store.deaf.set()
    with pytest.raises(StorageError):
        lease.renew()
    store.deaf.clear()
    lease.renew()
    lease.renew()
    check_fence(store, PATH, lease.token, lease.nonce)
    lease.release()


def test_a_deleted_lease_is_lost(store: Faulty) -> None:
    lease = Lease.acquire(store, PATH)
    store.delete_tree("runs/x")
    with pytest.raises(LeaseLost, match="is gone"):
        check_fence(store, PATH, lease.token, lease.nonce)
    with pytest.raises(LeaseLost, match="was deleted"):
        lease.renew()


def test_a_token_of_a_lease_that_was_deleted_is_no_ticket_for_the_next_one(store: Faulty) -> None:
    frozen = Lease.acquire(store, PATH)
    store.delete_tree("runs/x")
    with Lease.acquire(store, PATH) as lease:
        assert lease.token == frozen.token
        check_fence(store, PATH, lease.token, lease.nonce)
        with pytest.raises(LeaseLost, match="went to"):
            check_fence(store, PATH, frozen.token, frozen.nonce)


def test_a_process_that_lost_its_lease_may_take_it_again(store: Faulty) -> None:
    lease, lost = Lease.acquire(store, PATH, ttl=0.3), threading.Event()
    store.failing.set()
    lease.start(lambda reason: lost.set())
    assert lost.wait(60)
    store.failing.clear()
    assert Lease.acquire(store, PATH).token == 2


def test_what_is_no_lease_is_named(store: Faulty) -> None:
    store.write(PATH, b"{}")
    with pytest.raises(IntegrityError, match=r"lease\.json: not a lease"):
        Lease.acquire(store, PATH)


def test_a_store_without_swap_is_refused() -> None:
    with pytest.raises(StorageError, match="no compare-and-swap"):
        Lease.acquire(Storage("memory://lease"), PATH)
