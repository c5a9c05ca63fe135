"""`raysd study`."""

from pathlib import Path
from typing import Annotated

import typer

from raysd.cli.output import Json, open_database, open_storage, out, show
from raysd.console import Watcher

study_app = typer.Typer(no_args_is_help=True, help="Two versions compared blind, by people.")


@study_app.command("new")
def study_new(
    first: Annotated[str, typer.Argument(help="A model, as in `raysd generate`.")],
    second: Annotated[str, typer.Argument(help="The model to compare it with.")],
    prompts: Annotated[Path | None, typer.Option(help="File of prompts, one a line, or .jsonl.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the study; made from what it compares if not given.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="How many pairs; one a prompt if not given.")] = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(min=0, max=100, help="Classifier-free guidance scale.")] = 7.5,
) -> None:
    """Draw the same prompts and seeds with two versions. A study that was stopped goes on."""
    from raysd.references import locate
    from raysd.study import studies
    from raysd.study.draw import draw_study

    storage = open_storage()
    a, b = locate(first, storage), locate(second, storage)
    texts = studies.prompts_of(prompts) if prompts else studies.default_prompts(a, b)
    plan = studies.plan(a, b, texts, count=count, steps=steps, guidance=guidance)
    made, pairs = studies.create(open_database(storage), plan, name)
    with Watcher() as watch:
        draw_study(
            made, pairs, a, b, storage, lambda d, n: watch({"kind": "count", "text": "draw", "done": d, "of": n})
        )
    out.print(f"study {made.name}: {len(pairs)} pairs\nnext: raysd study serve {made.name}", soft_wrap=True)


@study_app.command("serve")
def study_serve(
    name: str,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8010,
    public: Annotated[bool, typer.Option("--public", help="Allow others: anyone who reaches it may vote.")] = False,
) -> None:
    """Serve the page on which reviewers compare, until interrupted. Answers are kept as they come."""
    from raysd.study import host as hosting
    from raysd.study.page import of_study

    storage = open_storage()
    app = of_study(open_database(storage), storage, name, public=public)
    hosting.serve(
        app, hosting.listen_to_reviewers(host, port, public=public), lambda url: out.print(url, soft_wrap=True)
    )


@study_app.command("results")
def study_results(name: str, as_json: Json = False) -> None:
    """How often each version won, with intervals, and whether the reviewers agree."""
    from raysd.study.results import results, table

    body = results(open_database(open_storage()), name)
    show(body, as_json, lambda: table(body))
