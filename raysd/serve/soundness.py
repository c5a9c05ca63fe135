"""Whether a replica could load a version, as far as the store tells without a look at the weights."""

from raysd.config.serving import ModelSpec
from raysd.errors import ExportMissing, ExportRefused, IntegrityError, NotFound, RequestError
from raysd.export.kept import is_kept, refusal
from raysd.models import FAMILIES, is_adapter
from raysd.registry import Registry, Version, signing
from raysd.registry.records import File, blob_path, parse
from raysd.storage import Storage


class Soundness:
    """Of versions in a registry; with `signers` (public keys) those that none of them signed are not sound."""

    def __init__(self, storage: Storage, signers: tuple[str, ...] = ()) -> None:
        self._storage, self._registry, self._signers = storage, Registry(storage), signers
        self._sound: set[tuple[str, str]] = set()  # by served name, digests of versions whose files were looked at

    def below(self, version: Version) -> Version | None:
        """The version that a LoRA version was trained on; None for a whole model, and where that is in no registry.

        Raises RequestError where it was withdrawn: nothing draws with what lies on it either.
        """
        if not is_lora(version):
            return None
        try:
            base = parse(str(version.record["base"]))
        except RequestError:
            return None
        return self._registry.resolve(str(version.record["base"])) if base.number is not None else None

    def check(self, version: Version, model: ModelSpec) -> None:
        """Raises what is wrong: a file missing or cut off, too large for `memory`, unsigned, or its base withdrawn.

        The bytes of a LoRA's base are in what is signed of the LoRA. Raises StorageError for a store that is away.
        """
        base = self.below(version)
        if (model.served_name, version.digest) in self._sound:
            return
        if self._signers:
            signing.check(self._storage, version, self._signers)
        parts = [version, *([base] if base is not None else [])]
        for part in parts:
            for file in part.files:
                if self._size(file) != file.size:
                    raise IntegrityError(f"{part.ref}: {file.path} is missing or cut off in the store")
        files = [file for part in parts for file in part.files]
        size = sum(file.size for file in files if file.path.endswith(".safetensors")) / 2**30
        if model.memory is not None and size > model.memory:
            has = f"{size:.3g} GiB of weights, and a replica here has memory for {model.memory:.3g}"
            raise RequestError(f"{version.ref}: {has}; raise `memory` of the served model")
        self._sound.add((model.served_name, version.digest))

    def check_export(self, version: Version, model: ModelSpec) -> None:
        """Raises ExportMissing or ExportRefused where ONNX Runtime has not what it draws with."""
        if model.backend != "onnx":
            return
        self._check_inputs(version)
        if self._signers:  # each machine makes its own
            return
        source, precision = self._exported(version), model.export_precision
        if is_kept(self._storage, source, precision):
            return
        if reason := refusal(self._storage, source, precision):
            raise ExportRefused(reason)
        if model.replicas.least > 0:
            raise ExportMissing(f"{version.ref}: its {precision} export is not made yet")

    def _check_inputs(self, version: Version) -> None:
        """An export has inputs for the modules that its family adapts by default."""
        method = version.record.get("spec", {}).get("method", {})
        adapted = FAMILIES[str(version.record.get("family", "sd"))].lora_targets
        for target in method.get("targets") or ():
            if not any(target == name or target.endswith(f".{name}") for name in adapted):
                raise ExportRefused(
                    f"{version.ref}: adapts {target}, for which an export has no input; serve it with `backend: torch`"
                )

    def _exported(self, version: Version) -> str:
        """The digest that its export is kept by: its own, or that of the whole model below a LoRA version."""
        base = self.below(version)
        if base is not None:
            return base.digest
        return str(version.record["base_digest"]) if is_lora(version) else version.digest

    def _size(self, file: File) -> int | None:
        try:
            return self._storage.size(blob_path(file.sha256))
        except NotFound:
            return None


def is_lora(version: Version) -> bool:
    return any(is_adapter(file.path) for file in version.files)
