"""Every spec, a file a stage. Importing this package imports neither torch nor ray."""

from raysd.config.base import Spec, describe, load, override, read_toml
from raysd.config.data import DataSpec
from raysd.config.training import TrainingSpec

__all__ = ["DataSpec", "Spec", "TrainingSpec", "describe", "load", "override", "read_toml"]
