"""Manifests of k8s/: read, put together as kustomize does, and held to closed schemas, in which an unknown field is an error.

So are Serve configs. And the commands in them, parsed as the command line does.
"""

import copy
import functools
import gzip
import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import jsonpatch
import jsonschema
import kubernetes_validate
import typer
import yaml
from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema

from raysd import cli
from raysd.cli.specs import dotted, recipe_of
from raysd.config import SearchSpec, load, override, read_toml
from raysd.config.serving import ServingSpec
from raysd.errors import RaysdError

ROOT = Path(__file__).parents[1]
K8S = ROOT / "k8s"
FILES = sorted(K8S.rglob("*.yaml"))
FOLDERS = sorted(path.parent for path in FILES if path.name == "kustomization.yaml")
DEFINITIONS = ROOT / "tests" / "kuberay-crds"
KUBERNETES = "1.34"
# The package reads its definitions, a megabyte, for each resource.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)
Document = dict[str, Any]
Place = tuple[Any, ...]
"""The names and numbers that lead to a field."""

MAP = dict[str, str]
SELECTOR = {"matchLabels": MAP, "matchExpressions": [{"key": str, "operator": str, "values": [str]}]}
ENDPOINT = {
    "port": str,
    "path": str,
    "interval": str,
    "relabelings": [{"action": str, "sourceLabels": [str], "targetLabel": str, "regex": str, "replacement": str}],
}
TOLERATION = {"key": str, "operator": str, "value": str, "effect": str, "tolerationSeconds": int}
RULE = {"alert": str, "expr": str, "for": str, "labels": MAP, "annotations": MAP}
RESOURCE = {"name": str, "nominalQuota": (int, str), "borrowingLimit": (int, str), "lendingLimit": (int, str)}
METADATA = {"name": str, "namespace": str, "labels": MAP, "annotations": MAP}
# Of operators whose own schemas are not at hand: the fields that their definitions have and that manifests here may use.
SPECS: dict[str, Any] = {
    "PodMonitor": {"jobLabel": str, "selector": SELECTOR, "podMetricsEndpoints": [ENDPOINT]},
    "PrometheusRule": {"groups": [{"name": str, "interval": str, "rules": [RULE]}]},
    "ResourceFlavor": {
        "nodeLabels": MAP,
        "nodeTaints": [{"key": str, "value": str, "effect": str}],
        "tolerations": [TOLERATION],
    },
    "ClusterQueue": {
        "namespaceSelector": SELECTOR,
        "queueingStrategy": str,
        "cohortName": str,
        "preemption": {"withinClusterQueue": str, "reclaimWithinCohort": str},
        "resourceGroups": [{"coveredResources": [str], "flavors": [{"name": str, "resources": [RESOURCE]}]}],
    },
    "LocalQueue": {"clusterQueue": str},
    "Queue": {"weight": int, "reclaimable": bool, "capability": dict[str, Any]},
}
VERSIONS = {
    "PodMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
    "ResourceFlavor": "kueue.x-k8s.io/v1beta2",
    "ClusterQueue": "kueue.x-k8s.io/v1beta2",
    "LocalQueue": "kueue.x-k8s.io/v1beta2",
    "Queue": "scheduling.volcano.sh/v1beta1",
}
KUSTOMIZATION = {
    "apiVersion": str,
    "kind": str,
    "namespace": str,
    "resources": [str],
    "patches": [{"path": str, "target": {"kind": str, "name": str}}],
    "images": [{"name": str, "newName": str, "newTag": str}],
}
TYPES = {str: "string", int: "integer", bool: "boolean"}


def read(path: Path) -> list[Any]:
    return copy.deepcopy(_read(path))


@functools.cache
def _read(path: Path) -> list[Any]:
    return [document for document in yaml.load_all(path.read_text(), yaml.CSafeLoader) if document]


