"""What of this environment a job gets: RAYSD_STORAGE and other RAYSD_ values. Secrets stay here."""

import os
from collections.abc import Mapping

from raysd.errors import RequestError
from raysd.jobs.clusters import Cluster
from raysd.jobs.secrets import holds_secret, is_secret_variable

OURS = "RAYSD_"
HERE = ("RAYSD_CLUSTER", "RAYSD_CLUSTERS", "RAYSD_STORAGE")
"""Mean something on this machine, or are dealt with apart."""
PRIVATE = "RAYSD_JOB_"
"""Of the process that runs a job's command."""


def storage_for(cluster: Cluster) -> str:
    """The URL of the storage that a job uses. Raises RequestError for one that the cluster cannot reach."""
    url = os.environ.get("RAYSD_STORAGE") or cluster.spec.storage
    if not url:
        raise RequestError(
            f"RAYSD_STORAGE is not set, and a folder of this machine is not on {cluster}\n"
            "set it to s3://bucket/folder, or give `storage` in clusters.toml"
        )
    if holds_secret(url):
        raise RequestError("RAYSD_STORAGE: the URL holds a password; the cluster's own environment gives access")
    local = "://" not in url or url.startswith(("file://", "local://"))
    if local and not cluster.shares(url.split("://")[-1]):
        raise RequestError(
            f"RAYSD_STORAGE {url}: a folder of this machine is not on {cluster}\n"
            "set it to s3://bucket/folder; a folder that all nodes share stands in shared_folders of clusters.toml"
        )
    return url


def values_for(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """(RAYSD_ variables that a job gets, names of those that look like secrets and stay here)."""
    ours = {name: value for name, value in sorted(environment.items()) if name.startswith(OURS) and value}
    ours = {name: value for name, value in ours.items() if name not in HERE and not name.startswith(PRIVATE)}
    kept = [name for name, value in ours.items() if is_secret_variable(name, value)]
    return {name: value for name, value in ours.items() if name not in kept}, kept
