"""Ports for the servers that tests start."""

import random
import socket

# Below what the system gives to connections and to servers that ask for any port (32768 and up here): one of those, given to
# somebody else between this look and the server's start, would keep the server from starting. Above Ray's own workers' (19999).
_PORTS = range(20_000, 32_000)
_given: set[int] = set()
_random = random.SystemRandom()  # tests seed the other one


def free_port() -> int:
    """A port of the loopback interface where nobody listens, given once."""
    while True:
        port = _random.choice(_PORTS)
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
