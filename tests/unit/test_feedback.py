"""What people say: kept once, deleted on request, counted, and exported as a data set."""

import io
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from pydantic import ValidationError
from rich.console import Console
from sqlalchemy import select, text

from raysd import cli
from raysd.cli import output
from raysd.config.data import DataSpec
from raysd.data.check import check
from raysd.data.source import open_source
from raysd.database import Database
from raysd.errors import NotFound, RequestError, StorageError, TooMany
from raysd.feedback import export as exports
from raysd.feedback.export import Liked, export, export_pairs
from raysd.feedback.generations import Generations
from raysd.feedback.records import Records
from raysd.feedback.stats import stats, table
from raysd.feedback.tables import FeedbackRow
from raysd.feedback.wire import Feedback
from raysd.serve.queue import Queue
from raysd.storage import Storage
from tests.records import drawn, new, png

ID = "a" * 26 + "-0"
OTHER = "b" * 26 + "-0"


@pytest.fixture
def queue(database, clock):
    return Queue(database, keep_pictures=1000.0, clock=clock)


@pytest.fixture
def records(database, clock):
    return Records(database, most_a_day=4, clock=clock)


@pytest.fixture
def generations(database, storage, clock):
    return Generations(database, storage, clock=clock)


@pytest.fixture
def say(records):
    """Keeps feedback and says under which id."""

    def one(generation, user="anna", key=None, **said):
        return records.keep(Feedback(generation=generation, **said), user=user, owner="k1", key=key).id

    return one


@pytest.fixture
def choose(records):
    def one(left, right, choice, user="anna"):
        pair = {"left": left, "right": right, "choice": choice}
        return records.keep(Feedback.model_validate({"pair": pair}), user=user)

    return one


def everything(database):
    with database.reading() as session:
        names = ("predictions", "generations", "feedback")
        return str([session.execute(text(f"SELECT * FROM {name}")).all() for name in names])  # noqa: S608


def compared(queue, storage, shade=0, **changes):
    """The generations of a comparison: what cats@3 and cats@4 drew."""
    both = {"comparison": f"c{shade}", **changes}
    first = drawn(queue, storage, new(ref="cats@3", **both), shade)[0]
    return first, drawn(queue, storage, new(ref="cats@4", digest="4" * 64, **both), shade + 1)[0]


# On the wire


@pytest.mark.parametrize(
    "body",
    [
        {"generation": ID, "thumb": "up"},
        {"generation": ID, "thumb": "down", "stars": 1, "tags": ["hands", "too blurry"], "text": "é\n", "report": "x"},
        {"pair": {"left": ID, "right": OTHER, "choice": "tie"}},
    ],
)
def test_what_is_feedback(body):
    assert Feedback.model_validate_json(json.dumps(body)) == Feedback.model_validate(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "either generation or pair"),
        ({"generation": ID}, "say something of it: thumb, stars, tags, text, report"),
        ({"generation": ID, "thumb": "up", "pair": {"left": ID, "right": OTHER, "choice": "tie"}}, "either"),
        ({"stars": 3, "pair": {"left": ID, "right": OTHER, "choice": "tie"}}, "stars: belongs to a generation"),
        ({"pair": {"left": ID, "right": ID, "choice": "left"}}, "the same generation"),
        ({"pair": {"left": ID, "right": OTHER, "choice": "both"}}, "left"),
        ({"generation": "../etc", "thumb": "up"}, "pattern"),
        ({"generation": ID + "\n", "thumb": "up"}, "pattern"),
        ({"generation": ID, "thumb": "sideways"}, "up"),
        ({"generation": ID, "stars": 0}, "greater than or equal to 1"),
        ({"generation": ID, "stars": 6}, "less than or equal to 5"),
        ({"generation": ID, "stars": "5"}, "integer"),
        ({"generation": ID, "stars": True}, "integer"),
        ({"generation": ID, "stars": 4.0}, "integer"),
        ({"generation": ID, "tags": []}, "at least 1"),
        ({"generation": ID, "tags": ["x"] * 11}, "at most 10"),
        ({"generation": ID, "tags": ["<b>"]}, "pattern"),
        ({"generation": ID, "text": ""}, "at least 1"),
        ({"generation": ID, "text": "x" * 2001}, "at most 2000"),
        ({"generation": ID, "text": "a\0b"}, "NUL"),
        ({"generation": ID, "report": "x" * 1001}, "at most 1000"),
        ({"generation": ID, "thumb": "up", "user": "me"}, "Extra"),
    ],
)
def test_what_is_no_feedback(body, message):
    with pytest.raises(ValidationError, match=message):
        Feedback.model_validate(body)


