"""`raysd evaluate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from raysd.cli.output import Json, check_writable, open_registry, open_storage, reserve_output, show
from raysd.console import Watcher

app = typer.Typer()


@app.command()
def evaluate(
    ref: Annotated[str, typer.Argument(help="tiny-sd, a folder, file.safetensors, org/name, name@3 or name:alias.")],
    against: Annotated[str | None, typer.Option(help="A model to compare with: before, where REF is after.")] = None,
    data: Annotated[str | None, typer.Option(help="As data.source: pictures to compare with.")] = None,
    prompts: Annotated[str | None, typer.Option(help="File of prompts, one a line, or .jsonl.")] = None,
    count: Annotated[int | None, typer.Option(help="How many pictures are drawn.")] = None,
    inception: Annotated[str | None, typer.Option(help="FID InceptionV3: .safetensors, or TorchScript.")] = None,
    clip: Annotated[str | None, typer.Option(help="Folder of a CLIPModel.")] = None,
    workers: Annotated[int | None, typer.Option(help="Ray workers that draw; 0: this process.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with charts and pictures.")] = None,
    as_json: Json = False,
) -> None:
    """Say how good a model is: losses, scores of its pictures with their uncertainty, and a page to look at."""
    from raysd.evaluate import report
    from raysd.evaluate.evaluation import evaluate as run
    from raysd.evaluate.evaluation import spec_of

    if html is not None:
        check_writable("--html", html)
    given = {"prompts": prompts, "count": count, "inception": inception, "clip": clip, "workers": workers}
    spec = spec_of(ref, data, given, open_storage())
    reserve_output()
    with Watcher(quiet=as_json) as watch:
        found = run(ref, against, spec, open_storage(), watch)
    show(found.to_json(), as_json, lambda: report.table(found))
    if html is not None:
        report.page(found, open_storage(), html, _training(found.model.ref))


def _training(ref: str) -> Any:
    """The run of a registered version, where it still is."""
    from raysd.evaluate.report import Training
    from raysd.train import runs

    if "@" not in ref or "/" in ref:
        return None
    made = open_registry().resolve(ref).record.get("run", {})
    name = made.get("name")
    if name not in runs.names(open_storage()) or runs.read(open_storage(), name).id != made.get("id"):
        return None  # it was deleted, and another one may have its name
    run = runs.storage_of(open_storage(), name)
    return Training(name, runs.metrics(run), runs.samples(run))
