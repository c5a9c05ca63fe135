"""The moving average of the trained weights: it is validated and published in their place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from raysd.errors import TrainingFailed
from raysd.train.engine import Engine


class Ema:
    """Averages in fp32, each tensor kept by one rank only, so that the memory a rank needs falls with their number.

    Every method is collective: all ranks call it at the same place.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        """Starts from the engine's weights of now."""
        self._engine, self._decay = engine, decay
        self._shapes = {name: _shape(engine, name) for name in engine.trainable_names()}
        self._owners = owners(self._shapes, engine.world)
        self._own = {name: weight.clone() for name, weight in self._weights() if self._mine(name)}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimiser step `step` (from 0): the average keeps min(decay, (1 + step) / (10 + step)) of itself.

        So it follows quickly at first, as it started from weights that were not trained. Depends on nothing but the
        step, so there is nothing to resume besides the tensors.
        """
        kept = min(self._decay, (1 + step) / (10 + step))
        for name, weight in self._weights():
            if self._mine(name):
                self._own[name].lerp_(weight, 1 - kept)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The module holds the averages meanwhile, and afterwards, to the bit, what it held before.

        Each owner keeps the weights of before in the host's memory. No optimiser step may be made inside.
        """
        before: dict[str, Tensor] = {}
        for name, weight in self._weights():
            if self._mine(name):
                before[name] = weight.to("cpu", copy=True)
            self._engine.write_weight(name, self._own.get(name), self._owners[name])
        try:
            yield
        finally:
            for name, owner in self._owners.items():
                self._engine.write_weight(name, before.pop(name, None), owner)

    def full(self, name: str) -> Tensor:
        """The average of one weight, full shape, on every rank."""
        if self._engine.world == 1:
            return self._own[name]
        value = torch.empty(self._shapes[name], device=self._engine.device)
        if self._mine(name):
            value.copy_(self._own[name])
        dist.broadcast(value, self._owners[name])
        return value

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from saved averages of all names. Raises TrainingFailed if they are others'."""
        odd = sorted(set(tensors) ^ set(self._owners))
        if odd:
            raise TrainingFailed(
                f"the checkpoint's moving average is of another model: {len(odd)} names, first {odd[0]}"
            )
        for name, own in self._own.items():
            own.copy_(tensors[name])

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """All trained weights, one at a time: at stage 3 each is gathered from all ranks, and freed after use."""
        return ((name, self._engine.full_weight(name)) for name in self._owners)

    def _mine(self, name: str) -> bool:
        return self._owners[name] == self._engine.rank


def _shape(engine: Engine, name: str) -> torch.Size:
    parameter = engine.module.get_parameter(name)
    return getattr(parameter, "ds_shape", parameter.shape)  # stage 3 leaves an empty tensor in the module


def owners(shapes: Mapping[str, torch.Size], world: int) -> dict[str, int]:
    """The rank that keeps each tensor: from the largest on, the one that has least. In the order of `shapes`."""
    load, found = [0] * world, dict.fromkeys(shapes, 0)
    for name in sorted(shapes, key=lambda name: -shapes[name].numel()):
        found[name] = min(range(world), key=load.__getitem__)
        load[found[name]] += shapes[name].numel()
    return found
