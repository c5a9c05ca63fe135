"""Plots as SVG: what was drawn is there, and nothing in a label is markup."""

import re
from collections import Counter

import pytest

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


def drawn_with(label):
    yield plots.intervals([Mark(label, 1.0, 0.0, 2.0)])
    yield plots.lines({label: [(0, 1), (1, 2)]}, label, label)
    yield plots.scatter([(label, 1.0), ("b", 2.0)], label, label)
    yield plots.bars({label: 0.5, "b": 1.0}, label)
    yield plots.steps([(0, 1)], label, label)
    yield plots.parallel([[1, 2], [2, 3]], [label, "b"], [1, 2])


@pytest.mark.parametrize("label", ["/models/$\\foo$", "$a^$", "a $5 cat and a $6 dog", r"\$x$_$"])
def test_dollars_in_labels_are_no_formulas(label):
    """A formula that is none would end the report. Each dollar is drawn as the letter that it is."""
    (dollar,) = glyphs(plots.bars({"$": 1}, "")).keys() - glyphs(plots.bars({"": 1}, "")).keys()
    for svg in drawn_with(label):
        assert glyphs(svg)[dollar] >= label.count("$")


def glyphs(svg):
    return Counter(re.findall(r'xlink:href="#(DejaVuSans-\w+)"', svg))


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
