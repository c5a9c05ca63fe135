"""Plots as SVG text, for pages that open from disk with no network."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WIDTH, HEIGHT = 6.4, 3.2  # inches
ROW = 0.25  # inches
LABEL = 60
"""Most characters of a label."""
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """A value and its interval. `kind`: "mean"; "train", in another colour; "band", a span without a value."""

    label: str
    value: float
    low: float
    high: float
    kind: str = "mean"


def intervals(marks: Sequence[Mark]) -> str:
    """One row a mark, from above, on one scale. An end that is not finite is drawn at the value."""
    figure, axes = _axes("", "", height=ROW * (len(marks) + 2))
    colours = {"mean": "tab:blue", "train": "tab:orange", "band": "lightgrey"}
    for place, mark in enumerate(marks):
        ends = [end if np.isfinite(end) else mark.value for end in (mark.low, mark.high)]
        colour = colours[mark.kind]
        axes.plot(ends, [place, place], color=colour, linewidth=8 if mark.kind == "band" else 2)
        if mark.kind != "band":
            axes.plot([mark.value], [place], "o", color=colour, markersize=5)
    axes.set_yticks(range(len(marks)), [_plain(mark.label[-LABEL:]) for mark in marks])
    axes.set_ylim(len(marks) - 0.5, -0.5)
    return _svg(figure)


def lines(curves: Mapping[str, Points], x: str, y: str, ends: Sequence[tuple[float, float]] = ()) -> str:
    """One line a curve; `ends` are marked with a cross."""
    figure, axes = _axes(x, y)
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=_plain(name), linewidth=1, marker=".", markersize=3)
    if ends:
        axes.plot(*zip(*ends, strict=True), "kx", markersize=5)
    if len(curves) <= 12 and any(curves):
        axes.legend(fontsize="x-small", frameon=False)
    return _svg(figure)


def scatter(points: Sequence[tuple[Any, float]], x: str, y: str, log: bool = False) -> str:
    """Values that are no numbers become places on the axis."""
    figure, axes = _axes(x, y)
    numbers = all(isinstance(value, int | float) for value, _ in points)
    places = [value if numbers else _plain(str(value)) for value, _ in points]
    axes.scatter(places, [height for _, height in points], s=14)
    if log and numbers:
        axes.set_xscale("log")
        axes.tick_params(axis="x", which="minor", labelbottom=False)
    return _svg(figure)


def bars(values: Mapping[str, float], x: str) -> str:
    """Horizontal bars, the largest first."""
    figure, axes = _axes(x, "")
    names = sorted(values, key=lambda name: values[name])
    axes.barh([_plain(name) for name in names], [values[name] for name in names])
    return _svg(figure)


def steps(points: Points, x: str, y: str) -> str:
    """A value that holds until the next point."""
    figure, axes = _axes(x, y)
    axes.step(*zip(*points, strict=True), where="post")
    axes.set_ylim(bottom=0)
    return _svg(figure)


def parallel(rows: Sequence[Sequence[float]], columns: Sequence[str], colour: Sequence[float]) -> str:
    """Parallel coordinates: a line a row, each column scaled to its own range; dark is low in `colour`."""
    import matplotlib

    figure, axes = _axes("", "")
    table = np.asarray(rows, dtype=float)
    low, span = table.min(axis=0), np.ptp(table, axis=0)
    scaled = (table - low) / np.where(span > 0, span, 1)
    shade = np.argsort(np.argsort(colour)) / max(1, len(colour) - 1)
    for row, value in zip(scaled, shade, strict=True):
        axes.plot(range(len(columns)), row, color=matplotlib.colormaps["viridis"](value), linewidth=1)
    axes.set_xticks(
        range(len(columns)),
        [f"{_plain(name)}\n{a:.3g} to {a + b:.3g}" for name, a, b in zip(columns, low, span, strict=True)],
    )
    axes.tick_params(axis="x", labelsize="x-small")
    axes.set_yticks([])
    return _svg(figure)


def _axes(x: str, y: str, height: float = HEIGHT) -> tuple[Any, Any]:
    """A figure that no global state knows of."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(_plain(x))
    axes.set_ylabel(_plain(y))
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plain(text: str) -> str:
    """Text from elsewhere for a label: what is between two dollars would be taken for a formula, and often is none."""
    return text.replace("$", r"\$")


def _svg(figure: Any) -> str:
    """The <svg> element without comments. Text is drawn as outlines, so that nothing in a label can be markup."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return re.sub(r"<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
