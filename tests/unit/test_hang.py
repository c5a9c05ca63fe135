"""A worker that gets no further tells where it is and ends; one that goes on does not."""

import threading
import time

from raysd.train.hang import EXIT, HangWatch


def stuck_here(until: threading.Event) -> None:
    until.wait(30)


def test_a_hang_is_told_with_the_stacks_and_ends_the_process() -> None:
    told: list[str] = []
    ended = threading.Event()
    statuses: list[int] = []

    def end(status: int) -> None:
        statuses.append(status)
        ended.set()

    worker = threading.Thread(target=stuck_here, args=(ended,))
    worker.start()
    began = time.monotonic()
    watch = HangWatch(0.5, told.append, end)
    assert ended.wait(20)
    assert time.monotonic() - began >= 0.5
    assert statuses == [EXIT]
    assert "in stuck_here" in told[0]
    worker.join()
    watch.close()


def test_a_store_that_hangs_does_not_keep_it_from_its_end() -> None:
    ended, never = threading.Event(), threading.Event()
    HangWatch(0.2, lambda stacks: never.wait(30) and None, lambda status: ended.set())
    assert ended.wait(10)
    never.set()


def test_one_that_goes_on_or_is_done_is_left_alone() -> None:
    statuses: list[int] = []
    watch = HangWatch(1.0, lambda stacks: None, statuses.append)
    for _ in range(20):
        watch.beat()
        time.sleep(0.1)
    watch.close()
    time.sleep(1.5)
    assert statuses == []
