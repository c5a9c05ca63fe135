"""What keeps a LoRA version from being drawn with, besides its own files: its base, and what an export has inputs for."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from raysd.config.serving import ModelSpec
from raysd.errors import ExportRefused, IntegrityError, NotFound, RequestError
from raysd.registry import Registry, Version
from raysd.registry.records import blob_path
from raysd.serve import routes as routing
from raysd.serve.drawing import Drawing
from raysd.serve.predictions import Ask
from raysd.serve.routes import Routes
from raysd.serve.soundness import Soundness
from tests.versions import files_of, safetensors

ASK = Ask("predictions", "cats", Drawing(prompt="a cat"))
CATS = ModelSpec(ref="cats:production")


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "REFRESH", 0.02)


@pytest.fixture
def base(registry: Registry, tmp_path: Path) -> Version:
    return registry.publish("base", files_of(tmp_path / "base", 9), {}, key="base")


@pytest.fixture
def lora(registry: Registry, base: Version, tmp_path: Path) -> Callable[..., Version]:
    """Publishes an adapter on the base, with other fields of its record."""

    def publish(**record: object) -> Version:
        name = "pytorch_lora_weights.safetensors"
        (tmp_path / name).write_bytes(safetensors(3))
        lineage = {"base": base.ref, "base_digest": "0" * 64, **record}
        return registry.publish("cats", {name: tmp_path / name}, lineage, key="lora")

    return publish


def wait(met: Callable[[], bool]) -> None:
    end = threading.Event()
    for _ in range(3000):
        if met():
            return
        end.wait(0.02)
    raise AssertionError("it did not happen")


def test_an_alias_does_not_move_to_a_lora_whose_base_was_withdrawn(
    registry: Registry, put: Callable[[int], Version], base: Version, lora: Callable[..., Version]
) -> None:
    first, refused = put(1), list[str]()
    registry.alias(first, "production")
    routes = Routes(registry.storage, [CATS])
    try:
        routes.on_refused = lambda target: refused.append(target.ref)
        registry.withdraw(base, "licence")
        moved = lora()
        registry.alias(moved, "production")
        wait(lambda: refused == [moved.ref])
        assert routes.choose(ASK)[0].ref == first.ref
        with pytest.raises(RequestError, match=r"base@1 was withdrawn \(licence\)"):
            routes.choose(Ask("predictions", "cats", ASK.drawing, version=moved.ref))
    finally:
        routes.close()


@pytest.mark.parametrize("begins", ["before", "after"])
def test_a_base_that_is_withdrawn_takes_the_loras_on_it_along(
    registry: Registry, put: Callable[[int], Version], base: Version, lora: Callable[..., Version], begins: str
) -> None:
    other = put(1)
    registry.alias(lora(), "production")
    models = [CATS, ModelSpec(ref=other.ref, name="beside")]
    if begins == "after":
        registry.withdraw(base, "licence")
    routes = Routes(registry.storage, models)
    try:
        if begins == "before":
            assert routes.served()[0].withdrawn is None
            registry.withdraw(base, "licence")
        wait(lambda: routes.served()[0].withdrawn is not None)
        with pytest.raises(NotFound, match=r"cats is not served now: .*base@1 was withdrawn \(licence\)"):
            routes.choose(ASK)
        assert routes.served()[1].withdrawn is None
    finally:
        routes.close()


def test_a_lora_is_as_sound_and_as_large_as_its_base(
    registry: Registry, base: Version, lora: Callable[..., Version]
) -> None:
    adapter = lora()
    weights = [file.size for part in (base, adapter) for file in part.files if file.path.endswith(".safetensors")]
    large = ModelSpec(ref="cats", memory=sum(weights) / 2**30)
    Soundness(registry.storage).check(adapter, large)
    with pytest.raises(RequestError, match="raise `memory`"):
        Soundness(registry.storage).check(adapter, large.model_copy(update={"memory": (sum(weights) - 1) / 2**30}))
    file = next(file for file in base.files if file.path.startswith("unet/"))
    registry.storage.write(blob_path(file.sha256), b"cut off")
    with pytest.raises(IntegrityError, match=f"base@1: {file.path} is missing or cut off"):
        Soundness(registry.storage).check(adapter, large)


@pytest.mark.parametrize(
    ("targets", "fits"),
    [
        (None, True),
        (["to_q", "attn2.to_v"], True),
        (["to_q", "ff.net.0.proj"], False),
        (["proj_into_q"], False),
    ],
)
def test_an_export_draws_with_loras_on_the_modules_that_it_has_inputs_for(
    registry: Registry, lora: Callable[..., Version], targets: list[str] | None, fits: bool
) -> None:
    adapter = lora(spec={"method": {"kind": "lora", "targets": targets}}, family="sd")
    rare = {"ref": "cats", "replicas": {"least": 0}}
    Soundness(registry.storage).check_export(adapter, ModelSpec(**rare))  # PyTorch takes any
    exported = ModelSpec(**rare, backend="onnx")
    if fits:
        Soundness(registry.storage).check_export(adapter, exported)
        return
    with pytest.raises(ExportRefused, match="has no input; serve it with `backend: torch`"):
        Soundness(registry.storage).check_export(adapter, exported)
