"""`raysd feedback`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from raysd.cli.output import Json, open_database, open_storage, out, show, table, when

feedback_app = typer.Typer(no_args_is_help=True, help="What people said of the pictures of a service.")
Model = Annotated[str | None, typer.Option(help="Of this model alone, as clients call it.")]


@feedback_app.command("list")
def feedback_list(
    model: Model = None,
    limit: Annotated[int, typer.Option(min=1, max=10000, help="How many.")] = 50,
    as_json: Json = False,
) -> None:
    """The newest feedback."""
    from raysd.feedback.records import Records

    rows = Records(open_database(open_storage())).find(model, limit)
    columns = ("when", "generation", "version", "thumb", "stars", "said")
    show(rows, as_json, lambda: table([_shown(row) for row in rows], *columns))


@feedback_app.command("stats")
def feedback_stats(model: Model = None, as_json: Json = False) -> None:
    """What people think of each version, with intervals."""
    from raysd.feedback import stats

    rows = stats.stats(open_database(open_storage()), model)
    show(rows, as_json, lambda: stats.table(rows))


@feedback_app.command("export")
def feedback_export(
    to: Annotated[Path, typer.Option("--out", help="Folder to write; must not exist.")],
    model: Model = None,
    thumb_up: Annotated[bool, typer.Option("--thumb-up", help="Take what has more thumbs up than down.")] = False,
    stars: Annotated[float | None, typer.Option(min=1, max=5, help="Take what has at least so many stars.")] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Write pairs, the preferred and the other one.")] = False,
    as_json: Json = False,
) -> None:
    """Write the pictures that people liked, with their prompts, as a data set to train on.

    Without --thumb-up and --stars: those with more thumbs up than down, or four stars.
    """
    from raysd.feedback import export

    storage = open_storage()
    database = open_database(storage)
    if pairs:
        done = export.export_pairs(database, storage, to, model=model)
    else:
        liked = export.Liked(thumb_up, stars) if thumb_up or stars is not None else export.Liked()
        done = export.export(database, storage, to, model=model, liked=liked)
    left_out = f"; {done.left_out} left out: their pictures are gone or damaged" if done.left_out else ""
    show({"out": str(to), **asdict(done)}, as_json, lambda: f"{to}: {done.written} rows{left_out}")
    if not pairs and not as_json:
        out.print(f"next: raysd train RECIPE --data.source {to}", soft_wrap=True)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """One line of a table. What people wrote is text in it, never markup or escape codes."""
    from rich.markup import escape

    from raysd.words import shown

    pair = row["pair"]
    if pair is not None:
        about = {
            "generation": f"{pair['left']} {pair['right']}",
            "version": f"{pair['left_version']} {pair['right_version']}",
        }
        words = [pair["choice"], "blind" if pair["blind"] else ""]
    else:
        about = {"generation": row["generation"], "version": row["version"]}
        words = [*row["tags"], row["text"] or "", "" if row["report"] is None else f"reported: {row['report']}"]
    said = escape(shown(" ".join(word for word in words if word), 60))
    return {**about, "when": when(row["created"]), "thumb": row["thumb"], "stars": row["stars"], "said": said}
