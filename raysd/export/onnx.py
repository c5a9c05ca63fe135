"""A version's networks as ONNX graphs: traced by torch.export, tidied, with the attention that ONNX Runtime has kernels for.

Batch, height and width stay free. <name>.onnx is the graph, <name>.onnx.data its weights.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from raysd.export.adapters import DOWN, UP
from raysd.export.networks import Graph, Networks
from raysd.export.precision import quantise

OPSET = 20
"""From 21 on group normalisation is one operator, which ONNX Runtime's CPU kernels compute in nine steps."""
ATTENTION = "com.microsoft::MultiHeadAttention"

Progress = Callable[[int, int], None]


def export_graphs(networks: Networks, folder: Path, precision: str, progress: Progress) -> None:
    """Write all graphs into a folder. `progress(done, total)` counts them."""
    graphs = networks.graphs()
    for done, graph in enumerate(graphs):
        progress(done, len(graphs))
        model = trace(graph)
        if precision == "int8" and graph.name == "denoiser":
            model = quantise(model)
        save(model, folder / f"{graph.name}.onnx")
    progress(len(graphs), len(graphs))


def trace(graph: Graph) -> Any:
    """The graph of a network, as onnx_ir.Model."""
    with _quiet(), _fused_attention(), torch.no_grad():
        program = torch.onnx.export(
            graph.module,
            graph.example,
            dynamo=True,
            opset_version=OPSET,
            input_names=graph.inputs,
            output_names=[graph.output],
            dynamic_shapes=graph.free,
            optimize=False,  # it takes longer than the tracing, most of it for rewrites that ONNX Runtime does anyway
            verbose=False,
        )
    assert program is not None
    model: Any = program.model
    _tidy(model)
    _make_optional(model)
    return model


def save(model: Any, path: Path) -> None:
    import onnx_ir

    onnx_ir.save(model, path, external_data=f"{path.name}.data")


def _tidy(model: Any) -> None:
    """Inline the functions that operators were translated to, and compute once what is constant."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    common.InlinePass()(model)
    optimizer.fold_constants(model)
    for tidy in (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.ClearMetadataAndDocStringPass(),  # where in which file each node comes from
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        tidy(model)


def _make_optional(model: Any) -> None:
    """Give the adapter's inputs a default that adapts nothing. Of rank 1: not every provider has products over none."""
    import onnx_ir

    for value in model.graph.inputs:
        if value.name.endswith((DOWN, UP)):
            shape = [side if isinstance(side, int) else 1 for side in value.shape]
            value.const_value = onnx_ir.tensor(np.zeros(shape, value.dtype.numpy()), name=value.name)
            model.graph.initializers[value.name] = value


@contextmanager
def _fused_attention() -> Iterator[None]:
    """While tracing, attention is one operator, with the kernels that keep no matrix of tokens by tokens."""
    plain = functional.scaled_dot_product_attention

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any
    ) -> Tensor:
        if attn_mask is not None or rest or any(options.values()):
            return plain(query, key, value, attn_mask, *rest, **options)  # the text encoder's, which is causal
        heads, width = query.shape[1], value.shape[3]
        rows = [x.transpose(1, 2).flatten(2) for x in (query, key, value)]  # [B, H, L, D] -> [B, L, HD]
        shape = (query.shape[0], query.shape[2], heads * width)
        joined = torch.onnx.ops.symbolic(
            ATTENTION, rows, {"num_heads": heads}, dtype=query.dtype, shape=shape, version=1
        )
        return joined.unflatten(2, (heads, width)).transpose(1, 2)

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks about libraries that are not installed."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
