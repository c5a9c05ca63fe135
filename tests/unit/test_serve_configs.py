"""The committed Serve configs are what Ray and raysd take; wrong ones say which field is wrong."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray import serve
from ray.serve.config import HTTPOptions

from raysd.config import load, override
from raysd.config.serving import ServingSpec
from raysd.database import Database
from raysd.errors import NotFound, RequestError, SpecError
from raysd.registry import Registry
from raysd.serve import app as application
from raysd.serve import run as running
from raysd.serve.keys import Keys
from raysd.serve.run import BUILDER, read_config
from raysd.storage import Storage
from tests.manifests import misspell, serve_faults
from tests.ports import free_port
from tests.versions import files_of

FOLDER = Path(__file__).parents[2] / "serve"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_each_config_is_taken(path: Path) -> None:
    spec, http = read_config(path)
    assert spec.models
    assert http["port"] == 8000
    assert spec.public == (http["host"] != "127.0.0.1")
    assert serve_faults(yaml.safe_load(path.read_text())) == []


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_a_misspelt_field_is_found_wherever_it_is(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    places = list(fields(config))
    for place in places:
        assert serve_faults(misspell(config, place)), f"{'.'.join(map(str, place))}x is taken"
    assert len(places) > 8


def fields(node: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every named field of a config."""
    for key, inner in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if isinstance(key, str):
            yield (*place, key)
        yield from fields(inner, (*place, key))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": []}, "models: Tuple should have at least 1 item"),
        ({"models": [{"ref": "tiny-sd", "batch": 3}]}, "batch: unknown"),
        ({"models": [{"ref": "cats@1"}, {"ref": "cats:production"}]}, "cats is served twice"),
        ({"models": [{"ref": "cats", "replicas": {"least": 3, "most": 1}}]}, "least: is more than most"),
        ({"models": [{"ref": "cats", "precision": "int8"}]}, "precision: torch has no int8"),
        ({"models": [{"ref": "cats", "backend": "onnx", "precision": "bf16"}]}, "precision: onnx has no bf16"),
        ({"models": [{"ref": "cats", "backend": "onnx", "compile": True}]}, "compile: is for backend torch"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    application = {"name": "raysd", "import_path": BUILDER, "args": change}
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump({"applications": [application]}))
    with pytest.raises(SpecError) as error:
        read_config(path)
    assert message in str(error.value)
    assert "serve.yaml" in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_a_config_that_names_no_host_is_for_this_machine(tmp_path: Path) -> None:
    """Ray's own default would be every address."""
    application = {"name": "raysd", "import_path": BUILDER, "args": {"models": [{"ref": "tiny-sd"}]}}
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump({"applications": [application]}))
    _, http = read_config(path)
    assert "host" not in http


def test_what_is_no_config_is_said_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    for text in ("a: [", "applications: 3", "applications: [{name: x, import_path: other.module:app}]"):
        path.write_text(text)
        with pytest.raises(SpecError, match=r"serve\.yaml"):
            read_config(path)
    with pytest.raises(SpecError, match="no such file"):
        read_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("field", "config"),
    [
        ("applications.0.runtime_env", {"applications": [{"runtime_env": {"env_vars": {"A": "1"}}}]}),
        ("applications.0.route_prefix", {"applications": [{"route_prefix": "/draw"}]}),
        ("http_options.ssl_keyfil", {"http_options": {"ssl_keyfil": "key.pem"}}),
        ("http_options: ssl_keyfile and ssl_certfile", {"http_options": {"ssl_keyfile": "key.pem"}}),
        ("target_capacity", {"target_capacity": 50}),
    ],
)
def test_what_the_command_would_do_nothing_with_is_refused(tmp_path: Path, field: str, config: dict[str, Any]) -> None:
    application = {"name": "raysd", "import_path": BUILDER, "args": {"models": [{"ref": "tiny-sd"}]}}
    (more,) = config.get("applications", [{}])
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump({**config, "applications": [application | more]}))
    with pytest.raises(SpecError, match=rf"serve\.yaml: {field}"):
        read_config(path)


