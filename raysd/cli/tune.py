"""`raysd tune`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from raysd.cli.output import Json, check_writable, open_storage, out, reserve_output, show
from raysd.cli.specs import grounded, grounded_search, recipe_of, search_of
from raysd.config import SearchSpec, TrainingSpec, override
from raysd.console import Watcher, errors
from raysd.errors import RequestError

app = typer.Typer()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def tune(
    context: typer.Context,
    what: Annotated[str, typer.Argument(metavar="FILE.toml|status|resume|report", help="A search, or a verb on one.")],
    name: Annotated[str | None, typer.Option(help="Name of the search; the file's if not given.")] = None,
    retrain: Annotated[bool, typer.Option("--retrain", help="Train the best again on all pictures.")] = False,
    html: Annotated[Path | None, typer.Option(help="Where report writes its page.")] = None,
    as_json: Json = False,
) -> None:
    """Search: `raysd tune FILE.toml [--any.dotted.path VALUE ...]`, then `raysd tune status|resume|report SEARCH`."""
    if what in ("status", "resume", "report"):
        if len(context.args) != 1:
            raise RequestError(f"raysd tune {what} SEARCH: name one search")
        _on_search(what, context.args[0], retrain, html, as_json)
        return
    spec, values = search_of(what, context.args)
    training = grounded(override(recipe_of(spec.recipe), values))
    _search(grounded_search(spec), training, name or Path(what).stem.lower(), retrain, as_json)


def _search(spec: SearchSpec, training: TrainingSpec, name: str, retrain: bool, as_json: bool) -> None:
    from raysd.tune.search import search

    reserve_output()
    with Watcher(quiet=as_json) as watch:
        outcome = search(spec, training, name, open_storage(), watch, retrain)
    _show_search(outcome.record, outcome.trials, as_json)
    if not outcome.finished:
        errors.print(f"search {name} was interrupted; go on: raysd tune resume {name}")
        raise typer.Exit(1)


def _on_search(what: str, name: str, retrain: bool, html: Path | None, as_json: bool) -> None:
    from raysd.tune import records, report

    record = records.read(open_storage(), name)
    if what == "resume":
        _search(record.search_spec(), record.training_spec(), name, retrain, as_json)
        return
    found = records.trials(records.storage_of(open_storage(), name))
    if what == "report":
        to = html or Path(f"{name}.html")
        check_writable("--html", to)
        report.page(record, found, to)
        out.print(str(to), soft_wrap=True)
        return
    _show_search(record, found, as_json)


def _show_search(record: Any, found: list[Any], as_json: bool) -> None:
    from raysd.train import runs
    from raysd.tune import records, report

    best = [trial.key for trial in records.front(found, record.search_spec().objective)]
    shown = {**asdict(record), "training": runs.public_spec(record.training)}
    body = {**shown, "best": best, "trials": [asdict(trial) for trial in found]}
    show(body, as_json, lambda: report.table(record, found))
