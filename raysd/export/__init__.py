"""A model as files for other programs, and as graphs for ONNX Runtime."""

from raysd.export.files import EXPORTS

__all__ = ["EXPORTS"]
