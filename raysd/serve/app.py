"""The Ray Serve application: an ingress that speaks HTTP, and a deployment of replicas for each served model.

Serve configs name `raysd.serve.app:build`, whose arguments are `raysd.config.serving.ServingSpec`.
"""

import os
from typing import Any

from ray import serve
from ray.serve import Application

from raysd.config.serving import ModelSpec, ServingSpec
from raysd.errors import NotFound, RequestError
from raysd.serve.replica import Replica
from raysd.serve.scaling import POLICY

DRAIN = 300.0
"""Seconds that a replica or ingress has to finish what it has begun before it is ended."""
UPSCALE, DOWNSCALE = 10.0, 180.0
"""Seconds for which more, or fewer, replicas have to be wanted: starting one takes longer than a short rush lasts."""
CALLS = 2000
"""Calls to a replica at once: each lasts as long as its prediction, and holds no more than a task."""


@serve.ingress()
class Ingress:
    """Takes requests, writes them down, calls replicas, answers."""

    def __init__(self, spec: ServingSpec, storage: str, replicas: dict[str, Any]):
        from raysd.quiet import quiet_libraries

        quiet_libraries()
        self.spec, self._storage, self._replicas = spec, storage, replicas

    def __serve_build_asgi_app__(self) -> Any:
        from raysd.database import Database
        from raysd.feedback.generations import Generations
        from raysd.serve import tracing
        from raysd.serve.http.application import build as build_application
        from raysd.serve.metrics import Metrics
        from raysd.serve.queue import Queue
        from raysd.serve.router import Router
        from raysd.serve.routes import Routes
        from raysd.storage import Storage

        tracing.configure("ingress")
        store = Storage(self._storage)
        database = Database(self.spec.database, store)
        database.migrate()
        metrics = Metrics.to_ray()
        queue = Queue(database, keep_pictures=self.spec.retention_days * 86400, metrics=metrics)
        _refuse_split(queue)
        waiting = {model.served_name: model.waiting for model in self.spec.models}
        routes, generations = Routes(store, self.spec.models, self.spec.signers), Generations(database, store)
        router = Router(queue, store, routes, self._replicas, metrics, waiting, generations)
        return build_application(router, queue, database, store, self.spec, metrics)


def build(spec: ServingSpec) -> Application:
    """The application that a Serve config deploys. Raises RequestError for what cannot be served, before anything starts.

    A model whose version was withdrawn or is damaged is left out, so that a cluster which starts again serves the others.
    """
    return compose(spec, whole=False)


def compose(spec: ServingSpec, *, whole: bool) -> Application:
    """The same; with `whole` such a model is refused too. Raises RequestError, IntegrityError."""
    from raysd.storage import Storage

    storage = Storage(spec.storage).url
    _check(spec, storage, whole)
    keep = spec.retention_days * 86400
    replicas = {
        model.served_name: _deployment(model).bind(model, storage, spec.database, keep, spec.signers)
        for model in spec.models
    }
    ingress = serve.deployment(Ingress).options(
        name="ingress",
        max_ongoing_requests=CALLS,
        graceful_shutdown_timeout_s=DRAIN,
        max_surge_percent=100,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(spec, storage, replicas)


def _deployment(model: ModelSpec) -> serve.Deployment:
    scale = model.replicas
    size: dict[str, Any] = {"num_replicas": scale.least}
    if scale.least != scale.most:
        size = {
            "autoscaling_config": {
                "min_replicas": scale.least,
                "max_replicas": scale.most,
                "target_ongoing_requests": scale.target,
                "policy": {"policy_function": POLICY},
                "upscale_delay_s": UPSCALE,
                "downscale_delay_s": DOWNSCALE,
                "downscale_to_zero_delay_s": scale.idle_seconds,
            }
        }
    return serve.deployment(Replica).options(
        name=f"model-{model.served_name}",
        max_ongoing_requests=CALLS,
        graceful_shutdown_timeout_s=DRAIN,
        max_surge_percent=100,
        health_check_timeout_s=60,
        ray_actor_options={"num_cpus": model.cpus, "num_gpus": model.gpus},
        **size,
    )


def _check(spec: ServingSpec, storage: str, whole: bool) -> None:
    """What would fail later in a replica fails now, with its reason."""
    from raysd.database import Database
    from raysd.registry.catalog import listings
    from raysd.serve.keys import Keys
    from raysd.serve.routes import Routes
    from raysd.storage import Storage

    store = Storage(storage)
    database = Database(spec.database, store)
    database.migrate()
    routes = Routes(store, spec.models)
    routes.close()
    refs = {model.served_name: model.ref for model in spec.models}
    for name, reason in routes.missing.items():
        if whole or (isinstance(reason, NotFound) and refs[name] not in listings(store, "models")):
            raise reason  # a name that was never there is a slip of whoever wrote it
    for model in spec.models:
        if model.safety is not None:
            from raysd.serve import safety

            safety.check(model.safety)
    if spec.public and not Keys(database).live():
        raise RequestError("public: every request would be refused, for there is no key: raysd keys create NAME")


def refuse_split(spec: ServingSpec) -> None:
    """In a process of the cluster: raises RequestError where several machines would share SQLite's file."""
    from raysd.database import Database
    from raysd.serve.queue import Queue
    from raysd.storage import Storage

    _refuse_split(Queue(Database(spec.database, Storage(spec.storage))))


def _refuse_split(queue: Any) -> None:
    import ray

    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    if nodes > 1 and queue.one_node and not os.environ.get("RAYSD_ONE_NODE"):
        raise RequestError(
            f"database: SQLite serves one machine, and this cluster has {nodes}; set RAYSD_DATABASE to PostgreSQL"
        )
