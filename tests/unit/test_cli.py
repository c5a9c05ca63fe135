"""The command line as a person meets it: messages, exit status, help, JSON."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from raysd import cli
from raysd.cli.models import generate
from raysd.cli.specs import dotted, recipe_of
from raysd.config import override
from raysd.errors import RequestError
from raysd.quiet import native_logs
from raysd.registry.records import blob_path
from raysd.storage import Storage
from raysd.train import runs
from raysd.train.runs import RunRecord
from tests.base import toml
from tests.cluster import raysd, start
from tests.pictures import photo
from tests.versions import flip


def refused(done):
    """Exit status 2, three lines at most, no traceback, nothing on standard output."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert 1 <= len(lines) <= 3
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "nothing-like-it"], "recipe nothing-like-it: not one of full-demo, lora-demo"),
        (["train", "absent.toml"], "absent.toml: no such file"),
        (["train", "lora-demo", "--optim.lrr", "1"], "optim.lrr: unknown; did you mean optim.lr?"),
        (["train", "lora-demo", "--optim.lr"], "--optim.lr: a value is missing"),
        (["train", "lora-demo", "stray"], "stray: expected --dotted.path VALUE"),
        (["train", "lora-demo", "--data.source", "./nowhere", "--dry-run"], "nowhere"),
        (["train", "lora-demo", "--name", "No Good", "--dry-run"], "run name 'No Good'"),
        (["train", "lora-demo", "--base", "./nowhere", "--dry-run"], "./nowhere: no such folder"),
        (["data", "check", "./nowhere"], "nowhere"),
        (["runs", "show", "nothing"], "run nothing: not in"),
        (["models", "show", "cats@9"], "cats@9"),
        (["runs", "shwo"], "No such command 'shwo'"),
        (["generate", "tiny-sd"], "Missing option '--prompt'"),
        (["generate", "tiny-sd", "--prompt", "x", "--out", "x.gif"], "--out x.gif: name a .png file"),
        (["generate", "tiny-sd", "--prompt", "a\udcff", "--out", "x.png"], "--prompt a : is not UTF-8"),
        (
            ["generate", "tiny-sd", "--prompt", "x", "--out", "x.png", "--seed", str(2**63 - 1), "--count", "2"],
            f"--seed {2**63 - 1}: at most {2**63 - 2} with --count 2",
        ),
        (["export", "tiny-sd", "--format", "gguf", "--out", "x"], "--format gguf: one of diffusers, kohya, onnx"),
        (["export", "tiny-sd", "--format", "onnx", "--precision", "int4", "--out", "x"], "--precision int4: one of"),
        (["export", "tiny-sd", "--format", "kohya"], "--out: --format kohya needs it"),
        (["evaluate", "tiny-sd", "--html", "/"], "--html /: cannot be written: Is a directory; name another file"),
        (["data", "check", "sample", "--html", f"{__file__}/x.html"], "x.html: cannot be written: "),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_wrong_request_is_named(words, message, tmp_path):
    assert message in refused(raysd(*words, storage=tmp_path / "store"))
    assert not (tmp_path / "store").exists(), "nothing was written"


def test_a_place_that_cannot_be_written_is_named_before_anything_is_drawn(tmp_path, monkeypatch):
    from raysd import draw

    monkeypatch.setattr(draw, "draw", lambda *_: pytest.fail("drawn"))
    monkeypatch.setenv("RAYSD_STORAGE", str(tmp_path / "store"))
    (tmp_path / "file").touch()
    (tmp_path / "x-2.png").mkdir()
    for place, said in (("file/x.png", r"file/x-1\.png: cannot be written"), ("x.png", r"x-2\.png: .*Is a directory")):
        with pytest.raises(RequestError, match=said):
            generate("tiny-sd", "x", tmp_path / place, count=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "x-2.png"]