def closed(shape: Any) -> Any:
    """A JSON schema without room for other fields, from types, lists of one shape, and fields by name."""
    if isinstance(shape, tuple):
        return {"anyOf": [closed(one) for one in shape]}
    if isinstance(shape, list):
        return {"type": "array", "items": closed(shape[0])}
    if isinstance(shape, dict):
        fields = {name: closed(inner) for name, inner in shape.items()}
        return {"type": "object", "properties": fields, "additionalProperties": False}
    if shape in TYPES:
        return {"type": TYPES[shape]}
    values = {"type": "string"} if shape is MAP else {}
    return {"type": "object", "additionalProperties": values}


def _close(schema: Any) -> Any:
    """A definition's OpenAPI schema in which every object with named fields refuses others."""
    if isinstance(schema, list):
        return [_close(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    closing = {name: _close(inner) for name, inner in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        closing.setdefault("additionalProperties", False)
    return closing


@functools.cache
def ray_schema(kind: str) -> Any:
    """The closed schema of one of KubeRay's kinds, version v1."""
    packed = (DEFINITIONS / f"ray.io_{kind.lower()}s.yaml.gz").read_bytes()
    definition = yaml.load(gzip.decompress(packed), yaml.CSafeLoader)
    (version,) = [found for found in definition["spec"]["versions"] if found["name"] == "v1"]
    schema = _close(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = closed(METADATA)
    return schema


@functools.cache
def _validator(kind: str) -> jsonschema.Draft202012Validator:
    if kind == "Kustomization":
        return jsonschema.Draft202012Validator(closed(KUSTOMIZATION))
    if kind in SPECS:
        fields = {"apiVersion": str, "kind": str, "metadata": METADATA, "spec": SPECS[kind]}
        return jsonschema.Draft202012Validator(closed(fields) | {"required": list(fields)})
    return jsonschema.Draft202012Validator(ray_schema(kind))


def is_ray(document: Document) -> bool:
    return str(document["apiVersion"]).startswith("ray.io/")


def faults(document: Document, whole: bool = True) -> list[str]:
    """What the schema of its kind finds wrong; in a patch, which is not whole, nothing is missed."""
    kind = document["kind"]
    if not is_ray(document) and kind not in (*SPECS, "Kustomization"):
        try:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
        except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
            return [str(error.message)]
        return []
    expected = "ray.io/v1" if is_ray(document) else VERSIONS.get(kind)
    wrong = [f"apiVersion {document['apiVersion']}"] if expected and document["apiVersion"] != expected else []
    found = [error for error in _validator(kind).iter_errors(document) if whole or error.validator != "required"]
    return wrong + [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in found]


def serve_faults(config: Any) -> list[str]:
    """Fields of a Serve config that Serve does not know: it takes most of them in silence."""
    if not isinstance(config, dict):
        return ["not a map"]
    try:
        ServeDeploySchema.model_validate(config)
        for application in config["applications"]:
            load(ServingSpec, application.get("args", {}))
    except (ValueError, RaysdError) as error:
        return [str(error)]
    return list(_unknown(config, ServeDeploySchema, ""))


def _unknown(node: Any, shape: Any, place: str) -> Iterator[str]:
    """By the models in a type; maps without one have keys of their own."""
    if isinstance(node, list):
        for inner in node:
            yield from _unknown(inner, shape, place)
    elif isinstance(node, dict) and (models := list(_models(shape))):
        fields = {name: field.annotation for model in models for name, field in model.model_fields.items()}
        for name, inner in node.items():
            if name in fields:
                yield from _unknown(inner, fields[name], f"{place}{name}.")
            else:
                yield f"{place}{name}: unknown"


def _models(shape: Any) -> Iterator[type[BaseModel]]:
    if isinstance(shape, type) and issubclass(shape, BaseModel):
        yield shape
    for inner in get_args(shape):
        yield from _models(inner)


def build(folder: Path) -> list[Document]:
    """What kustomize makes of a folder, by the few of its features that k8s/ uses."""
    return copy.deepcopy(_build(folder))


@functools.cache
def _build(folder: Path) -> list[Document]:
    plan = yaml.safe_load((folder / "kustomization.yaml").read_text())
    documents: list[Document] = []
    for name in plan["resources"]:
        path = (folder / name).resolve()
        documents += build(path) if path.is_dir() else read(path)
    for patch in plan.get("patches", ()):
        _patch(documents, folder / patch["path"], patch.get("target"))
    for document in documents:
        if "namespace" in plan and document["kind"] != "Namespace":
            document["metadata"]["namespace"] = plan["namespace"]
        _rename(document, {image["name"]: image for image in plan.get("images", ())})
    return documents


def _patch(documents: list[Document], path: Path, target: Mapping[str, str] | None) -> None:
    """Apply a file with one patch. Fails where nothing, or more than one resource, is meant."""
    if target:
        _apply_operations(documents, read(path)[0], target)
        return
    (patch,) = read(path)  # the kustomize of kubectl 1.30 takes no file with two
    (found,) = [number for number, document in enumerate(documents) if same(document, patch)]
    documents[found] = _merged(documents[found], patch, path.name)


def _apply_operations(documents: list[Document], operations: list[Any], target: Mapping[str, str]) -> None:
    (found,) = [
        number
        for number, document in enumerate(documents)
        if (document["kind"], document["metadata"]["name"]) == (target["kind"], target["name"])
    ]
    documents[found] = jsonpatch.apply_patch(documents[found], operations)


def same(one: Document, other: Document) -> bool:
    return (one["kind"], one["metadata"]["name"]) == (other["kind"], other["metadata"]["name"])


def _merged(document: Any, patch: Any, name: str) -> Any:
    """Maps merged, values replaced. Lists are refused: what becomes of them depends on the kind."""
    assert not isinstance(patch, list), f"{name}: a list in a merge patch; write operations instead"
    if not isinstance(patch, dict) or not isinstance(document, dict):
        return patch
    merged = {**document, **{key: _merged(document.get(key), value, name) for key, value in patch.items()}}
    return {key: value for key, value in merged.items() if value is not None}


def _rename(node: Any, images: Mapping[str, Mapping[str, str]]) -> None:
    """The images of all containers, wherever they are."""
    for found in walk(node):
        name, _, _ = str(found.get("image", "")).partition(":")
        if name in images:
            found["image"] = f"{images[name]['newName']}:{images[name]['newTag']}"


def walk(node: Any) -> Iterator[dict[str, Any]]:
    """Every map in a document, outermost first."""
    if isinstance(node, dict):
        yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from walk(inner)


def kubectl_is_new() -> str | None:
    """Why kubectl cannot build, or None. Its kustomize is the one of Kubernetes 1.30 or newer."""
    if not shutil.which("kubectl"):
        return "no kubectl here"
    done = subprocess.run(["kubectl", "version", "--client", "-o", "json"], capture_output=True, text=True)
    try:
        minor = int(json.loads(done.stdout)["clientVersion"]["minor"].rstrip("+"))
    except (ValueError, KeyError):
        return "kubectl does not say its version"
    return None if minor >= 30 else f"kubectl 1.{minor} is older than 1.30"


def kustomized(folder: Path) -> list[Document]:
    """What kubectl makes of a folder."""
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def parse(words: list[str]) -> None:
    """Parse a command and its spec as the command line would, and run nothing. Raises where it would be refused."""
    command: Any = typer.main.get_command(cli.app)
    context = command.context_class(command, info_name="raysd")
    rest = list(words)
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
        if hasattr(command, "commands"):
            context = command.context_class(command, parent=context)
    context = command.make_context(command.name, rest, parent=context)
    if words[0] == "train":
        override(recipe_of(context.params["recipe"]), dotted(context.args))
    elif words[0] == "tune":
        search = load(SearchSpec, read_toml(ROOT / context.params["what"].removeprefix("/opt/raysd/")))
        override(recipe_of(search.recipe), {**search.training, **dotted(context.args)})
    else:
        assert not context.args


def misspell(document: Any, place: Place) -> Any:
    """The document with the name of one field misspelt."""
    wrong = copy.deepcopy(document)
    node = wrong
    for step in place[:-1]:
        node = node[step]
    node[place[-1] + "x"] = node.pop(place[-1])
    return wrong
