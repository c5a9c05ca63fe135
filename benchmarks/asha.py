"""Successive halving over the recorded curves of a whole grid: how often it finds the best, and for how many epochs.

The grid (learning rate x rank x batch, 27 points) is trained once on the bundled sample by `raysd tune`, without a
scheduler. Ray Tune's own ASHA is then given the recorded validations, the lowest so far as a live trial tells it, trials
in a random order, four at once: 100 seeds.
One live search with ASHA over the same grid confirms. The grid is recorded anew only if its curves are not there.
"""

import json
from dataclasses import asdict
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from benchmarks import hardware, spawned
from benchmarks.options import Options
from benchmarks.results import FOLDER, Result, Table, Target

SPACE = {
    "optim.lr": {"kind": "choice", "values": [2e-4, 1e-3, 5e-3]},
    "method.rank": {"kind": "choice", "values": [2, 4, 16]},
    "optim.batch_size": {"kind": "choice", "values": [2, 4, 8]},
}
EPOCHS, EVERY, GRACE, REDUCTION = 27, 1, 1, 3
AT_ONCE, SEEDS = 4, 100
CLOSE, SHARE, OFTEN = 1.01, 0.35, 90
OUTSIDE = 15.0
"""Seconds of a trial's life outside its steps."""

Curve = list[tuple[float, float]]
"""(epoch, lowest validation loss so far)."""


def run(options: Options) -> Result:
    grid = _recorded(options)
    curves = curves_of(grid)
    seeds = 10 if options.quick else SEEDS
    best, whole = whole_grid(curves)
    replays = [replay(curves, seed) for seed in range(seeds)]
    ratios, shares = [loss / best for loss, _ in replays], [epochs / whole for _, epochs in replays]
    good = count_good(curves, replays)
    live = spawned.alone(_search, str(options.work / "live"), "asha", options.quick)
    found = min(_curve(trial)[-1][1] for trial in live if trial["status"] == "finished")
    spent = sum(_curve(trial)[-1][0] for trial in live if trial["reports"])
    outside = [trial["outside"] for trial in live]
    return Result(
        targets=[
            Target(
                f"seeds of {seeds} within 1% of the best for at most 35% of the epochs",
                good,
                OFTEN * seeds / 100,
                True,
                "",
            ),
            Target("live search: its best beside the grid's", found / best, CLOSE, False),
            Target("live search: share of the grid's epochs", spent / whole, SHARE, False),
            Target("live search: a trial's time outside its steps, median", median(outside), OUTSIDE, False, "s"),
        ],
        tables=[
            Table(
                "The grid's best",
                ["validation loss", "learning rate", "rank", "batch"],
                [[f"{_curve(t)[-1][1]:.5f}", *(t["values"][path] for path in SPACE)] for t in _best(grid)[:5]],
            ),
            Table(
                "Replays",
                ["", "median", "worst"],
                [
                    ["best found / grid's best", f"{median(ratios):.4f}", f"{max(ratios):.4f}"],
                    ["share of the epochs", f"{median(shares):.3f}", f"{max(shares):.3f}"],
                ],
            ),
        ],
        samples={"ratio": ratios, "share": shares, "outside": outside},
        settings={"space": SPACE, "epochs": EPOCHS, "grace": GRACE, "reduction": REDUCTION, "at_once": AT_ONCE},
    )


def curves_of(grid: list[dict[str, Any]]) -> dict[str, Curve]:
    """By key, of the trials that finished."""
    return {trial["key"]: _curve(trial) for trial in grid if trial["status"] == "finished"}


def whole_grid(curves: dict[str, Curve]) -> tuple[float, float]:
    """(lowest loss, epochs) of training every point to its end."""
    return min(curve[-1][1] for curve in curves.values()), sum(curve[-1][0] for curve in curves.values())


def count_good(curves: dict[str, Curve], replays: list[tuple[float, float]]) -> int:
    """How many replays found a loss close to the grid's best for a small enough share of its epochs."""
    best, whole = whole_grid(curves)
    return sum(loss <= CLOSE * best and epochs <= SHARE * whole for loss, epochs in replays)


