"""What ships inside the package: a small base model, the judge that scores it, and a sample data set."""

from __future__ import annotations

from pathlib import Path

NAMES = ("tiny-sd", "tiny-clip", "sample")


def asset(name: str) -> Path:
    """The folder of a bundled asset: 'tiny-sd' (the base), 'tiny-clip' (the judge) or 'sample' (captioned pictures).

    Raises ValueError for a name that is no asset, FileNotFoundError where the installation lacks its files.
    """
    if name not in NAMES:
        raise ValueError(f"no bundled asset {name!r}: there are {', '.join(NAMES)}")
    folder = Path(__file__).parent / name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"bundled asset {name!r} is missing ({folder}): reinstall raysd, or see raysd.assets.make"
        )
    return folder
