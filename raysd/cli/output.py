"""What the verbs share: where things lie, and how a result is shown."""

import json
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from raysd.errors import RequestError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
RESULT = sys.stdout
# Prompts and paths may look like markup or emoji codes: nothing that is printed is.
out = Console(file=RESULT, highlight=False, markup=False, emoji=False, width=None if RESULT.isatty() else 160)


def reserve_output() -> None:
    """From here on standard output is the result's alone: Ray's threads print there what they hear of its processes."""
    sys.stdout = sys.stderr


def check_writable(option: str, *paths: Path) -> None:
    """Looked at before the work whose result goes there. Raises RequestError.

    Each is opened, as permissions alone say too little; what was not there goes again.
    """
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            path.open("ab").close()
            if new:
                path.unlink()
        except OSError as error:
            raise RequestError(f"{option} {path}: cannot be written: {error.strerror}; name another file") from None


def open_storage() -> Any:
    from raysd.storage import Storage

    return Storage()


def open_registry() -> Any:
    from raysd.registry import Registry

    return Registry(open_storage())


def open_database(storage: Any) -> Any:
    from raysd.database import Database

    database = Database(None, storage)
    database.migrate()
    return database


def show(body: Any, as_json: bool, render: Callable[[], Any]) -> None:
    if as_json:
        print(json.dumps(body), file=RESULT)
    else:
        out.print(render())


def when(seconds: float | None) -> str | None:
    """Epoch seconds as local date and time."""
    return None if seconds is None else datetime.fromtimestamp(seconds).isoformat(" ", "seconds")


def table(rows: list[dict[str, Any]], *columns: str) -> Table:
    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*("" if row[column] is None else str(row[column]) for column in columns))
    return table


def pairs(values: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(name, "" if value is None else str(value))
    return table


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, value in values.items():
        rows.update(flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return rows
