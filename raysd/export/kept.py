"""Exports kept with their version, by its digest. One is there whole or not at all, and never changes.

exports/<digest>/<precision>/manifest.json             written last, create-only: what it is, its files, what the gate found
exports/<digest>/<precision>/<sha256>/denoiser.onnx …  so that two that make the same export cannot mix their files
exports/<digest>/<precision>/refused.json              why there is none, where the gate refused it

<digest> is the version's, or the identity of a model that is not registered. A whole model's denoiser takes adapters as
inputs, so the LoRA versions of a base share its export.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from raysd import __version__
from raysd.errors import AlreadyExists, ExportRefused, IntegrityError, NotFound, RequestError
from raysd.export.precision import PRECISIONS
from raysd.references import Located, identity, locate
from raysd.registry.files import cache_folder, ensure
from raysd.registry.records import File, timestamp
from raysd.storage import Storage, digest, sha256_of

ROOT, MANIFEST, REFUSED = "exports", "manifest.json", "refused.json"
LIBRARIES = ("torch", "diffusers", "onnx", "onnxscript")
Watch = Callable[[dict[str, Any]], None]
"""Told what happens: {"kind": "phase" | "count", …}, as `raysd.train.follow`'s."""


@dataclass(frozen=True)
class Export:
    """An export on this machine, every byte of it compared with its digest, and what its manifest says of it."""

    folder: Path
    manifest: dict[str, Any]


def export_onnx(ref: str, storage: Storage, folder: Path | None, precision: str, watch: Watch) -> str:
    """Export a model into a folder, a LoRA merged in; or keep what serving draws it with: its base's. Returns where it lies.

    What the gate refused before is tried again. Raises RequestError for a folder in use, ExportRefused.
    """
    located = locate(ref, storage)
    if folder is not None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RequestError(f"--out {folder}: exists and is not empty")
        write(located, precision, folder, watch)
        return str(folder)
    base = base_of(located, storage)
    make(storage, base, precision, watch, again=True)
    return f"{storage.url}/{place_of(digest_of(base), precision)}"


def base_of(located: Located, storage: Storage) -> Located:
    """The whole model below a LoRA version, as its own version where it is one; any other model itself."""
    if located.lora is None:
        return located
    assert located.version is not None
    return locate(located.version.record["base"], storage)


def digest_of(located: Located) -> str:
    """What an export is kept by."""
    return located.version.digest if located.version else identity(located.folder)


def kept(storage: Storage, located: Located, precision: str) -> Export | None:
    """The export of a model, on this machine; None if there is none. Raises IntegrityError naming a damaged file."""
    place = place_of(digest_of(located), precision)
    try:
        data = storage.read(f"{place}/{MANIFEST}")
    except NotFound:
        return None
    what = f"{located.ref}: its {precision} export"
    remedy = f"delete {place} and export it again"
    manifest = _unpack(data, f"{what} ({place}/{MANIFEST})", remedy, digest_of(located))
    folder = cache_folder() / ROOT / digest(data)
    for file in _files(manifest):
        ensure(storage, f"{place}/{file.sha256}/{file.path}", file, folder / file.path, f"{what}: {file.path}", remedy)
    return Export(folder, manifest)


def is_kept(storage: Storage, source: str, precision: str) -> bool:
    """Whether there is an export of the model with that digest."""
    return storage.exists(f"{place_of(source, precision)}/{MANIFEST}")


def refusal(storage: Storage, source: str, precision: str) -> str | None:
    """What the gate of this version of raysd said of the export of the model with that digest, if it refused it."""
    try:
        found = json.loads(storage.read(f"{place_of(source, precision)}/{REFUSED}"))
        return str(found["reason"]) if found["raysd"] == __version__ else None
    except (NotFound, ValueError, KeyError, TypeError):  # one that is no longer readable is made again
        return None


