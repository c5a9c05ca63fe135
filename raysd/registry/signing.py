"""Signatures of versions: who vouches for a manifest, and so for every file it names (Ed25519, RFC 8032).

models/<model>/signatures/<n>.json holds them by public key. A service that names its signers loads nothing else.
"""

import base64
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from raysd.errors import IntegrityError, NotFound, RequestError, Stale
from raysd.registry.records import Version
from raysd.storage import Storage

REMEDY = "make one with: openssl genpkey -algorithm ed25519 -out FILE"
_TRIES = 20


def read_key(path: Path) -> Ed25519PrivateKey:
    """A private key of a PEM file. Raises RequestError."""
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError:
        raise NotFound(f"--key {path}: no such file; {REMEDY}") from None
    except (ValueError, TypeError, OSError):
        raise RequestError(f"--key {path}: not an unencrypted private key in PEM; {REMEDY}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise RequestError(f"--key {path}: not an Ed25519 key; {REMEDY}")
    return key


def public_name(key: Ed25519PrivateKey) -> str:
    """The public key as configurations name it: its 32 bytes in base64."""
    return base64.b64encode(key.public_key().public_bytes_raw()).decode()


def sign(storage: Storage, version: Version, key: Ed25519PrivateKey) -> str:
    """Add a signature to those of the version. Returns the public key's name."""
    name = public_name(key)
    signature = base64.b64encode(key.sign(_message(version))).decode()
    for last in [False] * (_TRIES - 1) + [True]:
        found, tag = _read(storage, version)
        try:
            storage.swap(_path(version), json.dumps({**found, name: signature}, indent=1).encode(), tag)
            break
        except Stale:
            if last:
                raise
    return name


def check(storage: Storage, version: Version, signers: Sequence[str]) -> None:
    """Raises IntegrityError unless one of the signers (public keys in base64) signed this very manifest."""
    found, _ = _read(storage, version)
    for signer in signers:
        with suppress(InvalidSignature, ValueError, KeyError, TypeError):
            public = Ed25519PublicKey.from_public_bytes(base64.b64decode(signer, validate=True))
            public.verify(base64.b64decode(found[signer], validate=True), _message(version))
            return
    raise IntegrityError(
        f"{version.ref}: is signed by none of the {len(signers)} signers that this service trusts: raysd models sign"
    )


def _message(version: Version) -> bytes:
    """Name and digest: a signature of one version says nothing of another."""
    return f"raysd version\n{version.ref}\n{version.digest}".encode()


def _read(storage: Storage, version: Version) -> tuple[dict[str, str], str | None]:
    try:
        data, tag = storage.read_tagged(_path(version))
    except NotFound:
        return {}, None
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    return (found, tag) if isinstance(found, dict) else ({}, tag)


def _path(version: Version) -> str:
    return f"models/{version.model}/signatures/{version.number}.json"
