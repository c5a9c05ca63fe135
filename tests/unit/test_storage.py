"""The promises of a store, on a local folder and on S3."""

import errno
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from raysd.errors import AlreadyExists, NotFound, RequestError, Stale, StorageError
from raysd.storage import Storage, digest, sha256_of
from raysd.storage.local import _lock
from raysd.storage.remote import S3


@pytest.fixture
def store(store_url: str) -> Storage:
    return Storage(store_url)


def test_an_object_is_read_as_it_was_written(store: Storage) -> None:
    store.write("a/b.json", b"one")
    store.write("a/b.json", b"two")
    assert store.read("a/b.json") == b"two"
    assert store.exists("a/b.json")
    assert not store.exists("a")
    assert store.size("a/b.json") == 3
    store.delete("a/b.json")
    store.delete("a/b.json")
    with pytest.raises(NotFound, match=r"a/b\.json"):
        store.read("a/b.json")
    for missing in (store.size, store.read_tagged, lambda path: store.read_ranges(path, [(0, 1)])):
        with pytest.raises(NotFound, match="gone"):
            missing("gone")


@pytest.mark.parametrize("inner", ["", "inner"])
def test_a_root_that_is_no_folder_is_refused_before_it_looks_empty(monkeypatch, tmp_path, inner):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("RAYSD_STORAGE", str(tmp_path / "file" / inner))
    with pytest.raises(RequestError, match=f"RAYSD_STORAGE {tmp_path}/file is not a folder"):
        Storage()
    (tmp_path / "file").unlink()
    assert Storage().list() == []


@pytest.mark.parametrize("root", ["file", "file/inner", "/proc/nope"])
def test_a_write_into_what_can_be_no_folder_names_the_folder(tmp_path, root):
    (tmp_path / "file").write_text("x")
    store = Storage(str(tmp_path / root))
    for work in (lambda: store.write("a", b"1"), lambda: store.create("a", b"1"), store.require_swap):
        with pytest.raises(StorageError, match=f"{root}: cannot be made a folder .*: set RAYSD_STORAGE"):
            work()


def test_create_refuses_what_exists_and_nothing_at_all(store: Storage) -> None:
    store.create("a", b"one")
    for again in (b"one", b"two"):
        with pytest.raises(AlreadyExists, match="/a: exists already"):
            store.create("a", again)
    assert store.read("a") == b"one"
    with pytest.raises(ValueError, match="at least one byte"):
        store.create("empty", b"")


def test_swap_takes_only_the_current_tag(store: Storage) -> None:
    first = store.swap("a", b"1", None)
    second = store.swap("a", b"2", first)
    assert store.read_tagged("a") == (b"2", second)
    for tag in (first, None):
        with pytest.raises(Stale, match="/a: was changed"):
            store.swap("a", b"3", tag)
    assert store.read("a") == b"2"
    store.delete("a")
    with pytest.raises(Stale):
        store.swap("a", b"3", second)
    with pytest.raises(Stale):
        store.swap("never/was", b"3", second)


def test_one_of_many_creators_wins(store: Storage) -> None:
    def create(name: int) -> bool:
        try:
            store.create("prize", f"{name}".encode())
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(12) as pool:
        won = [name for name, winner in enumerate(pool.map(create, range(12))) if winner]
    assert [store.read("prize")] == [f"{name}".encode() for name in won]


def _count(store: Storage, times: int) -> None:
    done = 0
    while done < times:
        data, tag = store.read_tagged("counter")
        try:
            store.swap("counter", str(int(data) + 1).encode(), tag)
            done += 1
        except Stale:
            continue


def _count_in_threads(store: Storage, times: int) -> None:
    with ThreadPoolExecutor(2) as pool:
        for running in [pool.submit(_count, store, times) for _ in range(2)]:
            running.result()


def test_no_swap_is_lost_between_threads_and_processes(store: Storage) -> None:
    times = 4 if store.url.startswith("s3") else 60
    store.create("counter", b"0")
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        for running in [pool.submit(_count_in_threads, store, times) for _ in range(3)]:
            running.result()
    assert store.read("counter") == str(3 * 2 * times).encode()


