"""Manifests of k8s/: no unknown field in any file, nothing that the operator refuses, nothing open without a token."""

import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from raysd.config import load
from raysd.config.serving import ServingSpec
from raysd.errors import RaysdError
from tests.manifests import (
    FILES,
    FOLDERS,
    K8S,
    ROOT,
    Document,
    build,
    closed,
    faults,
    is_ray,
    kubectl_is_new,
    kustomized,
    misspell,
    parse,
    read,
    serve_faults,
    walk,
)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RAY = re.search(r"(?m)^ray==(.+)$", (ROOT / "constraints.txt").read_text())[1]  # type: ignore[index]
DRIVER = "python -m raysd.jobs.driver --retries 3"
NAMES = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 36}
CLOSED_PORTS = (8265, 10001, 6379, 52365)
# Maps with keys of their own, and texts: no schema knows their names.
FREE = {
    *("labels", "annotations", "matchLabels", "nodeSelector", "nodeLabels", "rayStartParams", "data"),
    *("limits", "requests", "capability", "value"),
}
needs_kubectl = pytest.mark.skipif(kubectl_is_new() is not None, reason=str(kubectl_is_new()))


def name_of(path: Path) -> str:
    return str(path.relative_to(K8S))


def everywhere() -> list[tuple[str, Document]]:
    """Every resource that any folder makes, with the folder's name."""
    return [(name_of(folder), document) for folder in FOLDERS for document in build(folder)]


def of_kind(*kinds: str) -> list[tuple[str, Document]]:
    return [(folder, document) for folder, document in everywhere() if document["kind"] in kinds]


def clusters(document: Document) -> list[tuple[str, Document]]:
    """(where, specification) of each Ray cluster that a resource holds."""
    spec: Any = document["spec"] if is_ray(document) else None
    for field in {"RayJob": ["rayClusterSpec"], "RayService": ["rayClusterConfig"]}.get(document["kind"], ()):
        spec = spec[field]
    return [(document["metadata"]["name"], spec)] if spec else []


def pods(document: Document) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """(where, pod specification, labels) of each pod that a resource makes."""
    for node in walk(document):
        if isinstance(node.get("spec"), dict) and "containers" in node["spec"]:
            where = f"{document['kind']} {document['metadata']['name']} {node.get('groupName', '')}".strip()
            yield where, node["spec"], node.get("metadata", {}).get("labels", {})


def groups(cluster: Document) -> list[tuple[str, Document]]:
    workers = [(group["groupName"], group) for group in cluster.get("workerGroupSpecs", ())]
    return [("head", cluster["headGroupSpec"]), *workers]


# What is wrong with a file.


@pytest.fixture(params=FILES, ids=name_of)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def patches() -> set[Path]:
    return {
        folder / patch["path"]
        for folder in FOLDERS
        for patch in yaml.safe_load((folder / "kustomization.yaml").read_text()).get("patches", ())
    }


def faults_of(path: Path, documents: list[Any]) -> list[str]:
    """What is wrong with a file's documents; its operations are tried on what they change."""
    if documents and isinstance(documents[0], list):
        for operation in documents[0]:
            if wrong := set(operation) - {"op", "path", "value"}:
                return [f"operation: {wrong}"]
            if not isinstance(operation.get("path"), str) or operation.get("op") not in ("add", "remove", "replace"):
                return [f"operation: {operation}"]
        return []
    return [fault for document in documents for fault in faults(document, whole=path not in patches())]


def test_each_file_is_right(path: Path) -> None:
    assert faults_of(path, read(path)) == []
    assert read(path), "empty"


def misspelt(documents: list[Any]) -> Iterator[tuple[str, Any]]:
    """A document for each name of a field in them, with its first occurrence misspelt."""
    seen: set[str] = {"kind", "apiVersion"}
    for place in _fields(documents):
        if place[-1] in seen or re.search("[/:]", place[-1]):
            continue
        seen.add(place[-1])
        yield place[-1], misspell(documents[place[0]], place[1:])


