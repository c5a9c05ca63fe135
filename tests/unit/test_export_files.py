"""Files for other programs, and the adapters that they are made of."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from raysd.models.weights import sort_header, whole
from raysd.storage import sha256_of

WRITE = """
import sys
from pathlib import Path
from raysd.export.files import export_kohya
from raysd.registry import Registry
from raysd.storage import Storage
from tests.adapters import publish_lora

base, out = Path(sys.argv[1]), Path(sys.argv[2])
store = Storage(str(out / "store"))
export_kohya(publish_lora(Registry(store), base, out / "lora", seed=1).ref, store, out / "kohya.safetensors")
"""


def test_equal_adapters_are_equal_bytes_in_every_process(tiny_base: Path, tmp_path: Path) -> None:
    digests = set()
    for seed in ("1", "2"):
        out = tmp_path / seed
        environment = {**os.environ, "PYTHONHASHSEED": seed, "XDG_CACHE_HOME": str(out / "cache")}
        subprocess.run([sys.executable, "-c", WRITE, str(tiny_base), str(out)], env=environment, check=True)
        [lora] = (out / "lora").iterdir()
        digests.add((sha256_of(lora), sha256_of(out / "kohya.safetensors")))
    assert len(digests) == 1


def test_a_sorted_header_is_of_the_same_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "x.safetensors"
    tensors = {"b": torch.randn(3), "a": torch.ones(5, dtype=torch.float16), "ü": torch.arange(4)}
    metadata = {name: f"{name}ö\n" for name in ("z", "y", "x", "w", "v")}
    save_file(tensors, file, metadata=metadata)
    sort_header(file)
    assert whole(file)
    found = load_file(file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == metadata
    header = file.read_bytes()
    assert int.from_bytes(header[:8], "little") % 8 == 0
    assert sorted(metadata) == sorted(metadata, key=lambda name: header.index(f'"{name}":'.encode()))
