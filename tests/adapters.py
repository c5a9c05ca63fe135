"""LoRA versions in a registry, over a base."""

from pathlib import Path

from benchmarks.bases import lora_of
from raysd.references import identity
from raysd.registry import Registry, Version


def publish_lora(registry: Registry, base: Path, out: Path, seed: int, model: str = "cats", rank: int = 2) -> Version:
    """A LoRA of random weights; `out` is a folder for its file."""
    file = lora_of(base, out, seed, rank)
    record = {"base": str(base), "base_digest": identity(base), "seed": seed}
    return registry.publish(model, {file.name: file}, record, key=f"{model}-{seed}")
