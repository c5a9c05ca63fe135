"""Which version a request belongs to: what the served references mean now, and how traffic is split between versions."""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from raysd.config.serving import ModelSpec
from raysd.errors import (
    ExportMissing,
    ExportRefused,
    IntegrityError,
    NotFound,
    RaysdError,
    RequestError,
    StorageError,
)
from raysd.export.kept import is_kept, refusal
from raysd.models import is_adapter
from raysd.references import identity, identity_of, locate
from raysd.registry import Registry, Version, signing, traffic
from raysd.registry.records import File, blob_path, parse
from raysd.serve.http.desk import Ask, Served, Share
from raysd.storage import Storage

log = logging.getLogger(__name__)
REFRESH = 1.0
"""Seconds after which a moved alias or a changed split is seen."""


@dataclass(frozen=True)
class Target:
    """A version that draws."""

    ref: str
    digest: str


@dataclass(frozen=True)
class Route:
    """What a served model means now. `base` is the identity of the base that its LoRA versions share.

    `bases` are those that all its versions need, `refused` the versions that it should mean and why it does not.
    """

    spec: ModelSpec
    deployed: Target
    created: float
    base: str
    split: traffic.Traffic
    versions: Mapping[int, Target]
    bases: frozenset[str] = frozenset()
    refused: Mapping[Target, RaysdError] = field(default_factory=dict)


