"""What a service that starts again serves where one of its models has no version any more."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from raysd.config.serving import ModelSpec
from raysd.errors import IntegrityError, NotFound, RequestError
from raysd.registry import Registry, Version
from raysd.serve import routes as routing
from raysd.serve.drawing import Drawing
from raysd.serve.predictions import Ask
from raysd.serve.routes import Routes, Target
from tests.versions import files_of
from tests.waiting import until

ASK = Ask("predictions", "dogs", Drawing(prompt="a dog"))


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "REFRESH", 0.02)


@pytest.fixture
def dogs(registry: Registry, tmp_path: Path) -> Callable[[int], Version]:
    """Publishes dogs of a seed."""
    return lambda seed: registry.publish("dogs", files_of(tmp_path / f"dogs{seed}", seed), {}, key=f"dogs{seed}")


@pytest.mark.parametrize(
    ("ref", "reason"), [("dogs@1", r"dogs@1 was withdrawn \(leaked\)"), ("dogs", "every version was withdrawn")]
)
def test_a_model_that_is_withdrawn_when_the_service_starts_keeps_no_other_from_being_served(
    registry: Registry,
    put: Callable[[int], Version],
    dogs: Callable[[int], Version],
    caplog: pytest.LogCaptureFixture,
    ref: str,
    reason: str,
) -> None:
    """And is served itself when it has a version."""
    put(1)
    registry.withdraw(dogs(1), "leaked")
    told = list[Target]()
    with routes_of(registry, "cats", ref) as routes:
        routes.on_change = told.append
        assert routes.choose(Ask("predictions", "cats", ASK.drawing))[0].ref == "cats@1"
        assert [model.withdrawn is None for model in routes.served()] == [True, False]
        for _ in range(2):
            with pytest.raises(NotFound, match=f"model: dogs is not served now: .*{reason}"):
                routes.choose(ASK)
            time.sleep(0.1)
        assert [target.ref for target in routes.targets()] == ["cats@1"]
        assert len(caplog.records) == 1, "it is said once, and not at each look"
        if ref == "dogs":
            dogs(2)
            until(lambda: [target.ref for target in told] == ["dogs@2"])
            assert routes.choose(ASK)[0].ref == "dogs@2"


def test_a_model_whose_traffic_is_damaged_is_served_when_that_is_mended(
    registry: Registry, put: Callable[[int], Version], dogs: Callable[[int], Version]
) -> None:
    put(1), dogs(1)
    damaged = Path(registry.storage.url) / "models" / "dogs" / "traffic.json"
    damaged.write_text("{")
    with routes_of(registry, "cats", "dogs") as routes:
        assert isinstance(routes.missing["dogs"], IntegrityError)
        with pytest.raises(NotFound, match=r"dogs is not served now: dogs: models/dogs/traffic\.json is damaged"):
            routes.choose(ASK)
        damaged.unlink()
        until(lambda: routes.served()[1].withdrawn is None)
        assert routes.choose(ASK)[0].ref == "dogs@1"


def test_a_service_that_has_no_model_left_does_not_start(
    registry: Registry, put: Callable[[int], Version], dogs: Callable[[int], Version]
) -> None:
    registry.withdraw(put(1)), registry.withdraw(dogs(1))
    for refs in (["cats@1"], ["cats@1", "dogs"]):
        with pytest.raises(RequestError, match="cats@1 was withdrawn"), routes_of(registry, *refs):
            pass


@contextmanager
def routes_of(registry: Registry, *refs: str) -> Iterator[Routes]:
    routes = Routes(registry.storage, [ModelSpec(ref=ref) for ref in refs])
    try:
        yield routes
    finally:
        routes.close()
