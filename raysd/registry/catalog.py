"""Reading the registry: from a reference to a version, and what there is."""

import json
from dataclasses import dataclass, field
from typing import Any

from raysd.errors import IntegrityError, NotFound, RequestError
from raysd.registry.manifest import unpack
from raysd.registry.records import Model, Version, alias_path, manifest_path, parse, withdrawn_path
from raysd.storage import Storage


@dataclass
class Listing:
    """The numbers and aliases of one model, by name only."""

    versions: list[int] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)
    withdrawn: list[int] = field(default_factory=list)


def resolve(storage: Storage, ref: str, withdrawn_ok: bool) -> Version:
    """The version that a reference means now. Raises NotFound, RequestError if withdrawn, IntegrityError."""
    model, number, alias = parse(ref)
    if alias is not None:
        version = _aliased(storage, model, alias)
    else:
        version = load(storage, model, number if number is not None else _newest(storage, model))
    if version.withdrawn and not withdrawn_ok:
        reason = json.loads(storage.read(withdrawn_path(model, version.number)))["reason"]
        why = f" ({reason})" if reason else ""
        raise RequestError(f"{ref}: {version.ref} was withdrawn{why}: use another version")
    return version


def load(storage: Storage, model: str, number: int, digest: str | None = None) -> Version:
    """One version by number; `digest`, where given, is what its manifest must have. Raises NotFound, IntegrityError."""
    try:
        data = storage.read(manifest_path(model, number))
    except NotFound:
        raise NotFound(f"{model}@{number}: no such version; {known(storage, model)}") from None
    version = unpack(data, model, number, storage.exists(withdrawn_path(model, number)))
    if digest is not None and version.digest != digest:
        raise IntegrityError(
            f"{version.ref}: its manifest is {version.digest[:12]}, and {digest[:12]} was published: restore it"
        )
    return version


def models(storage: Storage) -> list[Model]:
    """Every model that has a version."""
    found = [(name, listing) for name, listing in sorted(listings(storage, "models").items()) if listing.versions]
    return [_model(storage, name, listing) for name, listing in found]


def listings(storage: Storage, folder: str) -> dict[str, Listing]:
    """What the names under models/ (or models/<model>) say."""
    found: dict[str, Listing] = {}
    for entry in storage.list(folder):
        parts = entry.path.split("/")
        if len(parts) != 4 or not parts[3].endswith(".json"):
            continue
        listing, name = found.setdefault(parts[1], Listing()), parts[3].removesuffix(".json")
        if parts[2] == "aliases":
            listing.aliases.append(name)
        elif parts[2] in ("versions", "withdrawn") and name.isdecimal():
            getattr(listing, parts[2]).append(int(name))
    for listing in found.values():
        listing.versions.sort()
        listing.withdrawn.sort()
    return found


def listing_of(storage: Storage, model: str) -> Listing:
    return listings(storage, f"models/{model}").get(model, Listing())


def latest(storage: Storage, model: str) -> int:
    """The highest number, 0 where there is none."""
    names = [entry.path.rpartition("/")[2] for entry in storage.list(f"models/{model}/versions")]
    return max((int(name.removesuffix(".json")) for name in names if name[0].isdecimal()), default=0)


def known(storage: Storage, model: str) -> str:
    """What exists, in a few words, for a message that says what does not."""
    listing = listing_of(storage, model)
    if listing.versions:
        return f"{model} has versions {_few(listing.versions)} and aliases {_few(listing.aliases)}"
    return f"models: {_few([name for name, found in sorted(listings(storage, 'models').items()) if found.versions])}"


def read_alias(storage: Storage, model: str, alias: str) -> tuple[dict[str, Any], str]:
    """An alias as stored, with its tag. Raises NotFound naming what exists, IntegrityError."""
    try:
        data, tag = storage.read_tagged(alias_path(model, alias))
    except NotFound:
        raise NotFound(f"{model}:{alias}: no such alias; {known(storage, model)}") from None
    try:
        body = json.loads(data)
        if not (isinstance(body["version"], int) and body["moves"]):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise IntegrityError(f"{model}:{alias}: {alias_path(model, alias)} is damaged: restore it") from None
    return body, tag


def _aliased(storage: Storage, model: str, alias: str) -> Version:
    body, _ = read_alias(storage, model, alias)
    return load(storage, model, body["version"], body["digest"])


def _newest(storage: Storage, model: str) -> int:
    listing = listing_of(storage, model)
    usable = sorted(set(listing.versions) - set(listing.withdrawn))
    if not usable:
        reason = "every version was withdrawn" if listing.versions else "no such model"
        raise NotFound(f"{model}: {reason}; {known(storage, model)}")
    return usable[-1]


def _model(storage: Storage, name: str, listing: Listing) -> Model:
    aliases = {alias: read_alias(storage, name, alias)[0]["version"] for alias in listing.aliases}
    return Model(name, listing.versions, aliases, listing.withdrawn)


def _few(names: list[int] | list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(str(name) for name in names[-10:]) + (f" and {len(names) - 10} older" if len(names) > 10 else "")
