"""Jobs before there is a cluster: ids, what is sent, what stays here, and which commands are refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import typer

from raysd import cli
from raysd.cli import jobs as cli_jobs
from raysd.cli.submitted import command_of
from raysd.errors import (
    AlreadyExists,
    LeaseLost,
    OutOfMemory,
    RaysdError,
    RequestError,
    StorageError,
    TrainingFailed,
)
from raysd.jobs import clusters, command, driver, environment, follow, outcome, package
from raysd.jobs.clusters import Cluster, ClusterSpec
from raysd.jobs.secrets import holds_secret, is_secret_file, is_secret_variable
from raysd.lease import Lease

URL = "http://head:8265"
PRIVATE = "-----BEGIN RSA PRIVATE" + " KEY-----\nMIIB\n"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith(("RAYSD_", "RAY_A"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small checkout, which is the current folder."""
    place = tmp_path / "checkout"
    place.mkdir()
    monkeypatch.chdir(place)
    write(place, ".gitignore", "ignored/\n*.log\n")
    write(place, "raysd/code.py", "x = 1\n")
    write(place, "cats/1.png", "a picture")
    write(place, "cats/1.txt", "a cat")
    git(place, "init", "--quiet")
    return place


def write(place: Path, name: str, text: str) -> Path:
    path = place / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def git(place: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(place), *words], check=True, capture_output=True)


def cluster(**values) -> Cluster:
    return Cluster("test", URL, ClusterSpec(url=URL, **values))


def parse(*words: str) -> command.Command:
    return command_of(typer.main.get_command(cli.app), words)


# Ids


def id_of(*words: str, storage: str = "s3://b/r", sent: package.Selection | None = None) -> str:
    return command.name(parse(*words), storage, sent)[1]


def test_the_same_submission_has_the_same_id_and_another_one_another():
    words = ("train", "lora-demo", "--optim.lr", "1e-4")
    assert id_of(*words) == id_of(*words)
    others = {
        id_of(*words),
        id_of(*words, storage="s3://b/other"),
        id_of("train", "lora-demo", "--optim.lr", "2e-4"),
        id_of(*words, "--name", "cats"),
        id_of("train", "full-demo", "--optim.lr", "1e-4"),
    }
    assert len(others) == 5


def test_a_run_without_a_name_gets_a_stable_one_and_a_given_one_stays():
    named, id = command.name(parse("train", "lora-demo"), "s3://b/r", None)
    assert named.words == ("train", "lora-demo", "--name", id)
    assert named.run == id
    assert named.lease == f"runs/{id}/lease.json"
    again, _ = command.name(parse("train", "lora-demo"), "s3://b/r", None)
    assert again == named
    given, id = command.name(parse("train", "lora-demo", "--name=cats"), "s3://b/r", None)
    assert given.words == ("train", "lora-demo", "--name=cats")
    assert given.run == "cats"
    assert id.startswith("cats-")


def test_a_search_and_what_is_resumed_are_known_by_name(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    search = parse("tune", "tune/lora.toml", "--budget.trials", "3", "--optim.warmup", "3")
    assert search.unnamed
    assert ("the search", "tune/lora.toml") in [(named.option, named.text) for named in search.inputs]
    assert parse("tune", "resume", "lora").lease == "searches/lora/lease.json"
    assert parse("runs", "resume", "cats").lease == "runs/cats/lease.json"
    assert parse("models", "list").lease is None


def test_what_is_sent_is_part_of_the_job(folder):
    words = ("train", "lora-demo", "--data.source", "./cats")
    sent = id_of(*words, sent=package.select(folder))
    assert sent == id_of(*words, sent=package.select(folder))
    ids = {sent, id_of(*words)}
    for name, text in (("raysd/code.py", "x = 2\n"), ("cats/1.txt", "another cat"), ("more.py", "")):
        write(folder, name, text)
        ids.add(id_of(*words, sent=package.select(folder)))
    assert len(ids) == 5


def test_who_detaches_is_told_how_to_come_back_to_the_same_cluster(monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(follow, "to_end", interrupted)
    for given, option in (("production", " --cluster production"), (None, "")):
        with pytest.raises(typer.Exit):
            cli_jobs._to_end(None, "cats-1", given, False, {})
        assert capsys.readouterr().err.rstrip().endswith(f"raysd jobs logs cats-1 --follow{option}")


# What is refused before anything is sent


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian", "lora-demo"], "raysd trian lora-demo: no such command; one of data, demo"),
        (["models", "lst"], "raysd models lst: no such command"),
        (["submit", "--", "train"], "a command of raysd"),
        (["jobs", "list"], "a command of raysd"),
        (["train", "nothing-like-it"], "recipe nothing-like-it: not one of"),
        (["train", "absent.toml"], "absent.toml: no such file"),
        (["train", "lora-demo", "--optim.lrr", "1"], "optim.lrr: unknown; did you mean optim.lr?"),
    ],
)
def test_a_wrong_command_is_refused_here(words, message):
    with pytest.raises(RequestError) as refused:
        parse(*words)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "words",
    [
        ["train", "lora-demo", "--data.source", "https://me:hunter2@host/cats.zip"],
        ["train", "lora-demo", "--data.source=https://b.s3.amazonaws.com/cats.zip?X-Amz-Signature=hunter2"],
        ["data", "check", "ftp://me:hunter2@host/cats"],
    ],
)
def test_a_secret_in_the_command_is_refused_without_repeating_it(words):
    with pytest.raises(RequestError) as refused:
        command.refuse_secrets(parse(*words))
    assert "hunter2" not in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 3


