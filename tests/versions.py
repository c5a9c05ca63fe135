"""Small valid files to publish."""

import json
import random
import struct
from pathlib import Path


def safetensors(seed: int, size: int = 64) -> bytes:
    """A valid file with one tensor of bytes."""
    header = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + random.Random(seed).randbytes(size)


def files_of(folder: Path, seed: int, size: int = 64) -> dict[str, Path]:
    """Three files; the last is the same whatever the seed."""
    contents = {
        "unet/weights.safetensors": safetensors(seed, size),
        "model_index.json": json.dumps({"seed": seed}).encode(),
        "README.md": b"always the same",
    }
    for path, content in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return {path: folder / path for path in contents}


def flip(path: Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
