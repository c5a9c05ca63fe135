"""`raysd predictions`: a running service, asked over HTTP."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from raysd.cli.output import Json, flat, out, pairs, show, table
from raysd.console import errors
from raysd.errors import RaysdError, RequestError

predictions_app = typer.Typer(
    no_args_is_help=True, help="Pictures from a running service. RAYSD_KEY holds the API key where it wants one."
)
PATIENCE = 10.0
"""Seconds for which a service may be away: who sits and waits wants to know of a wrong address."""
Url = Annotated[str | None, typer.Option(help="The service; RAYSD_URL, or http://127.0.0.1:8000, if not given.")]


@predictions_app.command("create")
def predictions_create(
    model: Annotated[str, typer.Argument(help="As the service calls it, or a version of it: cats, cats@3.")],
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    to: Annotated[Path, typer.Option("--out", help="PNG file; of several pictures, -1, -2 … go before its suffix.")],
    negative: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Picture n has seed + n; by lot if not given.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Classifier-free guidance scale.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 1,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Ask for pictures and wait for them. Its id is told at once: with it, get fetches them later."""
    _check_png(to)
    settings = {"negative_prompt": negative, "seed": seed, "num_inference_steps": steps, "guidance_scale": guidance}
    given = {name: value for name, value in settings.items() if value is not None}
    client = _client(url)
    asked = client.predict(prompt, model=model, num_outputs=count, **given)
    errors.print(f"prediction {asked.id}", markup=False, soft_wrap=True)
    _save(client, client.wait(asked.id), to, as_json)


@predictions_app.command("get")
def predictions_get(
    id: str,
    to: Annotated[
        Path | None, typer.Option("--out", help="Wait for its pictures and write them, as create does.")
    ] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """A prediction as it stands."""
    if to is None:
        _show(_client(url).get(id), as_json)
        return
    _check_png(to)
    client = _client(url)
    _save(client, client.wait(id), to, as_json)


@predictions_app.command("list")
def predictions_list(
    limit: Annotated[int, typer.Option(min=1, max=10000, help="How many.")] = 50, url: Url = None, as_json: Json = False
) -> None:
    """The newest predictions of this key; with the role admin, and on loopback, of all."""
    rows = [asdict(each) for each in _client(url).predictions(limit)]
    columns = ("created", "id", "model", "version", "status")
    show(rows, as_json, lambda: table([_escaped(row) for row in rows], *columns))


@predictions_app.command("cancel")
def predictions_cancel(id: str, url: Url = None, as_json: Json = False) -> None:
    """Stop a prediction at its next step. What has ended stays as it is."""
    _show(_client(url).cancel(id), as_json)


def _client(url: str | None) -> Any:
    from raysd.client import Client

    return Client(url, patience=PATIENCE)


def _check_png(to: Path) -> None:
    if to.suffix.lower() != ".png":
        raise RequestError(f"--out {to}: name a .png file")


def _save(client: Any, ended: Any, to: Path, as_json: bool) -> None:
    """Write the pictures and say where. Raises RaysdError where there are none."""
    if ended.status != "succeeded":
        raise RaysdError(f"prediction {ended.id}: {ended.error or 'was canceled'}")
    files = []
    for number, generation in enumerate(ended.generations):
        path = to if len(ended.generations) == 1 else to.with_stem(f"{to.stem}-{number + 1}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(client.picture(generation))
        files.append(str(path))
    if as_json:
        show({**asdict(ended), "files": files}, True, lambda: None)
    else:
        out.print("\n".join(files), markup=False, soft_wrap=True)


def _show(prediction: Any, as_json: bool) -> None:
    body = asdict(prediction)
    show(body, as_json, lambda: pairs(_escaped(flat(body))))


def _escaped(row: dict[str, Any]) -> dict[str, Any]:
    """What a service answers is text in a table, never markup."""
    return {name: escape(value) if isinstance(value, str) else value for name, value in row.items()}