# Kept


def test_feedback_is_kept_with_its_generation(records, queue, storage, say, clock):
    (generation,) = drawn(queue, storage, new())
    id = say(generation, thumb="up", stars=4, tags=["nice", "hands", "nice"], text="ears!", report="none")
    (found,) = records.find()
    assert found == {
        "id": id,
        "created": clock.now,
        "user": "anna",
        "generation": generation,
        "version": "cats@3",
        "thumb": "up",
        "stars": 4,
        "tags": ["hands", "nice"],
        "text": "ears!",
        "report": "none",
        "pair": None,
    }
    assert records.find("cats") == [found]
    assert records.find("dogs") == []


def test_the_same_key_keeps_once(records, queue, storage, say, database):
    (generation,) = drawn(queue, storage, new())
    said = Feedback(generation=generation, thumb="up")
    first = records.keep(said, user="anna", owner="k1", key="once")
    again = records.keep(said, user="anna", owner="k1", key="once")
    assert (first.new, again.new, again.id) == (True, False, first.id)
    with pytest.raises(RequestError, match="Idempotency-Key: was used for other feedback"):
        say(generation, key="once", thumb="down")
    assert records.keep(said, user="bert", owner="k1", key="once").new
    assert records.keep(said, user="anna", owner="k1").new
    with ThreadPoolExecutor(6) as pool:
        kept = list(pool.map(lambda _: records.keep(said, user="carl", key="at once"), range(12)))
    assert sum(one.new for one in kept) == 1
    assert len({one.id for one in kept}) == 1
    database.lose = True
    assert records.keep(said, user="dora").new
    with database.reading() as session:
        assert len(session.scalars(select(FeedbackRow)).all()) == 5


def test_a_user_is_capped_and_no_other(records, queue, storage, say, clock):
    (generation,) = drawn(queue, storage, new())
    start = clock.now
    for number in range(4):
        say(generation, key=str(number), thumb="up")
        clock.now += 10
    with pytest.raises(TooMany, match="one user gives at most 4 in 24 hours") as caught:
        say(generation, thumb="down")
    assert caught.value.retry_after == pytest.approx(start + 86400 - clock.now)
    say(generation, key="0", thumb="up")  # was kept already
    say(generation, user="bert", thumb="down")
    clock.now = start + 86400
    say(generation, thumb="down")
    with pytest.raises(TooMany):
        say(generation, thumb="up")


def test_a_key_is_capped_whoever_it_names(queue, storage, database, clock):
    asked = []
    admit = lambda session, now, owner, id: asked.append(owner)  # noqa: E731
    records = Records(database, most_of_key=3, admit=admit, clock=clock)
    (one,) = drawn(queue, storage, new())
    up = Feedback(generation=one, thumb="up")
    for name in "abc":
        records.keep(up, user=name, owner="k1", key="once")
    records.keep(up, user="a", owner="k1", key="once")
    with pytest.raises(TooMany, match="feedback: one key gives at most 3 in 24 hours"):
        records.keep(up, user="d", owner="k1")
    records.keep(up, user="d", owner="k2")
    for name in "efgh":
        records.keep(up, user=name)
    assert asked == ["k1"] * 3 + ["k2"], "what is kept already is asked for by nobody"


def test_many_at_once_pass_no_cap(queue, storage, database, say):
    (generation,) = drawn(queue, storage, new())

    def one(_):
        try:
            return say(generation, thumb="up")
        except TooMany:
            return None

    with ThreadPoolExecutor(8) as pool:
        assert sum(id is not None for id in pool.map(one, range(12))) == 4


