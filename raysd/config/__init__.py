"""Every spec, a file a stage. Importing this package imports neither torch nor ray."""

from raysd.config.base import Spec, describe, load, override, read_toml
from raysd.config.data import DataSpec
from raysd.config.evaluation import EvaluationSpec
from raysd.config.search import SearchSpec
from raysd.config.training import TrainingSpec

__all__ = [
    "DataSpec",
    "EvaluationSpec",
    "SearchSpec",
    "Spec",
    "TrainingSpec",
    "describe",
    "load",
    "override",
    "read_toml",
]
