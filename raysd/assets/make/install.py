"""Puts a trained version in its place as the bundled base: a diffusers folder with all weights in fp16."""

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from raysd.methods.full import copy_model
from raysd.references import locate
from raysd.storage import Storage


def install(ref: str, folder: Path) -> None:
    """Write the model of `ref` (a full version or a folder) to `folder`, which is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    copy_model(locate(ref, Storage()).folder, folder)
    for path in folder.rglob("*.safetensors"):
        tensors = load_file(path)
        halved = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        save_file(halved, path, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ref")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    install(args.ref, args.folder)


if __name__ == "__main__":
    main()
