"""Imports run downwards, in the order that CONTRIBUTING.md states."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "raysd").rglob("*.py")
}
UPWARDS = {
    ("raysd.train.launch", "raysd.plan.fit"),
    ("raysd.train.request", "raysd.plan.fit"),
}
"""A run asks whether it fits before it starts; what fits is planned from the engines' own sizes."""


def stated() -> list[set[str]]:
    """The levels, lowest first."""
    text = re.search(r"Imports run downwards: ([^.]+)\.", (ROOT / "CONTRIBUTING.md").read_text())
    assert text is not None
    return [{name.strip().replace("/", ".") for name in level.split(",")} for level in text[1].split("→")]


def part(module: str) -> str:
    """What the order names: the first folder or file below raysd/; what makes the assets is apart from them."""
    name = module.removeprefix("raysd.")
    return "assets.make" if name.startswith("assets.make") else name.split(".")[0]


def imports(path: Path) -> Iterator[str]:
    """The modules of raysd that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("raysd."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "raysd":
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else str(node.module) for name in named)


def test_the_order_names_every_part_once():
    names = [name for level in stated() for name in level]
    assert sorted(names) == sorted({part(module) for module in FILES} - {"raysd"})


def test_imports_run_downwards():
    height = {name: number for number, level in enumerate(stated()) for name in level}
    found = {(module, name) for module, path in FILES.items() for name in imports(path) if name != "raysd"}
    upwards = {
        (module, name)
        for module, name in found
        if part(module) != part(name) and height[part(name)] >= height[part(module)]
    }
    assert upwards == UPWARDS
