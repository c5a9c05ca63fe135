"""Safetensors files by their headers: 8 bytes of length, so many of JSON, then the tensors."""

import json
from pathlib import Path
from typing import Any


def whole(file: Path) -> bool:
    """Whether the header can be read and the file is as long as it says. No tensor is read."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            size = file.stat().st_size - 8 - length
            tensors = _tensors(json.loads(opened.read(length))) if size >= 0 else []
            return bool(tensors) and size == max(tensor["data_offsets"][1] for tensor in tensors)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return False


def sort_header(file: Path) -> None:
    """Write the header anew with its metadata in order, which safetensors leaves to chance: equal models, equal bytes."""
    body = file.read_bytes()
    end = 8 + int.from_bytes(body[:8], "little")
    header = json.loads(body[8:end])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors are aligned
    file.write_bytes(len(text).to_bytes(8, "little") + text + body[end:])


def _tensors(header: dict[str, Any]) -> list[dict[str, Any]]:
    return [tensor for name, tensor in header.items() if name != "__metadata__"]