def test_what_would_be_written_on_a_node_is_refused():
    with pytest.raises(RequestError, match=r"--out x.png: would be written on a node"):
        command.refuse_outputs(parse("generate", "cats@1", "--prompt", "a cat", "--out", "x.png"))
    command.refuse_outputs(parse("models", "list"))


def test_files_that_other_commands_name_are_found_too(folder):
    for words in (
        ("evaluate", "cats@1", "--prompts", "p.jsonl"),
        ("evaluate", "./cats"),
        ("study", "new", "a@1", "b@1", "--prompts", "p.txt"),
    ):
        with pytest.raises(RequestError, match="lies on this machine"):
            checked(*words)
    assert checked("evaluate", "cats@1", "--against", "cats:production") == []


def checked(*words: str, sent=None, **values) -> list[str]:
    return command.check_inputs(parse(*words), cluster(**values), sent)


@pytest.mark.parametrize("place", ["./cats", "cats", "../checkout/cats"])
def test_a_local_folder_is_refused_with_the_remedy(folder, place):
    with pytest.raises(RequestError, match=r"data\.source .*cats: lies on this machine.*\n.*--send"):
        checked("train", "lora-demo", "--data.source", place)


def test_a_local_path_inside_a_recipe_is_found_too(folder):
    recipe = (REPOSITORY / "raysd/recipes/lora-demo.toml").read_text().replace('"sample"', '"./cats"')
    assert "./cats" in recipe
    write(folder, "mine.toml", recipe)
    with pytest.raises(RequestError, match=r"the recipe mine\.toml: lies on this machine"):
        checked("train", "mine.toml")
    assert checked("train", "mine.toml", sent=package.select(folder)) == []
    shutil.rmtree(folder / "cats")
    with pytest.raises(RequestError, match=r"data\.source \./cats: is not here"):
        checked("train", "mine.toml", sent=package.select(folder))


def test_what_is_sent_may_be_named_and_what_is_left_out_may_not(folder):
    write(folder, "ignored/1.png", "a picture")
    sent = package.select(folder)
    assert checked("train", "lora-demo", "--data.source", "./cats", sent=sent) == []
    with pytest.raises(RequestError, match=r"\./ignored: does not go along"):
        checked("train", "lora-demo", "--data.source", "./ignored", sent=sent)
    with pytest.raises(RequestError, match="outside of the folder"):
        checked("train", "lora-demo", "--data.source", "../checkout/cats", sent=sent)
    with pytest.raises(RequestError, match=r"write it as \./cats"):
        checked("train", "lora-demo", "--data.source", str(folder / "cats"), sent=sent)


def test_paths_of_the_cluster_urls_and_bundled_names_pass(folder):
    write(folder, "sample", "a file that happens to be here")
    assert checked("train", "lora-demo", "--data.source", "s3://b/cats", "--base", "org/name") == []
    assert checked("train", "lora-demo") == []
    notices = checked("train", "lora-demo", "--data.source", "/data/cats")
    assert notices == ["data.source /data/cats: taken as a path on the cluster's nodes"]
    assert checked("train", "lora-demo", "--data.source", "/nfs/cats", shared_folders=("/nfs",)) == []
    assert checked("train", "lora-demo", "--data.source", "/nfs/../data", shared_folders=("/nfs",)) != []


