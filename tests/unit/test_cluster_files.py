"""Launcher files of cluster/, the Dockerfile and the runbook: what Ray and the clouds take, and what they must never open."""

import functools
import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from jsonschema import ValidationError
from ray.autoscaler._private.util import validate_config

from raysd.plan.devices import devices
from raysd.plan.fit import PREFIX
from tests.manifests import misspell, parse

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
FILES = sorted(CLUSTER.glob("*.yaml"))
CLOUDS = [CLUSTER / "aws.yaml", CLUSTER / "gcp.yaml"]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
PINS = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text()))

PROVIDERS = {
    "aws": {"type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "security_group"},
    "gcp": {"type", "region", "availability_zone", "cache_stopped_nodes", "project_id"},
    "external": {
        *("type", "module", "use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check"),
        *("launch_multiple", "gcs_address", "head_node_id"),
    },
}
# Of Compute Engine's `instances` (its client is not installed): the fields that are used here.
INSTANCE: dict[str, Any] = {
    "machineType": str,
    "disks": [
        {
            "boot": bool,
            "autoDelete": bool,
            "type": str,
            "initializeParams": {"diskSizeGb": int, "diskType": str, "sourceImage": str},
        }
    ],
    "serviceAccounts": [{"email": str, "scopes": [str]}],
    "networkInterfaces": [{"subnetwork": str, "nicType": str, "accessConfigs": [{"name": str, "type": str}]}],
    "scheduling": {
        "onHostMaintenance": str,
        "automaticRestart": bool,
        "provisioningModel": str,
        "instanceTerminationAction": str,
    },
}


def name_of(path: Path) -> str:
    return path.name


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def unknown(node: Any, shape: Any, place: str) -> list[str]:
    """Where a value is not of its shape: types, lists of one shape, fields by name."""
    if isinstance(shape, list):
        if not isinstance(node, list):
            return [f"{place}: not a list"]
        return [fault for number, inner in enumerate(node) for fault in unknown(inner, shape[0], f"{place}.{number}")]
    if isinstance(shape, dict):
        if not isinstance(node, dict):
            return [f"{place}: not fields"]
        wrong = [f"{place}.{name}: unknown" for name in node if name not in shape]
        return wrong + [
            f for name in node if name in shape for f in unknown(node[name], shape[name], f"{place}.{name}")
        ]
    return [] if isinstance(node, shape) else [f"{place}: not {shape.__name__}"]


@functools.cache
def _run_instances() -> Any:
    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def ec2_faults(node: dict[str, Any], place: str) -> list[str]:
    """What EC2's own description of RunInstances says of a machine. SubnetIds is Ray's."""
    given = {name: value for name, value in node.items() if name != "SubnetIds"} | {"MinCount": 1, "MaxCount": 1}
    report = ParamValidator().validate(given, _run_instances())
    return [f"{place}: {report.generate_report()}"] if report.has_errors() else []


def faults(config: dict[str, Any]) -> list[str]:
    """What Ray's schema, the provider and the cloud find wrong."""
    try:
        validate_config(config)
    except ValidationError as error:
        return [error.message]
    except RuntimeError as error:
        return [str(error)]
    provider = config["provider"]["type"]
    wrong = [f"provider.{name}: unknown" for name in config["provider"] if name not in PROVIDERS[provider]]
    for name, kind in config["available_node_types"].items():
        if provider == "aws":
            wrong += ec2_faults(kind["node_config"], name)
        else:
            wrong += unknown(kind["node_config"], INSTANCE if provider == "gcp" else {}, name)
    return wrong


@pytest.fixture(params=FILES, ids=name_of)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_there_are_three() -> None:
    assert [path.name for path in FILES] == ["aws.yaml", "gcp.yaml", "local.yaml"]
    assert (CLUSTER / "README.md").read_text().startswith("Read by `ray up`")


def test_each_file_is_right(path: Path) -> None:
    assert faults(read(path)) == []


def fields(node: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every named field whose name a schema knows."""
    if isinstance(node, list):
        for number, inner in enumerate(node):
            yield from fields(inner, (*place, number))
    elif isinstance(node, dict):
        for name, inner in node.items():
            if place != ("available_node_types",):
                yield (*place, name)
            if name not in ("metadata", "labels", "resources", "file_mounts"):
                yield from fields(inner, (*place, name))


def test_a_misspelt_field_is_found_wherever_it_is(path: Path) -> None:
    config, seen = read(path), set()
    for place in fields(config):
        if place[-1] in seen:
            continue
        seen.add(place[-1])
        assert faults(misspell(config, place)), f"{'.'.join(map(str, place))}x is taken"
    assert len(seen) > 15


# What must never be open.


def options(command: str) -> dict[str, str]:
    """The options of `ray start` in a command, and the variables before it, by name."""
    before, _, after = command.partition("ray start")
    words = shlex.split(before) + shlex.split(after)
    given = {}
    for word in words:
        name, equals, value = word.lstrip("-").partition("=")
        given[name] = value if equals else ""
    return given


def open_doors(config: dict[str, Any]) -> list[str]:
    """Ways in without a token, or past loopback."""
    problems = []
    heads = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    workers = [command for command in config["worker_start_ray_commands"] if "ray start" in command]
    for command in heads:
        given = options(command)
        if "--head" in command and given.get("dashboard-host") != "127.0.0.1":
            problems.append("the dashboard, and with it the job port, is not on loopback")
    for command in [*heads, *workers]:
        if options(command).get("RAY_AUTH_MODE") != "token":
            problems.append("a node asks for no token")
    for command in config["head_setup_commands"]:
        if "--web.listen-address" in command and "--web.listen-address=127.0.0.1:" not in command:
            problems.append("Prometheus is not on loopback")
        if "grafana/" in command and "GF_SERVER_HTTP_ADDR=127.0.0.1" not in command:
            problems.append("Grafana is not on loopback")
        if re.search(r"docker run.* -p ", command):
            problems.append("a container publishes a port")
    return problems


def test_nothing_is_open_without_a_token(path: Path) -> None:
    config = read(path)
    assert open_doors(config) == []
    assert any("ray start --head" in command for command in config["head_start_ray_commands"])


def in_head(config: dict[str, Any], old: str, new: str) -> None:
    for name in ("head_start_ray_commands", "worker_start_ray_commands", "head_setup_commands"):
        config[name] = [command.replace(old, new) for command in config[name]]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "not on loopback"),
        ("--dashboard-host=127.0.0.1", "", "not on loopback"),
        ("RAY_AUTH_MODE=token", "", "asks for no token"),
        ("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", "asks for no token"),
        ("--web.listen-address=127.0.0.1:9090", "--web.listen-address=:9090", "Prometheus"),
        ("-e GF_SERVER_HTTP_ADDR=127.0.0.1", "", "Grafana"),
        ("--network host", "-p 3000:3000", "publishes a port"),
    ],
)
def test_an_open_door_is_found(old: str, new: str, message: str) -> None:
    config = read(CLUSTER / "aws.yaml")
    in_head(config, old, new)
    assert any(message in problem for problem in open_doors(config))


@pytest.mark.parametrize("path", CLOUDS, ids=name_of)
def test_secrets_come_from_the_cloud_and_into_a_file_of_ones_own(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"(?m)^ *(RAY_AUTH_TOKEN|RAYSD_DATABASE|AWS_SECRET_ACCESS_KEY)=", text)
    (written,) = [command for command in read(path)["setup_commands"] if "> ~/.raysd.env" in command]
    assert written.startswith("umask 077")
    assert re.search(r"(aws|gcloud) secrets?", written)
    assert "RAY_AUTH_MODE=token" in written


@pytest.mark.parametrize("path", CLOUDS, ids=name_of)
def test_grafana_knows_its_prometheus_and_its_dashboards(path: Path) -> None:
    config = read(path)
    (start,) = [command for command in config["head_setup_commands"] if "grafana/grafana" in command]
    folder = ROOT / config["file_mounts"]["~/raysd-files/grafana"]
    assert '-v "$HOME/raysd-files/grafana:/etc/raysd:ro"' in start
    assert "GF_PATHS_PROVISIONING=/etc/raysd/provisioning" in start
    (source,) = read(folder / "provisioning/datasources/prometheus.yaml")["datasources"]
    assert f"RAY_PROMETHEUS_HOST={source['url']}\n" in path.read_text()
    ours, of_ray = read(folder / "provisioning/dashboards/files.yaml")["providers"]
    assert ours["options"]["path"] == "/etc/raysd"
    assert (folder / "dashboard.json").exists()
    assert of_ray["options"]["path"].startswith("/tmp/ray/")
    assert "-v /tmp/ray:/tmp/ray:ro" in start


# Versions and sizes.


@pytest.mark.parametrize("path", CLOUDS, ids=name_of)
def test_exact_versions_are_installed(path: Path) -> None:
    config = read(path)
    install = " ".join(config["setup_commands"])
    wheel = f"raysd-{VERSION}-py3-none-any.whl"
    assert f"raysd-files/{wheel}[" in install
    assert f"ray=={PINS['ray']}" in install
    assert config["file_mounts"][f"~/raysd-files/{wheel}"] == f"dist/{wheel}"
    for local in config["file_mounts"].values():
        assert local.startswith("dist/") or (ROOT / local).exists(), local
    for command in [*config["setup_commands"], *config["head_setup_commands"]]:
        if re.search(r"pip install", command):
            assert "==" in command or "-c ~/raysd-files/constraints.txt" in command, command
        for image in re.findall(r"\b(?:prom/prometheus|grafana/grafana)\S*", command):
            assert re.search(r":v?\d+\.\d+\.\d+$", image), image


def test_every_node_and_image_has_the_same_python() -> None:
    pythons = {re.search(r"--python (3\.\d+\.\d+) ", path.read_text())[1] for path in CLOUDS}  # type: ignore[index]
    pythons |= set(re.findall(r"FROM python:([\d.]+)-", (ROOT / "Dockerfile").read_text()))
    assert len(pythons) == 1


@pytest.mark.parametrize("path", CLOUDS, ids=name_of)
def test_workers_come_from_nothing_and_the_cluster_knows_how_far(path: Path) -> None:
    config = read(path)
    kinds = config["available_node_types"]
    head = kinds.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert all(kind.get("min_workers", 0) == 0 for kind in kinds.values())
    assert sum(kind["max_workers"] for kind in kinds.values()) == config["max_workers"]
    most: Counter[str] = Counter()
    for kind in kinds.values():
        most.update({name: kind["max_workers"] * count for name, count in kind["resources"].items()})
    text = ",".join(f"{name}={most[name]}" for name in sorted(most))
    assert f"RAYSD_CLUSTER_RESOURCES={text}\n" in path.read_text()
    assert {name for name in most if name.startswith(PREFIX)} <= {
        PREFIX + kind for d in devices().values() for kind in d.ray
    }
    markets = {(kind["labels"]["ray.io/market-type"], "GPU" in kind["resources"]) for kind in kinds.values()}
    assert markets >= {("spot", True), ("on-demand", True), ("on-demand", False)}
    assert config["idle_timeout_minutes"] <= 10


def test_a_label_says_what_the_market_is() -> None:
    for path in CLOUDS:
        for kind in read(path)["available_node_types"].values():
            node = kind["node_config"]
            spot = "InstanceMarketOptions" in node or node.get("scheduling", {}).get("provisioningModel") == "SPOT"
            assert spot == (kind.get("labels", {}).get("ray.io/market-type") == "spot")


def test_a100_machines_have_their_network_and_no_keys() -> None:
    aws = read(CLUSTER / "aws.yaml")
    for kind in aws["available_node_types"].values():
        node = kind["node_config"]
        assert "Name" in node["IamInstanceProfile"]
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        if node["InstanceType"].startswith("p4d"):
            cards = node["NetworkInterfaces"]
            assert [card["NetworkCardIndex"] for card in cards] == [0, 1, 2, 3]
            assert {card["InterfaceType"] for card in cards} == {"efa"}
            assert not {"SubnetIds", "SecurityGroupIds"} & set(node), "Ray refuses both"
    settings = " ".join(aws["setup_commands"])
    assert "FI_PROVIDER=efa" in settings
    assert "NCCL_SOCKET_IFNAME=" in settings
    for name, kind in read(CLUSTER / "gcp.yaml")["available_node_types"].items():
        assert name == "head" or kind["node_config"]["serviceAccounts"]


def test_the_head_may_look_up_the_image_that_it_names() -> None:
    """EC2 resolves it with the rights of the caller of RunInstances."""
    assert "resolve:ssm:/aws/service/deeplearning/" in (CLUSTER / "aws.yaml").read_text()
    assert "`ssm:GetParameters`" in (ROOT / "docs/runbook.md").read_text()


def test_the_readme_starts_the_local_cluster_as_its_file_says() -> None:
    (start,) = read(CLUSTER / "local.yaml")["head_start_ray_commands"]
    readme = (CLUSTER / "README.md").read_text().replace("\\\n", " ")
    head = re.search(r"export HEAD=(\w+)", readme)[1]  # type: ignore[index]
    (line,) = [line.strip() for line in readme.splitlines() if "ray start --head --block" in line]
    said = options(line.replace("$HEAD", head)) | {"RAY_AUTH_MODE": "token"}
    assert "export RAY_AUTH_MODE=token" in readme
    assert said == options(start)
    config = read(CLUSTER / "local.yaml")
    assert config["provider"]["head_node_id"] == head
    assert config["provider"]["gcs_address"] == f"{said['node-ip-address']}:{said['port']}"


# The image, and what is written about all of it.


def test_the_image_holds_what_its_file_copies_and_runs_as_nobody_special() -> None:
    docker = (ROOT / "Dockerfile").read_text()
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        word for line in re.findall(r"(?m)^COPY (?!--from)(.+) \S+$", docker) for word in line.split() if word != "./"
    }
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
    assert re.findall(r"(?m)^USER (.+)$", docker) == ["1000:1000"]
    assert "ENTRYPOINT" not in docker
    for install in re.findall(r"pip install (.+)", docker):
        assert "-c constraints.txt" in install
    assert re.findall(r"(?m)^FROM (\S+?)(?: AS|$)", docker)[-1] == "${DEVICE}"
    assert not [image for image in re.findall(r"(?m)^FROM (\S+:\S+)", docker) if "latest" in image]


def commands(path: Path) -> list[str]:
    """The commands of raysd in a page's blocks, without comments."""
    found = []
    for line in path.read_text().splitlines():
        if not line.startswith("    ") or "…" in line:
            continue
        text = re.sub(r"\s+#.*", "", line.strip())
        if match := re.match(r"(?:[A-Z_]+=\S+ )*raysd (.*)", text):
            found.append(match[1])
    inline = re.findall(r"`raysd ([a-z]+ [^`…]*)`", path.read_text())
    return found + [text for text in inline if not re.search(r"\bNAME\b|submit$", text)]


PAGES = [ROOT / "docs/runbook.md", CLUSTER / "README.md", ROOT / "k8s/README.md"]


def tried(text: str, check: Callable[[list[str]], None]) -> None:
    """Parse a command, and the one that it submits."""
    words = shlex.split(text)
    if "--" in words:
        check(words[words.index("--") + 1 :])
    check(words)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_that_is_written_exists(page: Path) -> None:
    for text in commands(page):
        tried(text, parse)


def test_the_runbook_says_what_to_do() -> None:
    text = (ROOT / "docs/runbook.md").read_text()
    headings = [heading.lower() for heading in re.findall(r"(?m)^## (.+)$", text)]
    for subject in ("upgrade", "rollback", "lost head", "full bucket", "restoring the database", "what to watch"):
        assert any(subject in heading for heading in headings), subject
    assert len(commands(ROOT / "docs/runbook.md")) > 20
    files = set(re.findall(r"\b(?:k8s|cluster|serve)/[\w./-]+[\w]", text))
    assert files
    assert not [name for name in files if not (ROOT / name).exists()]
