"""Where a server listens on this machine, and whether others reach it there."""

import ipaddress
import socket

from raysd.errors import RequestError


def is_loopback(host: str) -> bool:
    """Whether a host name or address, as in a URL, is this machine's alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """The socket; port 0 takes a free one. Raises RequestError where it cannot listen: an address that is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(f"--host {host} --port {port}: cannot listen there: {reason}; try another --port") from None
