"""A search space in the words of Ray Tune and Optuna, and what is wrong with one, before anything starts."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from random import Random
from typing import Any

from raysd.config import SearchSpec, TrainingSpec, describe, override
from raysd.config.search import Choice, Integer, LogUniform, Uniform
from raysd.errors import RequestError, SpecError

CHANGES_LOSS = {
    *("base", "seed", "loss.prediction", "validation.timesteps", "data.source", "data.prompt", "data.resolution"),
    *("data.validation", "data.duplicates", "data.blurry", "data.outliers"),
}
"""What changes the held-out pictures or the meaning of their loss: values of it could not be compared."""
SEARCHS_OWN = ("validation.every", "validation.best", "publish.", "track.")
"""Beginnings of paths that are not the trials': the search sets them, or they change nothing that it measures."""

MOST_COMBINATIONS = 2000
"""Of a space's extremes that are tried on the training spec before anything starts; a millisecond each."""


def key_of(values: Mapping[str, Any]) -> str:
    """A name for one setting: the same values are the same trial. 10 characters."""
    return hashlib.sha256(json.dumps(dict(values), sort_keys=True).encode()).hexdigest()[:10]


def short(value: Any) -> str:
    """A parameter's value for people."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def ray_space(spec: SearchSpec) -> dict[str, Any]:
    """For Ray Tune's own searcher."""
    from ray import tune

    def domain(found: Any) -> Any:
        if isinstance(found, Choice):
            return tune.choice(list(found.values))
        if isinstance(found, Integer):
            return tune.randint(found.low, found.high + 1)
        return (tune.loguniform if isinstance(found, LogUniform) else tune.uniform)(found.low, found.high)

    return {path: domain(found) for path, found in spec.space.items()}


def grid_points(spec: SearchSpec) -> list[dict[str, Any]]:
    """Every point of the grid, in an order by lot: successive halving judges a trial by those before it."""
    points = [
        dict(zip(spec.space, values, strict=True))
        for values in itertools.product(*(list(found.values) for found in spec.space.values()))  # type: ignore[union-attr]
    ]
    Random(spec.searcher.seed).shuffle(points)
    return points


def corners(spec: SearchSpec, paths: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Each combination of the extremes of those of the paths that vary."""
    varied = [path for path in paths if path in spec.space]
    for values in itertools.product(*(spec.space[path].extremes for path in varied)):
        yield dict(zip(varied, values, strict=True))


def optuna_space(spec: SearchSpec) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    def domain(found: Any) -> Any:
        if isinstance(found, Choice):
            return CategoricalDistribution(list(found.values))
        if isinstance(found, Integer):
            return IntDistribution(found.low, found.high)
        return FloatDistribution(found.low, found.high, log=isinstance(found, LogUniform))

    return {path: domain(found) for path, found in spec.space.items()}


def check_space(spec: SearchSpec, training: TrainingSpec) -> None:
    """Every path is known and free to vary, and every extreme value valid, alone and with the others.

    Raises SpecError that names them.
    """
    check_fixed(spec, spec.training)
    known = {row.path: row for row in describe(TrainingSpec)}
    for path, found in spec.space.items():
        if path not in known:
            close = _nearest(path, list(known))
            raise SpecError(f"space.{path}: unknown path{close}")
        if path.startswith(SEARCHS_OWN):
            raise SpecError(
                f"space.{path}: the search sees to it for every trial; leave it out, or set it for all of them"
            )
        for value in found.extremes:
            if isinstance(found, Uniform | LogUniform) and "number" not in known[path].kind.split(" | "):
                raise SpecError(f"space.{path}: takes {known[path].kind}; use kind integer or choice")
            try:
                override(training, {path: value})
            except SpecError as error:
                raise SpecError(f"space.{path}: {value!r} does not do: {str(error).splitlines()[0]}") from None
    for changes in itertools.islice(corners(spec, spec.space), MOST_COMBINATIONS):
        try:
            override(training, changes)
        except SpecError as error:
            named = ", ".join(f"{path} {value!r}" for path, value in changes.items())
            raise SpecError(f"space: {named} do not go together: {str(error).splitlines()[0]}") from None
    _check_comparable(spec)


def check_fixed(spec: SearchSpec, fixed: Iterable[str]) -> None:
    """No path that is set for every trial varies. Raises SpecError that names it."""
    both = sorted(spec.space.keys() & {path.replace("-", "_") for path in fixed})
    if both:
        raise SpecError(
            f"space.{both[0]}: set for every trial as well, by [training] or an option: leave one of them out"
        )


def _check_comparable(spec: SearchSpec) -> None:
    """Losses are compared by the objective, and by a scheduler whatever the objective is."""
    for path in sorted(CHANGES_LOSS & spec.space.keys()):
        text = f"space.{path}: it changes what validation_loss measures, so that values cannot be compared"
        if "validation_loss" in spec.objective:
            raise SpecError(f"{text}\nleave it out, or take objective kid or clip_score with scheduler.kind none")
        if spec.scheduler.kind != "none":
            raise SpecError(f"{text}, and scheduler.kind {spec.scheduler.kind} goes by it: use scheduler.kind none")


def check_choices(spec: SearchSpec) -> None:
    """Optuna takes choices of plain values alone. Raises RequestError."""
    for path, found in spec.space.items():
        if isinstance(found, Choice) and not all(isinstance(v, str | int | float | bool | None) for v in found.values):
            raise RequestError(f"space.{path}: optuna takes plain values; use searcher.kind random or grid for lists")


def _nearest(path: str, known: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else "; known paths: raysd train RECIPE --help"
