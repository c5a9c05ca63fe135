"""Which examples a step trains on: a function of (seed, step) alone, the same at every world size."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

from raysd.seeding import generator, permutation


@dataclass(frozen=True)
class Draw:
    """One place of a global batch: an example, and which of its variants."""

    index: int  # in the global batch
    example: int
    variant: int


class Sampler:
    """Passes over `length` examples in a new order each epoch; batches run on over the end of an epoch, nothing is dropped.

    With weights, an epoch draws `length` examples with replacement instead. Variant k of an example is trained in the
    epochs e with e % variants == k, each example starting at another k.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, variants: int = 1, weights: Sequence[float] | None = None
    ):
        self.length, self.batch_size, self.seed, self.variants = length, batch_size, seed, variants
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        self._epoch = lru_cache(maxsize=2)(self._order)

    def batch(self, step: int) -> list[Draw]:
        """The global batch of step `step` (from 0)."""
        first = step * self.batch_size
        return [self._draw(place, first + place) for place in range(self.batch_size)]

    def epoch_of(self, step: int) -> float:
        """Passes completed before step `step`."""
        return step * self.batch_size / self.length

    def _draw(self, place: int, position: int) -> Draw:
        epoch, offset = divmod(position, self.length)
        example = self._epoch(epoch)[offset]
        return Draw(place, example, (epoch + example) % self.variants)

    def _order(self, epoch: int) -> list[int]:
        if self.weights is None:
            return permutation(self.length, self.seed, "epoch", epoch).tolist()
        chooser = generator(self.seed, "epoch", epoch)
        return torch.multinomial(self.weights, self.length, replacement=True, generator=chooser).tolist()


def share(batch: Sequence[Draw], rank: int, world: int, micro_batch: int | None) -> list[list[Draw]]:
    """This rank's part of a global batch, cut into micro-batches; every rank gets the same number of them.

    Parts differ by one example at most where the batch is not divisible. The batch must hold an example for each rank.
    """
    bounds = [len(batch) * r // world for r in range(world + 1)]
    largest = max(b - a for a, b in pairwise(bounds))
    micro_steps = -(-largest // micro_batch) if micro_batch else 1
    mine = batch[bounds[rank] : bounds[rank + 1]]
    micro_steps = min(micro_steps, min(b - a for a, b in pairwise(bounds)))
    cuts = [len(mine) * m // micro_steps for m in range(micro_steps + 1)]
    return [list(mine[a:b]) for a, b in pairwise(cuts)]