def test_an_unknown_generation_is_not_found(records, queue, storage, say, choose):
    (generation,) = drawn(queue, storage, new())
    with pytest.raises(NotFound, match=f"generation {ID}: there is none"):
        say(ID, thumb="up")
    with pytest.raises(NotFound, match=f"generation {ID}: there is none"):
        choose(generation, ID, "left")
    assert records.find() == []


def test_a_choice_ends_the_blindness(records, queue, storage, choose, generations, say):
    first, second = compared(queue, storage)
    say(first, thumb="up")
    assert all(generations.get(id).blind for id in (first, second))
    assert all(prediction.blind for prediction in queue.find(None, None, 2))
    kept = choose(second, first, "left")
    assert (kept.left, kept.right) == ("cats@4", "cats@3")
    assert not any(generations.get(id).blind for id in (first, second))
    assert not any(prediction.blind for prediction in queue.find(None, None, 2))
    pair = next(row["pair"] for row in records.find() if row["pair"])
    assert (pair["left"], pair["left_version"], pair["choice"], pair["blind"]) == (second, "cats@4", "left", True)


def test_what_was_not_shown_together_stays_blind(queue, storage, choose, generations):
    (first, second), (third, _) = compared(queue, storage), compared(queue, storage, 5)
    (plain,) = drawn(queue, storage, new())
    for other in (third, plain):
        with pytest.raises(RequestError, match="pair: these two were never shown together"):
            choose(first, other, "left")
    assert all(generations.get(id).blind for id in (first, second, third))


# Deleted


def test_a_deleted_generation_leaves_a_tombstone(records, queue, storage, say, generations, clock, database):
    (generation,) = drawn(queue, storage, new("Q9 cat", negative="Q9 dog", owner="k1", user="Q9 user"))
    say(generation, stars=2, text="Q9 text", report="Q9 report", tags=["hands"])
    before = generations.get(generation)
    clock.now += 50
    with pytest.raises(NotFound):
        generations.delete(generation, owner="another")
    generations.delete(generation, owner="k1")
    assert not storage.exists(before.path)
    assert "Q9" not in everything(database)
    after = generations.get(generation, owner="k1")
    assert (after.deleted, after.path, after.prompt, after.parameters) == (clock.now, None, None, {})
    assert (after.sha256, after.digest, after.created) == (before.sha256, before.digest, before.created)
    (prediction,) = queue.find(None, None, 1)
    assert (prediction.status, prediction.pictures, prediction.drawing["prompt"]) == ("succeeded", [], "")
    (said,) = records.find()
    assert (said["stars"], said["tags"], said["text"], said["report"]) == (2, ["hands"], None, "")
    with pytest.raises(NotFound, match="was deleted"):
        say(generation, thumb="up")
    clock.now += 50
    generations.delete(generation)
    assert generations.get(generation).deleted == after.deleted


@pytest.mark.parametrize("id", [ID, "a\0b"])
def test_what_never_was_cannot_be_deleted(generations, id):
    for call in (generations.get, generations.delete):
        with pytest.raises(NotFound, match="there is none of that id"):
            call(id)


def test_one_of_several_is_deleted_alone(queue, storage, generations):
    first, second = drawn(queue, storage, new("a cat", count=2))
    generations.delete(first)
    (prediction,) = queue.find(None, None, 1)
    assert [picture.number for picture in prediction.pictures] == [1]
    assert prediction.drawing["prompt"] == "a cat"
    assert storage.exists(generations.get(second).path)


@pytest.mark.parametrize("when", ["before", "after", "failed"])
def test_shadows_are_deleted_with_what_they_shadow(queue, storage, generations, database, when):
    """Whether the other version drew before the deletion, after it, or not at all."""
    (generation,) = drawn(queue, storage, new("Q9"))
    shadow = new("Q9", shadow_of=generation.rpartition("-")[0])
    ids = drawn(queue, storage, shadow, 3) if when == "before" else []
    if when == "failed":
        queue.submit(shadow)
        queue.fail(queue.claim("w", "cats")[0], "no")
    generations.delete(generation)
    if when == "after":
        ids = drawn(queue, storage, shadow, 3)
        generations.sweep()
    assert "Q9" not in everything(database)
    assert [generations.get(id).path for id in ids] == [None for _ in ids]
    assert storage.list("generated") == []


