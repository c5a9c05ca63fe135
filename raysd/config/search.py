"""A search over training runs: which dotted paths vary, what is best, how it is looked for, and what it may cost."""

from math import prod
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from raysd.config.base import Spec
from raysd.config.evaluation import EvaluationSpec
from raysd.config.training import NonNegative

Metric = Literal["validation_loss", "kid", "clip_score", "seconds"]
SCORES = ("kid", "clip_score")
"""Of pictures that a trial draws when its training is over."""
HIGHER = ("clip_score",)
"""Better where it is higher; of all others the lowest is best."""


class Choice(Spec):
    """One of several values."""

    kind: Literal["choice"]
    values: Annotated[tuple[Any, ...], Field(min_length=1)]

    @property
    def extremes(self) -> tuple[Any, ...]:
        return self.values


class Uniform(Spec):
    """A number between two, all equally likely."""

    kind: Literal["uniform"]
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> "Uniform":
        return _ordered(self)

    @property
    def extremes(self) -> tuple[Any, ...]:
        return self.low, self.high


class LogUniform(Spec):
    """A number between two, its logarithm equally likely: for learning rates."""

    kind: Literal["loguniform"]
    low: float
    high: float

    @model_validator(mode="after")
    def _above_zero(self) -> "LogUniform":
        if self.low <= 0:
            raise ValueError(f"low {self.low}: a log-uniform range lies above 0")
        return _ordered(self)

    @property
    def extremes(self) -> tuple[Any, ...]:
        return self.low, self.high


class Integer(Spec):
    """A whole number from low to high, both included."""

    kind: Literal["integer"]
    low: int
    high: int

    @model_validator(mode="after")
    def _ordered(self) -> "Integer":
        return _ordered(self)

    @property
    def extremes(self) -> tuple[Any, ...]:
        return self.low, self.high


Distribution = Annotated[Choice | Uniform | LogUniform | Integer, Field(discriminator="kind")]


class SearcherSpec(Spec):
    """How settings are chosen."""

    kind: Literal["optuna", "random", "grid"] = "optuna"
    """optuna: TPE (Bergstra et al. 2011), which learns from finished trials; grid: every combination of choices."""
    seed: NonNegative = 0
    """Of the choice of settings; the trials' own seed is the recipe's."""


class SchedulerSpec(Spec):
    """Which trials are stopped early."""

    kind: Literal["asha", "median", "none"] = "asha"
    """asha: successive halving (Li et al. 2020); median: below the median of the others (Golovin et al. 2017)."""
    every: PositiveFloat = 1.0
    """Epochs between two validations of a trial."""
    grace: PositiveFloat = 2.0
    """Epochs that each trial gets."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """asha: one in so many goes on from each rung to the next."""


class BudgetSpec(Spec):
    """What the search may cost; whichever ends first ends it."""

    trials: PositiveInt | None = None
    """Settings tried. A grid has as many as it has combinations."""
    hours: PositiveFloat | None = None
    """Hours of the clock."""
    gpu_hours: PositiveFloat | None = None
    """GPU hours of all trials together."""
    money: PositiveFloat | None = None
    """Cost of all trials together, at `price`."""
    price: PositiveFloat | None = None
    """Price of one worker for one hour, in your currency."""

    @model_validator(mode="after")
    def _priced(self) -> "BudgetSpec":
        if self.money is not None and self.price is None:
            raise ValueError("money needs price, that of one worker for an hour")
        return self


class SearchSpec(Spec):
    """A search over one recipe."""

    recipe: str
    """The recipe or FILE.toml that each trial starts from."""
    training: Annotated[dict[str, Any], Field(default_factory=dict)]
    """Dotted paths of the training spec set for every trial."""
    space: Annotated[dict[str, Distribution], Field(min_length=1)]
    """Dotted paths of the training spec that vary, with their distributions."""
    objective: Annotated[tuple[Metric, ...], Field(min_length=1)] = ("validation_loss",)
    """What is best; several: the trials that no other beats in all of them. The scheduler goes by validation_loss."""
    evaluation: EvaluationSpec = EvaluationSpec(count=64)
    """For kid and clip_score: what each trial draws, and who judges it."""
    searcher: SearcherSpec = SearcherSpec()
    scheduler: SchedulerSpec = SchedulerSpec()
    budget: BudgetSpec
    concurrent: PositiveInt | None = None
    """Trials at once; as many as the cluster has room for if not given."""

    @field_validator("objective", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> "SearchSpec":
        wrong = [path for path, found in self.space.items() if not isinstance(found, Choice)]
        if self.searcher.kind == "grid" and wrong:
            raise ValueError(f"space.{wrong[0]}: a grid is made of choices; use kind choice, or searcher.kind random")
        if self.searcher.kind == "grid" and (self.budget.trials or self.trials) < self.trials:
            raise ValueError(f"budget.trials: the grid has {self.trials}; leave it out, or use searcher.kind random")
        if self.searcher.kind != "grid" and self.budget.trials is None:
            raise ValueError("budget.trials: required, unless searcher.kind is grid")
        if self.evaluation.data is not None:
            raise ValueError("evaluation.data: leave it out; trials are compared with the recipe's own data")
        if len(self.objective) > 1 and self.scheduler.kind != "none":
            raise ValueError("scheduler.kind: with several objectives no trial is plainly worse; use none")
        return self

    @property
    def trials(self) -> int:
        """How many settings are tried at most."""
        if self.searcher.kind != "grid":
            assert self.budget.trials is not None
            return self.budget.trials
        return prod(len(found.values) for found in self.space.values() if isinstance(found, Choice))


def _ordered(found: Any) -> Any:
    if found.low >= found.high:
        raise ValueError(f"low {found.low} is not below high {found.high}")
    return found
