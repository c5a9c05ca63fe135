"""Training methods. A new one is a file beside this, a line in `METHODS`, and its spec in `raysd.config.training`."""

from raysd.methods.base import Batch, Method, TrainedModule
from raysd.methods.full import Full
from raysd.methods.lora import Lora

METHODS: dict[str, Method] = {"full": Full(), "lora": Lora()}

__all__ = ["METHODS", "Batch", "Method", "TrainedModule"]