def test_a_picture_that_could_not_be_removed_goes_with_the_next_sweep(queue, storage, generations, monkeypatch):
    (generation,) = drawn(queue, storage, new())
    path = generations.get(generation).path

    def fails(_path):
        raise StorageError("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "delete", fails)
        with pytest.raises(StorageError):
            generations.delete(generation)
    assert queue.find(None, None, 1)[0].pictures == [], "nobody sees it any more"
    assert storage.exists(path)
    assert generations.sweep() == 1
    assert not storage.exists(path)


def test_retention_takes_the_picture_and_leaves_the_rest(queue, storage, generations, clock, say):
    (old,) = drawn(queue, storage, new("old"))
    clock.now += 600
    (young,) = drawn(queue, storage, new("young"))
    clock.now += 400
    path = generations.get(old).path
    assert generations.sweep() == 1
    assert generations.sweep() == 0
    assert not storage.exists(path)
    found = generations.get(old)
    assert (found.path, found.prompt, found.deleted) == (None, "old", None)
    assert storage.exists(generations.get(young).path)
    assert queue.find(None, None, 2)[1].drawing["prompt"] == "old"
    say(old, thumb="up")


def test_strays_of_former_days_are_removed(queue, storage, generations):
    (generation,) = drawn(queue, storage, new())
    id = generation.rpartition("-")[0]
    stray, today = f"generated/1970-01-12/{id}-1-0.png", f"generated/1970-01-13/{id}-1-0.png"
    for path in (stray, today):
        storage.write(path, b"x")
    assert generations.strays("1970-01-13", queue.known) == 1
    assert [entry.path for entry in storage.list("generated")] == [generations.get(generation).path, today]


def test_pictures_of_another_database_are_no_strays(queue, storage, generations, tmp_path, clock):
    """A store outlives its database, and may be that of a staging service too."""
    (generation,) = drawn(queue, storage, new())
    path = generations.get(generation).path
    other = Database(f"sqlite:///{tmp_path}/other.db", storage)
    other.migrate()
    others = Queue(other, clock=clock)
    drawn(others, storage, new())
    assert Generations(other, storage, clock=clock).strays("1970-01-13", others.known) == 0
    assert storage.exists(path)
    other.close()


# Counted


def test_stats_count_a_users_last_word_and_first_choice(queue, storage, say, choose, records, database, clock):
    records._most = 1000
    old, fresh = compared(queue, storage)
    for number in range(10):
        say(old, user=f"u{number}", thumb="up")
        clock.now += 1
        say(old, user=f"u{number}", thumb="up" if number < 2 else "down", tags=["hands"])
        say(fresh, user=f"u{number}", stars=3 + number % 2)
    say(old, user="u0", report="bad")
    drawn(queue, storage, new(model="dogs", ref="dogs@1"))
    for number in range(8):
        clock.now += 1
        user = f"u{number}"
        choose(*((old, fresh, "right") if number % 2 else (fresh, old, "left")), user=user)
        clock.now += 1
        choose(old, fresh, "left", user=user)  # by now it is known who drew which
    choose(old, fresh, "tie", user="t")
    choose(old, fresh, "left", user="l")
    first, second, dogs = stats(database)
    assert [row["ref"] for row in (first, second, dogs)] == ["cats@3", "cats@4", "dogs@1"]
    assert (first["thumbs"]["up"], first["thumbs"]["down"], first["thumbs"]["share"]) == (2, 8, 0.2)
    # Wilson's interval for 2 of 10 (Newcombe 1998's method 3): 0.0567 to 0.5098
    assert first["thumbs"]["interval"] == pytest.approx([0.0567, 0.5098], abs=1e-4)
    assert (first["tags"], first["reports"]) == ({"hands": 10}, 1)
    assert (second["stars"]["n"], second["stars"]["mean"]) == (10, 3.5)
    assert 3.0 < second["stars"]["interval"][0] < 3.5 < second["stars"]["interval"][1] < 4.0
    assert [second["pairs"][name] for name in ("wins", "losses", "ties", "win_rate")] == [8, 1, 1, 0.85]
    assert [first["pairs"][name] for name in ("wins", "losses", "ties", "win_rate")] == [1, 8, 1, pytest.approx(0.15)]
    assert (dogs["generations"], dogs["thumbs"]["share"], dogs["stars"]["mean"]) == (1, None, None)
    assert [row["ref"] for row in stats(database, "dogs")] == ["dogs@1"]
    json.dumps([first, second, dogs], allow_nan=False)
    screen = Console(file=io.StringIO(), width=160)
    screen.print(table([first, second, dogs]))
    assert "20% [6%, 51%]" in screen.file.getvalue()


def test_one_vote_has_no_interval_of_a_mean(queue, storage, say, database):
    (generation,) = drawn(queue, storage, new())
    say(generation, stars=5)
    (row,) = stats(database)
    assert row["stars"] == {"n": 1, "mean": 5.0, "interval": None}


# Exported


@pytest.fixture
def rated(queue, storage, say):
    """Generations by what was said of them."""
    said = {
        "up": {"thumb": "up"},
        "stars": {"stars": 4},
        "down": {"thumb": "down"},
        "few": {"stars": 3},
        "reported": {"thumb": "up", "report": "no"},
        "withheld": {"thumb": "up"},
        "deleted": {"thumb": "up"},
        "unrated": None,
    }
    ids = {}
    for shade, (name, one) in enumerate(said.items()):
        (ids[name],) = drawn(queue, storage, new(f"a {name} cat, é", withhold=name == "withheld"), 11 * shade)
        if one is not None:
            say(ids[name], user=name, **one)
    Generations(queue._patient._database, storage).delete(ids["deleted"])
    return ids


def test_the_export_is_a_data_set(rated, database, storage, tmp_path):
    done = export(database, storage, tmp_path / "liked", model="cats")
    assert (done.written, done.left_out) == (2, 0)
    source = open_source(str(tmp_path / "liked"), Storage(str(tmp_path / "uploads")))
    assert {entry.name: entry.caption for entry in source.entries} == {
        f"{rated[name]}.png": f"a {name} cat, é" for name in ("up", "stars")
    }
    assert source.notes == []
    report = check(source, DataSpec(source="x", resolution=64))
    assert (report.used, report.missing_captions, report.unreadable) == (2, (), ())
    rows = [json.loads(line) for line in (tmp_path / "liked" / "metadata.jsonl").read_text().splitlines()]
    assert {(row["version"], row["digest"]) for row in rows} == {("cats@3", "3" * 64)}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("liked", "names"),
    [
        (Liked(thumb=False, stars=3), {"stars", "few"}),
        (Liked(thumb=True, stars=None), {"up"}),
        (Liked(), {"up", "stars"}),
    ],
)
def test_what_is_liked_is_chosen(rated, database, storage, tmp_path, liked, names):
    export(database, storage, tmp_path / "liked", liked=liked)
    assert {path.stem for path in (tmp_path / "liked").glob("*.png")} == {rated[name] for name in names}


