"""From the words of a command to a spec."""

import os
from pathlib import Path
from typing import Any

from rich.table import Table

from raysd.cli.output import flat, out
from raysd.config import SearchSpec, TrainingSpec, describe, load, override, read_toml
from raysd.config.search import Choice
from raysd.errors import RequestError
from raysd.jobs.outcome import FILE as JOB
from raysd.tune.space import check_fixed

RECIPES = Path(__file__).parents[1] / "recipes"


def recipe_of(name: str) -> TrainingSpec:
    """A recipe that ships, or a file. Raises SpecError or RequestError."""
    path = Path(name)
    if path.suffix != ".toml" and "/" not in name:
        path = RECIPES / f"{name}.toml"
        if not path.exists():
            known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.toml")))
            raise RequestError(f"recipe {name}: not one of {known}, and not a .toml file")
    return load(TrainingSpec, read_toml(path), path.name)


def grounded(spec: TrainingSpec) -> TrainingSpec:
    """Relative local paths made absolute: workers and later commands run in other folders.

    Not in a job, whose folder is another one each time that it is sent, and the run is the same.
    """
    if JOB in os.environ:
        return spec
    source = spec.data.source
    changes = {"base": _grounded_base(spec.base)}
    if "://" not in source and Path(source).expanduser().exists() and source != "sample":
        changes["data.source"] = str(Path(source).expanduser().absolute())
    return override(spec, changes)


def _grounded_base(ref: str) -> str:
    base = Path(ref).expanduser()
    is_path = ref.startswith((".", "~")) or base.suffix == ".safetensors" or (base / "model_index.json").exists()
    return str(base.absolute()) if is_path and base.exists() and ref != "tiny-sd" else ref


def grounded_search(spec: SearchSpec) -> SearchSpec:
    """The same for what a search's trials start from and are judged with."""
    if JOB in os.environ:
        return spec
    bases = spec.space.get("base")
    if isinstance(bases, Choice):
        values = tuple(_grounded_base(base) if isinstance(base, str) else base for base in bases.values)
        spec = spec.model_copy(update={"space": {**spec.space, "base": bases.model_copy(update={"values": values})}})
    given = {name: getattr(spec.evaluation, name) for name in ("prompts", "inception", "clip")}
    changes = {f"evaluation.{name}": str(Path(path).expanduser().absolute()) for name, path in given.items() if path}
    return override(spec, changes) if changes else spec


def dotted(arguments: list[str]) -> dict[str, Any]:
    """["--optim.lr", "1e-4", "--scale.compile=true"] -> {"optim.lr": "1e-4", "scale.compile": "true"}."""
    changes: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise RequestError(f"{word}: expected --dotted.path VALUE")
        path, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise RequestError(f"--{path}: a value is missing")
            value = rest.pop(0)
        changes[path] = value
    return changes


def search_of(file: str, arguments: list[str]) -> tuple[SearchSpec, dict[str, Any]]:
    """A search with those of the options that are its own, and {path: value} of what it and the others set of the training.

    Raises SpecError or RequestError.
    """
    path = Path(file)
    spec, changes = load(SearchSpec, read_toml(path), path.name), dotted(arguments)
    own = {name: value for name, value in changes.items() if name.split(".")[0] in SearchSpec.model_fields}
    training = {name: value for name, value in changes.items() if name not in own}
    spec = override(spec, own) if own else spec
    check_fixed(spec, training)
    return spec, {**spec.training, **training}


def train_help(recipe: str | None) -> None:
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.toml")))
    out.print("raysd train RECIPE|FILE.toml [--name RUN] [--dry-run] [--json] [--any.dotted.path VALUE ...]")
    out.print(f"recipes: {known}\n")
    values = flat(recipe_of(recipe).model_dump(mode="json")) if recipe else {}
    table = Table("path", "value" if recipe else "default", "values", "meaning", box=None)
    for row in describe(TrainingSpec):
        if recipe and row.path.startswith("method.") and row.path not in values:
            continue
        shown = values.get(row.path, row.default)
        table.add_row(row.path, "" if shown is None else str(shown), row.kind, row.meaning)
    out.print(table)
