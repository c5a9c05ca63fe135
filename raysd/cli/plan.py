"""`raysd plan`: what a run will need, before it is paid for."""

from typing import Annotated, Any

import typer

from raysd.cli.output import Json, open_storage, pairs, show, table
from raysd.cli.specs import dotted, grounded, recipe_of
from raysd.config import TrainingSpec, override
from raysd.console import errors

app = typer.Typer()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def plan(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A recipe that ships, or FILE.toml.")],
    cluster: Annotated[
        str | None,
        typer.Option(
            help="A device of the table, with the number of it a node: A10G, L4, A100-40GB, A100-80GB, H100, H200, CPU, or "
            "your own in cluster/devices.toml (or the file that RAYSD_DEVICES names). All if not given."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Memory a worker, steps, time and cost of a run: `raysd plan RECIPE [--any.dotted.path VALUE ...]`.

    Nothing is allocated, downloaded (but a model's configuration) or started. Prices are examples: put yours into
    cluster/devices.toml. Exit status 1 if --cluster is given and the run does not fit.
    """
    spec = grounded(override(recipe_of(recipe), dotted(context.args)))
    bodies = _bodies(spec, cluster)
    show(bodies[0] if cluster else bodies, as_json, lambda: _one(bodies[0]) if cluster else _all(bodies))
    for body in bodies if not as_json else ():
        if not body["fits"]:
            errors.print(_remedy(body), markup=False, soft_wrap=True)
    if cluster and not bodies[0]["fits"]:
        raise typer.Exit(1)


def _bodies(spec: TrainingSpec, name: str | None) -> list[dict[str, Any]]:
    from raysd.plan.changes import change_that_fits, words
    from raysd.plan.devices import device, devices
    from raysd.plan.estimate import Planner
    from raysd.plan.shapes import configurations
    from raysd.plan.speed import measured_in

    table = {name: device(name)} if name else devices()
    if spec.scale.precision == "fp16" and not name:
        table = {label: entry for label, entry in table.items() if entry.kind == "gpu"}
    root = open_storage()
    planner = Planner(configurations(spec.base, root), _steps(spec, root), measured_in(root))
    bodies = []
    for label, entry in table.items():
        estimate = planner.estimate(spec, label, entry)
        found = None if estimate.fits else change_that_fits(planner, spec, label, entry)
        bodies.append({**estimate.body(), "change": words(found[0]) if found else None})
    return bodies


def _steps(spec: TrainingSpec, root: Any) -> int:
    """As the trainer counts them; pictures are looked at only where their number decides."""
    from raysd.train.frozen import total_steps

    if spec.optim.steps is not None:
        return spec.optim.steps
    from raysd.data.dataset import prepare

    return total_steps(spec, len(prepare(spec.data, root, lambda done, of: None).train))


def _all(bodies: list[dict[str, Any]]) -> Any:
    columns = ("device", "workers", "fits", "memory", "usable", "steps", "s/step", "from", "time", "cost")
    rows = [
        {
            **{name: body[name] for name in ("device", "workers", "steps")},
            "fits": "yes" if body["fits"] else "no",
            "memory": _bytes(body["bytes"]["needed"]),
            "usable": _bytes(body["bytes"]["usable"]),
            "s/step": f"{body['seconds_a_step']:.3g}",
            "from": body["seconds_from"],
            "time": _time(body["seconds"]),
            "cost": f"{body['cost']:.2f}",
        }
        for body in bodies
    ]
    return table(rows, *columns)


def _one(body: dict[str, Any]) -> Any:
    size = body["bytes"]
    rows = {
        "device": body["device"],
        "workers": body["workers"],
        "parameters": f"{body['parameters']['trained']:,} trained, {body['parameters']['frozen']:,} frozen",
        "micro-batches a step": " + ".join(map(str, body["micro_batches"])),
        "memory a worker": f"{_bytes(size['needed'])} of {_bytes(size['usable'])}: {'fits' if body['fits'] else 'DOES NOT FIT'}",
        f"at the {size['peak_moment']}": _bytes(size["peak"]),
    }
    parts = size["moments"][size["peak_moment"]]
    rows |= {f"  {part}": _bytes(value) for part, value in parts.items() if value}
    rows |= {f"in the host: {part}": _bytes(value) for part, value in size["host"].items()}
    rows |= {
        "operations a step": f"{body['operations_a_step']:.3g}",
        "seconds a step": f"{body['seconds_a_step']:.3g} ({body['seconds_from']})",
        "steps": body["steps"],
        "time": _time(body["seconds"]),
        "cost": f"{body['cost']:.2f}",
    }
    return pairs(rows)


def _remedy(body: dict[str, Any]) -> str:
    change = body["change"]
    return f"{body['device']}: does not fit; " + (f"it does with {change}" if change else "no setting makes it fit")


def comparison(found: dict[str, Any]) -> dict[str, str]:
    """Rows of `runs show`."""
    rows = {"device": found["device"]}
    for name, form in (("peak_bytes", _bytes), ("seconds_a_step", lambda value: f"{value:.3g} s"), ("seconds", _time)):
        both = found[name]
        words = ", ".join(f"{which} {form(value)}" for which, value in both.items() if value is not None)
        rows[name.replace("_", " ").replace("peak bytes", "peak memory")] = words
    return rows


def _bytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _time(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"
