"""The one door to SQL, on SQLite and PostgreSQL."""

import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, select, text

import raysd.study.tables as tables
from raysd import database as sql
from raysd.database import MIGRATIONS, Base, Database, upsert
from raysd.errors import RequestError, StorageError
from raysd.feedback.tables import FeedbackRow
from raysd.serve.http.tables import MessageRow
from raysd.serve.tables import PredictionRow
from raysd.storage import Storage
from tests.postgres import PASSWORD

NEWEST = max(path.name[1:5] for path in (MIGRATIONS / "versions").glob("v*.py"))
MIGRATE = """
import sys
from raysd.database import Database
from raysd.storage import Storage
print("ready", flush=True)
sys.stdin.readline()
Database(sys.argv[1], Storage(sys.argv[2])).migrate()
"""

MANY_NEW_FILES = """
import multiprocessing, sys
from raysd.database import Database
from raysd.storage import Storage

def work(barrier, problems):
    for number in range(25):
        database = Database(f"sqlite:///{sys.argv[1]}/{number}.db", Storage(sys.argv[1]))
        barrier.wait(60)
        try:
            database.migrate()
        except Exception as error:
            problems.put(str(error))
        database.close()
    problems.put(None)

context = multiprocessing.get_context("fork")
barrier, problems = context.Barrier(6), context.Queue()
workers = [context.Process(target=work, args=(barrier, problems)) for _ in range(6)]
for worker in workers:
    worker.start()
ends = 0
while ends < 6:
    problem = problems.get(timeout=120)
    ends += problem is None
    if problem:
        print(problem)
"""


@pytest.fixture
def database(database_url, tmp_path):
    opened = Database(database_url, Storage(str(tmp_path / "store")))
    opened.migrate()
    yield opened
    opened.close()


def study(name="one", **fields):
    both = {f"{side}_{what}": f"{side} {what}" for side in ("first", "second") for what in ("ref", "digest")}
    values = {"created": 1.5, "key": "k", "steps": 3, "guidance": 2.5, **both, **fields}
    return tables.Study(name=name, **values)


def test_migrations_from_empty_make_the_tables_that_the_code_declares(database):
    with database.reading() as session:
        connection = session.connection()
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
        declared = {kind.__tablename__ for kind in (tables.Study, PredictionRow, FeedbackRow, MessageRow)}
        assert {*declared, "alembic_version"} <= set(inspect(connection).get_table_names())
    database.migrate()  # again: nothing to do


def test_what_is_written_is_there_after_a_restart(database, database_url, tmp_path):
    with database.writing() as session:
        session.add(study())
    again = Database(database_url, Storage(str(tmp_path / "store")))
    again.migrate()
    with again.reading() as session:
        found = session.scalars(select(tables.Study)).one()
        assert (found.name, found.created, found.guidance) == ("one", 1.5, 2.5)
    again.close()


def test_an_exception_rolls_back(database):
    def fails():
        with database.writing() as session:
            session.add(study())
            session.flush()
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    with database.reading() as session:
        assert session.scalars(select(tables.Study)).all() == []


def test_foreign_keys_hold(database):
    with pytest.raises(Exception, match=r"(?i)foreign key"), database.writing() as session:
        session.add(tables.Pair(study_id=9, number=0, prompt="", seed=0, token="", first_picture="", second_picture=""))


def test_upsert_replaces_the_row_of_the_same_key(database):
    with database.writing() as session:
        session.add(study())
        session.flush()
        pair = {"study_id": 1, "number": 0, "seed": 0, "token": "t", "first_picture": "a", "second_picture": "b"}
        for prompt in ("before", "after"):
            upsert(session, tables.Pair, {**pair, "prompt": prompt}, ("study_id", "number"))
    with database.reading() as session:
        assert session.scalars(select(tables.Pair.prompt)).all() == ["after"]


def test_processes_that_migrate_at_once_take_turns(database_url, tmp_path):
    store = str(tmp_path / "store")
    command = [sys.executable, "-c", MIGRATE, database_url, store]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    with Database(database_url, Storage(store)).reading() as session:
        assert session.scalars(text("SELECT version_num FROM alembic_version")).all() == [NEWEST]


