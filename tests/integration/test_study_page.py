"""The page of a blind study as reviewers meet it: in a browser, by keyboard, from a server that is restarted."""

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import json_of, raysd, start
from tests.ports import free_port
from tests.studies import made, plan

NAME = "tabby-study"
MARKUP = '<b id="bold">x</b><script>document.title = "owned"</script> {{ 7 * 7 }}'
COUNT = 6
COLOUR = """picture => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0, 1, 1);
  const [red, green, blue] = context.getImageData(0, 0, 1, 1).data;
  return red > blue ? "red" : "blue";
}"""


class Server:
    """`raysd study serve`, which may be stopped and started again on its port."""

    def __init__(self, root: Path):
        self.root, self.port = root, free_port()
        self.start()

    def start(self) -> None:
        self.process = start("study", "serve", NAME, "--port", str(self.port), storage=self.root)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url == f"http://127.0.0.1:{self.port}/", self.process.stderr.read()

    def stop(self, how: int) -> int:
        self.process.send_signal(how)
        self.process.communicate(timeout=60)
        return self.process.returncode


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made(tmp_path, plan(count=COUNT, prompts=("a plain caption", MARKUP)), NAME)
    running = Server(tmp_path)
    yield running
    if running.process.poll() is None:
        running.stop(signal.SIGKILL)


class Reviewer:
    """A person in a browser of their own, and all that the server sent it."""

    def __init__(self, browser, url, name):
        self.page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
        self.answers, self.problems = [], []
        self.page.on("response", lambda answer: self.answers.append(answer))
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_selector("input:focus")
        self.page.keyboard.type(name)
        self.page.keyboard.press("Enter")
        self.ready()

    def ready(self):
        self.page.wait_for_selector(".count")
        self.page.wait_for_load_state("load")

    def count(self):
        return self.page.inner_text(".count")

    def left_is(self):
        return self.page.locator("#vote img").first.evaluate(COLOUR)

    def press(self, key):
        before = self.count()
        self.page.keyboard.press(key)
        self.page.wait_for_function("before => document.querySelector('.count')?.innerText !== before", arg=before)
        self.ready()

    def prefer(self, colour):
        self.press("ArrowLeft" if self.left_is() == colour else "ArrowRight")


def test_two_reviewers_one_reload_one_restart(browser, server, tmp_path):
    anna, bert = Reviewer(browser, server.url, "Anna"), Reviewer(browser, server.url, "Bert")
    assert anna.count() == bert.count() == f"0 of {COUNT}"
    lefts = set()
    for _ in range(3):
        lefts.add(anna.left_is())
        anna.prefer("red")
    bert.prefer("blue")

    shown = anna.page.locator("#vote img").first.get_attribute("src")
    anna.page.reload()
    anna.ready()
    assert anna.count() == f"3 of {COUNT}"
    assert anna.page.locator("#vote img").first.get_attribute("src") == shown

    assert server.stop(signal.SIGTERM) == 0
    server.start()
    bert.press("ArrowDown")
    assert bert.count() == f"2 of {COUNT}"
    bert.press("Backspace")
    bert.prefer("red")
    server.stop(signal.SIGKILL)
    server.start()
    bert.page.goto(server.url)
    bert.ready()
    assert bert.count() == f"2 of {COUNT}"

    for _ in range(3):
        lefts.add(anna.left_is())
        anna.prefer("red")
    assert lefts == {"red", "blue"}
    assert "That was the last" in anna.page.inner_text("main")
    for _ in range(4):
        bert.press("ArrowDown")

    body = json_of(raysd("study", "results", NAME, "--json", storage=tmp_path))
    red, blue = body["versions"]
    assert (red["ref"], red["wins"], red["losses"], red["ties"]) == ("tabby@3", 7, 1, 4)
    assert (blue["ref"], blue["wins"], blue["losses"], blue["ties"]) == ("tabby@4", 1, 7, 4)
    assert red["win_rate"] == 0.75
    rows = [(row["reviewer"], row["first"], row["second"], row["ties"]) for row in body["reviewers"]]
    assert rows == [("Anna", 6, 0, 0), ("Bert", 1, 1, 4)]
    assert body["agreement"]["pairs"] == COUNT
    assert not [problem for problem in anna.problems if "Failed to load" not in problem]


