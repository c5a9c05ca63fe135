"""Which cluster is meant, where its dashboard answers, and the token that it wants."""

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, NonNegativeFloat, PositiveFloat

from raysd.config.base import Spec, load, read_toml
from raysd.errors import RequestError
from raysd.jobs.secrets import holds_secret

FILE = "~/.config/raysd/clusters.toml"


class EntrySpec(Spec):
    """Where the command itself runs, which starts the work and waits for it."""

    cpus: NonNegativeFloat | None = None
    """CPUs that it takes; if not given, none on a head that has CPUs, else a tenth on a node that has."""
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Custom resources that its node must have, taken from it: {head_work = 0.1}."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels that its node must have: {"ray.io/market-type" = "on-demand"}."""


class ClusterSpec(Spec):
    """One table of clusters.toml."""

    url: str
    """Of the dashboard: http://host:8265 or https://…"""
    storage: str | None = None
    """RAYSD_STORAGE of its jobs where the environment sets none."""
    token_file: str | None = None
    """File that holds the token, and nothing else."""
    shared_folders: tuple[str, ...] = ()
    """Absolute folders that every node and this machine have in common, such as NFS: they may be storage and data."""
    entry: EntrySpec = EntrySpec()


@dataclass(frozen=True)
class Cluster:
    """A cluster as it was named, its settings, and its URL without a trailing slash."""

    name: str
    url: str
    spec: ClusterSpec

    def __str__(self) -> str:
        return self.url if self.name == self.url else f"{self.name} ({self.url})"

    def shares(self, path: str) -> bool:
        """Whether an absolute local path is the same one on every node."""
        given = Path(os.path.normpath(path))
        return given.is_absolute() and any(given.is_relative_to(Path(folder)) for folder in self.spec.shared_folders)


def find(given: str | None) -> Cluster:
    """The cluster of --cluster, else of RAYSD_CLUSTER, else of an http RAY_ADDRESS. Raises RequestError."""
    name = given or os.environ.get("RAYSD_CLUSTER") or _ray_address()
    if not name:
        raise RequestError(
            "no cluster: give --cluster http://HOST:8265 (the address of its dashboard), or set RAYSD_CLUSTER\n"
            f"a name stands for a table of {_file()}"
        )
    spec = ClusterSpec(url=name) if "://" in name else _named(name)
    if holds_secret(spec.url):
        raise RequestError("--cluster: the URL holds a password; put the token into RAY_AUTH_TOKEN or a token_file")
    if not spec.url.startswith(("http://", "https://")):
        raise RequestError(
            f"cluster {name}: url {spec.url}: give the dashboard's address, http://HOST:8265 or https://…"
        )
    url = spec.url.rstrip("/")
    return Cluster(url if "://" in name else name, url, spec)


def token_of(cluster: Cluster) -> tuple[str | None, str]:
    """(the token or None, where it comes from or should). Raises RequestError for a file that cannot be read."""
    if cluster.spec.token_file:
        return _read(cluster.spec.token_file, "token_file"), f"token_file {cluster.spec.token_file}"
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled":
        return None, "RAY_AUTH_MODE=disabled"
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return _read(path, "RAY_AUTH_TOKEN_PATH"), f"RAY_AUTH_TOKEN_PATH {path}"
    usual = "~/.ray/auth_token"
    if mode == "token" and Path(usual).expanduser().is_file():
        return _read(usual, "RAY_AUTH_MODE=token"), usual
    return None, "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"


def _ray_address() -> str | None:
    address = os.environ.get("RAY_ADDRESS", "")
    return address if address.startswith(("http://", "https://")) else None


def _file() -> str:
    return os.environ.get("RAYSD_CLUSTERS") or FILE


def _named(name: str) -> ClusterSpec:
    path = Path(_file()).expanduser()
    tables = read_toml(path) if path.exists() else {}
    if name not in tables:
        known = f"it has {', '.join(sorted(tables))}" if tables else "there is no such file, or it is empty"
        raise RequestError(f"cluster {name}: no table [{name}] in {_file()} ({known}); or give a URL, http://HOST:8265")
    return load(ClusterSpec, tables[name], f"{_file()} [{name}]")


def _read(path: str, what: str) -> str:
    try:
        token = Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no text"
        raise RequestError(f"{what} {path}: no token can be read from it: {reason}") from None
    if not token or not token.isprintable() or " " in token:
        raise RequestError(f"{what} {path}: holds no token; it must hold the token and nothing else")
    return token