def test_processes_that_make_a_file_at_once_take_turns(tmp_path):
    """SQLite does not wait to change to WAL: without turns a few of these 150 fail."""
    command = [sys.executable, "-c", MANY_NEW_FILES, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_writers_that_read_first_lose_nothing(database):
    """A counter raised by eight threads: on SQLite a transaction that began as a reader would be refused."""
    with database.writing() as session:
        session.add(study(steps=0))

    def raise_it():
        for _ in range(5):
            with database.writing() as session:
                found = session.scalars(select(tables.Study).with_for_update()).one()
                time.sleep(0.002)
                found.steps += 1

    threads = [threading.Thread(target=raise_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.reading() as session:
        assert session.scalars(select(tables.Study.steps)).one() == 40


def test_a_database_newer_than_the_code_is_refused(database):
    with database.writing() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(RequestError, match=r"not of this version of raysd .*9999.*: upgrade raysd"):
        database.migrate()


def test_a_server_that_restarted_is_reached_again(postgres, tmp_path):
    database = Database(postgres.url(), Storage(str(tmp_path)))
    database.migrate()
    with database.writing() as session:
        session.add(study())
    postgres.stop()
    try:
        with pytest.raises(StorageError, match="RAYSD_DATABASE"), database.reading() as session:
            session.scalars(select(tables.Study)).all()
    finally:
        postgres.start()
    with database.reading() as session:
        assert session.scalars(select(tables.Study.name)).all() == ["one"]
    database.close()


def test_a_database_that_has_no_connection_left_is_one_that_is_away(database):
    """As where the server hangs and nobody gets an answer."""
    pool = database._engine.pool
    pool._timeout = 0.05
    with ExitStack() as stack:
        for _ in range(pool.size() + pool._max_overflow):
            stack.enter_context(database.reading()).execute(text("SELECT 1"))
        with pytest.raises(StorageError, match=r"limit of size .*RAYSD_DATABASE"), database.reading() as session:
            session.execute(text("SELECT 1"))


def test_a_server_that_says_nothing_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sql.SILENT, "connect_timeout", 2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"postgresql://user@127.0.0.1:{server.getsockname()[1]}/x"
        database, began = Database(url, Storage(str(tmp_path))), time.monotonic()
        with pytest.raises(StorageError, match="timeout"), database.reading() as session:
            session.execute(text("SELECT 1"))
    assert time.monotonic() - began < 30


def test_the_default_is_a_file_in_a_local_storage(tmp_path, monkeypatch):
    monkeypatch.delenv("RAYSD_DATABASE", raising=False)
    Database(None, Storage(str(tmp_path / "store"))).migrate()
    assert (tmp_path / "store" / "raysd.db").is_file()
    monkeypatch.setenv("RAYSD_DATABASE", f"sqlite:///{tmp_path}/other.db")
    Database(None, Storage(str(tmp_path / "store"))).migrate()
    assert (tmp_path / "other.db").is_file()


def test_a_remote_storage_needs_a_url(s3, monkeypatch):
    monkeypatch.delenv("RAYSD_DATABASE", raising=False)
    with pytest.raises(RequestError, match=r"a database cannot lie in this store: set RAYSD_DATABASE"):
        Database(None, Storage(s3))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense " + PASSWORD, "not a URL"),
        (f"postgresql+psycopg://u:{PASSWORD}@host:{PASSWORD}/x", "not a URL"),
        (f"mysql://u:{PASSWORD}@host/x", "neither a file of SQLite nor PostgreSQL"),
        ("sqlite://", "neither a file of SQLite"),
        ("sqlite:///:memory:", "neither a file of SQLite"),
    ],
)
def test_urls_that_are_refused(url, message, tmp_path):
    with pytest.raises(RequestError, match=message) as caught:
        Database(url, Storage(str(tmp_path)))
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize("place", ["{}@", "127.0.0.1:1/x?password={}"])
def test_the_password_is_not_printed(place, tmp_path):
    host = place.format(PASSWORD)
    url = f"postgresql://user:{host}127.0.0.1:1/x" if place.startswith("{") else f"postgres://user@{host}"
    database = Database(url, Storage(str(tmp_path)))
    with pytest.raises(StorageError, match=r"127\.0\.0\.1.*RAYSD_DATABASE") as caught:
        database.migrate()
    assert PASSWORD not in str(caught.value)
    assert PASSWORD not in repr(database)


def test_a_wrong_password_is_not_printed(postgres, tmp_path):
    database = Database(postgres.url().replace(PASSWORD, "wr0ng-word"), Storage(str(tmp_path)))
    with pytest.raises(StorageError, match="password authentication failed") as caught:
        database.migrate()
    assert "wr0ng-word" not in str(caught.value)


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / "raysd.db").write_bytes(b"not a database at all, but long enough to be read as a header" * 20)
    with pytest.raises(StorageError, match=r"raysd\.db: file is not a database: set RAYSD_DATABASE"):
        Database(f"sqlite:///{tmp_path}/raysd.db", Storage(str(tmp_path))).migrate()