def replay(curves: dict[str, Curve], seed: int) -> tuple[float, float]:
    """(lowest loss seen, epochs spent) of ASHA over recorded curves, trials begun in the seed's order."""
    from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

    scheduler = AsyncHyperBandScheduler(
        time_attr="epoch", metric="loss", mode="min", grace_period=GRACE, max_t=EPOCHS + 1, reduction_factor=REDUCTION,
        stop_last_trials=False,
    )  # fmt: skip
    waiting, running = list(curves), {}
    Random(seed).shuffle(waiting)
    best, epochs = float("inf"), 0.0
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            key = waiting.pop(0)
            running[key] = iter(curves[key])
            scheduler.on_trial_add(None, Named(key))
        for key, rows in list(running.items()):
            row = next(rows, None)
            if row is None:
                del running[key]
                continue
            best, (epoch, loss) = min(best, row[1]), row
            decision = scheduler.on_trial_result(None, Named(key), {"epoch": epoch, "loss": loss})
            if decision == TrialScheduler.STOP or epoch >= curves[key][-1][0]:
                epochs += epoch
                del running[key]
    return best, epochs


class Named:
    """As much of a trial as the scheduler looks at."""

    def __init__(self, trial_id: str):
        self.trial_id = trial_id


def _recorded(options: Options) -> list[dict[str, Any]]:
    path = FOLDER / f"grid-{hardware.slug(hardware.describe(False))}{'.quick' if options.quick else ''}.curves"
    if not path.exists():
        trials = spawned.alone(_search, str(options.work / "grid"), "none", options.quick)
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(trial) + "\n" for trial in trials))
    return [json.loads(line) for line in path.read_text().splitlines()]


def _search(root: str, scheduler: str, quick: bool) -> list[dict[str, Any]]:
    """The trials of a grid search on the bundled sample."""
    from raysd.config import SearchSpec, TrainingSpec, load, override, read_toml
    from raysd.storage import Storage
    from raysd.tune.search import search

    recipe = Path(__file__).parents[1] / "raysd/recipes/lora-demo.toml"
    training = override(
        load(TrainingSpec, read_toml(recipe)),
        {"optim.epochs": 3 if quick else EPOCHS, "scale.workers": 1, "scale.zero_stage": 0, "publish.model": None,
         "data.validation": 0.25, "optim.schedule": "constant", "data.augment.variants": 1, "method.targets": None},
    )  # fmt: skip
    space = {path: {**found, "values": found["values"][:1]} for path, found in SPACE.items()} if quick else SPACE
    body = {
        "recipe": "lora-demo",
        "space": space,
        "searcher": {"kind": "grid"},
        "scheduler": {"kind": scheduler, "every": EVERY, "grace": GRACE, "reduction": REDUCTION},
        "budget": {},
    }
    outcome = search(load(SearchSpec, body), training, "grid", Storage(root), lambda event: _say(event))
    return [{**asdict(trial), "outside": _outside(trial, Storage(root))} for trial in outcome.trials]


def _outside(trial: Any, root: Any) -> float:
    """Seconds of a trial's life before its first step was done and after its last."""
    from raysd.train import runs

    times = [row["time"] for row in runs.metrics(runs.storage_of(root, trial.run)) if "loss" in row]
    return float(trial.seconds - (times[-1] - times[0]))


def _say(event: dict[str, Any]) -> None:
    if event["kind"] == "trial":
        print(f"  {event['text']}", flush=True)


def _curve(trial: dict[str, Any]) -> Curve:
    """As the trial reported it; the loss is the lowest so far, which is what is published."""
    rows, best = [], float("inf")
    for report in trial["reports"]:
        best = min(best, report["validation_loss"])
        rows.append((report["epoch"], best))
    return rows


def _best(grid: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted((t for t in grid if t["status"] == "finished"), key=lambda trial: _curve(trial)[-1][1])