def test_a_caption_with_markup_is_text(browser, server):
    reviewer = Reviewer(browser, server.url, "<i>Anna</i>")
    seen = set()
    for _ in range(COUNT):
        seen.add(reviewer.page.inner_text("h1"))
        assert reviewer.page.locator("#bold, h1 *, .quiet *").count() == 0
        assert reviewer.page.inner_text(".quiet") == "<i>Anna</i>"
        reviewer.press("ArrowDown")
    assert seen == {"a plain caption", MARKUP}
    assert reviewer.page.title() == "Which is better?"
    assert reviewer.problems == []


def test_nothing_that_is_sent_names_a_version(browser, server):
    reviewer = Reviewer(browser, server.url, "Anna")
    sent = []
    for _ in range(COUNT):
        sent.append(reviewer.page.content().encode())
        reviewer.press("ArrowLeft")
    sent.append(reviewer.page.content().encode())
    paths = {answer.url.removeprefix(server.url) for answer in reviewer.answers}
    pictures = {path for path in paths if re.fullmatch(r"pictures/[0-9a-f]{32}\.png", path)}
    assert len(pictures) == 2 * COUNT
    assert paths - pictures == {"", "reviewer", "vote"}
    for path in sorted(pictures):
        body = reviewer.page.context.request.get(server.url + path).body()
        assert body[12:16] == b"IHDR"
        sent.append(body)
    sent += [json.dumps([answer.url, answer.all_headers()]).encode() for answer in reviewer.answers]
    for word in (b"tabby", b"1" * 16, b"2" * 16, b"first", b"second", b"red", b"blue", b"tEXt", b"iTXt", b"eXIf"):
        assert not [part for part in sent if re.search(rb"(?<![A-Za-z])" + word + rb"(?![A-Za-z])", part)], word


def test_a_key_held_down_votes_once(browser, server):
    reviewer = Reviewer(browser, server.url, "Anna")
    before = reviewer.count()
    for _ in range(5):  # playwright repeats a key that is pressed again before it is let go
        reviewer.page.keyboard.down("ArrowDown")
    reviewer.page.keyboard.up("ArrowDown")
    reviewer.page.wait_for_function("before => document.querySelector('.count')?.innerText !== before", arg=before)
    reviewer.ready()
    assert reviewer.count() == f"1 of {COUNT}"
    reviewer.page.keyboard.press("Control+ArrowDown")
    reviewer.page.reload()
    reviewer.ready()
    assert reviewer.count() == f"1 of {COUNT}"


def test_from_two_models_to_results(tiny_base, tmp_path):
    """The commands alone, with models that really draw; what was drawn is not drawn again."""
    from raysd.assets.make.skeleton import build

    build(tmp_path / "other", seed=2)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    words = ["study", "new", str(tiny_base), str(tmp_path / "other"), "--prompts", str(tmp_path / "prompts.txt")]
    options = ["--name", "one", "--count", "3", "--steps", "2"]
    store = tmp_path / "store"
    done = raysd(*words, *options, storage=store)
    assert done.returncode == 0, done.stderr
    assert "draw: 12/12" in done.stderr
    files = {path: path.stat().st_mtime_ns for path in (store / "studies" / "one").glob("*.png")}
    assert len(files) == 6
    next(iter(files)).unlink()
    again = raysd(*words, *options, storage=store)
    assert "draw: 2/2" in again.stderr
    kept = [path for path, when in files.items() if path.stat().st_mtime_ns == when]
    assert len(kept) == 5
    assert json_of(raysd("study", "results", "one", "--json", storage=store))["pairs"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["new", "tiny-sd", "tiny-sd"], "tiny-sd and tiny-sd: the same model"),
        (["new", "tiny-sd", "./nowhere"], "./nowhere: no such folder"),
        (["new", "tiny-sd", "tiny-sd", "--prompts", "absent.txt"], "prompts absent.txt: no such file"),
        (["serve", "absent"], "study absent: not in"),
        (["results", "absent"], "study absent: not in"),
        (["serve", "one", "--host", "0.0.0.0"], "--public"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_requests_are_short_errors(words, message, tmp_path):
    made(tmp_path, plan(count=1))
    done = raysd("study", *words, storage=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3
