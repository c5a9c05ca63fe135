"""Plots as SVG: what was drawn is there, and nothing in a label is markup."""

import re

from raysd import plots
from raysd.plots import Mark

HOSTILE = "<script>alert(1)</script>"


def points(svg, colour):
    """The x coordinates of all drawn lines of a colour."""
    drawn = re.findall(rf'<path d="([^"]*)"[^>]*style="[^"]*stroke: {colour}', svg)
    return [float(x) for path in drawn for x in re.findall(r"[ML] ([\d.]+)", path)]


def test_marks_are_in_order_and_an_end_that_is_not_finite_is_at_the_value():
    marks = [Mark("a", 1.0, 0.5, 2.0), Mark("b", 3.0, float("-inf"), float("inf"), "train")]
    svg = plots.intervals(marks)
    first, second = points(svg, "#1f77b4"), points(svg, "#ff7f0e")
    assert min(first) < max(first) < min(second) == max(second)


def test_labels_are_no_markup():
    for svg in (
        plots.intervals([Mark(HOSTILE, 0.0, 0.0, 0.0)]),
        plots.bars({HOSTILE: 1.0}, HOSTILE),
        plots.lines({HOSTILE: [(0, 1)]}, HOSTILE, "y"),
        plots.scatter([(HOSTILE, 1.0)], "x", HOSTILE),
        plots.parallel([[1.0, 2.0]], [HOSTILE, "b"], [0.0]),
    ):
        assert svg.startswith("<svg")
        assert "script" not in svg
