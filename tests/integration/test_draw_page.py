"""The page at / as people meet it: in a browser, before a real application that draws with the bundled model."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raysd.feedback.records import Records
from raysd.serve.http.desk import Busy
from tests.serving import Parts, listening, parts

MARKUP = '<b id="bold">a fox</b><script>document.title = "owned"</script> {{ 7 * 7 }}'
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
LEAST_TOUCH = 40
"""Pixels: the height of what a finger has to hit."""
STEPS = 6
PATIENCE = 120
"""Seconds: the first picture waits until the model is loaded."""


class Server:
    """A service that listens. Its desk takes as many steps as it is allowed, or all that it has to."""

    def __init__(self, service: Parts, url: str):
        self.service, self.url = service, url
        self._allowed = threading.Semaphore(0)
        self.free()

    def hold(self) -> None:
        self.service.desk.step = lambda: self._allowed.acquire(timeout=PATIENCE) and None

    def allow(self, steps: int) -> None:
        self._allowed.release(steps)

    def free(self) -> None:
        self.service.desk.step = lambda: None
        self._allowed.release()

    def said(self) -> list[dict[str, Any]]:
        """All feedback that is kept, the oldest first."""
        return Records(self.service.database).find()[::-1]

    def opinions(self) -> list[dict[str, Any]]:
        return [{name: row[name] for name in ("thumb", "stars", "tags", "text") if row[name]} for row in self.said()]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    service = parts(tmp_path)
    with listening(service) as url:
        running = Server(service, url)
        yield running
        running.free()


@pytest.fixture
def comes(browser: Any) -> Iterator[Callable[..., "Person"]]:
    """Opens the page for somebody new."""
    contexts = []

    def come(url: str, screen: dict[str, int] = DESK, **context: Any) -> Person:
        contexts.append(browser.new_context(viewport=screen, **context))
        return Person(contexts[-1], url)

    yield come
    for context in contexts:
        context.close()


class Person:
    """Somebody in a browser of their own, and all that it asked for and complained of."""

    def __init__(self, context: Any, url: str):
        self.url, self.context = url, context
        self.page = context.new_page()
        self.page.set_default_timeout(1000 * PATIENCE)
        self.asked: list[str] = []
        self.answers: list[Any] = []
        self.problems: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("response", lambda answer: self.answers.append(answer))
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(url)

    def ready(self) -> "Person":
        self.page.wait_for_selector("#model-field option", state="attached")
        return self

    def write(self, prompt: str, model: str = "tiny-sd", seed: str = "") -> None:
        self.page.select_option("[name=model]", model)
        self.page.evaluate("document.querySelector('#settings').open = true")
        self.page.fill("[name=num_inference_steps]", str(STEPS))
        self.page.fill("[name=seed]", seed)
        self.page.fill("[name=prompt]", prompt)

    def draw(self, prompt: str, **more: str) -> None:
        self.write(prompt, **more)
        self.page.press("[name=prompt]", "Enter")
        self.page.wait_for_selector("#drawn:not([hidden])")

    def go(self, view: str) -> None:
        self.page.click(f"nav >> text={view}")
        self.page.wait_for_selector(f"#{view.lower()}:not([hidden])")

    def until(self, holds: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end
            self.page.wait_for_timeout(50)

    def checked(self) -> None:
        """Nothing was asked of another host, and the browser had nothing to complain of."""
        assert not [url for url in self.asked if not url.startswith((self.url, f"blob:{self.url}", "data:"))]
        assert self.problems == []


def test_a_picture_is_drawn_before_ones_eyes_rated_found_again_and_deleted(server, comes):
    person = comes(server.url).ready()
    server.hold()
    person.write("a red circle", seed="7")
    person.page.press("[name=prompt]", "Enter")
    person.page.wait_for_selector("#progress:not([hidden]) progress")
    assert person.page.is_disabled("#go")
    server.allow(2)
    person.page.wait_for_selector("#picture img[alt='Preview: a red circle']")
    server.free()
    person.page.wait_for_selector("#drawn:not([hidden])")
    assert person.page.get_attribute("#picture img:last-child", "alt") == "a red circle"
    assert person.page.evaluate("document.querySelector('#picture img:last-child').naturalWidth") == 64
    assert person.page.inner_text("#facts").startswith("tiny-sd · seed 7 · 6 steps · ")
    assert person.page.inner_text("#status") == "The picture is done"
    assert person.page.is_hidden("#progress")

    person.page.click("[aria-label='I like it']")
    person.page.click(".stars label:nth-of-type(2)")
    person.page.click(".stars label:nth-of-type(4)")  # the one that is meant: the other is not sent
    person.page.click("text=blurry")
    person.page.fill("[name=text]", "<i>quite</i> round")
    person.page.press("[name=text]", "Enter")
    opinions = [{"stars": 4}, {"tags": ["blurry"], "text": "<i>quite</i> round"}, {"thumb": "up"}]
    person.until(lambda: [said for said in opinions if said not in server.opinions()] == [])
    assert len(server.opinions()) == len(opinions)

    person.page.reload()
    person.ready()
    person.go("History")
    person.page.wait_for_selector(".gallery img")
    person.page.click(".gallery button")
    person.page.wait_for_selector("#picture img")
    assert person.page.get_attribute("[value=up]", "aria-pressed") == "true"
    assert person.page.is_checked("[name=stars][value='4']")
    with person.page.expect_download() as saved:
        person.page.click("#save")
    assert Path(saved.value.path()).read_bytes()[12:16] == b"IHDR"
    person.page.click("#delete")
    with person.page.expect_response(lambda answer: answer.request.method == "DELETE") as gone:
        person.page.click("#delete")
    assert gone.value.status == 204
    person.go("History")
    assert person.page.locator(".gallery li").count() == 0
    person.checked()


def test_two_versions_are_compared_blind_by_keyboard(server, comes):
    person = comes(server.url).ready()
    person.go("Compare")
    person.write("a blue square", model="cats", seed="11")
    begun = len(person.answers)
    person.page.press("[name=prompt]", "Enter")
    person.page.wait_for_selector("#answers:not([hidden])")
    sent = [answer for answer in person.answers[begun:] if not answer.url.startswith(("blob:", "data:"))]
    assert sum(answer.url.endswith("/picture") for answer in sent) == 2
    for answer in sent:
        said = answer.body() + json.dumps(answer.all_headers()).encode()
        for word in (b"cats@", b"1" * 64, b"2" * 64, b"tEXt", b"iTXt", b"eXIf"):
            assert word not in said, answer.url

    person.page.keyboard.press("ArrowLeft")
    person.page.wait_for_selector("#again:not([hidden])")
    shown = person.page.locator(".reveal").all_inner_texts()
    assert sorted(text.split()[0] for text in shown) == ["cats@1", "cats@2"]
    assert "your choice" in shown[0]
    assert "your choice" not in shown[1]

    person.page.keyboard.press("Enter")
    person.page.wait_for_selector("#answers:not([hidden])")
    person.page.keyboard.press("Control+ArrowRight")
    person.page.keyboard.press("ArrowDown")
    person.page.wait_for_selector("#again:not([hidden])")
    kept = [row["pair"] for row in server.said()]
    assert [(pair["choice"], pair["blind"]) for pair in kept] == [("left", True), ("tie", True)]
    (asked,) = [answer.json() for answer in sent if answer.url.endswith("/v1/comparisons")]
    assert (kept[0]["left"], kept[0]["right"]) == (asked["left"], asked["right"])
    assert [kept[0]["left_version"], kept[0]["right_version"]] == [text.split()[0] for text in shown]
    person.go("History")
    person.until(lambda: person.page.locator(".gallery img").count() == 4)
    person.checked()


def test_a_prompt_with_markup_is_text(server, comes):
    person = comes(server.url).ready()
    person.draw(MARKUP)
    assert person.page.inner_text("#caption") == MARKUP
    person.go("History")
    person.page.wait_for_selector(".gallery img")
    assert person.page.inner_text(".gallery .prompt") == MARKUP
    person.go("Compare")
    person.write(MARKUP, model="cats")
    person.page.click("#go")
    person.page.wait_for_selector("#answers:not([hidden])")
    assert person.page.inner_text("#pair-prompt") == MARKUP
    assert person.page.locator("#bold").count() == 0
    assert person.page.title() == "raysd"
    person.checked()


def test_on_a_phone_nothing_is_cut_off_and_all_can_be_hit(server, comes):
    person = comes(server.url, PHONE, is_mobile=True, has_touch=True).ready()
    person.draw("a red circle " + "x" * 200)
    for view in ("Draw", "Compare", "History"):
        person.go(view)
        if view == "Compare":
            person.page.select_option("[name=model]", "cats")
            person.page.tap("#go")
            person.page.wait_for_selector("#answers:not([hidden])")
        assert person.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        for target in person.page.locator("button, a, summary, select, textarea, .stars label, .tags label").all():
            if target.is_visible():
                box = target.bounding_box()
                assert box["x"] >= 0, target.inner_text()
                assert box["x"] + box["width"] <= PHONE["width"], target.inner_text()
                assert box["height"] >= LEAST_TOUCH, target.inner_text()
    person.go("Compare")
    person.page.tap("#answers [data-choice=right]")
    person.page.wait_for_selector("#again:not([hidden])")
    assert [row["pair"]["choice"] for row in server.said()] == ["right"]
    person.checked()


def test_stopping_cancels_and_a_refusal_is_told(server, comes):
    person = comes(server.url).ready()
    server.hold()
    person.write("a red circle")
    person.page.click("#go")
    person.until(lambda: len(server.service.desk.asks) == 1)
    person.page.click("#stop")
    person.page.wait_for_selector("#go:enabled")
    (prediction,) = server.service.queue.find(None, None, 10)
    person.until(lambda: server.service.queue.get(prediction.id).cancel_requested)
    server.free()
    assert person.page.is_hidden("#alert")
    assert person.page.is_hidden("#drawn")

    async def busy(ask):
        raise Busy("too much is being drawn", 7)

    server.service.desk.submit = busy
    person.page.click("#go")
    person.page.wait_for_selector("#alert:not([hidden])")
    assert person.page.inner_text("#alert") == "too much is being drawn\nTry again in 7 s."
    assert person.page.is_enabled("#go")
    assert len(person.problems) == 1
    assert "the server responded with a status of 503" in person.problems[0]


def test_a_key_is_asked_for_and_stays_in_the_tab(comes, tmp_path):
    service = parts(tmp_path, public=True)
    key = service.key()
    with listening(service) as url:
        person = comes(url, PHONE)
        person.page.wait_for_selector("#key-field:focus")
        assert person.page.is_hidden("#ask")
        person.page.keyboard.type("raysd_wrong")
        person.page.keyboard.press("Enter")
        person.page.wait_for_selector("#alert:not([hidden])")
        person.page.fill("#key-field", key)
        person.page.keyboard.press("Enter")
        person.ready()
        person.draw("a red circle")
        assert person.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        assert key in person.page.evaluate("JSON.stringify(sessionStorage)")
        assert key not in person.page.evaluate("JSON.stringify(localStorage)") + person.page.content()
        person.page.reload()
        person.ready()
        other = person.context.new_page()
        other.goto(url)
        other.wait_for_selector("#key-field:focus")
        person.page.click("#forget-key")
        assert person.page.is_hidden("#ask")
        assert key not in person.page.evaluate("JSON.stringify(sessionStorage)")
