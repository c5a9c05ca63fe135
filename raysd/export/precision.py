"""The arithmetic of exported graphs."""

import logging
from typing import Any

import torch

PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.float32}
"""What the denoiser and the text encoder are traced in. The autoencoder stays in fp32: that of some models overflows
in fp16, and it runs once a picture. fp16 is traced, not converted from fp32: so the network's own exceptions, such as the
sines and cosines of timesteps, stay exact."""
BLOCK = 32
"""int8: weights that share a scale."""
FP32_PRODUCTS = 1
"""ONNX Runtime's `accuracy_level`. With products in int8 it is slower at these sizes, and further from PyTorch."""


def quantise(model: Any) -> Any:
    """The weights of linear layers in int8; convolutions and adapters stay as they are. onnx_ir.Model -> onnx_ir.Model

    Quantising weights alone: with activations quantised as they come the distance doubles (and grows sixfold where
    convolutions are quantised too), and no GPU kernels do it.
    """
    import onnx_ir

    quantizer = _quantizer()(
        onnx_ir.serde.serialize_model(model),
        bits=8,
        block_size=BLOCK,
        is_symmetric=True,
        accuracy_level=FP32_PRODUCTS,
        op_types_to_quantize=("MatMul",),
    )
    quantizer.process()
    return onnx_ir.serde.deserialize_model(quantizer.model.model)


def _quantizer() -> Any:
    """ONNX Runtime's; its module gives the root logger a handler when it is imported, which is taken off again."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer, logger

    root.handlers, root.level = handlers, level
    logger.setLevel(logging.ERROR)
    return MatMulNBitsQuantizer
