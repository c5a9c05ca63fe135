"""The code that records name."""

import subprocess
from pathlib import Path

from raysd import __version__, revision


def test_a_checkout_is_named_by_its_commit(tmp_path, monkeypatch, request):
    request.addfinalizer(revision.code.cache_clear)
    package = tmp_path / "raysd"
    package.mkdir()
    (package / "x.py").write_text("a = 1\n")
    monkeypatch.setattr(revision, "__file__", str(package / "revision.py"))
    assert named() == __version__, "an installed package"
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    commit = subprocess.run(
        ["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout
    assert named() == f"{__version__}+g{commit[:12]}"
    Path(tmp_path / "notes.txt").write_text("beside the package")
    assert named() == f"{__version__}+g{commit[:12]}"
    (package / "x.py").write_text("a = 2\n")
    assert named() == f"{__version__}+g{commit[:12]}.dirty"


def named() -> str:
    revision.code.cache_clear()
    return revision.code()