# What is sent


def test_junk_and_secrets_stay_here_and_are_said(folder):
    named = [".env", ".envrc", "deploy/server.pem", "id_rsa", "credentials", ".aws/config", "k8s/secret.yaml"]
    named += ["prod.tfstate.backup", ".vault-token"]
    for name in named:
        write(folder, name, "hunter2")
    secrets = [*named, "notes/key.txt", "gcp.json", "hub.py", "app.yaml"]
    write(folder, "notes/key.txt", PRIVATE)
    write(folder, "gcp.json", json.dumps({"type": "service_account", "private_key": PRIVATE}, indent=2))
    write(folder, "hub.py", f'TOKEN = "hf_{"a" * 34}"')
    write(folder, "app.yaml", "database: postgresql://me:hunter2@host/db")
    write(folder, "raysd/database.py", "# postgresql://USER:PASSWORD@host/db")
    write(folder, ".env.example", "TOKEN=")
    write(folder, "raysd/secrets.py", "code")
    for name in (
        "ignored/big.bin",
        "run.log",
        ".raysd/runs/x/run.json",
        "env/pyvenv.cfg",
        "env/lib/y.py",
        "a/__pycache__/z.pyc",
    ):
        write(folder, name, "junk")
    outside = write(folder.parent, "outside.txt", "hunter2")
    (folder / "link.txt").symlink_to(outside)
    (folder / "alias.txt").symlink_to(".env")
    git(folder, "add", "--force", ".env", "run.log")  # that git knows a file does not make it less of a secret
    found = package.select(folder)
    expected = {
        ".gitignore",
        "raysd/code.py",
        "raysd/database.py",
        "cats/1.png",
        "cats/1.txt",
        ".env.example",
        "raysd/secrets.py",
        "run.log",
    }
    assert set(found.files) == expected
    assert set(found.secrets) == {*secrets, "alias.txt"}
    assert found.links == ("link.txt",)
    said = "\n".join(found.lines())
    assert "deploy/server.pem" in said
    assert "link.txt" in said
    assert f"left out: {found.others} files" in said
    assert found.others >= 4


def test_the_package_is_the_same_for_the_same_files_and_holds_no_secret(folder):
    write(folder, ".env", "hunter2")
    first, second = folder.parent / "1.zip", folder.parent / "2.zip"
    package.pack(package.select(folder), first)
    os.utime(folder / "cats/1.png", (1, 1))
    package.pack(package.select(folder), second)
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert archive.namelist() == [".gitignore", "cats/1.png", "cats/1.txt", "raysd/code.py"]
    assert b"hunter2" not in first.read_bytes()


def test_gitignore_counts_outside_of_a_repository(folder):
    shutil.rmtree(folder / ".git")
    write(folder, "ignored/1.png", "a picture")
    assert set(package.select(folder).files) == {".gitignore", "raysd/code.py", "cats/1.png", "cats/1.txt"}


def test_a_large_folder_is_refused_with_its_largest_files(folder, monkeypatch):
    monkeypatch.setattr(package, "MOST_BYTES", 2 * 2**20)
    (folder / "weights.bin").write_bytes(bytes(3 * 2**20))
    with pytest.raises(RequestError, match=r"weights\.bin 3\.0 MiB.*\n.*s3://"):
        package.select(folder)


def test_this_checkout_can_be_sent():
    found = package.select(REPOSITORY)
    assert found.has("raysd/jobs/driver.py")
    assert found.has("./tune/lora.toml")
    assert not found.has(".venv")
    assert not [name for name in found.secrets if name.startswith(("raysd/", "tests/"))]


@pytest.mark.parametrize(
    "name", ["src/tokenizer.json", "keys.py", "raysd/cli/keys.py", "secrets.py", "id_rsa.pub", "env.py"]
)
def test_code_is_no_secret(name):
    assert not is_secret_file(name)


# The environment


