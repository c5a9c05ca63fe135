"""A Ray cluster that grows and shrinks: the real autoscaler (v2), whose nodes are processes of this machine."""

import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.ports import free_port

HEAD = "f" * 51 + "00000"
IDLE_SECONDS = 6


@contextmanager
def growing(folder: Path, most: int) -> Iterator[str]:
    """The address of a cluster whose head takes no work; up to `most` nodes of one CPU come and go."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    config = folder / "autoscaling.json"
    config.write_text(json.dumps(_config(address, most)))
    # A socket's path may have 107 characters: the session lies under a short name.
    scratch = Path("/tmp") / f"raysd-{uuid.uuid4().hex[:8]}"
    environment = {
        **os.environ,
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        "RAY_AUTH_MODE": "disabled",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    options = ["--head", "--block", "--num-cpus=0", "--node-ip-address=127.0.0.1", f"--port={port}"]
    options += ["--include-dashboard=false", f"--autoscaling-config={config}", f"--temp-dir={scratch}"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, "--object-store-memory=200000000"]
    log = (folder / "head.log").open("w")
    head = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait(head, port, folder / "head.log")
        yield address
    finally:
        _end(head, str(scratch))
        log.close()


def _config(address: str, most: int) -> dict[str, Any]:
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
        "gcs_address": address,
        "head_node_id": HEAD,
    }
    types = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {"CPU": 1, "object_store_memory": 10**8},
            "node_config": {},
            "min_workers": 0,
            "max_workers": most,
        },
    }
    return {
        "cluster_name": "growing",
        "max_workers": most,
        "provider": provider,
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": IDLE_SECONDS / 60,
        "upscaling_speed": 1.0,
        "docker": {},
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


def _wait(head: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    end = time.monotonic() + 120
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert head.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.2)


def _end(head: "subprocess.Popen[bytes]", scratch: str) -> None:
    """End every process of this cluster: its own children, and the nodes that its autoscaler started."""
    family = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
    family += [p for p in psutil.process_iter(["cmdline"]) if scratch in " ".join(p.info["cmdline"] or [])]
    head.terminate()
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    head.wait()
