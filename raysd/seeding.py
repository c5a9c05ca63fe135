"""Randomness without state: every draw is a function of what it is for, so a resume and another world size repeat it."""

import hashlib

import torch
from torch import Tensor


def seed_of(*parts: int | str) -> int:
    """63 bits that depend on all parts: (seed, step, index in the global batch), or whatever names the draw."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded with `seed_of(*parts)`: the same numbers on every device and rank."""
    return torch.Generator().manual_seed(seed_of(*parts))


def permutation(length: int, *parts: int | str) -> Tensor:
    """A random order of range(length). [length]"""
    return torch.randperm(length, generator=generator(*parts))
