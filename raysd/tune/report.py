"""A search's report: a table for the terminal, and one HTML file that opens from disk."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from raysd import plots
from raysd.config import SearchSpec, TrainingSpec, override
from raysd.config.search import Choice, LogUniform
from raysd.tune import records
from raysd.tune.records import SearchRecord, TrialRecord, cost_of
from raysd.tune.space import optuna_space, short

TEMPLATE = Path(__file__).with_name("report.html.j2")
FEWEST = 4
"""Trials below which importances are noise and are not given."""
MOST_ROWS = 30


@dataclass(frozen=True)
class Cost:
    """What the trials took. Epochs saved are those that stopped trials would have gone on for."""

    trials: dict[str, int]  # by status
    epochs: float
    saved: float
    worker_hours: float
    gpu_hours: float
    money: float | None
    hours: float


def cost(record: SearchRecord, found: Sequence[TrialRecord]) -> Cost:
    spec = record.search_spec()
    states = {status: sum(trial.status == status for trial in found) for status in get_args(records.Status)}
    training = record.training_spec()
    worker_hours = sum(trial.seconds * trial.workers for trial in found) / 3600
    price = spec.budget.price
    return Cost(
        trials={status: count for status, count in states.items() if count},
        epochs=sum(trial.epochs for trial in found),
        saved=sum(max(0.0, _planned(trial, training) - trial.epochs) for trial in found if trial.status == "stopped"),
        worker_hours=worker_hours,
        gpu_hours=sum(trial.seconds * trial.gpus for trial in found) / 3600,
        money=None if price is None else worker_hours * price,
        hours=record.seconds / 3600,
    )


def _planned(trial: TrialRecord, training: TrainingSpec) -> float:
    """Epochs that the trial would have had."""
    spec = override(training, trial.values)
    if spec.optim.epochs is not None:
        return spec.optim.epochs
    last = trial.reports[-1] if trial.reports else {"step": 0.0, "epoch": 0.0}
    return (spec.optim.steps or 0) * last["epoch"] / last["step"] if last["step"] else 0.0


def importances(spec: SearchSpec, found: Sequence[TrialRecord]) -> dict[str, float]:
    """How much each parameter decides whether a trial is among the best (PED-ANOVA, Watanabe et al. 2023).

    A trial that failed is as bad as the worst, as it is to the searcher.
    """
    import optuna

    metric = spec.objective[0]
    failed = [trial for trial in found if trial.status == "failed"]
    scored = [trial for trial in found if trial not in failed and trial.best(metric) is not None]
    counted = [*scored, *failed]
    varied = [path for path in spec.space if len({str(trial.values[path]) for trial in counted}) > 1]
    if len(scored) < FEWEST or not varied:
        return {}
    costs = [cost_of(metric, trial.best(metric) or 0.0) for trial in scored]
    costs += [max(costs)] * len(failed)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    space = optuna_space(spec)
    for trial, found_cost in zip(counted, costs, strict=True):
        study.add_trial(
            optuna.create_trial(
                params={path: _within(_plain(trial.values[path]), space[path]) for path in varied},
                distributions={path: _plain_choices(space[path]) for path in varied},
                value=found_cost,
            )
        )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def table(record: SearchRecord, found: Sequence[TrialRecord]) -> RenderableType:
    """Status, the trials ranked, and what it cost, for a terminal."""
    spec = record.search_spec()
    spent = cost(record, found)
    rows = Table(*("", *spec.space, *spec.objective, "epochs", "status"), box=None)
    for number, trial in enumerate(_ordered(spec, found)[:MOST_ROWS], 1):
        scores = ["" if (value := trial.best(metric)) is None else f"{value:.4f}" for metric in spec.objective]
        values = [short(trial.values[path]) for path in spec.space]
        rows.add_row(str(number), *values, *scores, f"{trial.epochs:.1f}", trial.status)
    states = ", ".join(f"{count} {status}" for status, count in spent.trials.items())
    lines = [f"search {record.name}: {record.status}, {states or 'no trial yet'}"]
    lines.append(
        f"{spent.epochs:.0f} epochs, {spent.worker_hours:.2f} worker hours, {spent.saved:.0f} epochs saved by stopping"
    )
    lines += [f"failed {trial.key}: {trial.reason}" for trial in found if trial.status == "failed"][:3]
    if record.versions:
        lines.append(f"published: {', '.join(record.versions)}")
    return Group(Text(lines[0]), rows, *(Text(line) for line in lines[1:]))


def page(record: SearchRecord, found: Sequence[TrialRecord], out: Path) -> None:
    """Write the report as one HTML file: no scripts, nothing fetched, foreign text escaped."""
    spec = record.search_spec()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        record=record,
        spec=spec,
        trials=_ordered(spec, found),
        front={trial.key for trial in records.front(found, spec.objective)},
        cost=cost(record, found),
        plots=[(title, Markup(svg)) for title, svg in _plots(record, spec, found)],
        most=200,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")


def _ordered(spec: SearchSpec, found: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The best first; then those without a score, and last those that failed."""
    best = records.ranked(found, spec.objective)
    rest = [trial for trial in found if trial not in best]
    return [*best, *sorted(rest, key=lambda trial: trial.status == "failed")]