def test_a_forked_child_uses_the_store(store: Storage) -> None:
    store.create("counter", b"0")
    children = []
    for _ in range(2):
        if (pid := os.fork()) == 0:
            signal.alarm(30)
            try:
                _count(store, 3)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    assert store.read("counter") == b"6"


def test_a_pickled_store_opens_again(store: Storage) -> None:
    store.write("runs/x/a", b"1")
    again = pickle.loads(pickle.dumps(store.child("runs/x").patient(3)))  # noqa: S301
    assert again.read("a") == b"1"
    assert (again.url, again.deadline) == (f"{store.url}/runs/x", 3)


def test_listing_is_fresh_sorted_and_stays_in_its_folder(store: Storage) -> None:
    assert store.list() == []
    for path in ("models/b/2.json", "models/a/1.json", "models2/x", "top"):
        store.write(path, path.encode())
    assert [entry.path for entry in store.list()] == ["models/a/1.json", "models/b/2.json", "models2/x", "top"]
    assert [entry.path for entry in store.list("models")] == ["models/a/1.json", "models/b/2.json"]
    assert [entry.path for entry in store.list("models/")] == ["models/a/1.json", "models/b/2.json"]
    assert [entry.path for entry in store.list("models", recursive=False)] == ["models/a/", "models/b/"]
    assert [entry.path for entry in store.list(recursive=False)] == ["models/", "models2/", "top"]
    assert [entry.path for entry in store.child("models").list("a")] == ["a/1.json"]
    assert store.list("nothing") == store.list("top") == []
    assert store.list("nothing", recursive=False) == []
    [entry] = store.list("models2")
    assert entry.size == 9
    assert abs(store.now() - entry.modified) < 3600
    store.delete("models2/x")
    assert store.list("models2") == []


def test_the_stores_own_files_are_not_listed(store: Storage) -> None:
    store.require_swap()
    tag = store.swap("a/b", b"1", None)
    store.swap("a/b", b"2", tag)
    assert [entry.path for entry in store.list()] == ["a/b"]
    assert [entry.path for entry in store.list(recursive=False)] == ["a/"]


def test_delete_tree_takes_the_folder_and_nothing_beside_it(store: Storage) -> None:
    for path in ("runs/a/1", "runs/a/b/2", "runs/ab/1"):
        store.write(path, b"x")
    store.delete_tree("runs/a")
    store.delete_tree("runs/a")
    assert [entry.path for entry in store.list()] == ["runs/ab/1"]


def test_ranges(store: Storage) -> None:
    store.write("shard", b"0123456789")
    assert store.read_ranges("shard", [(8, 10), (0, 1), (3, 7)]) == [b"89", b"0", b"3456"]
    with pytest.raises(StorageError, match="no bytes 5 to 11"):
        store.read_ranges("shard", [(5, 11)])
    with pytest.raises(ValueError, match="empty or negative"):
        store.read_ranges("shard", [(3, 3)])


def test_files_go_up_and_down(store: Storage, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    source.write_bytes(os.urandom(3 << 20))
    store.upload(source, "blobs/x")
    store.download("blobs/x", target)
    assert sha256_of(target) == sha256_of(source) == digest(store.read("blobs/x"))
    with pytest.raises(NotFound, match="no-file"):
        store.upload(tmp_path / "no-file", "blobs/y")
    with pytest.raises(NotFound, match="blobs/y"):
        store.download("blobs/y", tmp_path / "y")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file() and "store" not in path.parts) == [
        "source",
        "target",
    ]


def test_a_file_in_many_parts(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda *args, **kwargs: 5 << 20)
    store, source = Storage(s3), tmp_path / "source"
    source.write_bytes(os.urandom(16 << 20))
    store.upload(source, "big")
    store.download("big", tmp_path / "target")
    assert sha256_of(tmp_path / "target") == sha256_of(source)


