"""Training methods. A new method is one file and one line here."""

from raysd.methods.base import Batch, Method, TrainedModule
from raysd.methods.full import Full
from raysd.methods.lora import Lora

METHODS: dict[str, Method] = {"full": Full(), "lora": Lora()}

__all__ = ["METHODS", "Batch", "Method", "TrainedModule"]
