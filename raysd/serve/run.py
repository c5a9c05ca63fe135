"""Running a service from the command line: until it is interrupted, on this machine or on the cluster of RAY_ADDRESS."""

import io
import os
import signal
import threading
from collections.abc import Callable, Container, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from raysd.config import load
from raysd.config.serving import ServingSpec
from raysd.errors import RequestError, SpecError
from raysd.host import is_loopback, listen

BUILDER = "raysd.serve.app:build"
NAME = "raysd"
OF_APPLICATION = ("name", "route_prefix", "import_path", "args", "deployments")
"""What a config may say of its application. `deployments` are for a cluster: here each is as the application has it."""


def read_config(path: Path) -> tuple[ServingSpec, dict[str, Any]]:
    """The service in a Serve config, and its HTTP options. Raises SpecError naming file and field.

    What `run` does nothing with is refused: nobody would see that it is not there.
    """
    from ray.serve.schema import HTTPOptionsSchema, ServeDeploySchema

    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        config = ServeDeploySchema.model_validate(given)
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, OSError) as error:
        raise SpecError(f"{path}: not a Serve config: {' '.join(str(error).split())[:200]}") from None
    ours = [found for found in config.applications if found.import_path == BUILDER]
    if len(ours) != 1 or len(config.applications) != 1:
        raise SpecError(f"{path}: applications: name {BUILDER} once; deploy other ones with `serve deploy`")
    _refuse_others(given, ("proxy_location", "http_options", "applications"), f"{path}: ")
    _refuse_others(given.get("http_options") or {}, HTTPOptionsSchema.model_fields, f"{path}: http_options.")
    _refuse_others(given["applications"][0], OF_APPLICATION, f"{path}: applications.0.")
    if ours[0].route_prefix != "/":
        raise SpecError(f"{path}: applications.0.route_prefix: `raysd serve` serves at /; leave it out")
    http = config.http_options.model_dump(exclude_unset=True) | {"location": config.proxy_location}
    if bool(http.get("ssl_keyfile")) != bool(http.get("ssl_certfile")):
        raise SpecError(f"{path}: http_options: ssl_keyfile and ssl_certfile need each other; give both")
    return load(ServingSpec, ours[0].args, str(path)), http


def _refuse_others(given: Mapping[str, Any], known: Container[str], where: str) -> None:
    for name in [name for name in given if name not in known]:
        raise SpecError(
            f"{where}{name}: `raysd serve` does not know it or does not do it; leave it out, or `serve deploy`"
        )


def run(
    spec: ServingSpec, host: str, port: int, ready: Callable[[str], None], http: Mapping[str, Any] | None = None
) -> None:
    """Serve until SIGINT or SIGTERM, then finish what was begun. `ready` gets the URL.

    `http` are the other options of Serve's proxies, and `location`, which is where they run.
    Raises RequestError for an address that is taken, or that others reach although the service is not public (also that
    of a Serve that runs already), for a public service that has no key, for SQLite on a cluster of several machines, for
    TLS without its files, or on a Serve that runs already without it, and for a model that nothing can draw.
    """
    options = {**(http or {}), "host": host, "port": port}
    location, secure = options.pop("location", None) or "HeadOnly", bool(options.get("ssl_certfile"))
    _refuse_open(spec, host, "--host")
    shared = "RAY_ADDRESS" in os.environ
    if not shared:
        listen(host, port).close()  # a proxy that cannot listen would only say so in its log
        _refuse_absent(options)
    from ray import serve

    from raysd.serve.app import compose, refuse_split

    application = compose(spec, whole=True)
    _join(spec)
    refuse_split(spec)
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    serve.start(http_options=options, proxy_location=location, logging_config=quiet)
    running = _running()
    _refuse_open(spec, str(running.host), "Serve runs already at")
    if secure and not running.ssl_certfile:
        raise RequestError("http_options.ssl_certfile: Serve runs already, without TLS; end it: serve shutdown")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        serve.run(application, name=NAME, route_prefix="/", logging_config=quiet)
        ready(f"{'https' if secure else 'http'}://{f'[{host}]' if ':' in host else host}:{port}")
        stop.wait()
    finally:
        if shared:
            serve.delete(NAME)  # others may serve on that cluster too
        else:
            _shut_down()


def _refuse_open(spec: ServingSpec, host: str, named: str) -> None:
    if not is_loopback(host) and not spec.public:
        raise RequestError(f"{named} {host}: others reach it; give --public, and keys: raysd keys create NAME")


def _refuse_absent(options: Mapping[str, Any]) -> None:
    """A proxy that cannot read what TLS needs would only say so in its log, too."""
    for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
        if options.get(name) and not Path(options[name]).is_file():
            raise RequestError(f"http_options.{name}: {options[name]}: no such file")


def _shut_down() -> None:
    """End Serve. Its controller dies in the midst of that call, as it should, and Ray would report it in red."""
    from ray import serve

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        serve.shutdown()


def _running() -> Any:
    """The options of Serve's proxies: one that ran before keeps its own, whatever was asked for now."""
    from ray.serve.context import _get_global_client

    return _get_global_client().http_config  # Serve tells it nowhere else


def _join(spec: ServingSpec) -> None:
    """Join the cluster, or start a local one that is as large as the service is at most."""
    from raysd import cluster

    need = sum(model.cpus * model.replicas.most for model in spec.models)
    cluster.join(int(need) + 1)
