"""The model registry: publish, resolve, fetch, alias, roll back, withdraw, verify, collect garbage."""

from raysd.registry.collect import Collected
from raysd.registry.pins import Pin
from raysd.registry.records import AliasMove, File, Model, Version
from raysd.registry.registry import Registry

__all__ = ["AliasMove", "Collected", "File", "Model", "Pin", "Registry", "Version"]
