"""The command of a job: what is known of it before it runs, its stable name, and the paths it names."""

import hashlib
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from raysd.errors import RequestError
from raysd.jobs.clusters import Cluster
from raysd.jobs.package import Selection
from raysd.jobs.secrets import holds_secret

URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://|.*::")


@dataclass(frozen=True)
class Named:
    """A value of the command that may be a path of this machine."""

    option: str
    text: str
    file: bool = False
    """It can be nothing else than a path; otherwise it is one if it looks like one, or exists here."""


@dataclass(frozen=True)
class Command:
    """A command of raysd. At most one of `run` and `search` is given: what it trains, by name."""

    words: tuple[str, ...]
    label: str
    """A short word for it, in the job's id."""
    run: str | None = None
    search: str | None = None
    unnamed: bool = False
    """It makes a run or a search and gives no name: `label` is only the beginning of one."""
    inputs: tuple[Named, ...] = ()
    outputs: tuple[Named, ...] = ()

    @property
    def lease(self) -> str | None:
        """Where in the storage the process that runs it holds its lease."""
        if self.run is not None:
            return f"runs/{self.run}/lease.json"
        return f"searches/{self.search}/lease.json" if self.search is not None else None

    def __str__(self) -> str:
        return shlex.join(["raysd", *self.words])


def refuse_secrets(command: Command) -> None:
    """A job's command is shown to everybody who sees the dashboard. Raises RequestError, without repeating the word."""
    before = ""
    for word in command.words:
        if holds_secret(word):
            where = word.partition("=")[0] if word.startswith("--") else before or "a word of the command"
            raise RequestError(
                f"{where}: holds a password, a signature or a key, and all who see the cluster's dashboard would read it\n"
                "let the cluster's own environment or role give access, and leave it out of the command"
            )
        before = word if word.startswith("--") else ""


def refuse_outputs(command: Command) -> None:
    """What a command writes into a folder of its node is lost with the job. Raises RequestError."""
    for named in command.outputs:
        if not URL.match(named.text):
            raise RequestError(
                f"{named.option} {named.text}: would be written on a node of the cluster, and lost with the job\n"
                "run this command here: with the same RAYSD_STORAGE it sees what jobs have made"
            )


def check_inputs(command: Command, cluster: Cluster, sent: Selection | None) -> list[str]:
    """Notices about paths that are taken as the cluster's own. Raises RequestError for one that will not be there."""
    notices = []
    for named in command.inputs:
        if URL.match(named.text) or not (named.file or _is_path(named.text)):
            continue
        if named.text.startswith(("/", "~")):
            if not cluster.shares(named.text):
                _refuse_inside(named, sent)
                notices.append(f"{named.option} {named.text}: taken as a path on the cluster's nodes")
            continue
        _refuse_left_behind(named, sent)
    return notices


def name(command: Command, storage: str, sent: Selection | None) -> tuple[Command, str]:
    """The command with the name that it lacked, and the job's id: the same for the same words, storage and sent files."""
    lines = [*command.words, storage]
    if sent is not None:
        lines += [f"{file} {hashlib.sha256((sent.folder / file).read_bytes()).hexdigest()}" for file in sent.files]
    short = hashlib.sha256("\0".join(lines).encode(errors="surrogateescape")).hexdigest()[:8]
    label = re.sub(r"[^a-z0-9._-]+", "-", command.label.lower()).strip("-._")[:36] or "raysd"
    id = f"{label}-{short}"
    if not command.unnamed:
        return command, id
    named_words = (*command.words, "--name", id)
    if command.words[0] == "tune":
        return replace(command, words=named_words, search=id, unnamed=False), id
    return replace(command, words=named_words, run=id, unnamed=False), id


def _is_path(text: str) -> bool:
    looks = text.startswith(("./", "../", "/", "~/")) or text in (".", "..")
    return looks or (bool(text) and "\0" not in text and len(text) < 1000 and Path(text).exists())


def _refuse_inside(named: Named, sent: Selection | None) -> None:
    path = Path(named.text).expanduser()
    if sent is not None and path.exists() and path.resolve().is_relative_to(sent.folder):
        inside = path.resolve().relative_to(sent.folder)
        raise RequestError(f"{named.option} {named.text}: lies in the folder that is sent; write it as ./{inside}")


def _refuse_left_behind(named: Named, sent: Selection | None) -> None:
    where = f"{named.option} {named.text}"
    if sent is None:
        raise RequestError(
            f"{where}: lies on this machine, and the cluster does not have it\n"
            "upload it and name its URL (s3://…), or send this folder along: raysd submit --send"
        )
    if ".." in PurePosixPath(named.text).parts:
        raise RequestError(f"{where}: lies outside of the folder that is sent; put it in, or upload it to s3://")
    if not sent.has(named.text):
        there = "does not go along (git ignores it, or it was left out)" if Path(named.text).exists() else "is not here"
        raise RequestError(f"{where}: {there}; put it into this folder, or upload it and name its URL (s3://…)")