class Routes:
    """The routes of all served models, looked up anew in the background. May be shared by threads.

    A version that no replica could load is not switched to, as far as the store tells without a look at the weights:
    one with a file missing or cut off, one larger than `memory`, and with `signers` (public keys) one that none signed.
    With ONNX Runtime nor is one whose export was refused, or is not made yet where a replica is there to make it.

    A model that has no version to begin with is left out until it has one, so that it does not keep the others from being
    served. Raises RequestError or IntegrityError where none is left, StorageError for a store that is away.
    """

    def __init__(self, storage: Storage, models: Sequence[ModelSpec], signers: Sequence[str] = ()):
        self.storage, self.registry, self._signers = storage, Registry(storage), signers
        self._models = {model.served_name: model for model in models}
        self._fixed: dict[str, tuple[Target, str]] = {}
        self.on_change: Callable[[Target], None] = lambda target: None
        """Told of each version that comes into use, from the thread that looks."""
        self.on_refused: Callable[[Target], None] = lambda target: None
        """Told of each that should and cannot."""
        self.on_unexported: Callable[[Target], None] = lambda target: None
        """Told of each that waits for its export, at each look until it is there. May not take long."""
        self._sound: set[tuple[str, str]] = set()  # by served name, digests of versions that were checked
        self._routes: dict[str, Route] = {}
        self._withdrawn: dict[str, Served] = {}  # by served name, what it was and why nothing draws it
        self.missing: dict[str, RaysdError] = {}
        """By served name, why a model had no version to begin with."""
        for name in self._models:
            self._begin(name)
        if not self._routes:
            raise next(iter(self.missing.values()))
        self._stop = threading.Event()
        threading.Thread(target=self._refresh, name="routes", daemon=True).start()

    def close(self) -> None:
        self._stop.set()

    def served(self) -> list[Served]:
        """Every model with its versions, the largest share first; one that was withdrawn with the reason."""
        routes, withdrawn = self._routes, self._withdrawn
        return [_served(name, routes[name]) if name in routes else withdrawn[name] for name in self._models]

    def targets(self) -> list[Target]:
        """Every version that is in use."""
        return list({target: None for route in self._routes.values() for target in _targets(route)})

    def choose(self, ask: Ask) -> tuple[Target, list[Target]]:
        """The version that draws, and those that draw it besides as shadows.

        Raises NotFound for a model, version or LoRA that is not served, RequestError for one that does not fit.
        """
        route = self._routes.get(ask.model)
        if route is None and (gone := self._withdrawn.get(ask.model)):
            raise NotFound(f"model: {ask.model} is not served now: {gone.withdrawn}")
        if route is None:
            raise NotFound(f"model: no {ask.model} is served; served here: {', '.join(sorted(self._routes))}")
        named = self._named(route, ask.version) if ask.version is not None else None
        if ask.lora is not None:
            return self._lora(route, ask.lora, named or route.deployed), []
        if named is not None:
            return named, []
        sticky = ask.user or ask.idempotency_key or secrets.token_hex(8)
        number = route.split.version(sticky)
        shadows = [route.versions[n] for n in route.split.shadows(sticky) if n in route.versions]
        return route.versions.get(number, route.deployed) if number is not None else route.deployed, shadows

    def _named(self, route: Route, version: str) -> Target:
        for target in _targets(route):
            if version in (target.ref, target.digest):
                return target
        model = route.spec.served_name
        try:
            found = self.registry.resolve(version)
        except StorageError:
            raise
        except RaysdError:
            raise NotFound(f"version: {model} has no version {version[:80]}") from None
        if found.model != parse(route.spec.ref).model:
            raise NotFound(f"version: {found.ref} is not a version of {model}")
        return _target(found)

    def _lora(self, route: Route, ref: str, of: Target) -> Target:
        """A LoRA version over the base of the version `of`. Raises NotFound, RequestError."""
        if not route.spec.loras:
            raise RequestError(f"lora: {route.spec.served_name} is served without LoRA versions")
        try:
            version = self.registry.resolve(ref)
        except NotFound:  # whose message names models that this caller may not know of
            raise NotFound(f"lora: there is no {ref[:80]}") from None
        if not _is_lora(version):
            raise RequestError(f"lora: {version.ref} is a whole model; ask for it as model")
        base = route.base if of == route.deployed else self._base(self.registry.resolve(of.ref))
        if version.record.get("base_digest") != base:
            raise RequestError(f"lora: {version.ref} was trained on another base than {of.ref}'s")
        return _target(version)

    def _refresh(self) -> None:
        while not self._stop.wait(REFRESH):
            for name in self._models:
                try:
                    self._look_again(name)
                except RaysdError as error:  # what was known goes on being served
                    log.warning("%s: %s", name, error)

    def _begin(self, name: str) -> None:
        model = self._models[name]
        try:
            self._routes[name] = self._look(model)
            self._report(self._routes[name], None)
        except (RequestError, IntegrityError) as error:
            self.missing[name] = error
            self._leave_out(Served(name, model.ref, "", 0.0, model.loras), str(error))

    def _look_again(self, name: str) -> None:
        try:
            route = self._look(self._models[name])
        except (RequestError, IntegrityError) as error:
            last = self._routes.get(name)
            if last is None and isinstance(error, NotFound):  # there is still none, or the store looks empty
                return
            reason = str(error) if last is None else self._withdrawal(last)
            if reason is None:
                raise
            self._leave_out(self._withdrawn[name] if last is None else _served(name, last), reason)
            return
        last, known, self._routes = self._routes.get(name), self.targets(), self._routes | {name: route}
        self._report(route, last)
        for target in _targets(route):
            if target not in known:
                self.on_change(target)

    def _report(self, route: Route, last: Route | None) -> None:
        """Say what is wrong with a route and was not wrong with the last one."""
        name, before = route.spec.served_name, last.refused if last is not None else {}
        for target, reason in route.refused.items():
            missing, new = isinstance(reason, ExportMissing), str(before.get(target)) != str(reason)
            if missing:
                self.on_unexported(target)
            if missing and new:
                log.warning("%s: is not switched yet: %s", name, reason)
            elif new:
                log.error("%s: cannot be drawn with: %s", name, reason)
                self.on_refused(target)
        needed, most = len(route.bases), route.spec.bases
        if needed > most and (last is None or route.bases != last.bases):
            log.warning("%s: its versions need `bases: %d`, and it is %d", name, needed, most)

    def _leave_out(self, last: Served, reason: str) -> None:
        """Serve a model no more, until it has a version again."""
        if reason != last.withdrawn:
            log.warning("%s: is not served: %s", last.name, reason)
        self._withdrawn = self._withdrawn | {last.name: replace(last, withdrawn=reason)}
        self._routes = {name: route for name, route in self._routes.items() if name != last.name}

    def _withdrawal(self, route: Route) -> str | None:
        """What the registry says of it if a model's version was withdrawn; a store that is away or empty says nothing."""
        try:
            self.registry.resolve(route.deployed.ref)
        except NotFound:
            return None
        except RequestError as error:
            return str(error)
        return None

    def _look(self, model: ModelSpec) -> Route:
        fixed = self._outside(model.ref)
        if fixed is not None:
            return Route(model, fixed[0], 0.0, fixed[1], traffic.Traffic(), {})
        refused: dict[Target, RaysdError] = {}
        version = self._deployed(model, refused)
        split = traffic.read(self.storage, version.model)
        versions, bases = {}, {self._base(version)}
        for number in {*split.shares, *split.shadow}:
            try:
                other = self.registry.resolve(f"{version.model}@{number}")
            except StorageError:
                raise
            except RaysdError as error:  # withdrawn since: its share goes to the deployed version
                log.warning("traffic of %s: %s", version.model, error)
                continue
            if self._is_sound(other, model, refused) and self._is_exported(other, model, refused):
                # Else its share goes there too.
                versions[number] = _target(other)
                bases.add(self._base(other))
        created = datetime.fromisoformat(version.created).timestamp()
        base = self._base(version)
        return Route(model, _target(version), created, base, split, versions, frozenset(bases), refused)

    def _deployed(self, model: ModelSpec, refused: dict[Target, RaysdError]) -> Version:
        """What the reference means; as long as that cannot be loaded, what it meant before, if anything."""
        version, last = self.registry.resolve(model.ref), self._routes.get(model.served_name)
        if last is None:
            return version
        drawn = _target(version) == last.deployed  # already: its replicas made its export, or say why not
        if self._is_sound(version, model, refused) and (drawn or self._is_exported(version, model, refused)):
            return version
        return self.registry.resolve(last.deployed.ref)

    def _is_sound(self, version: Version, model: ModelSpec, refused: dict[Target, RaysdError]) -> bool:
        """Whether a replica could load it; if not, it is put among the refused. Raises StorageError."""
        try:
            if (model.served_name, version.digest) not in self._sound:
                self._check(version, model)
        except StorageError:
            raise
        except RaysdError as error:
            refused[_target(version)] = error
            return False
        self._sound.add((model.served_name, version.digest))
        return True

    def _check(self, version: Version, model: ModelSpec) -> None:
        if self._signers:
            signing.check(self.storage, version, self._signers)
        for file in version.files:
            if self._size(file) != file.size:
                raise IntegrityError(f"{version.ref}: {file.path} is missing or cut off in the store")
        size = sum(file.size for file in version.files if file.path.endswith(".safetensors")) / 2**30
        if model.memory is not None and size > model.memory:
            has = f"{size:.3g} GiB of weights, and a replica here has memory for {model.memory:.3g}"
            raise RequestError(f"{version.ref}: {has}; raise `memory` of the served model")

    def _is_exported(self, version: Version, model: ModelSpec, refused: dict[Target, RaysdError]) -> bool:
        """Whether ONNX Runtime has what it draws with; if not, the version is put among the refused. Raises StorageError."""
        if model.backend != "onnx" or self._signers:  # with signers each machine makes its own
            return True
        source, precision = self._exported(version), model.export_precision
        if is_kept(self.storage, source, precision):
            return True
        if reason := refusal(self.storage, source, precision):
            refused[_target(version)] = ExportRefused(reason)
        elif model.replicas.least > 0:
            refused[_target(version)] = ExportMissing(f"{version.ref}: its {precision} export is not made yet")
        return _target(version) not in refused

    def _exported(self, version: Version) -> str:
        """The digest that its export is kept by: its own, or that of the whole model below a LoRA version."""
        if not _is_lora(version):
            return version.digest
        try:
            return self.registry.resolve(str(version.record["base"])).digest
        except RequestError:  # a base that is a folder, or in no registry
            return str(version.record["base_digest"])

    def _size(self, file: File) -> int | None:
        try:
            return self.storage.size(blob_path(file.sha256))
        except NotFound:
            return None

    def _outside(self, ref: str) -> tuple[Target, str] | None:
        """A model that is not in the registry, looked at once: it has one version, its bytes."""
        if ref in self._fixed:
            return self._fixed[ref]
        try:
            parse(ref)
            registered = ref != "tiny-sd"
        except RequestError:
            registered = False
        if registered:
            return None
        digest = identity(locate(ref, self.storage).folder)
        self._fixed[ref] = Target(ref, digest), digest
        return self._fixed[ref]

    def _base(self, version: Version) -> str:
        """The identity of what its LoRA versions would be trained on."""
        if _is_lora(version):
            return str(version.record["base_digest"])
        if version.digest not in self._fixed:
            self._fixed[version.digest] = _target(version), identity_of(version, self.storage)
        return self._fixed[version.digest][1]


def _is_lora(version: Version) -> bool:
    return any(is_adapter(file.path) for file in version.files)


def _target(version: Version) -> Target:
    return Target(version.ref, version.digest)


def _targets(route: Route) -> list[Target]:
    return [route.deployed, *route.versions.values()]


def _served(name: str, route: Route) -> Served:
    shares = {route.versions[n]: part / 100 for n, part in route.split.shares.items() if n in route.versions}
    left = 1 - sum(shares.values())
    if left > 1e-9:
        shares[route.deployed] = shares.get(route.deployed, 0) + left
    ordered = sorted(shares.items(), key=lambda share: -share[1])
    split = tuple(Share(target.ref, target.digest, weight) for target, weight in ordered)
    created = route.created or time.time()
    return Served(name, split[0].ref, split[0].digest, created, route.spec.loras, split)