def _plots(record: SearchRecord, spec: SearchSpec, found: Sequence[TrialRecord]) -> list[tuple[str, str]]:
    metric = spec.objective[0]
    scored = records.ranked(found, spec.objective)
    if not scored:
        return []
    made = [("Validation loss; a cross where a trial was stopped", _curves(found))]
    if len(spec.objective) > 1:
        second = spec.objective[1]
        points = [(trial.best(second), float(trial.best(metric) or 0)) for trial in scored]
        made.append(("The trials in both objectives", plots.scatter(points, second, metric)))
    for path, domain in spec.space.items():
        values = [(trial.values[path], float(trial.best(metric) or 0)) for trial in scored]
        made.append((path, plots.scatter(values, path, metric, log=isinstance(domain, LogUniform))))
    if len(scored) > 1:
        rows = [
            [*(_number(spec, path, trial) for path in spec.space), float(trial.best(metric) or 0)] for trial in scored
        ]
        made.append(
            (
                "Parallel coordinates",
                plots.parallel(
                    rows,
                    [*(_axis(spec, path) for path in spec.space), metric],
                    [cost_of(metric, row[-1]) for row in rows],
                ),
            )
        )
    if weights := importances(spec, found):
        made.append(("Importance of each parameter", plots.bars(weights, "share (PED-ANOVA)")))
    if len(record.nodes) > 1:
        when, count = record.nodes[-1]
        counts = [*record.nodes, (max(record.seconds, when), count)]
        made.append(("Nodes of the cluster", plots.steps(counts, "s", "nodes")))
    return made


def _curves(found: Sequence[TrialRecord]) -> str:
    name = "validation_loss"
    curves = {trial.key: [(row["epoch"], row[name]) for row in trial.reports if name in row] for trial in found}
    curves = {key: points for key, points in curves.items() if points}
    ends = [curves[trial.key][-1] for trial in found if trial.status == "stopped" and trial.key in curves]
    return plots.lines(curves, "epoch", name, ends)


def _axis(spec: SearchSpec, path: str) -> str:
    """What `_number` counts."""
    if isinstance(spec.space[path], LogUniform):
        return f"log10 {path}"
    return f"{path}, which choice" if _counted(spec.space[path]) else path


def _number(spec: SearchSpec, path: str, trial: TrialRecord) -> float:
    """A place on the parameter's axis: its value, its logarithm, or the number of a choice that is no number."""
    value, domain = trial.values[path], spec.space[path]
    if isinstance(domain, LogUniform):
        return math.log10(value)
    return float(list(domain.extremes).index(value)) if _counted(domain) else float(value)


def _counted(domain: Any) -> bool:
    return isinstance(domain, Choice) and not all(isinstance(value, int | float) for value in domain.values)


def _within(value: Any, found: Any) -> Any:
    """A number drawn as the exponential of a logarithm may lie a rounding error outside its range."""
    return min(max(value, found.low), found.high) if hasattr(found, "low") else value


def _plain(value: Any) -> Any:
    """Optuna knows no lists."""
    return str(value) if isinstance(value, list | tuple | dict) else value


def _plain_choices(found: Any) -> Any:
    from optuna.distributions import CategoricalDistribution

    if not isinstance(found, CategoricalDistribution):
        return found
    return CategoricalDistribution([_plain(value) for value in found.choices])
