"""Running a service from the command line: until it is interrupted, on this machine or on the cluster of RAY_ADDRESS."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from raysd.config import load
from raysd.config.serving import ServingSpec
from raysd.errors import RequestError, SpecError
from raysd.study.host import is_loopback, listen

BUILDER = "raysd.serve.app:build"
NAME = "raysd"


def read_config(path: Path) -> tuple[ServingSpec, dict[str, Any]]:
    """The service in a Serve config, and its HTTP options. Raises SpecError naming file and field."""
    from ray.serve.schema import ServeDeploySchema

    try:
        config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, OSError) as error:
        raise SpecError(f"{path}: not a Serve config: {' '.join(str(error).split())[:200]}") from None
    ours = [found for found in config.applications if found.import_path == BUILDER]
    if len(ours) != 1 or len(config.applications) != 1:
        raise SpecError(f"{path}: applications: name {BUILDER} once; deploy other ones with `serve deploy`")
    http = config.http_options.model_dump(exclude_unset=True) | {"location": config.proxy_location}
    return load(ServingSpec, ours[0].args, str(path)), http


def run(
    spec: ServingSpec, host: str, port: int, ready: Callable[[str], None], location: str | None = "HeadOnly"
) -> None:
    """Serve until SIGINT or SIGTERM, then finish what was begun. `ready` gets the URL; `location` is Serve's, of its proxies.

    Raises RequestError for an address that is taken, or that others reach although the service is not public (also that
    of a Serve that runs already), for a public service that has no key, and for SQLite on a cluster of several machines.
    """
    _refuse_open(spec, host, "--host")
    shared = "RAY_ADDRESS" in os.environ
    if not shared:
        listen(host, port, public=True).close()  # a proxy that cannot listen would only say so in its log
    from ray import serve

    from raysd.serve.app import build, refuse_split

    application = build(spec)
    _join(spec)
    refuse_split(spec)
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    serve.start(http_options={"host": host, "port": port}, proxy_location=location, logging_config=quiet)
    _refuse_open(spec, _listens(), "Serve runs already at")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        serve.run(application, name=NAME, route_prefix="/", logging_config=quiet)
        ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
        stop.wait()
    finally:
        if shared:
            serve.delete(NAME)  # others may serve on that cluster too
        else:
            serve.shutdown()


def _refuse_open(spec: ServingSpec, host: str, named: str) -> None:
    if not is_loopback(host) and not spec.public:
        raise RequestError(f"{named} {host}: others reach it; give --public, and keys: raysd keys create NAME")


def _listens() -> str:
    """Where Serve's proxies listen: one that ran before keeps its address, whatever was asked for now."""
    from ray.serve.context import _get_global_client

    return str(_get_global_client().http_config.host)  # Serve tells it nowhere else


def _join(spec: ServingSpec) -> None:
    """Join the cluster, or start a local one that is as large as the service is at most."""
    from raysd import cluster

    need = sum(model.cpus * model.replicas.most for model in spec.models)
    cluster.join(int(need) + 1)
