"""LoRA as tensors beside a denoiser: read from a version's file, merged into weights, or given as inputs of a graph."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear

from raysd.errors import RequestError
from raysd.models import Family

DOWN, UP = ".lora_A", ".lora_B"
"""Suffixes of a pair's names in a graph, after the name of the adapted module."""
_WEIGHT = ".weight"


class Pair(NamedTuple):
    """One module's adapter, W + up down: `down` [r, in], `up` [out, r] with alpha / r in it. Convolutions have more axes."""

    down: Tensor
    up: Tensor


def read_adapter(family: Family, lora: Path) -> dict[str, Pair]:
    """The pairs of an adapter file by the module's name in the denoiser, in fp32.

    Raises RequestError for an adapter that is more than such pairs.
    """
    config = family.lora_config(lora)
    beyond = [key for key in ("use_dora", "use_rslora", "alpha_pattern") if config.get(key)]
    tensors = {name.partition(".")[2]: value.float() for name, value in load_file(lora).items()}
    names = {name.removesuffix(DOWN + _WEIGHT) for name in tensors if name.endswith(DOWN + _WEIGHT)}
    beyond += sorted(tensors.keys() - {name + side + _WEIGHT for name in names for side in (DOWN, UP)})
    if beyond:
        raise RequestError(f"{lora.name}: has {beyond[0]}, which ONNX exports do not know: draw with PyTorch")
    pairs = {name: Pair(tensors[name + DOWN + _WEIGHT], tensors[name + UP + _WEIGHT]) for name in sorted(names)}
    return {name: Pair(down, up * (config["lora_alpha"] / len(down))) for name, (down, up) in pairs.items()}


@torch.no_grad()
def merge(denoiser: nn.Module, pairs: Mapping[str, Pair]) -> None:
    """Add an adapter to the weights of the linear layers and convolutions that it names."""
    for name, (down, up) in pairs.items():
        weight: Any = denoiser.get_submodule(name).weight
        weight += (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)


def adaptable(denoiser: nn.Module, endings: tuple[str, ...]) -> list[str]:
    """The linear layers whose names end as the family's adapters want it."""
    suffixes = tuple(f".{ending}" for ending in endings)
    linears = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linears if f".{name}".endswith(suffixes)]


def attach(denoiser: nn.Module, names: list[str]) -> dict[str, Pair]:
    """Make the named layers add what the returned dictionary holds for them when they are called, if anything.

    The pairs are no attributes of a module, so that tracing takes them for what they are: inputs.
    """
    pairs: dict[str, Pair] = {}
    for name in names:
        denoiser.get_submodule(name).register_forward_hook(_adding(pairs, name))
    return pairs


def _adding(pairs: Mapping[str, Pair], name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if name not in pairs:
            return output
        down, up = pairs[name]
        return output + linear(linear(inputs[0], down), up)

    return add