def test_a_torn_upload_is_swept(s3: str) -> None:
    store = Storage(s3)
    fs: Any = store._backend.fs  # type: ignore[attr-defined]
    bucket, key = s3.removeprefix("s3://").split("/")
    for name in (f"{key}/blobs/torn", "elsewhere/torn"):
        fs.call_s3("create_multipart_upload", Bucket=bucket, Key=name)
    assert store.sweep(100 * 365 * 86400) == 0
    assert store.sweep(3600) == 1  # the server says 2010 of all of them
    assert [part["Key"] for part in fs.list_multipart_uploads(bucket)] == ["elsewhere/torn"]


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "a/../b", "../b", "a//b", "./a", "a\\b", "a/", ".raysd-lock", "a\0"]
)
def test_a_path_stays_under_the_root(tmp_path: Path, path: str) -> None:
    store = Storage(str(tmp_path))
    for use in (store.read, store.delete, store.delete_tree, store.child, lambda path: store.write(path, b"x")):
        if path == "a/" and use == store.delete_tree:
            continue
        with pytest.raises(RequestError, match="not a path in a store"):
            use(path)


def test_the_root_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSD_STORAGE", str(tmp_path / "there"))
    assert Storage().url == str(tmp_path / "there")
    monkeypatch.delenv("RAYSD_STORAGE")
    monkeypatch.chdir(tmp_path)
    store = Storage()
    assert store.url == str(tmp_path / ".raysd")
    assert store.list() == []
    assert not (tmp_path / ".raysd").exists()
    store.write("a/b", b"x")
    assert store.local_path("a/b") == tmp_path / ".raysd" / "a" / "b"
    assert Storage(f"file://{tmp_path}/.raysd").read("a/b") == b"x"


class Failing:
    """Makes a backend's method fail a few times, before or after it did its work."""

    def __init__(self, store: Storage, name: str, errors: list[Exception], after: bool = False) -> None:
        self.real, self.errors, self.after = getattr(store._backend, name), errors, after
        setattr(store._backend, name, self)

    def __call__(self, *args: Any) -> Any:
        result = self.real(*args) if self.after or not self.errors else None
        if self.errors:
            raise self.errors.pop(0)
        return result


def refusal(status: int, code: str) -> OSError:
    """What s3fs raises for an answer of S3."""
    answer = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error = OSError(errno.EIO, code)
    error.__cause__ = ClientError(answer, "PutObject")
    return error


def test_a_passing_failure_is_tried_again(store: Storage) -> None:
    store.write("a", b"1")
    passing = [ConnectionResetError("reset"), refusal(503, "SlowDown"), refusal(500, "InternalError"), TimeoutError()]
    Failing(store, "read", passing)
    assert store.read("a") == b"1"
    assert passing == []


def test_a_lasting_failure_ends_at_the_deadline(store: Storage) -> None:
    Failing(store, "read", [ConnectionResetError("reset")] * 1000)
    with pytest.raises(StorageError, match=r"/a: cannot reach .*: check AWS_ENDPOINT_URL and the network \(reset\)"):
        store.patient(0.3)._run("a", lambda: store._backend.read("a"))


def test_an_answer_that_was_lost_is_looked_up(store: Storage) -> None:
    Failing(store, "put_new", [ConnectionResetError("reset")], after=True)
    store.create("a", b"mine")
    tag = store.read_tagged("a")[1]
    Failing(store, "put_if", [ConnectionResetError("reset")], after=True)
    tag = store.swap("a", b"mine again", tag)
    assert store.read_tagged("a") == (b"mine again", tag)


def test_a_lost_answer_does_not_make_anothers_write_ours(store: Storage) -> None:
    store.create("a", b"theirs")
    Failing(store, "put_new", [ConnectionResetError("reset")])
    with pytest.raises(AlreadyExists):
        store.create("a", b"mine")
    Failing(store, "put_if", [ConnectionResetError("reset")])
    with pytest.raises(Stale):
        store.swap("a", b"mine", "0" * 64)
    assert store.read("a") == b"theirs"


