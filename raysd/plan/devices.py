"""The table of devices: what they hold, how fast they are and what they cost. It ships as devices.toml; users override it."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from raysd.config.base import Spec, load, read_toml
from raysd.errors import RequestError

SHIPPED = Path(__file__).with_name("devices.toml")
OVERRIDE = "RAYSD_DEVICES"
BESIDE = Path("cluster/devices.toml")
GIB = 2**30

NonNegative = Annotated[float, Field(ge=0)]


class Speed(Spec):
    """Dense peak, 10^12 operations a second."""

    fp32: PositiveFloat
    bf16: PositiveFloat
    fp16: PositiveFloat


class Device(Spec):
    """One kind of device, or of node. Units as in devices.toml."""

    kind: Literal["gpu", "cpu"] = "gpu"
    memory: PositiveFloat
    reserved: NonNegative = 1.0
    tflops: Speed
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.25
    per_node: PositiveInt = 1
    price: NonNegative = 0.0
    names: tuple[str, ...] = ()
    ray: tuple[str, ...] = ()

    @property
    def usable(self) -> int:
        """Bytes that tensors can have."""
        return int((self.memory - self.reserved) * GIB)

    def is_named(self, name: str) -> bool:
        """Whether torch's name for a device ("NVIDIA A100-SXM4-80GB", "cpu") means this one."""
        return bool(self.names) and all(re.search(rf"\b{re.escape(word)}\b", name) for word in self.names)


def devices() -> dict[str, Device]:
    """The table, with the user's entries over the shipped ones. Raises SpecError naming the file and the field."""
    table = read_toml(SHIPPED)
    path = _override()
    for name, entry in (read_toml(path) if path else {}).items():
        if not isinstance(entry, dict):
            raise RequestError(f"{path}: {name}: expected a table [{name}] with a device's fields")
        table[name] = _over(name, dict(entry), table, path)
    return {name: load(Device, entry, f"{path or SHIPPED.name}: {name}") for name, entry in table.items()}


def device(name: str) -> Device:
    """One entry. Raises RequestError."""
    table = devices()
    if name not in table:
        raise RequestError(f"--cluster {name}: not one of {', '.join(table)}; add it to {BESIDE} (see {OVERRIDE})")
    return table[name]


def _over(name: str, entry: dict[str, Any], table: dict[str, Any], path: Path | None) -> dict[str, Any]:
    like = entry.pop("like", name)
    if like != name and like not in table:
        raise RequestError(f"{path}: {name}: like {like!r} is not one of {', '.join(table)}")
    return {**table.get(like, {}), **entry}


def _override() -> Path | None:
    named = os.environ.get(OVERRIDE)
    if named:
        return Path(named).expanduser()
    return BESIDE if BESIDE.is_file() else None
