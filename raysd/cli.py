"""The command `raysd`: one function a verb, which reads a spec and calls the library."""

import contextlib
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from raysd.config import DataSpec, TrainingSpec, describe, load, override, read_toml
from raysd.console import Watcher, errors
from raysd.errors import RaysdError, RequestError
from raysd.quiet import native_logs, quiet_libraries

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
data_app = typer.Typer(no_args_is_help=True, help="Look at a data set.")
runs_app = typer.Typer(no_args_is_help=True, help="Training runs.")
models_app = typer.Typer(no_args_is_help=True, help="Versions in the registry.")
app.add_typer(data_app, name="data")
app.add_typer(runs_app, name="runs")
app.add_typer(models_app, name="models")

RECIPES = Path(__file__).parent / "recipes"
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
out = Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def main() -> None:
    """Run a command. Exit status: 0 done, 1 failed, 2 the request was wrong."""
    quiet_libraries()
    with native_logs() as log:
        status = _run(log)
        if status == 1 and log.stat().st_size:
            errors.print(f"details: {log}", markup=False, soft_wrap=True)
        else:
            log.unlink()
    sys.exit(status)


def _run(log: Path) -> int:
    """The command's exit status. An error's traceback goes to `log`."""
    try:
        app()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except RaysdError as error:
        errors.print(str(error), markup=False, style="red", soft_wrap=True)
        return error.exit_status
    except KeyboardInterrupt:
        errors.print("stopped")
        return 1
    except Exception as error:
        with log.open("a") as file:
            file.write(traceback.format_exc())
        reason = (str(error).splitlines() or [""])[0][:300]
        errors.print(f"{type(error).__name__}: {reason}", markup=False, style="red", soft_wrap=True)
        return 1
    return 0


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def train(
    context: typer.Context,
    recipe: Annotated[str | None, typer.Argument(help="A recipe that ships, or FILE.toml.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; the recipe's if not given.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, train nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model: `raysd train RECIPE|FILE.toml [--any.dotted.path VALUE ...]`."""
    if recipe in (None, "--help", "-h") or {"--help", "-h"} & set(context.args):
        _train_help(None if recipe in (None, "--help", "-h") else recipe)
        return
    assert recipe is not None
    spec = override(_recipe(recipe), _dotted(context.args))
    run = name or Path(recipe).stem.lower()
    if dry_run:
        _dry_run(spec, run, as_json)
        return
    _train(spec, run, as_json)


@app.command()
def demo() -> None:
    """Train a LoRA on the bundled sample, publish it, and draw before and after side by side."""
    from raysd.demo import run_demo

    with Watcher() as watch:
        table = run_demo(_recipe("lora-demo"), _storage(), watch)
    out.print(table)


@data_app.command("check")
def data_check(
    source: Annotated[str, typer.Argument(help="A folder, zip, URL or fsspec URL; `sample` is the bundled set.")],
    html: Annotated[Path | None, typer.Option(help="Write a page with a contact sheet.")] = None,
    prompt: Annotated[str | None, typer.Option(help="As data.prompt.")] = None,
    resolution: Annotated[int, typer.Option(help="As data.resolution.")] = DataSpec.model_fields["resolution"].default,
    as_json: Json = False,
) -> None:
    """Say what a data set holds and what training would leave out."""
    from raysd.data import report
    from raysd.data.check import check
    from raysd.data.source import open_source

    spec = load(DataSpec, {"source": source, "prompt": prompt, "resolution": resolution})
    opened = open_source(source, _storage().child("uploads"))
    with Watcher(quiet=as_json) as watch:
        checked = check(
            opened, spec, lambda d, n: watch({"kind": "count", "text": "check pictures", "done": d, "of": n})
        )
    if html is not None:
        report.page(checked, opened, html)
    _print(
        checked.model_dump(mode="json") if hasattr(checked, "model_dump") else asdict(checked),
        as_json,
        lambda: report.table(checked),
    )


@runs_app.command("list")
def runs_list(as_json: Json = False) -> None:
    """All runs."""
    from raysd.train import runs

    root = _storage()
    records = [runs.read(root, name) for name in runs.names(root)]
    rows = [_summary(record) for record in records]
    _print(rows, as_json, lambda: _table(rows, "name", "status", "step", "checkpoint", "version"))


@runs_app.command("show")
def runs_show(name: str, as_json: Json = False) -> None:
    """One run: its status, progress and settings."""
    from raysd.train import runs

    record = runs.read(_storage(), name)
    _print(
        {**_summary(record), "spec": record.spec}, as_json, lambda: _pairs({**_summary(record), **_flat(record.spec)})
    )


@runs_app.command("stop")
def runs_stop(name: str) -> None:
    """Ask a run to write a checkpoint and end."""
    from raysd.train import runs

    runs.request_stop(_storage(), name)
    out.print(f"asked run {name} to stop; it writes a checkpoint first")


@runs_app.command("resume")
def runs_resume(name: str, as_json: Json = False) -> None:
    """Go on with an interrupted run from its last checkpoint."""
    from raysd.train import runs

    _train(runs.read(_storage(), name).training_spec(), name, as_json)


@runs_app.command("diff")
def runs_diff(first: str, second: str, as_json: Json = False) -> None:
    """What differs between two runs: settings and results."""
    from raysd.train import runs

    root = _storage()
    changes = runs.differences(runs.read(root, first), runs.read(root, second))
    rows = [{"path": path, first: a, second: b} for path, a, b in changes]
    _print(rows, as_json, lambda: _table(rows, "path", first, second))


@runs_app.command("delete")
def runs_delete(name: str) -> None:
    """Remove a run and its checkpoints; its published versions stay."""
    from raysd.train import runs

    runs.delete(_storage(), name)
    out.print(f"deleted run {name}")


@models_app.command("list")
def models_list(as_json: Json = False) -> None:
    """All models, their versions and aliases."""
    rows = [{"model": m.name, "versions": list(m.versions), "aliases": dict(m.aliases)} for m in _registry().models()]
    _print(rows, as_json, lambda: _table(rows, "model", "versions", "aliases"))


@models_app.command("show")
def models_show(ref: str, as_json: Json = False) -> None:
    """One version: its files and where it comes from."""
    version = _registry().resolve(ref, withdrawn_ok=True)
    body = {
        "ref": version.ref,
        "digest": version.digest,
        "created": version.created,
        "withdrawn": version.withdrawn,
        "files": [{"path": file.path, "sha256": file.sha256, "size": file.size} for file in version.files],
        "record": version.record,
    }
    _print(body, as_json, lambda: _pairs(_flat(body)))


@models_app.command("alias")
def models_alias(ref: str, name: str) -> None:
    """Point an alias at a version."""
    registry = _registry()
    version = registry.resolve(ref)
    registry.alias(version, name)
    out.print(f"{version.model}:{name} -> {version.ref}")


@models_app.command("history")
def models_history(model: str, alias: str, as_json: Json = False) -> None:
    """Every move of an alias, oldest first."""
    rows = [asdict(move) for move in _registry().history(model, alias)]
    _print(rows, as_json, lambda: _table(rows, *(rows[0] if rows else ())))


@models_app.command("rollback")
def models_rollback(model: str, alias: str) -> None:
    """Point an alias at the version it had before."""
    move = _registry().rollback(model, alias)
    out.print(f"{model}:{alias} -> {model}@{move.version}")


@models_app.command("withdraw")
def models_withdraw(ref: str, reason: Annotated[str, typer.Option(help="Why; kept with the version.")] = "") -> None:
    """Take a version out of use; it is kept, and never resolved again."""
    registry = _registry()
    version = registry.resolve(ref, withdrawn_ok=True)
    registry.withdraw(version, reason)
    out.print(f"withdrew {version.ref}")


@models_app.command("verify")
def models_verify(ref: str, as_json: Json = False) -> None:
    """Compare a version's files with their digests."""
    registry = _registry()
    version = registry.resolve(ref, withdrawn_ok=True)
    problems = registry.verify(version)
    _print(
        {"ref": version.ref, "problems": problems}, as_json, lambda: "\n".join(problems) or f"{version.ref} is whole"
    )
    if problems:
        raise typer.Exit(1)


@models_app.command("gc")
def models_gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go.")] = False, as_json: Json = False
) -> None:
    """Remove files that no version refers to."""
    collected = asdict(_registry().collect(dry_run=dry_run))
    _print(collected, as_json, lambda: _pairs(collected))


@app.command()
def generate(
    ref: Annotated[str, typer.Argument(help="tiny-sd, a folder, file.safetensors, org/name, name@3 or name:alias.")],
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    to: Annotated[Path, typer.Option("--out", help="PNG file; with --count, -1, -2 … go before its suffix.")],
    negative: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Picture n has seed + n.")] = 0,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(min=0, max=100, help="Classifier-free guidance scale.")] = 7.5,
    count: Annotated[int, typer.Option(min=1, max=1000, help="How many pictures.")] = 1,
) -> None:
    """Draw pictures with a model."""
    if to.suffix.lower() != ".png":
        raise RequestError(f"--out {to}: name a .png file")
    from raysd.draw import Request, draw, save_png
    from raysd.references import locate

    located = locate(ref, _storage())
    request = Request(prompt, negative, seed, steps, guidance, count)
    with Watcher() as watch:
        images = draw(located, [request], lambda d, n: watch({"kind": "count", "text": "draw", "done": d, "of": n}))
    for number, image in enumerate(images):
        path = to if count == 1 else to.with_stem(f"{to.stem}-{number + 1}")
        save_png(image, path, located, request.of(number))
        out.print(str(path), soft_wrap=True)


@app.command()
def export(
    ref: str,
    to: Annotated[Path, typer.Option("--out", help="Folder or file to write; must not exist.")],
    form: Annotated[
        str,
        typer.Option(
            "--format", help="diffusers: a folder for from_pretrained. kohya: a LoRA file for A1111, ComfyUI."
        ),
    ] = "diffusers",
) -> None:
    """Write a model for other programs."""
    from raysd.export import EXPORTS

    if form not in EXPORTS:
        raise RequestError(f"--format {form}: one of {', '.join(EXPORTS)}")
    EXPORTS[form](ref, _storage(), to)
    out.print(str(to), soft_wrap=True)


def _train(spec: TrainingSpec, name: str, as_json: bool) -> None:
    from raysd.train.launch import train as launch

    # Ray prints on standard output when a worker dies; that is for the result alone.
    with Watcher(quiet=as_json) as watch, contextlib.redirect_stdout(sys.stderr):
        outcome = launch(spec, name, _storage(), watch)
    record = outcome.record
    if as_json:
        print(json.dumps(_summary(record)))
    elif outcome.finished:
        out.print(_pairs({key: value for key, value in _summary(record).items() if value is not None}))
        if record.version:
            out.print(f"next: raysd generate {record.version} --prompt TEXT --out picture.png")
    if not outcome.finished:
        errors.print(f"run {name} stopped at step {record.step} of {record.total}; go on: raysd runs resume {name}")
        raise typer.Exit(1)


def _dry_run(spec: TrainingSpec, name: str, as_json: bool) -> None:
    from raysd.train.launch import preview

    with Watcher(quiet=as_json) as watch:
        body = {"run": name, **preview(spec, name, _storage(), watch)}
    _print(body, as_json, lambda: _pairs(_flat(body)))


def _recipe(name: str) -> TrainingSpec:
    """A recipe that ships, or a file. Raises SpecError or RequestError."""
    path = Path(name)
    if path.suffix != ".toml" and "/" not in name:
        path = RECIPES / f"{name}.toml"
        if not path.exists():
            known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.toml")))
            raise RequestError(f"recipe {name}: not one of {known}, and not a .toml file")
    return load(TrainingSpec, read_toml(path), path.name)


def _dotted(arguments: list[str]) -> dict[str, Any]:
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


def _train_help(recipe: str | None) -> None:
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.toml")))
    out.print(
        "raysd train RECIPE|FILE.toml [--name RUN] [--dry-run] [--json] [--any.dotted.path VALUE ...]", markup=False
    )
    out.print(f"recipes: {known}\n")
    values = _flat(_recipe(recipe).model_dump(mode="json")) if recipe else {}
    table = Table("path", "value" if recipe else "default", "values", "meaning", box=None)
    for row in describe(TrainingSpec):
        if recipe and row.path.startswith("method.") and row.path not in values:
            continue
        shown = values.get(row.path, row.default)
        table.add_row(row.path, "" if shown is None else str(shown), row.kind, row.meaning)
    out.print(table)


def _storage() -> Any:
    from raysd.storage import Storage

    return Storage()


def _registry() -> Any:
    from raysd.registry import Registry

    return Registry(_storage())


def _summary(record: Any) -> dict[str, Any]:
    fields = ("name", "status", "step", "total", "checkpoint", "best_step", "base_loss", "loss", "version", "error")
    return {field: getattr(record, field) for field in fields}


def _print(body: Any, as_json: bool, render: Callable[[], Any]) -> None:
    if as_json:
        print(json.dumps(body))
    else:
        out.print(render())


def _table(rows: list[dict[str, Any]], *columns: str) -> Table:
    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*("" if row[column] is None else str(row[column]) for column in columns))
    return table


def _pairs(values: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(name, "" if value is None else str(value))
    return table


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, value in values.items():
        rows.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return rows