def test_a_conflict_is_tried_again(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, conflicts = Storage(s3), [refusal(409, "ConditionalRequestConflict"), refusal(409, "OperationAborted")]
    fs: Any = store._backend.fs  # type: ignore[attr-defined]
    real = fs.call_s3

    def call(method: str, **given: Any) -> Any:
        if method == "put_object" and conflicts:
            raise conflicts.pop(0)
        return real(method, **given)

    monkeypatch.setattr(fs, "call_s3", call)
    tag = store.swap("a", b"1", None)
    conflicts.append(refusal(409, "ConditionalRequestConflict"))
    store.swap("a", b"2", tag)
    assert store.read("a") == b"2"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "x"), "/a: no space left on .*: free some or set RAYSD_STORAGE"),
        (OSError(errno.EDQUOT, "x"), "/a: no space left on .*: free some or set RAYSD_STORAGE"),
        (PermissionError(errno.EACCES, "x"), "/a: access to .* was denied: check"),
        (OSError(errno.EROFS, "x"), "/a: access to .* was denied: check"),
        (refusal(403, "AccessDenied"), "/a: access to .* was denied: check"),
        (refusal(404, "NoSuchBucket"), "no such bucket: create it or set RAYSD_STORAGE"),
        (OSError(errno.EIO, "broken disk"), "/a: .* failed: .*broken disk"),
    ],
)
def test_failures_say_what_and_why_and_what_to_do(store: Storage, error: Exception, message: str) -> None:
    Failing(store, "put", [error])
    with pytest.raises(StorageError, match=message):
        store.write("a", b"1")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Storage(str(tmp_path))
    store.write("a", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "x")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="no space left"):
        store.write("a", b"new")
    assert store.read("a") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_store_that_is_not_there(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="cannot reach s3://"):
        Storage(s3, deadline=0.5).read("a")


def test_a_bucket_that_is_not_there(s3: str) -> None:
    store = Storage("s3://no-such-bucket/root")
    for use in (lambda: store.read("a"), store.list, store.require_swap, lambda: store.write("a", b"1")):
        with pytest.raises(StorageError, match="s3://no-such-bucket/root: no such bucket: create it"):
            use()


def test_a_store_without_conditions_is_refused(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="memory://: this store has no compare-and-swap: set RAYSD_STORAGE"):
        Storage("memory://x").require_swap()
    with pytest.raises(RequestError, match="not a storage URL"):
        Storage("s3://")
    real = S3._put
    for ignored in ("IfMatch", "IfNoneMatch"):

        def careless(self: S3, path: str, data: bytes, refused: Exception, ignored: str = ignored, **given: str) -> str:
            return real(self, path, data, refused, **{key: value for key, value in given.items() if key != ignored})

        monkeypatch.setattr(S3, "_put", careless)
        with pytest.raises(StorageError, match="this store ignores the conditions of"):
            Storage(s3).require_swap()
    monkeypatch.setattr(S3, "_put", real)
    Storage(s3).require_swap()
    assert Storage(s3).list() == []


def test_a_process_killed_inside_a_swap_leaves_no_lock_and_the_old_content(tmp_path: Path) -> None:
    store = Storage(str(tmp_path))
    tag = store.swap("a", b"old", None)
    script = f"""
        import os, sys, time
        from raysd.storage import Storage
        def stop(*args):
            print("inside", flush=True)
            time.sleep(60)
        os.replace = stop
        Storage({str(tmp_path)!r}).swap("a", b"new", {tag!r})
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"inside\n"
    child.kill()
    child.wait()
    assert store.read("a") == b"old"
    store.swap("a", b"mine", tag)
    assert [entry.path for entry in store.list()] == ["a"]
    assert store.sweep(3600) == 0
    for torn in tmp_path.glob(".raysd-tmp-*"):
        os.utime(torn, (time.time() - 7200,) * 2)
    assert store.sweep(3600) == 1


def test_a_lock_whose_file_was_deleted_is_not_enough(tmp_path: Path) -> None:
    """A deleted tree takes its lock file along: whoever waited for that one has to queue for the new one."""
    path = tmp_path / ".raysd-lock"
    script = f"""
        import time
        from pathlib import Path
        from raysd.storage.local import _lock
        _lock(Path({str(path)!r}))
        print("locked", flush=True)
        time.sleep(60)
    """
    holder = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"locked\n"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(_lock, path)
        time.sleep(0.3)  # long enough to have opened the file that goes
        path.unlink()
        path.touch()
        holder.kill()
        holder.wait()
        descriptor = waiting.result()
    assert os.path.samestat(os.fstat(descriptor), path.stat())
    os.close(descriptor)