def test_users_are_weighed_against_each_other(rated, database, storage, say, tmp_path):
    say(rated["up"], user="one", thumb="down")
    say(rated["stars"], user="two", stars=3)
    with pytest.raises(RequestError, match="nothing to export"):
        export(database, storage, tmp_path / "liked")
    assert list(tmp_path.glob("*liked*")) == []


def test_an_export_is_whole_or_not_there(rated, database, storage, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(RequestError, match="exists; name a folder that does not"):
        export(database, storage, tmp_path / "there")

    def fails(path, rows):
        assert len(list(path.parent.glob("*.png"))) == 2
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exports, "_write", fails)
    with pytest.raises(StorageError, match="no space left"):
        export(database, storage, tmp_path / "liked")
    assert list(tmp_path.glob("*liked*")) == []


def test_pictures_that_are_gone_or_damaged_are_left_out(rated, database, storage, generations, tmp_path):
    storage.write(generations.get(rated["up"]).path, png(99))
    done = export(database, storage, tmp_path / "one")
    assert (done.written, done.left_out) == (1, 1)
    storage.delete(generations.get(rated["stars"]).path)
    done = export(database, storage, tmp_path / "none")
    assert (done.written, done.left_out) == (0, 2)


def test_what_is_deleted_while_it_is_exported_is_left_out(rated, database, storage, generations, tmp_path, monkeypatch):
    read = storage.read

    def deletes(path):
        body = read(path)
        if path == generations.get(rated["up"]).path:
            generations.delete(rated["up"])
        return body

    monkeypatch.setattr(storage, "read", deletes)
    assert export(database, storage, tmp_path / "liked").left_out == 1
    assert [path.stem for path in (tmp_path / "liked").glob("*.png")] == [rated["stars"]]


