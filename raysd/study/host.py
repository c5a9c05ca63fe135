"""The server of a study's page: where it may listen, and until when."""

import contextlib
import signal
import socket
from collections.abc import Callable
from typing import Any

from raysd.errors import RequestError
from raysd.host import is_loopback, listen


def listen_to_reviewers(host: str, port: int, *, public: bool = False) -> socket.socket:
    """The socket. Raises RequestError for an address that others reach, unless `public`, and for one that is taken."""
    if not public and not is_loopback(host):
        raise RequestError(
            f"--host {host}: others reach it, and the page knows no logins: anyone could vote under any name; "
            "give --public if that is what you want"
        )
    return listen(host, port)


def serve(app: Any, listening: socket.socket, ready: Callable[[str], None]) -> None:
    """Answer until SIGINT or SIGTERM. `ready` gets the URL once connections are accepted."""
    import uvicorn

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises it again when it has answered all
    host, port = listening.getsockname()[:2]
    with listening, contextlib.suppress(KeyboardInterrupt):
        ready(f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/")
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none", server_header=False)
        uvicorn.Server(config).run(sockets=[listening])
