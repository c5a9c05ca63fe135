"""Fetch an archive from the web or a bucket, bounded in size and time, and never from a private address of the web."""

import ipaddress
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx

from raysd.errors import DataError, StorageError
from raysd.words import shown

MAX_ARCHIVE_BYTES = 32 * 2**30
MAX_SECONDS = 3600
MAX_REDIRECTS = 5
TIMEOUT = httpx.Timeout(60, connect=15)
CHUNK = 2**20
ALLOW_PRIVATE = "RAYSD_ALLOW_PRIVATE_URLS"
"""Set to 1 by an operator who wants URLs of the own network (and of tests) to be read."""


class Guard(httpx.BaseTransport):
    """Connects to public addresses only, and to exactly the address it judged.

    Each request (so each redirect too) resolves its host once, and goes to that address with the Host header and TLS
    name of the URL: a second answer of the name server cannot lead elsewhere. Proxies of the environment are not used,
    as they would resolve the name again.
    """

    def __init__(self) -> None:
        self._inner = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.raw_host.decode("ascii")
        address = public_address(host, request.url.port or (443 if request.url.scheme == "https" else 80))
        request.url = request.url.copy_with(host=address)
        request.extensions = {**request.extensions, "sni_hostname": host}
        return self._inner.handle_request(request)

    def close(self) -> None:
        self._inner.close()


def public_address(host: str, port: int) -> str:
    """The first address that `host` resolves to, if all of them are public. Raises DataError."""
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise DataError(f"{shown(host)}: does not resolve: {error}") from None
    addresses = [str(answer[4][0]) for answer in answers]
    private = [address for address in addresses if not is_public(address)]
    if private and os.environ.get(ALLOW_PRIVATE) != "1":
        raise DataError(
            f"{shown(host)} is {private[0]}, not a public address: refused\n"
            f"copy the archive to a bucket or upload it (operators: {ALLOW_PRIVATE}=1 allows private addresses)"
        )
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, looking into IPv6 forms that carry an IPv4 one."""
    ip = ipaddress.ip_address(address.split("%", 1)[0])
    if isinstance(ip, ipaddress.IPv6Address):
        carried = ip.ipv4_mapped or ip.sixtofour or _translated(ip)
        if ip.teredo or ip.is_site_local or ip in ipaddress.ip_network("64:ff9b:1::/48"):
            return False
        if carried is not None and not is_public(str(carried)):
            return False
        ip = ip if carried is None or ip.is_global else carried
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback)


def download(url: str, target: Path) -> None:
    """Write the body of an http(s) URL to `target`. Raises DataError naming the host and the reason.

    Follows a few redirects, each judged like the first address, and none from https down to http.
    """
    deadline = time.monotonic() + MAX_SECONDS
    with httpx.Client(transport=Guard(), timeout=TIMEOUT, follow_redirects=False, trust_env=False) as client:
        for _ in range(MAX_REDIRECTS + 1):
            following = _get(client, url, target, deadline)
            if following is None:
                return
            url = following
    raise DataError(f"{_host(url)}: more than {MAX_REDIRECTS} redirects; give the final URL")


def fetch(store: Any, inner: str, target: Path, origin: str) -> None:
    """Copy one object of an fsspec store to `target` by ranges. Raises DataError where it is absent or too large."""
    try:
        with store.open(inner, "rb") as body:
            _save(iter(lambda: body.read(8 * CHUNK), b""), target, origin, time.monotonic() + MAX_SECONDS)
    except FileNotFoundError:
        raise DataError(f"{origin}: no such object") from None
    except DataError:
        raise
    except Exception as error:  # botocore's and aiohttp's errors are not OSErrors
        raise StorageError(f"{origin}: cannot be read: {shown(str(error), 200)}") from error


def _get(client: httpx.Client, url: str, target: Path, deadline: float) -> str | None:
    """Save the answer, or say where it redirects to."""
    try:
        # Identity: a compressed answer could grow without end, and a zip gains nothing.
        with client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as answer:
            if answer.has_redirect_location:
                return _redirect(httpx.URL(url), answer.headers["location"])
            if answer.status_code != 200:
                raise DataError(f"{_host(url)}: answered {answer.status_code} for data.source; check the URL")
            _save(answer.iter_raw(CHUNK), target, _host(url), deadline)
            return None
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:  # the last of a host as xn--a.example
        raise DataError(f"{_host(url)}: {shown(str(error), 200) or type(error).__name__}") from None


def _redirect(here: httpx.URL, location: str) -> str:
    there = here.join(location)
    if there.scheme not in ("http", "https") or not there.host:
        raise DataError(f"{here.host}: redirects to {shown(there.scheme, 20)}://, which is refused")
    if here.scheme == "https" and there.scheme == "http":
        raise DataError(f"{here.host}: redirects from https to http, which is refused; give a https URL")
    return str(there)


def _save(chunks: Iterable[bytes], target: Path, origin: str, deadline: float) -> None:
    size = 0
    with target.open("wb") as file:
        for chunk in chunks:
            size += len(chunk)
            if size > MAX_ARCHIVE_BYTES:
                raise DataError(f"{origin}: larger than {MAX_ARCHIVE_BYTES >> 30} GiB; put the pictures in a bucket")
            if time.monotonic() > deadline:
                raise DataError(f"{origin}: not there after {MAX_SECONDS} s; put the pictures in a bucket instead")
            file.write(chunk)


def _translated(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address in a NAT64 address (64:ff9b::/96, RFC 6052) or a deprecated compatible one (::/96)."""
    for network in ("64:ff9b::/96", "::/96"):
        if ip in ipaddress.ip_network(network):
            return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return None


def _host(url: str) -> str:
    """What a message may show of a URL: neither its credentials nor its query, which may be a signature."""
    return shown(url.split("://", 1)[-1].split("/", 1)[0].rpartition("@")[2].split("?", 1)[0])
