"""The current folder as a job takes it along: what git knows of it, without junk and secrets, in one small file."""

import stat
import subprocess
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from raysd.errors import RequestError
from raysd.jobs.secrets import is_secret_content, is_secret_file

MOST_BYTES = 100 * 2**20
"""Of the files together, unpacked. They go through the head's memory to every node."""
START = 8192
"""Bytes of a file that are searched for secrets."""
JUNK = {
    *(".git", ".hg", ".svn", ".venv", "venv", "site-packages", "node_modules", "__pycache__", ".raysd"),
    *(".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".cache", ".tox", ".nox", ".ipynb_checkpoints"),
    *(".idea", ".vscode", "wandb", "mlruns"),
}
JUNK_FILES = (".pyc", ".pyo", ".swp", "~", ".DS_Store")


@dataclass(frozen=True)
class Selection:
    """What of a folder is sent: paths relative to it, with "/"."""

    folder: Path
    files: tuple[str, ...]
    size: int
    secrets: tuple[str, ...]
    """Left out because they look like secrets."""
    links: tuple[str, ...]
    """Left out because they lead out of the folder."""
    others: int
    """Files and folders left out: git ignores them, environments, caches."""

    def has(self, path: str) -> bool:
        """Whether a file, or anything in a folder of that name, goes along."""
        name = PurePosixPath(path).as_posix()
        return name == "." or any(file == name or file.startswith(f"{name}/") for file in self.files)

    def lines(self) -> list[str]:
        """What a person should know of it."""
        said = [f"sends {len(self.files)} files of this folder, {_mega(self.size)}"]
        if self.secrets:
            said.append(f"left out, they look like secrets: {_some(self.secrets)}")
        if self.links:
            said.append(f"left out, they lead out of this folder: {_some(self.links)}")
        if self.others:
            said.append(f"left out: {self.others} files and folders that git ignores, environments, caches")
        return said


def select(folder: Path) -> Selection:
    """Look through the folder. Raises RequestError without git, for an empty folder and above MOST_BYTES."""
    folder = folder.resolve()
    junk: set[str] = set(_git(folder, "--others", "--ignored", "--directory"))
    files: list[str] = []
    secrets: list[str] = []
    links: list[str] = []
    for name in sorted(set(_git(folder, "--cached", "--others"))):
        path = folder / name
        if place := _junk(folder, name):
            junk.add(place)
        elif path.is_symlink() and not path.resolve().is_relative_to(folder):
            links.append(name)
        elif path.is_file():
            (secrets if _secret(folder, path, name) else files).append(name)
    sizes = {name: (folder / name).stat().st_size for name in files}
    total = sum(sizes.values())
    if not files:
        raise RequestError(f"--send: {folder} has no file that could be sent")
    if total > MOST_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        shown = ", ".join(f"{name} {_mega(sizes[name])}" for name in largest)
        raise RequestError(
            f"--send: this folder has {_mega(total)} to send, more than {_mega(MOST_BYTES)}: {shown}\n"
            "upload pictures and models to s3:// and name them by URL, or list what is not needed in .gitignore"
        )
    return Selection(folder, tuple(files), total, tuple(secrets), tuple(links), len(junk))


def pack(selection: Selection, to: Path) -> None:
    """Write the files as a zip. The same files give the same bytes, so a cluster that has them is not sent them again."""
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED, compresslevel=3) as archive:
        for name in selection.files:
            path = selection.folder / name
            mode = 0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, (stat.S_IFREG | mode) << 16
            archive.writestr(entry, path.read_bytes())


def _git(folder: Path, *which: str) -> list[str]:
    """What git lists in the folder, in a repository or not."""
    words = ["ls-files", *which, "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, check=False)
        if listed.returncode != 0:  # no repository: .gitignore files count nevertheless
            with tempfile.TemporaryDirectory() as empty:
                subprocess.run(["git", "init", "--quiet", "--bare", empty], capture_output=True, check=True)
                here = ["git", f"--git-dir={empty}", f"--work-tree={folder}", *words]
                listed = subprocess.run(here, cwd=folder, capture_output=True, check=True)
    except FileNotFoundError:
        raise RequestError("--send: git is not installed, and only git knows what .gitignore leaves out") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.decode(errors="replace").splitlines() or [""])[-1]
        raise RequestError(f"--send: git cannot list {folder}: {reason}") from None
    return [name for name in listed.stdout.decode(errors="surrogateescape").split("\0") if name]


def _junk(folder: Path, name: str) -> str | None:
    """The file, or the folder that it lies in, that no job needs."""
    parts = PurePosixPath(name).parts
    for depth, part in enumerate(parts[:-1], 1):
        place = "/".join(parts[:depth])
        if part in JUNK or part.endswith(".egg-info") or (folder / place / "pyvenv.cfg").exists():
            return place
    return name if name.endswith(JUNK_FILES) or parts[-1] in JUNK else None


def _secret(folder: Path, path: Path, name: str) -> bool:
    if is_secret_file(name) or is_secret_file(path.resolve().relative_to(folder).as_posix()):
        return True
    with path.open("rb") as file:
        return is_secret_content(name, file.read(START))


def _some(names: tuple[str, ...], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _mega(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