def test_only_values_of_raysd_are_sent_and_none_that_looks_like_a_secret():
    given = {
        "RAYSD_CLUSTER_RESOURCES": "CPU=64",
        "RAYSD_STORAGE": "s3://b/r",
        "RAYSD_CLUSTER": "production",
        "RAYSD_DATABASE": "postgresql://me@host/db",
        "RAYSD_KEY": "hunter2",
        "RAYSD_URL": "https://me:hunter2@host",
        "RAYSD_EMPTY": "",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "HF_TOKEN": "hunter2",
        "PATH": "/bin",
    }
    values, kept = environment.values_for(given)
    assert values == {"RAYSD_CLUSTER_RESOURCES": "CPU=64"}
    assert kept == ["RAYSD_DATABASE", "RAYSD_KEY", "RAYSD_URL"]


@pytest.mark.parametrize(
    "text", ["s3://bucket/a:b@c", "org/name", "a cat, 1:2 @ home", "cats:production", "http://host:80/x"]
)
def test_plain_words_hold_no_secret(text):
    assert not holds_secret(text)
    assert not is_secret_variable("RAYSD_STORAGE", text)


def test_a_folder_of_this_machine_is_no_storage_of_a_cluster(monkeypatch):
    with pytest.raises(RequestError, match="RAYSD_STORAGE is not set"):
        environment.storage_for(cluster())
    for local in ("./.raysd", "/home/me/raysd", "file:///home/me/raysd"):
        monkeypatch.setenv("RAYSD_STORAGE", local)
        with pytest.raises(RequestError, match=r"RAYSD_STORAGE .*a folder of this machine"):
            environment.storage_for(cluster(shared_folders=("/nfs",)))
    monkeypatch.setenv("RAYSD_STORAGE", "/nfs/raysd")
    assert environment.storage_for(cluster(shared_folders=("/nfs",))) == "/nfs/raysd"
    monkeypatch.setenv("RAYSD_STORAGE", "ftp://me:hunter2@host/raysd")
    with pytest.raises(RequestError, match="password") as refused:
        environment.storage_for(cluster())
    assert "hunter2" not in str(refused.value)
    monkeypatch.delenv("RAYSD_STORAGE")
    assert environment.storage_for(cluster(storage="s3://b/r")) == "s3://b/r"


# Clusters


def test_a_cluster_is_found_by_name_by_url_and_by_environment(tmp_path, monkeypatch):
    file = write(tmp_path, "clusters.toml", f'[production]\nurl = "{URL}/"\nentry = {{ cpus = 0.5 }}\n')
    monkeypatch.setenv("RAYSD_CLUSTERS", str(file))
    found = clusters.find("production")
    assert (found.url, found.spec.entry.cpus) == (URL, 0.5)
    assert str(found) == f"production ({URL})"
    assert clusters.find("https://head/").url == "https://head"
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(RequestError, match="no cluster: give --cluster"):
        clusters.find(None)
    monkeypatch.setenv("RAY_ADDRESS", "http://other:8265")
    assert clusters.find(None).url == "http://other:8265"
    monkeypatch.setenv("RAYSD_CLUSTER", "production")
    assert clusters.find(None).url == URL


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("staging", r"cluster staging: no table \[staging\] in .*it has production, wrong"),
        ("wrong", r"\[wrong\]: token: unknown"),
        ("ray://head:10001", "give the dashboard's address"),
        ("http://me:hunter2@head:8265", "holds a password"),
    ],
)
def test_a_wrong_cluster_is_named(given, message, tmp_path, monkeypatch):
    text = f'[production]\nurl = "{URL}"\n[wrong]\nurl = "{URL}"\ntoken = "hunter2"\n'
    monkeypatch.setenv("RAYSD_CLUSTERS", str(write(tmp_path, "clusters.toml", text)))
    with pytest.raises(RequestError, match=message) as refused:
        clusters.find(given)
    assert "hunter2" not in str(refused.value)


def test_where_the_token_comes_from(tmp_path, monkeypatch):
    file = write(tmp_path, "token", "abc\n")
    assert clusters.token_of(cluster())[0] is None
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    assert clusters.token_of(cluster())[0] == "abc"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "def")
    assert clusters.token_of(cluster()) == ("def", "RAY_AUTH_TOKEN")
    assert clusters.token_of(cluster(token_file=str(file)))[0] == "abc"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert clusters.token_of(cluster())[0] is None
    with pytest.raises(RequestError, match=r"token_file /absent: no token can be read"):
        clusters.token_of(cluster(token_file="/absent"))
    with pytest.raises(RequestError, match="holds no token"):
        clusters.token_of(cluster(token_file=str(write(tmp_path, "page", "not a token"))))


