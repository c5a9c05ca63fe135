"""docs/benchmarks.md from the result files."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import soaks

FILE = Path(__file__).parent.parent / "docs" / "benchmarks.md"

HEAD = """\
# Benchmarks

What raysd costs beside a bare PyTorch loop, and what it gains beside diffusers' own script. Both sides of a ratio are measured in
one run, in turns, and compared by their medians. This page is made from `benchmarks/results/` by
`python -m benchmarks --page`; the files there hold the raw samples, the versions and the flags of the processor.

`python -m benchmarks` runs all of them (`make bench`), `python -m benchmarks NAME ...` some, `--quick` the smallest size of each
to see that it works. Leave the machine alone meanwhile: the load before each is in its file.
"""


def render(
    results: Sequence[Mapping[str, Any]],
    docs: Mapping[str, str],
    commands: Mapping[str, str],
    long: Sequence[Mapping[str, Any]] = (),
) -> str:
    """One section a benchmark. `docs`: what each measures; `commands`: how each is run; `long`: what soaks kept."""
    parts = [HEAD, _overview(results, docs)]
    for name, doc in docs.items():
        title, _, rest = doc.strip().partition("\n\n")
        parts.append(f"## {name}\n\n{_joined(title)}\n")
        if rest:
            parts.append(f"{_joined(rest)}\n")
        parts.append(f"    {commands[name]}\n")
        found = [result for result in results if result["name"] == name]
        parts += [_section(result) for result in found] or ["Not measured yet.\n"]
    parts += [_soaks(body) for body in long]
    return "\n".join(parts)


def _overview(results: Sequence[Mapping[str, Any]], docs: Mapping[str, str]) -> str:
    rows = []
    for name in docs:
        found = [result for result in results if result["name"] == name]
        rows += [[name, *_judged(target), _machine(result)] for result in found for target in result["targets"]]
        if not found:
            rows.append([name, "", "not measured", "", "", ""])
    return _table(["benchmark", "what", "measured", "target", "met", "on"], rows)


def _section(result: Mapping[str, Any]) -> str:
    hardware, versions = result["hardware"], result["versions"]
    parts = [f"### On {_machine(result)}\n"]
    said = ", ".join(f"{package} {number}" for package, number in versions.items() if number != "not installed")
    parts.append(
        f"{result['date'][:10]}, commit {result['commit'] or 'unknown'}, load before it {result['load_before']}. "
        f"{hardware['memory_gib']} GiB of memory; {said}.\n"
    )
    parts.append(_table(["what", "measured", "target", "met"], [_judged(target) for target in result["targets"]]))
    for table in result["tables"]:
        parts += [f"{table['title']}:\n", _table(table["columns"], table["rows"])]
    parts += [f"{note}\n" for note in result["notes"]]
    return "\n".join(parts)


def _soaks(body: Mapping[str, Any]) -> str:
    """The last pass of each long test."""
    columns = ["test", "passed on", "commit", "minutes", "found"]
    return f"## make soak\n\nOn {_machine(body)}:\n\n{_table(columns, soaks.rows(body))}"


def _judged(target: Mapping[str, Any]) -> list[str]:
    unit = "" if target["unit"] == "x" else f" {target['unit']}"
    bound = f"at {'least' if target['at_least'] else 'most'} {target['bound']:g}{unit}"
    return [target["what"], f"{target['value']:.3g}{unit}", bound, "yes" if target["met"] else "**no**"]


def _machine(result: Mapping[str, Any]) -> str:
    hardware = result["hardware"]
    return hardware["gpu"] or f"{hardware['cpu']}, {hardware['cores']} cores"


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def _joined(text: str) -> str:
    """A docstring's lines as one paragraph."""
    return re.sub(r"\s+", " ", text.strip())
