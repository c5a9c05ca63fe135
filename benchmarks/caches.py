"""Caches as a run fills them, with made-up moments and embeddings."""

from pathlib import Path

import torch
from torch import Tensor

from raysd.data.cache import TensorCache
from raysd.storage import Storage
from raysd.train.batches import Item

EMPTY = "empty"
SPREAD = -4.0
"""Log-variance of the latents."""


def fill(root: Path, pictures: int, side: int, tokens: int, width: int) -> None:
    """Moments [8, side, side] and embeddings [tokens, width] of `pictures` pictures, and of the empty caption."""
    chooser = torch.Generator().manual_seed(0)
    shape = (4, side, side)
    moments = {
        item.latents[0]: torch.cat([torch.randn(shape, generator=chooser), torch.full(shape, SPREAD)])
        for item in items(pictures)
    }
    texts = [EMPTY, *(item.text for item in items(pictures))]
    _space(root, "latents").write(moments)
    _space(root, "text").write({key: torch.randn(tokens, width, generator=chooser) for key in texts})


def items(pictures: int) -> list[Item]:
    return [Item((f"picture{n}",), f"caption {n}", f"text{n}", "", "") for n in range(pictures)]


def opened(root: Path) -> tuple[TensorCache, TensorCache]:
    """Latents and text, as a worker opens them."""
    return _space(root, "latents").refresh(), _space(root, "text").refresh()


def in_memory(root: Path, pictures: int) -> tuple[Tensor, Tensor]:
    """The same, whole: moments [N, 8, h, w] and embeddings [N, L, D]."""
    latents, text = opened(root)
    chosen = items(pictures)
    return torch.stack(latents.read([i.latents[0] for i in chosen])), torch.stack(text.read([i.text for i in chosen]))


def _space(root: Path, name: str) -> TensorCache:
    return TensorCache(Storage(str(root)).child(name))