def test_names_come_from_references() -> None:
    names = {
        "cats:production": "cats",
        "cats@3": "cats",
        "./models/dog": "dog",
        "org/model": "model",
        "tiny-sd": "tiny-sd",
    }
    for ref, name in names.items():
        spec = ServingSpec(models=({"ref": ref},))  # type: ignore[arg-type]
        assert spec.models[0].served_name == name
    assert override(spec, {"public": True}).public


# Refused at start


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `run` began: nothing really does. Serve's start ends it, for what comes then needs a cluster."""
    begun: list[str] = []

    def start(**_options: Any) -> None:
        begun.append("serve")
        raise ZeroDivisionError

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(running, "_join", lambda spec: begun.append("ray"))
    monkeypatch.setattr(serve, "start", start)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}])
    return begun


def a_service(folder: Path, **values: Any) -> ServingSpec:
    database = f"sqlite:///{folder}/raysd.db"
    return load(ServingSpec, {"models": [{"ref": "tiny-sd"}], "storage": str(folder), "database": database, **values})


def run(spec: ServingSpec, host: str = "127.0.0.1") -> None:
    running.run(spec, host, free_port(), lambda url: None)


def test_the_proxies_get_all_http_options_of_the_config_and_the_address_of_the_command(
    tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys would go over the network in clear if TLS were left out."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(serve, "start", lambda **options: given.update(options))
    monkeypatch.setattr(serve, "run", lambda *_, **__: None)
    monkeypatch.setattr(serve, "shutdown", lambda: None)
    monkeypatch.setattr(running, "_running", lambda: HTTPOptions(**tls))
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def ready(url: str) -> None:
        given["url"] = url
        raise ZeroDivisionError

    tls = keys_in(tmp_path)
    port, application = free_port(), {"name": "raysd", "import_path": BUILDER, "args": {"models": [{"ref": "tiny-sd"}]}}
    http = {"host": "10.0.0.1", "port": 80, "keep_alive_timeout_s": 90, "root_path": "/draw", **tls}
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump({"http_options": http, "applications": [application]}))
    _, options = read_config(path)
    with pytest.raises(ZeroDivisionError):
        running.run(a_service(tmp_path), "127.0.0.1", port, ready, options)
    assert HTTPOptions(**given["http_options"]) == HTTPOptions(**http | {"host": "127.0.0.1", "port": port})
    assert given["proxy_location"] == "EveryNode"
    assert given["url"] == f"https://127.0.0.1:{port}"


def test_a_serve_that_runs_already_without_tls_is_no_place_for_a_service_with_it(
    tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "start", lambda **_: None)
    monkeypatch.setattr(serve, "run", lambda *_, **__: pytest.fail("was deployed"))
    monkeypatch.setattr(running, "_running", HTTPOptions)
    with pytest.raises(RequestError, match=r"ssl_certfile: Serve runs already, without TLS; end it: serve shutdown"):
        running.run(a_service(tmp_path), "127.0.0.1", free_port(), lambda url: None, keys_in(tmp_path))


def test_tls_without_its_files_is_refused_before_anything_starts(tmp_path: Path, started: list[str]) -> None:
    tls = keys_in(tmp_path)
    Path(tls["ssl_certfile"]).unlink()
    with pytest.raises(RequestError, match=r"http_options\.ssl_certfile: .*cert\.pem: no such file"):
        running.run(a_service(tmp_path), "127.0.0.1", free_port(), lambda url: None, tls)
    assert started == []


def keys_in(folder: Path) -> dict[str, str]:
    """The options of TLS, with files that nobody reads here."""
    files = {"ssl_keyfile": folder / "key.pem", "ssl_certfile": folder / "cert.pem"}
    for path in files.values():
        path.touch()
    return {name: str(path) for name, path in files.items()}