def make(storage: Storage, located: Located, precision: str, watch: Watch, again: bool = False) -> Export:
    """The export of a model; where there is none it is made, goes through the gate and is kept.

    Raises ExportRefused with the figures where the gate refuses it, or has and not `again`; IntegrityError for a
    damaged one.
    """
    if found := kept(storage, located, precision):
        return found
    place = place_of(digest_of(located), precision)
    if not again and (reason := refusal(storage, digest_of(located), precision)):
        raise ExportRefused(reason)
    with tempfile.TemporaryDirectory(prefix="raysd-export-") as scratch:
        try:
            made = write(located, precision, Path(scratch), watch)
        except ExportRefused as error:
            storage.write(f"{place}/{REFUSED}", json.dumps({"reason": str(error), "raysd": __version__}).encode())
            raise
        watch({"kind": "phase", "text": "keeping the export"})
        for file in _files(made.manifest):
            storage.upload(made.folder / file.path, f"{place}/{file.sha256}/{file.path}")
        try:
            storage.create(f"{place}/{MANIFEST}", (made.folder / MANIFEST).read_bytes())
        except AlreadyExists:  # another was faster: its files are the ones that are kept
            for file in _files(made.manifest):
                _delete_unless_kept(storage, place, file)
        storage.delete(f"{place}/{REFUSED}")
    found = kept(storage, located, precision)
    assert found is not None
    return found


def write(located: Located, precision: str, folder: Path, watch: Watch) -> Export:
    """Export a model into an empty or absent folder, which is removed where that fails or the gate refuses.

    Raises ExportRefused with the gate's figures.
    """
    from raysd.export.gate import pass_gate
    from raysd.export.networks import Networks
    from raysd.export.onnx import OPSET, export_graphs
    from raysd.export.runtime import Runtime, require

    if precision not in PRECISIONS:
        raise RequestError(f"--precision {precision}: one of {', '.join(PRECISIONS)}")
    require("onnx", "onnxscript", "onnxruntime")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        watch({"kind": "phase", "text": f"exporting {located.ref} in {precision}: a minute or so"})
        export_graphs(Networks(located, PRECISIONS[precision]), folder, precision, partial(_count, watch))
        watch({"kind": "phase", "text": "comparing it with PyTorch"})
        networks = Networks(located)
        runtime = Runtime(folder, networks.family, networks.geometry)
        figures = pass_gate(located, networks, runtime, precision)
    except BaseException:
        shutil.rmtree(folder)
        raise
    files = [File(path.name, sha256_of(path), path.stat().st_size) for path in sorted(folder.iterdir())]
    body = {
        "schema": 1,
        "ref": located.ref,
        "source": digest_of(located),
        "adapters": "merged" if networks.merged else "inputs",
        "precision": precision,
        "opset": OPSET,
        "created": timestamp(),
        "files": [file._asdict() for file in files],
        "gate": {name: float(f"{value:.6g}") for name, value in asdict(figures).items()},
        "providers": runtime.providers,
        "versions": _versions(),
    }
    manifest = {**body, "check": _check(body)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return Export(folder, manifest)


def _count(watch: Watch, done: int, of: int) -> None:
    watch({"kind": "count", "text": "graphs", "done": done, "of": of})


def place_of(source: str, precision: str) -> str:
    """The folder below the storage's root of the export of the model with that digest."""
    if precision not in PRECISIONS:
        raise RequestError(f"precision {precision}: one of {', '.join(PRECISIONS)}")
    return f"{ROOT}/{source}/{precision}"


def _unpack(data: bytes, what: str, remedy: str, source: str) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(data)
        check = manifest.pop("check")
        whole = check == _check(manifest) and source == manifest["source"]
        # A name is one of ours, not a way out of the folder.
        if not whole or any("/" in file.path or "\\" in file.path or file.path[:1] == "." for file in _files(manifest)):
            raise ValueError("not what was written")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{what}: the manifest is damaged ({error}): {remedy}") from None
    return manifest


def _files(manifest: dict[str, Any]) -> list[File]:
    return [File(str(file["path"]), str(file["sha256"]), int(file["size"])) for file in manifest["files"]]


def _check(body: dict[str, Any]) -> str:
    return digest(json.dumps(body, sort_keys=True, allow_nan=False).encode())


def _versions() -> dict[str, str]:
    import onnxruntime

    return {
        "raysd": __version__,
        "onnxruntime": onnxruntime.__version__,
        **{name: installed(name) for name in LIBRARIES},
    }


def _delete_unless_kept(storage: Storage, place: str, file: File) -> None:
    kept_files = _files(json.loads(storage.read(f"{place}/{MANIFEST}")))
    if file not in kept_files:
        storage.delete(f"{place}/{file.sha256}/{file.path}")
