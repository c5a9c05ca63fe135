"""What is signed: addresses of pictures that end, and names of users that are not to be known. All from one secret."""

import hashlib
import hmac
import time
from collections.abc import Callable


def derived(secret: bytes, purpose: str) -> bytes:
    """A key of 32 bytes for one purpose: nothing learnt of it helps with another's."""
    return hmac.new(secret, f"raysd {purpose}".encode(), hashlib.sha256).digest()


def user_digest(secret: bytes, owner: str | None, user: str) -> str:
    """The same for the same user of the same owner; says nothing of who it is."""
    key = derived(secret, f"users of {owner or ''}")
    return hmac.new(key, user.encode(), hashlib.sha256).hexdigest()[:32]


class Links:
    """Addresses by which anybody who has one gets a picture, for `lifetime` seconds."""

    def __init__(self, secret: bytes, lifetime: float, clock: Callable[[], float] = time.time) -> None:
        self._key, self._lifetime, self._clock = derived(secret, "links"), lifetime, clock

    def to(self, picture: str, quality: int | None = None) -> str:
        """The path and query of a picture: of a generation, with the ending of its format, and of 100 its quality."""
        expires = int(self._clock() + self._lifetime)
        asked = "" if quality is None else f"&quality={quality}"
        return f"/v1/pictures/{picture}?expires={expires}{asked}&signature={self._signature(picture, expires, quality)}"

    def holds(self, picture: str, expires: int, signature: str, quality: int | None = None) -> bool:
        """Whether a link was signed here and has not ended."""
        wanted = self._signature(picture, expires, quality)
        signed = hmac.compare_digest(wanted.encode(), signature.encode("utf-8", "replace"))
        return signed and self._clock() < expires

    def _signature(self, picture: str, expires: int, quality: int | None) -> str:
        asked = "" if quality is None else f"\n{quality}"
        return hmac.new(self._key, f"{picture}\n{expires}{asked}".encode(), hashlib.sha256).hexdigest()