def _fields(node: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(node, list):
        for number, inner in enumerate(node):
            yield from _fields(inner, (*place, number))
    elif isinstance(node, dict):
        for name, inner in node.items():
            yield (*place, name)
            if name not in FREE:
                yield from _fields(inner, (*place, name))


def test_a_misspelt_field_is_found_in_each_file(path: Path) -> None:
    tried = 0
    for name, wrong in misspelt(read(path)):
        assert faults_of(path, [wrong]), f"{name}x is taken"
        tried += 1
    assert tried >= 2


def test_every_file_is_part_of_something() -> None:
    used = set()
    for folder in FOLDERS:
        plan = yaml.safe_load((folder / "kustomization.yaml").read_text())
        named = [*plan["resources"], *(patch["path"] for patch in plan.get("patches", ()))]
        used |= {(folder / name).resolve() for name in named} | {folder / "kustomization.yaml"}
    assert not [name_of(path) for path in FILES if path not in used]


# What the folders make.


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_what_each_folder_makes_is_right(folder: Path) -> None:
    documents = build(folder)
    assert [fault for document in documents for fault in faults(document)] == []
    keys = [(document["kind"], document["metadata"]["name"]) for document in documents]
    assert len(keys) == len(set(keys))


@needs_kubectl
@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_kubectl_makes_the_same(folder: Path) -> None:
    def order(document: Document) -> tuple[str, str]:
        return document["kind"], document["metadata"]["name"]

    made = kustomized(folder)
    assert [fault for document in made for fault in faults(document)] == []
    assert sorted(made, key=order) == sorted(build(folder), key=order)


# What the operator refuses, or does that one would not expect.


def refused(document: Document) -> list[str]:
    """What KubeRay 1.7 or Kueue would not take, and what they take and should not be given."""
    kind, name = document["kind"], document["metadata"]["name"]
    problems = [f"{kind} {name}: longer than {NAMES[kind]}"] if len(name) > NAMES.get(kind, 63) else []
    if kind == "RayJob":
        problems += _refused_job(document)
    if kind == "RayService":
        problems += _refused_service(document)
    for where, cluster in clusters(document):
        problems += [f"{where}: {problem}" for problem in _refused_cluster(cluster)]
    return problems


def _refused_job(document: Document) -> list[str]:
    spec, labels = document["spec"], document["metadata"].get("labels", {})
    rules = spec.get("deletionStrategy", {}).get("deletionRules")
    ends = spec.get("shutdownAfterJobFinishes", False)
    problems = []
    if rules and ends:
        problems.append("deletionRules and shutdownAfterJobFinishes")
    if not rules and not ends:
        problems.append("its cluster never goes")
    if spec.get("ttlSecondsAfterFinished") and not ends:
        problems.append("ttlSecondsAfterFinished without shutdownAfterJobFinishes")
    if "kueue.x-k8s.io/queue-name" in labels and (not ends or spec["rayClusterSpec"].get("enableInTreeAutoscaling")):
        problems.append("Kueue wants shutdownAfterJobFinishes and a cluster that does not grow")
    if spec.get("backoffLimit") and "--name " not in spec["entrypoint"]:
        problems.append("a retry begins again: the run has no name")
    if spec["entrypoint"].split(" -- ")[0] != f"{DRIVER} --lease {_lease(spec['entrypoint'])}":
        problems.append("nothing starts the command again, or its lease is another's")
    if not spec.get("entrypointNumCpus"):
        problems.append("the driver runs on the head")
    return problems


def _lease(entrypoint: str) -> str:
    """Where the run or the search that an entry point names has its lease."""
    words = shlex.split(entrypoint)
    name = dict(pairwise(words)).get("--name")
    return f"{'searches' if 'tune' in words else 'runs'}/{name}/lease.json"


def _refused_service(document: Document) -> list[str]:
    spec = document["spec"]
    problems = []
    if spec["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade":
        options = spec["upgradeStrategy"].get("clusterUpgradeOptions", {})
        if not spec["rayClusterConfig"].get("enableInTreeAutoscaling"):
            problems.append("an incremental upgrade needs autoscaling")
        if not options.get("gatewayClassName"):
            problems.append("an incremental upgrade needs a Gateway")
        if not 0 < options.get("stepSizePercent", 0) <= options.get("maxSurgePercent", 100) <= 100:
            problems.append("stepSizePercent must be at most maxSurgePercent")
    elif spec["upgradeStrategy"]["type"] != "NewCluster":
        problems.append("an upgrade stops the service")
    if "name" in spec["rayClusterConfig"]["headGroupSpec"].get("headService", {}).get("metadata", {}):
        problems.append("headService must have no name")
    return problems


def _refused_cluster(cluster: Document) -> list[str]:
    problems = []
    if cluster.get("authOptions", {}).get("mode") != "token":
        problems.append("authOptions.mode is not token: anybody may run code")
    if not cluster.get("authOptions", {}).get("secretName"):
        problems.append("authOptions.secretName: each new cluster would have another token")
    if cluster.get("rayVersion") != RAY:
        problems.append(f"rayVersion is not {RAY}")
    grows = cluster.get("enableInTreeAutoscaling", False)
    if grows and cluster.get("autoscalerOptions", {}).get("version") != "v2":
        problems.append("not the autoscaler v2")
    if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        problems.append("the head takes work")
    for name, group in groups(cluster):
        problems += [f"{name}: {problem}" for problem in _refused_group(name, group, grows)]
    return problems


def _refused_group(name: str, group: Document, grows: bool) -> list[str]:
    pod, container = group["template"]["spec"], group["template"]["spec"]["containers"][0]
    problems = []
    if grows and pod.get("restartPolicy") != "Never":
        problems.append("restartPolicy is not Never")
    if "env" in container and any(value["name"].startswith(("RAY_enable", "RAY_AUTH")) for value in container["env"]):
        problems.append("the operator sets RAY_AUTH_… and RAY_enable_…")
    if {"block", "dashboard-host", "labels"} & set(group.get("rayStartParams", {})):
        problems.append("rayStartParams: the operator's own")
    if name != "head":
        replicas = [group[field] for field in ("minReplicas", "replicas", "maxReplicas")]
        if replicas != sorted(replicas) or (not grows and len(set(replicas)) > 1):
            problems.append(f"replicas {replicas}")
        if group.get("priority") and not grows:
            problems.append("priority without the autoscaler v2")
    return problems


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_the_operator_takes_them(folder: Path) -> None:
    assert [problem for document in build(folder) for problem in refused(document)] == []


def job(document: Document) -> Any:
    return document["spec"]


def cluster(document: Document) -> Any:
    return clusters(document)[0][1]


BREAKS: list[tuple[str, Callable[[Document], Any], str]] = [
    ("base/cluster.yaml", lambda d: d["metadata"].update(name="c" * 54), "longer than 53"),
    ("base/jobs/train.yaml", lambda d: d["metadata"].update(name="j" * 48), "longer than 47"),
    ("base/service.yaml", lambda d: d["metadata"].update(name="s" * 48), "longer than 47"),
    ("base/cluster.yaml", lambda d: cluster(d).pop("authOptions"), "mode is not token"),
    ("base/service.yaml", lambda d: cluster(d)["authOptions"].update(mode="disabled"), "mode is not token"),
    ("base/jobs/search.yaml", lambda d: cluster(d).pop("rayVersion"), "rayVersion is not"),
    (
        "base/cluster.yaml",
        lambda d: cluster(d)["workerGroupSpecs"][1]["template"]["spec"].update(restartPolicy="Always"),
        "gpu-spot: restartPolicy is not Never",
    ),
    ("base/jobs/search.yaml", lambda d: job(d).update(shutdownAfterJobFinishes=True), "deletionRules and shutdown"),
    ("base/jobs/search.yaml", lambda d: job(d).pop("deletionStrategy"), "never goes"),
    ("base/jobs/train.yaml", lambda d: job(d).update(entrypoint="raysd train lora-demo"), "the run has no name"),
    ("base/jobs/train.yaml", lambda d: job(d).update(entrypoint="raysd train x --name x"), "starts the command again"),
    (
        "base/jobs/search.yaml",
        lambda d: job(d).update(entrypoint=job(d)["entrypoint"].replace("cats", "dogs", 1)),
        "lease is",
    ),
    ("base/jobs/train.yaml", lambda d: job(d).pop("entrypointNumCpus"), "runs on the head"),
    ("base/jobs/train.yaml", lambda d: cluster(d)["workerGroupSpecs"][1].update(maxReplicas=9), "replicas [4, 4, 9]"),
    ("base/service.yaml", lambda d: job(d)["upgradeStrategy"].update(type="None"), "stops the service"),
]


@pytest.mark.parametrize(("file", "change", "message"), BREAKS, ids=[message for _, _, message in BREAKS])
def test_what_the_operator_refuses_is_found(file: str, change: Callable[[Document], Any], message: str) -> None:
    (document,) = read(K8S / file)
    assert refused(document) == []
    change(document)
    assert any(message in problem for problem in refused(document))


def test_kueue_and_the_gateway_are_asked_only_for_what_they_can() -> None:
    (queued,) = [d for d in build(K8S / "overlays/kueue") if d["metadata"]["name"] == "raysd-train-cats"]
    assert refused(queued) == []
    queued["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] = True
    assert any("Kueue wants" in problem for problem in refused(queued))
    (service,) = [d for d in build(K8S / "overlays/incremental") if d["kind"] == "RayService"]
    service["spec"]["upgradeStrategy"]["clusterUpgradeOptions"].update(stepSizePercent=50)
    assert any("stepSizePercent" in problem for problem in refused(service))


def test_a_queue_is_named_where_a_job_asks_for_one() -> None:
    for folder, label, kind in (("kueue", "kueue.x-k8s.io", "LocalQueue"), ("volcano", "volcano.sh", "Queue")):
        made = build(K8S / "overlays" / folder)
        queues = {d["metadata"]["name"] for d in made if d["kind"] == kind}
        asked = {d["metadata"].get("labels", {}).get(f"{label}/queue-name") for d in made if d["kind"] == "RayJob"}
        assert asked - {None}
        assert asked - {None} <= queues
    flavors = {d["metadata"]["name"] for _, d in of_kind("ResourceFlavor")}
    (queue,) = {yaml.safe_dump(d["spec"]): d["spec"] for _, d in of_kind("ClusterQueue")}.values()
    assert {flavor["name"] for flavor in queue["resourceGroups"][0]["flavors"]} == flavors


def test_a_queue_admits_heads_and_drivers_on_demand_alone() -> None:
    made = build(K8S / "overlays/kueue")
    flavors = [d["spec"] for d in made if d["kind"] == "ResourceFlavor"]
    (kept,) = [flavor["nodeLabels"] for flavor in flavors if "tolerations" not in flavor]
    queued = [d for d in made if "kueue.x-k8s.io/queue-name" in d["metadata"].get("labels", {})]
    for document in queued:
        for where, pod, _ in pods(document):
            gpus = "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
            assert gpus or pod.get("nodeSelector") == kept, where
    assert queued


# What each pod is.


def test_pods_are_not_root_and_have_no_more_rights_than_they_need() -> None:
    for folder, document in everywhere():
        for where, pod, _ in pods(document):
            assert pod["securityContext"]["runAsNonRoot"] is True, (folder, where)
            assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", (folder, where)
            assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), (folder, where)
            for container in [*pod["containers"], *pod.get("initContainers", ())]:
                security = container["securityContext"]
                assert security["allowPrivilegeEscalation"] is False, (folder, where)
                assert security["capabilities"] == {"drop": ["ALL"]}, (folder, where)
                assert {"cpu", "memory"} <= set(container["resources"]["requests"]), (folder, where)
                assert "memory" in container["resources"]["limits"], (folder, where)


def test_the_autoscaler_is_held_to_the_same() -> None:
    for folder, document in everywhere():
        for where, spec in clusters(document):
            if spec.get("enableInTreeAutoscaling"):
                security = spec["autoscalerOptions"]["securityContext"]
                assert security == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}, (
                    folder,
                    where,
                )


def test_the_autoscaler_writes_its_log_where_the_head_reads_it() -> None:
    for folder, document in everywhere():
        for where, spec in clusters(document):
            if spec.get("enableInTreeAutoscaling"):
                (mount,) = spec["autoscalerOptions"]["volumeMounts"]
                assert mount in spec["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"], (
                    folder,
                    where,
                )


def test_images_have_the_version_of_the_project_and_no_other_is_the_latest() -> None:
    for folder, document in everywhere():
        for found in walk(document):
            image = found.get("image")
            if not isinstance(image, str):
                continue
            name, _, tag = image.partition(":")
            assert re.match(r"\d+\.\d+", tag), (folder, image)
            if "raysd" in name:
                assert tag == PROJECT["version"], (folder, image)


def test_gpus_are_drawn_with_the_gpu_image_and_tolerate_their_taint() -> None:
    seen = 0
    for folder, document in everywhere():
        for where, pod, _ in pods(document):
            for container in pod["containers"]:
                gpus = "nvidia.com/gpu" in container["resources"].get("limits", {})
                assert gpus == ("raysd-gpu" in container["image"]), (folder, where)
                keys = {toleration["key"] for toleration in pod.get("tolerations", ())}
                assert not gpus or "nvidia.com/gpu" in keys, (folder, where)
                spot = pod.get("nodeSelector", {}).get("karpenter.sh/capacity-type") == "spot"
                assert spot == ("raysd/spot" in keys), (folder, where)
                seen += gpus
    assert seen


def test_what_a_cluster_may_have_is_what_its_groups_have_at_most() -> None:
    for folder, document in everywhere():
        for where, spec in clusters(document):
            most = Counter({"CPU": 0, "GPU": 0})
            for group in spec["workerGroupSpecs"]:
                limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
                each = {"CPU": limits["cpu"], "GPU": limits.get("nvidia.com/gpu", 0), **group.get("resources", {})}
                most.update({name: group["maxReplicas"] * int(count) for name, count in each.items()})
                kind = group.get("labels", {}).get("ray.io/accelerator-type")
                assert kind is None or f"accelerator_type:{kind}" in each, (folder, where, group["groupName"])
            text = ",".join(f"{name}={count}" for name, count in most.items() if count)
            for name, group in groups(spec):
                values = {value["name"]: value for value in group["template"]["spec"]["containers"][0]["env"]}
                assert values["RAYSD_CLUSTER_RESOURCES"]["value"] == text, (folder, where, name)


def test_a_pod_that_goes_has_longer_than_ray_waits_for_it() -> None:
    for folder in FOLDERS:
        made = build(folder)
        settings = [d["data"] for d in made if d["metadata"]["name"] == "raysd-settings"]
        settings = settings or [read(K8S / "base/settings.yaml")[0]["data"]]
        waits = float(settings[0]["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        for document in made:
            for where, spec in clusters(document):
                for _, group in groups(spec):
                    pod = group["template"]["spec"]
                    assert pod["terminationGracePeriodSeconds"] >= waits + 30, (folder, where)


def test_heads_keep_what_they_know_and_accounts_exist() -> None:
    accounts = {d["metadata"]["name"]: d for d in read(K8S / "base/accounts.yaml")}
    assert all("role-arn" in " ".join(d["metadata"]["annotations"]) for d in accounts.values())
    for folder, document in everywhere():
        if document["kind"] in ("RayCluster", "RayService"):
            ((where, spec),) = clusters(document)
            assert spec["gcsFaultToleranceOptions"]["redisAddress"] == "redis://raysd-redis:6379", (folder, where)
        for where, pod, labels in pods(document):
            if document["kind"] in ("StatefulSet",) or "serviceAccountName" not in pod:
                assert pod["automountServiceAccountToken"] is False, (folder, where)
            else:
                assert pod["serviceAccountName"] in accounts, (folder, where)
            assert labels.get("app.kubernetes.io/part-of") == "raysd", (folder, where)


def ray_labels(name: str, group: Document) -> dict[str, str]:
    """The labels of a group's pods, those that the operator gives them included."""
    kind, label = ("head", "headgroup") if name == "head" else ("worker", name)
    return {**group["template"]["metadata"]["labels"], "ray.io/node-type": kind, "ray.io/group": label}


def test_each_head_and_each_group_of_the_service_have_a_disruption_budget_of_their_own() -> None:
    budgets = read(K8S / "base/disruption.yaml")
    assert all(isinstance(budget["spec"]["minAvailable"], int) for budget in budgets)
    used: set[str] = set()
    for folder, document in everywhere():
        for where, spec in clusters(document):
            found: list[str] = []
            for name, group in groups(spec):
                labels = ray_labels(name, group)
                mine = [b["metadata"]["name"] for b in budgets if selects(b["spec"]["selector"], labels)]
                wanted = name == "head" or labels["app.kubernetes.io/component"] == "serving"
                assert len(mine) == wanted, (folder, where, name)
                found += mine
            assert len(found) == len(set(found)), (folder, where)
            used |= set(found)
    assert used == {budget["metadata"]["name"] for budget in budgets}


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        (
            "postgresql+psycopg://me:a%40b%25c%5Cd\\e@db/raysd?sslmode=require",
            ("a@b%c\\d\\e", "postgresql://me@db/raysd?sslmode=require"),
        ),
        ("postgresql://me@db:5432/raysd", ("", "postgresql://me@db:5432/raysd")),
    ],
)
def test_the_password_of_the_database_is_no_argument(tmp_path: Path, url: str, seen: tuple[str, str]) -> None:
    (backup,) = read(K8S / "base/backup.yaml")
    (dump,) = backup["spec"]["jobTemplate"]["spec"]["template"]["spec"]["initContainers"]
    program = tmp_path / "pg_dump"
    program.write_text('#!/bin/bash\nprintf "%s\\n" "$PGPASSWORD" "${@: -1}"\n')
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RAYSD_DATABASE": url}
    done = subprocess.run(
        [*dump["command"], *dump["args"]], env=environment, capture_output=True, text=True, check=True
    )
    assert tuple(done.stdout.splitlines()) == seen


# Who comes in, and what is secret.


def test_no_file_holds_a_secret() -> None:
    for folder, document in everywhere():
        assert document["kind"] != "Secret", folder
        for node in walk(document):
            if (
                re.search(r"(?i)password|token|secret|RAYSD_DATABASE|KEY", str(node.get("name", "")))
                and "value" in node
            ):
                pytest.fail(f"{folder}: {node['name']} has a value")
    for path in FILES:
        assert not re.search(r"://[^/\s'\"]+:[^/\s'\"@…]+@", path.read_text()), name_of(path)


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for rule in selector.get("matchExpressions", ()):
        if rule["operator"] == "In" and labels.get(rule["key"]) not in rule["values"]:
            return False
        if rule["operator"] == "Exists" and rule["key"] not in labels:
            return False
    return True


def let_in(documents: list[Document], labels: dict[str, str], port: int) -> list[Any] | None:
    """Who reaches a pod's port: peers, or None where no policy selects the pod and everybody does."""
    policies = [d["spec"] for d in documents if d["kind"] == "NetworkPolicy"]
    mine = [policy for policy in policies if selects(policy["podSelector"], labels)]
    if not any("Ingress" in policy["policyTypes"] for policy in mine):
        return None
    peers: list[Any] = []
    for rule in [rule for policy in mine for rule in policy.get("ingress", ())]:
        if any(given["port"] == port for given in rule.get("ports", ())) or "ports" not in rule:
            peers += rule.get("from", ["anybody"])
    return peers


def head_labels(component: str) -> dict[str, str]:
    return {"ray.io/is-ray-node": "yes", "ray.io/node-type": "head", "app.kubernetes.io/component": component}


INSIDE = [
    {"podSelector": {"matchLabels": {"ray.io/is-ray-node": "yes"}}},
    {"podSelector": {"matchLabels": {"ray.io/originated-from-crd": "RayJob"}}},
    {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-system"}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
    },
]


@pytest.mark.parametrize("folder", ["base", "overlays/dev", "overlays/production", "overlays/incremental"])
def test_dashboard_and_job_port_are_closed(folder: str) -> None:
    made = build(K8S / folder)
    for component in ("interactive", "serving", "training"):
        for port in CLOSED_PORTS:
            peers = let_in(made, head_labels(component), port)
            assert peers is not None, (component, port)
            assert all(peer in INSIDE for peer in peers), (component, port, peers)
    assert let_in(made, {"anything": "else"}, 80) == []
    without = [d for d in made if d["metadata"]["name"] not in ("raysd-nothing", "raysd-ray")]
    assert let_in(without, {"ray.io/is-ray-node": "yes"}, 52365) == []
    assert let_in([d for d in made if d["kind"] != "NetworkPolicy"], head_labels("serving"), 8265) is None
    open_to_all = {"kind": "NetworkPolicy", "spec": {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{}]}}
    assert "anybody" in (let_in([*made, open_to_all], head_labels("serving"), 8265) or ())