def test_the_verbs_of_a_registry(registry, put, tmp_path):
    """Two versions through their whole life: pointed at, moved, rolled back, withdrawn, damaged, and swept after."""

    def models(*words, status=0):
        done = raysd("models", *words, storage=registry.storage.url)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return json.loads(done.stdout) if "--json" in words else done.stdout.strip()

    first, second = put(1), put(2)
    assert models("alias", "cats@1", "live") == "cats:live -> cats@1"
    assert models("alias", "cats@2", "live", "--json") == {"model": "cats", "alias": "live", "ref": "cats@2"}
    assert models("rollback", "cats", "live", "--json") == {"model": "cats", "alias": "live", "ref": "cats@1"}
    moves = models("history", "cats", "live", "--json")
    assert [(move["kind"], move["version"]) for move in moves] == [("move", 1), ("move", 2), ("rollback", 1)]
    assert models("history", "cats", "live").splitlines()[-1].split()[:4] == ["cats", "live", "3", "rollback"]
    assert registry.resolve("cats:live") == first

    assert "live points at it" in refused(raysd("models", "withdraw", "cats@1", storage=registry.storage.url))
    assert models("withdraw", "cats@2", "--reason", "blurred", "--json") == {"ref": "cats@2", "withdrawn": "blurred"}
    assert registry.resolve("cats@2", withdrawn_ok=True).withdrawn
    assert "cats@2 was withdrawn (blurred)" in refused(
        raysd("models", "alias", "cats@2", "live", storage=registry.storage.url)
    )

    assert models("verify", "cats@2") == "cats@2 is whole"
    [weights] = [file for file in second.files if file.path == "unet/weights.safetensors"]
    flip(registry.storage.local_path(blob_path(weights.sha256)))
    damaged = models("verify", "cats@2", "--json", status=1)
    assert damaged["ref"] == "cats@2"
    assert ["unet/weights.safetensors" in problem for problem in damaged["problems"]] == [True]

    orphan = "ab" * 32
    registry.storage.write(blob_path(orphan), b"orphan")
    os.utime(registry.storage.local_path(blob_path(orphan)), (0, 0))
    planned = models("gc", "--dry-run", "--json")
    assert (planned["blobs"], planned["bytes"], planned["kept"]) == ([orphan], 6, 5)
    assert registry.storage.exists(blob_path(orphan))
    assert models("gc", "--json")["blobs"] == [orphan]
    assert not registry.storage.exists(blob_path(orphan))