def test_a_cluster_that_starts_again_leaves_out_what_was_withdrawn_and_the_command_says_it(
    tmp_path: Path, started: list[str]
) -> None:
    """What nobody ever published is a slip, and is said by both."""
    registry = Registry(Storage(str(tmp_path)))
    registry.withdraw(registry.publish("cats", files_of(tmp_path / "files", 1), {}, key="cats"), "leaked")
    for ref, reason in (("cats@1", r"cats@1 was withdrawn \(leaked\)"), ("cats", "every version was withdrawn")):
        spec = a_service(tmp_path, models=[{"ref": "tiny-sd"}, {"ref": ref}])
        assert application.build(spec)
        with pytest.raises(RequestError, match=reason):
            run(spec)
    for ref, reason in (("cats@2", "no such version; cats has versions 1"), ("cat", "no such model; models: cats")):
        spec = a_service(tmp_path, models=[{"ref": "tiny-sd"}, {"ref": ref}])
        for start in (application.build, run):
            with pytest.raises(NotFound, match=f"{ref}: {reason}"):
                start(spec)
    assert started == []


def test_configs_name_the_ingress_as_the_application_does(tmp_path: Path) -> None:
    built = application.build(a_service(tmp_path))
    configs = [yaml.safe_load(path.read_text())["applications"][0] for path in FOLDER.glob("*.yaml")]
    named = {given["name"] for config in configs for given in config.get("deployments", ())}
    assert named == {built._bound_deployment.name}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "host.example"])
def test_an_address_that_others_reach_needs_public(tmp_path: Path, started: list[str], host: str) -> None:
    with pytest.raises(
        RequestError, match=rf"--host {host}: others reach it; give --public, and keys: raysd keys create"
    ):
        run(a_service(tmp_path), host)
    assert started == []


def test_a_serve_that_listens_already_where_others_reach_it_needs_public(
    tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps its own address, whatever a second start asks for."""
    monkeypatch.setattr(serve, "start", lambda **_: started.append("serve"))
    monkeypatch.setattr(serve, "run", lambda *_, **__: pytest.fail("was deployed"))
    monkeypatch.setattr(running, "_running", lambda: HTTPOptions(host="0.0.0.0"))
    with pytest.raises(RequestError, match=r"Serve runs already at 0\.0\.0\.0: others reach it; give --public"):
        run(a_service(tmp_path))
    assert started == ["ray", "serve"]


def test_public_needs_a_key_that_is_alive(tmp_path: Path, started: list[str]) -> None:
    spec, keys = (
        a_service(tmp_path, public=True),
        Keys(Database(f"sqlite:///{tmp_path}/raysd.db", Storage(str(tmp_path)))),
    )
    refused = pytest.raises(RequestError, match=r"public: every request would be refused.*raysd keys create NAME")
    for host in ("0.0.0.0", "127.0.0.1"):
        with refused:
            run(spec, host)
    key, _ = keys.create("anna", ["generate"])
    with pytest.raises(ZeroDivisionError):
        run(spec, "0.0.0.0")
    assert started == ["ray", "serve"]
    keys.revoke(key.id)
    with refused:
        run(spec, "0.0.0.0")
    assert started == ["ray", "serve"]


def test_several_machines_need_another_database_than_sqlite(
    tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}, {"Alive": True}, {"Alive": False}])
    with pytest.raises(
        RequestError, match="database: SQLite serves one machine, and this cluster has 2; set RAYSD_DATABASE"
    ):
        run(a_service(tmp_path))
    assert started == ["ray"]
    monkeypatch.setenv("RAYSD_ONE_NODE", "1")
    with pytest.raises(ZeroDivisionError):
        run(a_service(tmp_path))
    monkeypatch.delenv("RAYSD_ONE_NODE")
    application._refuse_split(type("OnPostgres", (), {"one_node": False}))
