"""Moving aliases, rolling them back, and withdrawing versions.

An alias is one object that holds every move it made, so a move and its entry in the history are one compare-and-swap.
"""

import json
from dataclasses import asdict

from raysd.errors import AlreadyExists, NotFound, RequestError, Stale
from raysd.registry.catalog import listing_of, load, read_alias
from raysd.registry.records import AliasMove, Version, alias_path, check_name, timestamp, withdrawn_path
from raysd.storage import Storage

_TRIES = 50


def move(storage: Storage, version: Version, alias: str, expect: int | None) -> AliasMove:
    """Point `alias` at `version`. Raises Stale, RequestError if withdrawn, NotFound, IntegrityError."""
    check_name(alias, "alias")
    current = load(storage, version.model, version.number, version.digest)
    _refuse_withdrawn(current)
    for last in [False] * (_TRIES - 1) + [True]:
        try:
            moved = _try_move(storage, current, alias, expect)
            break
        except Stale:
            if last or expect is not None:
                raise
    if load(storage, version.model, version.number).withdrawn:  # it was withdrawn while we moved
        _retreat(storage, moved)
        raise RequestError(f"{version.ref}: was withdrawn: move the alias to another version")
    return moved


def rollback(storage: Storage, model: str, alias: str) -> AliasMove:
    """Undo the last move that was not undone yet. Raises NotFound, RequestError where there is none, Stale."""
    body, tag = read_alias(storage, model, alias)
    moves = [AliasMove(**found) for found in body["moves"]]
    standing = _standing(moves)
    if len(standing) < 2:
        raise RequestError(f"{model}:{alias}: {model}@{body['version']} is its first version: nothing to go back to")
    target = load(storage, model, standing[-2].version, standing[-2].digest)
    _refuse_withdrawn(target)
    return _write(storage, target, alias, "rollback", moves, tag)


def history(storage: Storage, model: str, alias: str) -> list[AliasMove]:
    """Every move, oldest first. Raises NotFound."""
    return [AliasMove(**found) for found in read_alias(storage, model, alias)[0]["moves"]]


def withdraw(storage: Storage, version: Version, reason: str) -> None:
    """Take a version out of use; again is fine. Raises RequestError while an alias points at it."""
    load(storage, version.model, version.number, version.digest)
    _refuse_aliased(storage, version)
    path = withdrawn_path(version.model, version.number)
    body = {"version": version.number, "digest": version.digest, "reason": reason, "withdrawn": timestamp()}
    try:
        storage.create(path, json.dumps(body).encode())
    except AlreadyExists:
        return
    try:
        _refuse_aliased(storage, version)  # an alias moved here between the look and the mark
    except RequestError:
        storage.delete(path)
        raise


def _try_move(storage: Storage, version: Version, alias: str, expect: int | None) -> AliasMove:
    try:
        body, tag = read_alias(storage, version.model, alias)
        moves = [AliasMove(**found) for found in body["moves"]]
    except NotFound:
        moves, tag = [], None
    seq = moves[-1].seq if moves else 0
    if expect is not None and seq != expect:
        raise Stale(f"{version.model}:{alias}: is at move {seq}, not {expect}: look at its history first")
    if moves and (moves[-1].version, moves[-1].digest) == (version.number, version.digest):
        return moves[-1]
    return _write(storage, version, alias, "move", moves, tag)


def _write(
    storage: Storage, version: Version, alias: str, kind: str, moves: list[AliasMove], tag: str | None
) -> AliasMove:
    last = moves[-1] if moves else None
    seq, previous = (last.seq + 1, last.version) if last else (1, None)
    new = AliasMove(version.model, alias, seq, kind, version.number, version.digest, previous, timestamp())
    body = {"version": new.version, "digest": new.digest, "seq": new.seq, "previous": new.previous}
    data = json.dumps(body | {"moves": [asdict(found) for found in [*moves, new]]}, indent=1).encode()
    try:
        storage.swap(alias_path(version.model, alias), data, tag)
    except Stale:
        raise Stale(f"{version.model}:{alias}: was moved by another just now: look at its history first") from None
    return new


def _standing(moves: list[AliasMove]) -> list[AliasMove]:
    """The moves that no rollback has undone."""
    standing: list[AliasMove] = []
    for found in moves:
        if found.kind == "rollback":
            standing.pop()
        else:
            standing.append(found)
    return standing


def _retreat(storage: Storage, moved: AliasMove) -> None:
    """Undo our own move, unless the alias went on already or has nowhere to go (then `resolve` refuses it)."""
    body, tag = read_alias(storage, moved.model, moved.alias)
    moves = [AliasMove(**found) for found in body["moves"]]
    standing = _standing(moves)
    if body["seq"] == moved.seq and len(standing) > 1:
        target = load(storage, moved.model, standing[-2].version, standing[-2].digest)
        _write(storage, target, moved.alias, "rollback", moves, tag)


def _refuse_withdrawn(version: Version) -> None:
    if version.withdrawn:
        raise RequestError(f"{version.ref}: was withdrawn: point the alias at another version")


def _refuse_aliased(storage: Storage, version: Version) -> None:
    for alias in listing_of(storage, version.model).aliases:
        if read_alias(storage, version.model, alias)[0]["version"] == version.number:
            raise RequestError(
                f"{version.ref}: {version.model}:{alias} points at it: move or roll back that alias first"
            )
