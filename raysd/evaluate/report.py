"""An evaluation for people: a table for the terminal, and one HTML file that opens from disk with no network."""

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from raysd.data.picture import read_picture
from raysd.errors import DataError, NotFound
from raysd.evaluate.intervals import Interval
from raysd.evaluate.judging import Score
from raysd.evaluate.kept import Kept, other_versions
from raysd.evaluate.records import Evaluation, Judged
from raysd.plots import Mark, intervals, lines
from raysd.storage import Storage
from raysd.words import shown

TEMPLATE = Path(__file__).with_name("report.html.j2")
THUMB_SIDE = 192
MOST_PROMPTS = 24
"""Prompts whose pictures a page shows."""
BAND_NAMES = ("least noise", "less noise", "more noise", "most noise")


@dataclass(frozen=True)
class Training:
    """The run that a version comes from: its step records, and the PNGs it drew of fixed prompts by step."""

    run: str
    rows: Sequence[Mapping[str, Any]]
    samples: Mapping[int, Sequence[bytes]]


def table(evaluation: Evaluation) -> RenderableType:
    """The scores for a terminal. Foreign text is neither markup nor escape codes in it."""
    models = [evaluation.model, *([evaluation.against] if evaluation.against else [])]
    rows = Table(box=box.SIMPLE)
    rows.add_column("score", style="bold")
    for model in models:
        rows.add_column(Text(shown(model.ref, 60)), justify="right")
    for name in ("n", "better", "by", "remarks"):
        rows.add_column(name, overflow="fold")
    for scores in _rows(models):
        first = scores[0]
        assert first is not None
        values = [_value(score) if score else "" for score in scores]
        rows.add_row(first.name, *values, str(first.n), first.better, Text(shown(first.extractor, 60)), _remark(first))
    found = [Text(_sentence(score)) for score in evaluation.differences]
    remarks = [Text(f"! {shown(line, 300)}", style="yellow") for line in evaluation.warnings]
    return Group(rows, *found, *remarks)