def test_training_on_a_folder_without_captions_says_how_many_and_what_to_do(tiny_base, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        photo(number, 72).save(folder / f"{number}.png")
    path = toml(tmp_path, tiny_base, folder)
    message = refused_quietly(raysd("train", str(path), "--dry-run", storage=tmp_path / "store"))
    assert "data.prompt" in message
    assert "6" in message
    fine = raysd("train", str(path), "--dry-run", "--data.prompt", "a cat", "--json", storage=tmp_path / "store")
    assert json.loads(fine.stdout)["pictures"] == {"train": 5, "validation": 1}


def refused_quietly(done):
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return done.stderr


def test_help_of_a_recipe_lists_its_paths_with_values_and_meanings(tmp_path):
    done = raysd("train", "lora-demo", "--help", storage=tmp_path)
    assert done.returncode == 0
    for word in ("optim.lr", "scale.zero_stage", "Learning rate after warm-up", "method.rank"):
        assert word in done.stdout
    assert "method.text_encoder" not in done.stdout
    assert "[fewest, most]" in done.stdout


def test_what_looks_like_markup_or_emoji_is_printed_as_it_is(tmp_path):
    prompt = "[sks] [/x] zorb :cat: [bold]"
    spec = override(recipe_of("lora-demo"), {"data.prompt": prompt})
    root = Storage(str(tmp_path))
    for name in ("one", "two"):
        spec = override(spec, {"data.prompt": f"{prompt} {name}"})
        runs.write(runs.storage_of(root, name), RunRecord(name, spec.model_dump(mode="json"), status="failed"))
    for words in (("show", "one"), ("diff", "one", "two")):
        done = raysd("runs", *words, storage=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"{prompt} one" in done.stdout
    assert prompt in refused(raysd("train", "lora-demo", "--name", prompt, "--dry-run", storage=tmp_path))


def test_data_that_training_would_refuse_is_reported_and_ends_in_status_2(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        photo(number, 72).save(folder / f"{number}.png")
    done = raysd("data", "check", str(folder), "--prompt", "a cat", "--json", storage=tmp_path / "store")
    assert "3 pictures, 5 are the least" in json.loads(done.stdout)["refusals"][0]
    assert "3 pictures, 5 are the least" in refused_quietly(done)


def test_a_data_check_prints_one_json_document(tiny_pictures, tmp_path):
    words = ["data", "check", str(tiny_pictures), "--json", "--html", str(tmp_path / "page.html")]
    done = raysd(*words, storage=tmp_path / "store")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert "picture 3" in (tmp_path / "page.html").read_text()


def test_an_unexpected_error_is_one_line_and_its_details_are_kept(monkeypatch, capfd):
    def broken(**options: object) -> None:
        raise ZeroDivisionError("division by zero\nsecond line")

    monkeypatch.setattr(cli, "app", broken)
    monkeypatch.setattr(cli, "import_quickly", lambda: None)  # it would leave packages out for all tests after this one
    with pytest.raises(SystemExit) as raised:
        cli.main()
    assert raised.value.code == 1
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines[0] == "ZeroDivisionError: division by zero"
    assert "Traceback" in Path(lines[1].removeprefix("details: ")).read_text()


@pytest.mark.parametrize(("code", "status"), [(0, 0), (None, 0), (2, 2), (15, 1), ("words", 1)])
def test_every_exit_status_is_one_that_is_documented(monkeypatch, tmp_path, code, status):
    """Ray ends a process that gets SIGTERM with the signal's number."""

    def ended(**options: object) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(cli, "app", ended)
    assert cli._run(tmp_path / "log") == status


def test_ctrl_c_says_stopped_and_ends_in_status_1(tmp_path):
    """Wherever it comes: here while settings are read from a pipe that says nothing."""
    os.mkfifo(tmp_path / "endless.toml")
    running = start("train", str(tmp_path / "endless.toml"), storage=tmp_path / "store")
    with (tmp_path / "endless.toml").open("w"):  # from here on the verb waits for the settings
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert (running.returncode, out, err.strip()) == (1, "", "stopped")


@pytest.mark.parametrize("begun", [False, True])
def test_ctrl_c_in_a_run_says_how_to_go_on_where_there_is_one(monkeypatch, tmp_path, capfd, begun):
    def interrupted(spec, name, root, watch):
        if begun:
            runs.write(runs.storage_of(root, name), RunRecord(name, {}, status="interrupted"))
        raise KeyboardInterrupt

    monkeypatch.setenv("RAYSD_STORAGE", str(tmp_path))
    monkeypatch.setattr("raysd.train.launch.train", interrupted)
    monkeypatch.setattr(sys, "argv", ["raysd", "train", "lora-demo", "--name", "cats"])
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # the verb moves it
    assert cli._run(tmp_path / "log") == 1
    said = capfd.readouterr().err.strip().splitlines()
    assert said == ["go on with run cats: raysd runs resume cats"] * begun + ["stopped"]


def test_what_compiled_code_writes_is_kept_in_a_file(capfd):
    """Only what Python writes reaches the terminal, and everything does again afterwards."""
    with native_logs() as log:
        os.write(2, b"core_worker.cc: noise\n")
        print("progress", file=sys.stderr)
    os.write(2, b"later\n")
    assert capfd.readouterr().err == "progress\nlater\n"
    assert log.read_text() == "core_worker.cc: noise\n"
    log.unlink()


def test_dotted_words():
    assert dotted(["--optim.lr", "1e-4", "--scale.compile=true"]) == {"optim.lr": "1e-4", "scale.compile": "true"}
    with pytest.raises(RequestError, match="a value is missing"):
        dotted(["--optim.lr"])
