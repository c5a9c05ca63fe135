"""`raysd data`."""

from pathlib import Path
from typing import Annotated

import typer

from raysd.cli.output import Json, check_writable, open_storage, show
from raysd.config import DataSpec, load
from raysd.console import Watcher

app = typer.Typer(no_args_is_help=True, help="Look at a data set.")


@app.command("check")
def data_check(
    source: Annotated[str, typer.Argument(help="A folder, zip, URL or fsspec URL; `sample` is the bundled set.")],
    html: Annotated[Path | None, typer.Option(help="Write a page with a contact sheet.")] = None,
    prompt: Annotated[str | None, typer.Option(help="As data.prompt.")] = None,
    resolution: Annotated[int, typer.Option(help="As data.resolution.")] = DataSpec.model_fields["resolution"].default,
    as_json: Json = False,
) -> None:
    """Say what a data set holds and what training would leave out. Exit status 2 where training would refuse it."""
    from raysd.data import report
    from raysd.data.check import check
    from raysd.data.source import open_source

    if html is not None:
        check_writable("--html", html)
    spec = load(DataSpec, {"source": source, "prompt": prompt, "resolution": resolution})
    opened = open_source(source, open_storage().child("uploads"))
    with Watcher(quiet=as_json) as watch:
        checked = check(
            opened, spec, lambda d, n: watch({"kind": "count", "text": "check pictures", "done": d, "of": n})
        )
    show(checked.model_dump(mode="json"), as_json, lambda: report.table(checked))
    if html is not None:
        report.page(checked, opened, html)
    checked.raise_if_refused()
