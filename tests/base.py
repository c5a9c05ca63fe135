"""A tiny Stable Diffusion folder of random weights and a few pictures, made once a session, and a spec for both."""

from pathlib import Path
from typing import Any

import pytest

from raysd.config import TrainingSpec, load, override


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from raysd.assets.make.skeleton import build

    folder = tmp_path_factory.mktemp("base") / "tiny"
    build(folder, seed=1)
    return folder


@pytest.fixture(scope="session")
def tiny_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.pictures import photo

    folder = tmp_path_factory.mktemp("pictures")
    for number in range(10):
        photo(number, 80).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    return folder


def toml(folder: Path, base: Path, pictures: Path, **changes: Any) -> Path:
    """A training file that takes seconds; keywords set dotted paths, `__` for the dot."""
    plain = {
        "base": str(base),
        "data": {"source": str(pictures), "resolution": 64, "augment": {"variants": 2}},
        "method": {"kind": "lora", "rank": 2, "dropout": 0.1},
        "loss": {"caption_dropout": 0.2},
        "optim": {"lr": 5e-3, "steps": 6, "batch_size": 4},
        "checkpoint": {"every": 2},
        "publish": {"model": "cats"},
    }
    spec = override(load(TrainingSpec, plain), {path.replace("__", "."): value for path, value in changes.items()})
    path = folder / "training.toml"
    path.write_text(_toml(spec.model_dump(mode="json", exclude_none=True)))
    return path


def _toml(values: dict[str, Any], prefix: str = "") -> str:
    """TOML of nested tables of plain values."""
    import json

    plain = "".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items() if not isinstance(v, dict))
    tables = "".join(f"\n[{prefix}{k}]\n{_toml(v, f'{prefix}{k}.')}" for k, v in values.items() if isinstance(v, dict))
    return plain + tables
