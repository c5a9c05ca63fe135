"""`raysd train`, `raysd demo` and `raysd runs`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from raysd.cli.output import Json, flat, open_storage, out, pairs, reserve_output, show, table
from raysd.cli.plan import comparison
from raysd.cli.specs import dotted, grounded, recipe_of, train_help
from raysd.config import TrainingSpec, override
from raysd.console import Watcher, errors
from raysd.errors import RaysdError

app = typer.Typer()
runs_app = typer.Typer(no_args_is_help=True, help="Training runs.")


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
        train_help(None if recipe in (None, "--help", "-h") else recipe)
        return
    assert recipe is not None
    spec = grounded(override(recipe_of(recipe), dotted(context.args)))
    run = name or Path(recipe).stem.lower()
    if dry_run:
        _dry_run(spec, run, as_json)
        return
    _train(spec, run, as_json)


@app.command()
def demo() -> None:
    """Train a LoRA on the bundled sample, publish it, and draw before and after side by side."""
    from raysd.demo import run_demo

    reserve_output()
    with Watcher() as watch:
        table = run_demo(recipe_of("lora-demo"), open_storage(), watch)
    out.print(table)


@runs_app.command("list")
def runs_list(as_json: Json = False) -> None:
    """All runs."""
    from raysd.train import runs

    root = open_storage()
    records = [runs.read(root, name) for name in runs.names(root)]
    rows = [summary(record) for record in records]
    show(rows, as_json, lambda: table(rows, "name", "status", "step", "checkpoint", "version"))


@runs_app.command("show")
def runs_show(
    name: str,
    planned: Annotated[
        bool, typer.Option("--planned", help="What was planned beside what it took, on CPUs too: some ten seconds.")
    ] = False,
    as_json: Json = False,
) -> None:
    """One run: its status, progress and settings; of one on GPUs, what was planned beside what it took."""
    from raysd.train import runs

    root = open_storage()
    record = runs.read(root, name)
    beside = _planned_and_actual(root, name, planned)
    spec = runs.public_spec(record.spec)
    body = {**summary(record), **({"planned_and_actual": beside} if beside else {}), "spec": spec}
    rows = {**summary(record), **(comparison(beside) if beside else {}), **flat(spec)}
    show(body, as_json, lambda: pairs(rows))


@runs_app.command("stop")
def runs_stop(name: str, as_json: Json = False) -> None:
    """Ask a run to write a checkpoint and end."""
    from raysd.train import runs

    runs.request_stop(open_storage(), name)
    said = f"asked run {name} to stop; it writes a checkpoint first"
    show({"run": name, "asked": "stop"}, as_json, lambda: said)


@runs_app.command("resume", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def runs_resume(context: typer.Context, name: str, as_json: Json = False) -> None:
    """Go on with an interrupted run from its last checkpoint: `raysd runs resume RUN [--scale.workers N ...]`."""
    from raysd.train import runs

    spec = runs.read(open_storage(), name).training_spec()
    _train(override(spec, dotted(context.args)) if context.args else spec, name, as_json)


@runs_app.command("diff")
def runs_diff(first: str, second: str, as_json: Json = False) -> None:
    """What differs between two runs: settings and results."""
    from raysd.train import runs

    root = open_storage()
    changes = runs.differences(*(runs.public(runs.read(root, name)) for name in (first, second)))
    rows = [{"path": path, first: a, second: b} for path, a, b in changes]
    show(rows, as_json, lambda: table(rows, "path", first, second))


@runs_app.command("delete")
def runs_delete(name: str, as_json: Json = False) -> None:
    """Remove a run and its checkpoints; its published versions stay."""
    from raysd.train import runs

    runs.delete(open_storage(), name)
    show({"run": name, "deleted": True}, as_json, lambda: f"deleted run {name}")


def _planned_and_actual(root: Any, name: str, asked: bool) -> dict[str, Any] | None:
    """None for a run that did not end, or whose base is no longer there to be planned with."""
    from raysd.plan.actual import beside

    try:
        return beside(root, name, asked)
    except RaysdError:
        return None


def _train(spec: TrainingSpec, name: str, as_json: bool) -> None:
    from raysd.train.launch import train as launch

    reserve_output()
    root = open_storage()
    try:
        with Watcher(quiet=as_json) as watch:
            outcome = launch(spec, name, root, watch)
    except KeyboardInterrupt:
        if _is_interrupted(root, name):
            errors.print(f"go on with run {name}: raysd runs resume {name}", soft_wrap=True)
        raise
    record = outcome.record
    if as_json or outcome.finished:
        body = summary(record)
        show(body, as_json, lambda: pairs({key: value for key, value in body.items() if value is not None}))
    if record.version and not as_json:
        out.print(f"next: raysd generate {record.version} --prompt TEXT --out picture.png")
    if not outcome.finished:
        errors.print(f"run {name} stopped at step {record.step} of {record.total}; go on: raysd runs resume {name}")
        raise typer.Exit(1)


def _is_interrupted(root: Any, name: str) -> bool:
    """Whether there is a run to go on with: none is written before the data are checked."""
    from raysd.train import runs

    return name in runs.names(root) and runs.read(root, name).status == "interrupted"


def _dry_run(spec: TrainingSpec, name: str, as_json: bool) -> None:
    from raysd.train.request import preview

    with Watcher(quiet=as_json) as watch:
        body = {"run": name, **preview(spec, name, open_storage(), watch)}
    show(body, as_json, lambda: pairs(flat(body)))


def summary(record: Any) -> dict[str, Any]:
    fields = ("name", "status", "step", "total", "checkpoint", "best_step", "base_loss", "loss", "version", "error")
    return {field: getattr(record, field) for field in fields}