def test_nothing_is_published_by_itself() -> None:
    for folder, document in everywhere():
        assert document["kind"] not in ("Ingress", "Gateway"), folder
        if document["kind"] == "Service":
            assert document["spec"].get("type", "ClusterIP") == "ClusterIP", folder
        for where, spec in clusters(document):
            head = spec["headGroupSpec"]
            assert head.get("serviceType", "ClusterIP") == "ClusterIP", (folder, where)
            assert not head.get("enableIngress"), (folder, where)


# What repeats something else, and what is run.


def test_alerts_are_those_of_serve() -> None:
    serving, _ = [d for d in read(K8S / "base/monitoring/monitoring.yaml") if d["kind"] == "PrometheusRule"]
    assert serving["spec"]["groups"] == yaml.safe_load((ROOT / "serve/prometheus/rules.yaml").read_text())["groups"]


def test_a_failed_job_and_a_missing_backup_ring(tmp_path: Path) -> None:
    _, jobs = [d for d in read(K8S / "base/monitoring/monitoring.yaml") if d["kind"] == "PrometheusRule"]
    named = set(re.findall(r"raysd-\w+", yaml.safe_dump([rule for rule in jobs["spec"]["groups"][0]["rules"]])))
    assert named <= {d["metadata"]["name"] for _, d in of_kind("CronJob")}
    if not shutil.which("promtool"):
        pytest.skip("no promtool here")
    series = [
        ('kube_job_failed{namespace="raysd", condition="true", job_name="raysd-verify-1"}', "1x4000"),
        ('kube_job_failed{namespace="raysd", condition="true", job_name="raysd-verify-2"}', "0x4000"),
        ('kube_job_failed{namespace="other", condition="true", job_name="raysd-verify-3"}', "1x4000"),
        ('kube_cronjob_status_last_successful_time{namespace="raysd", cronjob="raysd-backup"}', "0x4000"),
    ]
    asked = [("3h", "RaysdBackupOld", 0), ("50h", "RaysdBackupOld", 1), ("3h", "RaysdJobFailed", 1)]
    rows = [
        {"eval_time": at, "expr": f'count(ALERTS{{alertname="{name}", alertstate="firing"}}) or vector(0)'}
        | {"exp_samples": [{"labels": "{}", "value": count}]}
        for at, name, count in asked
    ]
    tests = [{"interval": "1m", "promql_expr_test": rows}]
    tests[0]["input_series"] = [{"series": one, "values": values} for one, values in series]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(jobs["spec"]))
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": tests}))
    done = subprocess.run(["promtool", "test", "rules", str(tmp_path / "test.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_monitored_ports_are_those_of_the_pods() -> None:
    monitors = {d["metadata"]["name"]: d["spec"] for d in read(K8S / "base/monitoring/monitoring.yaml")}
    asked = {end["port"] for name in ("raysd-ray", "raysd-heads") for end in monitors[name]["podMetricsEndpoints"]}
    assert asked == {"metrics", "as-metrics", "dash-metrics"}
    for folder, document in everywhere():
        for where, spec in clusters(document):
            for name, group in groups(spec):
                ports = {port["name"] for port in group["template"]["spec"]["containers"][0]["ports"]}
                assert (asked if name == "head" else {"metrics"}) <= ports, (folder, where, name)


def test_the_service_serves_what_the_serve_config_says() -> None:
    config = yaml.safe_load((ROOT / "serve/production.yaml").read_text())
    (service,) = read(K8S / "base/service.yaml")
    assert yaml.safe_load(service["spec"]["serveConfigV2"])["applications"] == config["applications"]
    for folder, document in of_kind("RayService"):
        text = yaml.safe_load(document["spec"]["serveConfigV2"])
        assert serve_faults(text) == [], folder
        spec = load(ServingSpec, text["applications"][0]["args"], folder)
        assert spec.public
        gpus = sum(model.gpus * model.replicas.most for model in spec.models)
        ((_, made),) = clusters(document)
        most = made["headGroupSpec"]["template"]["spec"]["containers"][0]["env"][1]["value"]
        assert gpus <= int(dict(part.split("=") for part in most.split(",")).get("GPU", 0)), folder
    (ingress,) = config["applications"][0]["deployments"]
    (cpus, *_) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert 2 <= ingress["num_replicas"] <= cpus["minReplicas"]
    assert ingress["max_replicas_per_node"] == 1
    assert ingress["ray_actor_options"]["num_cpus"] > 0, "it would run on the head"
    with pytest.raises(RaysdError, match="modelx"):
        load(ServingSpec, {"modelx": [], **config["applications"][0]["args"]}, "service.yaml")


def test_what_is_verified_by_the_clock_is_served() -> None:
    for folder in FOLDERS:
        made = build(folder)
        configs = [yaml.safe_load(d["spec"]["serveConfigV2"]) for d in made if d["kind"] == "RayService"]
        served = {model["ref"] for config in configs for model in config["applications"][0]["args"]["models"]}
        for document in made:
            if document["kind"] == "CronJob" and not document["spec"].get("suspend"):
                for words in commands(document):
                    assert words[:2] != ["models", "verify"] or words[2] in served, folder


def commands(document: Document) -> Iterator[list[str]]:
    """Each command of raysd that a resource runs, without its first word."""
    for node in walk(document):
        if "entrypoint" in node:
            yield shlex.split(node["entrypoint"].split(" -- ")[1])
        words = [*node.get("command", ()), *node.get("args", ())] if "image" in node else []
        if words[:1] == ["raysd"]:
            yield words[1:]


def test_every_command_is_one_of_raysds() -> None:
    found = {tuple(words) for _, document in everywhere() for words in commands(document)}
    assert {words[0] for words in found} >= {"train", "tune", "models"}
    for words in found:
        parse(list(words))


@pytest.mark.parametrize(
    "words",
    [
        "train lora-demo --name x --scale.workerz 4",
        "train nothing --name x",
        "tune /opt/raysd/tune/lora.toml --optim.learning 3",
        "models collect",
        "models gc --dry",
        "models verify",
    ],
)
def test_another_command_is_refused(words: str) -> None:
    with pytest.raises(Exception, match=r"."):
        parse(words.split())


def test_operations_are_closed() -> None:
    for path in patches():
        documents = read(path)
        if isinstance(documents[0], list):
            shape = closed([{"op": str, "path": str}])
            bare = [{key: value for key, value in operation.items() if key != "value"} for operation in documents[0]]
            jsonschema.validate(bare, shape)