def test_pairs_are_exported_by_majority(queue, storage, choose, database, tmp_path):
    pairs = [compared(queue, storage, 3 * number) for number in range(3)]
    for left, right in pairs[:2]:
        choose(left, right, "right")
    choose(pairs[0][1], pairs[0][0], "left", user="bert")
    choose(*pairs[1], "left", user="bert")  # one each
    choose(*pairs[2], "tie")
    done = export_pairs(database, storage, tmp_path / "pairs")
    assert (done.written, done.left_out) == (1, 0)
    (row,) = [json.loads(line) for line in (tmp_path / "pairs" / "pairs.jsonl").read_text().splitlines()]
    old, fresh = pairs[0]
    assert (row["chosen"], row["rejected"], row["prompt"]) == (f"{fresh}.png", f"{old}.png", "a cat")
    assert (row["chosen_version"], row["rejected_version"]) == ("cats@4", "cats@3")
    assert {path.name for path in (tmp_path / "pairs").glob("*.png")} == {row["chosen"], row["rejected"]}


# On the command line


def test_the_command_line(tmp_path, monkeypatch, capsys):
    from raysd.database import Database

    storage = Storage(str(tmp_path / "store"))
    monkeypatch.setenv("RAYSD_STORAGE", storage.url)
    monkeypatch.delenv("RAYSD_DATABASE", raising=False)
    database = Database(None, storage)
    database.migrate()
    queue, records = Queue(database), Records(database)
    (generation,) = drawn(queue, storage, new("a cat"))
    records.keep(Feedback(generation=generation, thumb="up", text="[red]\x1b[31mhm"), user="anna")
    pair = dict(zip(("left", "right"), compared(queue, storage, 4), strict=True))
    records.keep(Feedback.model_validate({"pair": {**pair, "choice": "left"}}), user="anna")

    def run(*words):
        monkeypatch.setattr(output, "RESULT", output.sys.stdout)
        monkeypatch.setattr(output.out, "file", output.sys.stdout)
        cli.app(list(words), standalone_mode=False)
        return capsys.readouterr().out

    assert {row["generation"] for row in json.loads(run("feedback", "list", "--json"))} == {generation, None}
    shown = run("feedback", "list", "--limit", "5")
    assert "[red] [31mhm" in shown
    assert "left blind" in shown
    assert json.loads(run("feedback", "stats", "--json"))[0]["thumbs"]["up"] == 1
    assert "cats@3" in run("feedback", "stats", "--model", "cats")
    said = run("feedback", "export", "--out", str(tmp_path / "liked"), "--thumb-up")
    assert "1 rows" in said
    assert f"--data.source {tmp_path}/liked" in said
    assert json.loads(run("feedback", "export", "--out", str(tmp_path / "p"), "--pairs", "--json"))["written"] == 1
    with pytest.raises(RequestError, match="nothing to export"):
        run("feedback", "export", "--out", str(tmp_path / "x"), "--stars", "4")
