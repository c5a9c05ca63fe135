"""`raysd keys`."""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markup import escape

from raysd.cli.output import Json, open_database, open_storage, pairs, show, table, when

keys_app = typer.Typer(no_args_is_help=True, help="API keys of a service.")
Limit = Annotated[int | None, typer.Option(min=1, help="No limit if not given.")]


@keys_app.command("create")
def keys_create(
    owner: Annotated[str, typer.Argument(help="Who will hold it.")],
    role: Annotated[
        list[str] | None,
        typer.Option(help="generate, feedback, train or admin (all); may be repeated. [default: generate, feedback]"),
    ] = None,
    requests_per_minute: Limit = None,
    pictures_per_day: Limit = None,
    in_flight: Limit = None,
    as_json: Json = False,
) -> None:
    """Make a key. It is printed now and never again."""
    from raysd.serve.keys import Limits

    key, secret = _keys().create(
        owner, role or ["generate", "feedback"], Limits(requests_per_minute, pictures_per_day, in_flight)
    )
    body = {**_row(key), "key": secret}
    show(body, as_json, lambda: pairs({"id": key.id, "key": secret}))


@keys_app.command("list")
def keys_list(as_json: Json = False) -> None:
    """All keys, the newest first: their ids, owners, roles and limits."""
    rows = [_row(key) for key in _keys().list()]
    show(rows, as_json, lambda: table([_shown(row) for row in rows], *(rows[0] if rows else ())))


@keys_app.command("revoke")
def keys_revoke(id: str, as_json: Json = False) -> None:
    """Refuse a key from now on; a running service follows within five seconds."""
    key = _keys().revoke(id)
    show(_row(key), as_json, lambda: f"revoked {key.id} of {escape(key.owner)}")


def _keys() -> Any:
    from raysd.serve.keys import Keys

    return Keys(open_database(open_storage()))


def _row(key: Any) -> dict[str, Any]:
    values = asdict(key)
    return {**{name: values[name] for name in ("id", "owner", "roles", "created", "revoked")}, **values["limits"]}


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    times = {name: when(row[name]) for name in ("created", "revoked")}
    return {**row, "owner": escape(row["owner"]), "roles": " ".join(row["roles"]), **times}