def page(evaluation: Evaluation, storage: Storage, out: Path, training: Training | None = None) -> None:
    """Write the evaluation as one HTML file: no scripts, nothing fetched, foreign text escaped.

    Beside the models' pictures are those of other versions that were evaluated with the same prompts and seeds.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    models = [evaluation.model, *([evaluation.against] if evaluation.against else [])]
    compared = [Kept(model.ref, model.album) for model in models]
    html = template.render(
        evaluation=evaluation,
        models=models,
        rows=[(scores[0], [_value(score) if score else "" for score in scores]) for scores in _rows(models)],
        remark=_remark,
        sentences=[_sentence(score) for score in evaluation.differences],
        charts=list(_charts(models)),
        sheet=_sheet(evaluation, [*other_versions(compared, storage), *reversed(compared)], storage),
        nearest=_nearest(evaluation.model, storage),
        training=None if training is None else _training_part(training),
        spec=json.dumps(evaluation.spec, indent=2, ensure_ascii=False),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")


def _training_part(training: Training) -> dict[str, Any]:
    curves = {
        name: [(row["step"], row[field]) for row in training.rows if row.get(field) is not None]
        for name, field in (("training", "loss"), ("validation", "validation_loss"))
    }
    curves = {name: points for name, points in curves.items() if points}
    samples = [
        (step, [_url(Image.open(io.BytesIO(body)).convert("RGB")) for body in bodies])
        for step, bodies in sorted(training.samples.items())
    ]
    drawing = Markup(lines(curves, "step", "loss")) if curves else None
    return {"run": training.run, "curves": drawing, "samples": samples}


def _rows(models: Sequence[Judged]) -> Iterator[list[Score | None]]:
    """The scores of all models, losses first, a row each."""
    found = [{score.name: score for score in (*_losses(model), *model.scores)} for model in models]
    yield from ([scores.get(name) for scores in found] for name in found[0])


def _losses(model: Judged) -> Iterator[Score]:
    if model.losses is None:
        return
    names = (("validation_loss", model.losses.validation), ("training_loss", model.losses.train))
    for name, interval in (*names, ("overfitting_gap", model.losses.gap)):
        if interval is not None:
            note = "validation minus training" if name == "overfitting_gap" else ""
            yield Score(name, interval.value, interval.n, "lower", "", interval.low, interval.high, note=note)


def _value(score: Score) -> str:
    if score.low is not None and score.high is not None:
        return f"{score.value:.4g} ({score.low:.4g} to {score.high:.4g})"
    return f"{score.value:.4g}" + (f" ±{score.deviation:.2g}" if score.deviation is not None else "")


def _remark(score: Score) -> str:
    null = f"equal sets: {score.null[0]:.3g} to {score.null[1]:.3g}" if score.null else ""
    return "; ".join(part for part in (null, score.note) if part)


def _sentence(score: Score) -> str:
    return f"{score.name}, model minus against: {_value(score)} ({score.note})"


def _charts(models: Sequence[Judged]) -> Iterator[tuple[str, Markup]]:
    """Titles and drawings."""
    marks = [mark for model in models for mark in _loss_marks(model)]
    if marks:
        yield "Loss by timestep band", Markup(intervals(marks))
    for scores in _rows(models):
        found = [(model, score) for model, score in zip(models, scores, strict=True) if score is not None]
        marks = [Mark(model.ref, score.value, *_span(score)) for model, score in found]
        null = found[0][1].null
        if null is not None:
            marks.append(Mark("equal sets", sum(null) / 2, null[0], null[1], "band"))
        yield found[0][1].name, Markup(intervals(marks))


def _span(score: Score) -> tuple[float, float]:
    if score.low is not None and score.high is not None:
        return score.low, score.high
    deviation = score.deviation or 0.0
    return score.value - deviation, score.value + deviation


def _loss_marks(model: Judged) -> Iterator[Mark]:
    if model.losses is None:
        return
    splits: tuple[tuple[str, tuple[Interval, ...]], ...] = (
        ("held out", model.losses.bands),
        ("training", model.losses.train_bands),
    )
    for split, bands in splits:
        for name, band in zip(BAND_NAMES, bands, strict=False):
            kind = "mean" if split == "held out" else "train"
            yield Mark(f"{model.ref}, {split}, {name}", band.value, band.low, band.high, kind)


def _sheet(evaluation: Evaluation, order: Sequence[Kept], storage: Storage) -> list[dict[str, Any]]:
    """Prompt by prompt, the same seed by each version, before and after last."""
    count = min(len(evaluation.prompts), int(evaluation.spec["count"]), MOST_PROMPTS)
    return [
        {
            "prompt": evaluation.prompts[number].text,
            "pictures": [(kept.ref, _drawn(storage, kept.album, number)) for kept in order],
        }
        for number in range(count)
    ]


def _nearest(model: Judged, storage: Storage) -> list[dict[str, Any]]:
    return [
        {
            "drawn": _drawn(storage, model.album, found.picture),
            "training": _training_picture(found.path),
            "name": found.name,
            "similarity": f"{found.similarity:.3f}",
        }
        for found in model.nearest
    ]


def _drawn(storage: Storage, album: str, number: int) -> str:
    try:
        body = storage.read(f"{album}/pictures/{number:05}.png")
    except NotFound:
        return ""
    return _url(Image.open(io.BytesIO(body)).convert("RGB"))


def _training_picture(path: str) -> str:
    try:
        return _url(read_picture(path))
    except DataError:
        return ""


def _url(picture: Image.Image) -> str:
    picture.thumbnail((THUMB_SIDE, THUMB_SIDE), Image.Resampling.BICUBIC)
    body = io.BytesIO()
    picture.save(body, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(body.getvalue()).decode()