# The process that runs a job's command


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (StorageError("no answer"), True),
        (ConnectionError("no cluster"), True),
        (AlreadyExists("x"), False),
        (TrainingFailed("loss"), False),
        (OutOfMemory("x"), False),
        (LeaseLost("the store was away"), True),
        (RequestError("x"), False),
        (RaysdError("x"), False),
        (KeyError("a bug"), False),
    ],
)
def test_which_errors_may_pass(error, passes, tmp_path, monkeypatch):
    file = tmp_path / "outcome"
    file.write_text("")
    monkeypatch.setenv(outcome.FILE, str(file))
    outcome.note(error)
    assert driver.may_pass(1, file) == passes


def run_driver(tmp_path, monkeypatch, body: str, retries: int = 2, before=lambda run: None) -> tuple[int, int]:
    """(exit status, how often the command was started), of a command whose Python source is `body`."""
    count = tmp_path / "count"
    count.write_text("")
    beginning = (
        f"import os, sys, time, signal\nopen({str(count)!r}, 'a').write('x')\nn = len(open({str(count)!r}).read())\n"
    )
    monkeypatch.setattr(driver, "COMMAND", beginning + body)
    monkeypatch.setattr(driver, "PAUSES", (0.01,))
    monkeypatch.setattr(driver, "LOOK", 0.05)
    monkeypatch.setattr(driver, "GOODBYE", 0.1)
    monkeypatch.setenv("RAYSD_STORAGE", str(tmp_path / "store"))
    before_handler = signal.getsignal(signal.SIGTERM)
    try:
        run = driver.Driver(["train", "x"], retries, None, "job-1", again=False)
        before(run)
        return run.run(), len(count.read_text())
    finally:
        signal.signal(signal.SIGTERM, before_handler)


@pytest.mark.parametrize(
    ("body", "status", "starts"),
    [
        ("sys.exit(0)", 0, 1),
        ("sys.exit(2)", 2, 1),
        ("sys.exit(1)", 1, 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", 1, 3),
        ("n < 2 and os.kill(os.getpid(), signal.SIGKILL)", 0, 2),
        (f"open(os.environ[{outcome.FILE!r}], 'w').write('passing')\nsys.exit(1)", 1, 3),
        (f"n < 2 and open(os.environ[{outcome.FILE!r}], 'w').write('passing')\nsys.exit(1)", 1, 2),
    ],
)
def test_a_command_that_was_killed_is_started_again_and_one_that_failed_is_not(
    body, status, starts, tmp_path, monkeypatch
):
    assert run_driver(tmp_path, monkeypatch, body) == (status, starts)


def test_a_command_that_is_asked_to_stop_gets_its_time_and_is_not_started_again(tmp_path, monkeypatch):
    saved = tmp_path / "checkpoint"
    body = (
        f"def save(*_):\n    time.sleep(0.3)\n    open({str(saved)!r}, 'w').write('saved')\n    sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"open({str(tmp_path / 'ready')!r}, 'w').close()\n"
        "time.sleep(60)\n"
    )

    def ask(run: driver.Driver) -> None:
        exists = run.storage.exists
        run.storage.exists = lambda path: (tmp_path / "ready").exists() or exists(path)

    assert run_driver(tmp_path, monkeypatch, body, before=ask) == (1, 1)
    assert saved.read_text() == "saved"
    assert (tmp_path / "store" / driver.ended_path("job-1")).exists()


def test_a_restarted_command_waits_until_its_lost_predecessor_has_no_lease(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYSD_STORAGE", str(tmp_path / "store"))
    run = driver.Driver(["train", "x"], 0, "runs/x/lease.json", "job-1", again=True)
    run._await_lease()  # nobody has held it
    held = Lease.acquire(run.storage.child("runs/x"), "lease.json")
    waiting = threading.Thread(target=run._await_lease)
    waiting.start()
    waiting.join(1.5)
    assert waiting.is_alive()
    held.release()
    waiting.join(20)
    assert not waiting.is_alive()


def test_the_command_is_told_not_to_colour_its_log(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    body = "sys.exit(2 if 'FORCE_COLOR' in os.environ or os.environ['NO_COLOR'] != '1' or sys.stdin.read() else 0)"
    assert run_driver(tmp_path, monkeypatch, body) == (0, 1)


def test_the_driver_needs_neither_ray_nor_torch():
    check = "import raysd.cli, raysd.jobs.driver, sys; sys.exit(bool({'ray', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
