"""The report for people: complete, bounded, and safe with text that nobody vouches for."""

import base64
import io
import re

import pytest
from PIL import Image
from rich.console import Console

from raysd.config import DataSpec
from raysd.data import report as module
from raysd.data.check import check
from raysd.data.report import page, table
from raysd.data.source import open_source
from raysd.storage import Storage
from tests.pictures import encoded, folder, photo

MARKUP = '<script>alert("x")</script><img src=x onerror=alert(1)>'


def checked(root, **fields):
    source = open_source(str(root), Storage(str(root / ".storage")))
    return source, check(source, DataSpec(source=str(root), resolution=64, **fields))


def text(report, width=100):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor")
    console.print(table(report))
    return console.file.getvalue()


def html(tmp_path, source, report):
    page(report, source, tmp_path / "out" / "report.html")
    return (tmp_path / "out" / "report.html").read_text("utf-8")


@pytest.fixture
def mixed(tmp_path):
    root = folder(tmp_path / "set", 12)
    (root / "again.png").write_bytes(encoded(photo(3)))
    (root / "again.txt").write_text("again")
    (root / "bad.png").write_bytes(b"junk")
    (root / "blank.png").write_bytes(encoded(Image.new("RGB", (40, 40))))
    (root / "notes.md").write_text("x")
    return root


def test_the_table_says_everything_that_was_found(mixed):
    shown = re.sub(r"\x1b\[[0-9;]*m", "", text(checked(mixed)[1]))
    for part in ("15 pictures", "unreadable", "bad.png", "too small", "duplicates", "1 exact, 0 near", "no caption"):
        assert part in shown
    assert "refused: 1 picture without a caption (blank.png)" in shown
    assert "! 1 file neither picture nor caption, not used: notes.md" in shown
    assert "can be trained on" not in shown
    assert "can be trained on" in text(checked(mixed, prompt="x {caption}")[1])


def test_the_page_shows_findings_and_thumbnails_and_fetches_nothing(mixed, tmp_path):
    source, report = checked(mixed)
    shown = html(tmp_path, source, report)
    for part in ("Duplicates", "Blurry or blank", "Examples", "Unreadable, left out", "a photo number 3", "again.png"):
        assert part in shown
    urls = re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^"> )]+)', shown)
    assert urls
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
    assert "default-src 'none'" in shown
    for url in urls:
        thumbnail = Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1])))
        assert max(thumbnail.size) <= module.THUMB_SIDE


def test_the_page_is_bounded(tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr(module, "MOST_THUMBS", 5)
    monkeypatch.setattr(module, "read_picture", lambda path: reads.append(path) or photo(1))
    source, report = checked(folder(tmp_path / "set", 40, captions=False))
    shown = html(tmp_path, source, report)
    assert (len(reads), shown.count("<figure>")) == (
        5,
        5 + len(set(report.examples) & set(report.missing_captions[:5])),
    )


def test_markup_in_captions_and_names_is_escaped(tmp_path):
    root = folder(tmp_path / "set", 10)
    for index in range(3):
        (root / f"p{index}.txt").write_text(MARKUP)
    (root / "<b>x<b>.png").write_bytes(b"junk")
    (root / "p4.png").write_bytes(encoded(photo(5)))
    (root / "p4.txt").write_text("{{ 7 * 7 }}{% raw %}")
    source, report = checked(root)
    shown = html(tmp_path, source, report)
    assert "<script" not in shown
    assert "<img src=x" not in shown
    assert "<b>x" not in shown
    assert "&lt;script&gt;alert" in shown
    assert "&lt;b&gt;x&lt;b&gt;.png" in shown
    assert "49" not in re.sub(r"base64,[^\"]*", "", shown)


def test_escape_codes_and_rich_markup_are_plain_in_the_terminal(tmp_path):
    root = folder(tmp_path / "set", 10)
    (root / "\x1b]0;owned\x07[red]x[red]\n.png").write_bytes(b"junk")
    (root / "p1.txt").write_text("[bold]\x1b[2Jcaption[/nonsense]")
    (root / "p2.txt").write_text("[bold]\x1b[2Jcaption[/nonsense]")
    shown = text(checked(root)[1], width=300)
    assert "\x1b]0;" not in shown
    assert "\x1b[2J" not in shown
    assert "\x07" not in shown
    assert "[red]x[red]" in shown
    assert "[bold] [2Jcaption[/nonsense]" in shown


def test_a_picture_that_vanished_leaves_the_page_whole(tmp_path):
    root = folder(tmp_path / "set", 10)
    source, report = checked(root)
    (root / "p1.png").unlink()
    assert html(tmp_path, source, report).count("<figure>") == 10
