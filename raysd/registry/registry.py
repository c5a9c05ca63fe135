"""`Registry`: all that can be done with published models, over one storage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysd.errors import IntegrityError, NotFound
from raysd.registry import aliases, catalog, files
from raysd.registry.collect import Collected, Collector
from raysd.registry.pins import PIN_TTL, Pin
from raysd.registry.publish import publish
from raysd.registry.records import AliasMove, Model, Version
from raysd.storage import Storage


class Registry:
    """Models in one storage. It holds nothing itself: any number of processes may use the same storage.

    Every method raises StorageError where the store fails; those that write, where it cannot compare-and-swap.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def publish(self, model: str, files: Mapping[str, Path], record: Mapping[str, Any], key: str) -> Version:
        """Publish local files (by their path in the version) as the model's next version.

        `key` is the identity of the publication: the version that has it already is returned as it is, whoever
        published it. `record` is kept verbatim. A version is there whole or not at all, and never changes.
        Raises RequestError for a name, path, kind of file or record that is not allowed.
        """
        return publish(self.storage, model, files, record, key)

    def resolve(self, ref: str, *, withdrawn_ok: bool = False) -> Version:
        """The version meant by `cats@3`, `cats:production` or `cats` (the newest that is not withdrawn).

        Raises NotFound naming what exists, RequestError for a withdrawn one, IntegrityError for a damaged manifest
        and for one that is not the one the alias was pointed at.
        """
        return catalog.resolve(self.storage, ref, withdrawn_ok)

    def fetch(self, version: Version, folder: Path | None = None) -> Path:
        """A local folder with the version's files, each compared with its size and sha256 at each call.

        Without `folder` it is one of the user's cache, shared between versions: not to be written to.
        Raises IntegrityError naming version, file and blob.
        """
        return files.fetch(self.storage, version, folder)

    def verify(self, version: Version) -> list[str]:
        """What is wrong with a version in the store, a line each; empty if it is whole."""
        try:
            catalog.load(self.storage, version.model, version.number, version.digest)
        except (IntegrityError, NotFound) as error:
            return [str(error)]
        return files.problems(self.storage, version)

    def models(self) -> list[Model]:
        """Every model with its versions, aliases and withdrawn versions."""
        return catalog.models(self.storage)

    def alias(self, version: Version, alias: str, *, expect: int | None = None) -> AliasMove:
        """Point an alias at a version; where it points there already, nothing happens.

        With `expect`, only if its last move has that `seq` (0: there is none yet), else Stale is raised.
        Raises RequestError for a withdrawn version.
        """
        self.storage.require_swap()
        return aliases.move(self.storage, version, alias, expect)

    def history(self, model: str, alias: str) -> list[AliasMove]:
        """Every move of an alias, oldest first. Raises NotFound."""
        return aliases.history(self.storage, model, alias)

    def rollback(self, model: str, alias: str) -> AliasMove:
        """Undo the alias's last move that was not undone yet. Raises NotFound, RequestError, and Stale in a race."""
        self.storage.require_swap()
        return aliases.rollback(self.storage, model, alias)

    def withdraw(self, version: Version, reason: str = "") -> None:
        """Take a version out of use for good: it is kept and no longer resolved. Raises RequestError while aliased."""
        self.storage.require_swap()
        aliases.withdraw(self.storage, version, reason)

    def pin(self, version: Version, why: str = "in use", *, ttl: float = PIN_TTL) -> Pin:
        """Keep a version's blobs from collection until the pin is released or its process is dead for `ttl` seconds."""
        return Pin(self.storage, {file.sha256 for file in version.files}, f"{why}: {version.ref}", ttl)

    def collect(self, *, grace: float = 24 * 3600, dry_run: bool = False) -> Collected:
        """Delete the blobs older than `grace` seconds that no manifest and no pin names. Publishers need not stop.

        Raises LeaseHeld beside another collection, IntegrityError for a damaged manifest (nothing is deleted then).
        """
        collector = Collector(self.storage, grace)
        return collector.dry_run() if dry_run else collector.run()
