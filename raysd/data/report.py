"""A check's report for people: a table for the terminal, and one HTML file with a contact sheet."""

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from PIL import Image
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from raysd.data.findings import Report
from raysd.data.picture import read_picture
from raysd.data.source import Entry, Source
from raysd.errors import DataError
from raysd.words import named, shown

TEMPLATE = Path(__file__).with_name("report.html.j2")
THUMB_SIDE = 160
MOST_THUMBS = 120
"""Pictures in a page, a few KB each."""
MOST_ROWS = 20
MOST_DUPLICATES = 10
"""Groups of duplicates, and three pictures of each."""


def table(report: Report) -> RenderableType:
    """Counts, what was done, and the verdict, for a terminal. Foreign text is neither markup nor escape codes in it."""
    title = Text(f"{report.origin}: {report.found:,} pictures")
    rows = Table(box=box.SIMPLE, show_header=False)
    rows.add_column(style="bold")
    rows.add_column(justify="right")
    rows.add_column(overflow="fold")
    for what, count, detail in _rows(report):
        rows.add_row(what, count, Text(detail))
    remarks = [Text(f"! {shown(line, 300)}", style="yellow") for line in report.warnings]
    refused = [Text(f"refused: {shown(line, 300)}", style="red") for line in report.refusals]
    return Group(title, rows, *remarks, *(refused or [Text("these pictures can be trained on", style="green")]))


def page(report: Report, source: Source, out: Path) -> None:
    """Write the report as one HTML file: no scripts, nothing fetched, foreign text escaped.

    The contact sheet reads at most 120 pictures of the source again, one at a time.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    html = template.render(report=report, rows=list(_rows(report)), sheets=_sheets(report, source), most=MOST_ROWS)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")


def _rows(report: Report) -> Iterator[tuple[str, str, str]]:
    """(what, how many, detail), without what did not occur."""
    again = [name for group in report.duplicates for name in group.names[1:]]
    exact = sum(len(group.names) - 1 for group in report.duplicates if group.exact)
    split = "" if report.train is None else f"{report.train:,} to train, {report.validation:,} to validate"
    lists: tuple[tuple[str, Sequence[str], str], ...] = (
        ("unreadable", [f"{f.name} ({f.what})" for f in report.unreadable], ""),
        ("too small", report.upscaled, "scaled up: "),
        ("duplicates", again, f"{exact:,} exact, {len(again) - exact:,} near: "),
        ("blurry or blank", [f.name for f in report.blurry], ""),
        ("unlike all others", [f.name for f in report.outliers], ""),
        ("dropped", report.dropped, ""),
        ("no caption", report.missing_captions, ""),
    )
    yield "used", f"{report.used:,}", split
    yield from ((what, f"{len(names):,}", detail + named(names)) for what, names, detail in lists if names)
    if report.replaced_captions:
        yield "captions replaced", f"{report.replaced_captions:,}", "by data.prompt"
    if report.diversity is not None:
        yield "diversity", f"{report.diversity:.2f}", "0 copies of one picture, 1 all quite different"
    for balance in report.balance:
        detail = "; ".join(f"{g.count:,} x {shown(g.key, 40)} (weight {g.weight:.2f})" for g in balance.groups[:3])
        yield f"{balance.axis}s", f"{len(balance.groups):,}", detail + ("; …" if len(balance.groups) > 3 else "")


Cell = dict[str, str | None]


class _Thumbs:
    """Thumbnails as data URLs, each picture read once and no more of them than a page holds."""

    def __init__(self, source: Source):
        self._entries = {entry.name: entry for entry in source.entries}
        self._made: dict[str, str] = {}

    def cell(self, name: str, remark: str = "") -> Cell | None:
        """What the page shows of a picture; None where it is gone or the page is full."""
        entry = self._entries.get(name)
        if entry is None or (name not in self._made and len(self._made) >= MOST_THUMBS):
            return None
        if name not in self._made:
            self._made[name] = _thumbnail(entry)
        return {"name": name, "caption": entry.caption, "remark": remark, "url": self._made[name]}


def _sheets(report: Report, source: Source) -> list[tuple[str, list[Cell]]]:
    """(title, pictures) of each contact sheet, problems first."""
    thumbs = _Thumbs(source)
    duplicates = [
        (name, "used" if place == 0 else f"{'the same as' if group.exact else 'nearly'} {group.names[0]}")
        for group in report.duplicates[:MOST_DUPLICATES]
        for place, name in enumerate(group.names[:3])
    ]
    sheets: tuple[tuple[str, Sequence[tuple[str, str]]], ...] = (
        ("Duplicates", duplicates),
        ("Blurry or blank", [(f.name, f"blur {f.what}") for f in report.blurry[:MOST_ROWS]]),
        ("Unlike all others", [(f.name, f"score {f.what}") for f in report.outliers[:MOST_ROWS]]),
        ("No caption", [(name, "") for name in report.missing_captions[:MOST_ROWS]]),
        ("Examples", [(name, "") for name in report.examples]),
    )
    cells = ((title, [thumbs.cell(*picture) for picture in pictures]) for title, pictures in sheets)
    return [(title, [cell for cell in row if cell]) for title, row in cells if any(row)]


def _thumbnail(entry: Entry) -> str:
    try:
        picture = read_picture(entry.path)
    except DataError:
        return ""
    picture.thumbnail((THUMB_SIDE, THUMB_SIDE), Image.Resampling.BICUBIC)
    body = io.BytesIO()
    picture.save(body, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(body.getvalue()).decode()
