"""`raysd serve` and `raysd traffic`."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from raysd.cli.output import Json, open_storage, out, reserve_output, show, table
from raysd.console import errors
from raysd.errors import RequestError

app = typer.Typer()
_SHARE = re.compile(r"v?(?P<number>[1-9][0-9]*)=(?P<percent>[0-9]+(?:\.[0-9]+)?)%?")


@app.command()
def serve(
    what: Annotated[str, typer.Argument(help="A model, as in `raysd generate`, or a Serve config: serve/local.yaml.")],
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="8000, or what the config says.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; loopback, or what the config says.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Let others in, with keys: raysd keys create NAME.")] = False,
) -> None:
    """Serve a model over HTTP until interrupted."""
    reserve_output()
    from raysd.config import load, override
    from raysd.config.serving import ServingSpec
    from raysd.serve.run import read_config, run

    if what.endswith((".yaml", ".yml")):
        spec, http = read_config(Path(what))
    else:
        spec, http = load(ServingSpec, {"models": [{"ref": what}]}), {}
    if public:
        spec = override(spec, {"public": True})
    where = host or http.get("host") or "127.0.0.1", port or http.get("port") or 8000
    run(spec, *where, lambda url: out.print(url, soft_wrap=True), http)


@app.command()
def traffic(
    model: Annotated[str, typer.Argument(help="A model of the registry.")],
    shares: Annotated[
        list[str] | None, typer.Argument(help="v8=10: version 8 draws 10% of the requests; the rest stays as deployed.")
    ] = None,
    shadow: Annotated[
        list[str] | None, typer.Option(help="v9=5: version 9 draws 5% of them besides, and nobody sees it.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="All to the deployed version again.")] = False,
    as_json: Json = False,
) -> None:
    """Split a model's requests between versions, or show how they are split. Running services follow in seconds."""
    from raysd.registry import traffic as splits

    storage = open_storage()
    if clear and (shares or shadow):
        raise RequestError("--clear: takes no shares")
    if shares or shadow or clear:
        former = splits.in_use(storage, model)
        drawn = _parsed(shares) if shares or clear else former.shares
        beside = _parsed(shadow) if shadow or clear else former.shadow
        now = splits.change(storage, model, drawn, beside)
    else:
        now = splits.read(storage, model)
    show(asdict(now), as_json, lambda: _rendered(model, now))
    if sum(now.shares.values()) >= 100:
        say = f"an alias that moves changes nothing that is drawn, until raysd traffic {model} --clear"
        errors.print(say, markup=False, soft_wrap=True)


def _parsed(shares: list[str] | None) -> dict[int, float]:
    found = {}
    for text in shares or ():
        match = _SHARE.fullmatch(text)
        if match is None:
            raise RequestError(f"{text!r}: write a share as v8=10, in percent")
        found[int(match["number"])] = float(match["percent"])
    return found


def _rendered(model: str, now: Any) -> Any:
    left = 100 - sum(now.shares.values())
    rows = [{"version": f"{model}@{number}", "draws": f"{share:g}%"} for number, share in now.shares.items()]
    rows.append({"version": "as deployed", "draws": f"{left:g}%"})
    rows += [{"version": f"{model}@{number}", "draws": f"shadow {share:g}%"} for number, share in now.shadow.items()]
    return table(rows, "version", "draws")
