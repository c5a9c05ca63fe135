"""A model reference, one word everywhere, made into files on this machine.

tiny-sd            the bundled model            ./folder, /folder     a diffusers folder
file.safetensors   a single-file checkpoint     org/name              a hub id
cats@3, cats:production, cats                   a version in the registry
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from raysd.errors import IntegrityError, NotFound, RequestError
from raysd.models import INDEX, Family, components, family_of, family_of_file, is_adapter, is_part, is_parts_name, named
from raysd.models.folder import check_folder
from raysd.registry import Registry, Version
from raysd.registry.files import cache_folder, ensure
from raysd.registry.records import blob_path
from raysd.storage import Storage, sha256_of


@dataclass(frozen=True)
class Located:
    """A model on this machine. `folder` is the whole diffusers model; `lora` an adapter over it, or None."""

    ref: str
    folder: Path
    lora: Path | None = None
    version: Version | None = None

    @property
    def family(self) -> Family:
        return family_of(self.folder)


def locate(ref: str, storage: Storage, whole: bool = True) -> Located:
    """Find a model; a registered version's files are checked against their digests, another's by `check_folder`.

    Without `whole` a folder of configurations will do.
    Raises NotFound, RequestError (not a model), IntegrityError (not the bytes that were published).
    """
    if ref == "tiny-sd":
        from raysd.assets import asset

        return Located(ref, asset("tiny-sd"))
    path = Path(ref).expanduser()
    if ref.endswith(".safetensors"):
        return Located(str(path.resolve()), _single_file(path))
    # A word alone may also be a model of the registry, beside a folder of that name which holds its pictures.
    if path.is_dir() and ("/" in ref or ref.startswith((".", "~")) or (path / INDEX).exists()):
        check_folder(path, ref) if whole else family_of(path)
        return Located(str(path.resolve()), path.resolve())
    if ref.startswith((".", "/", "~")):
        raise NotFound(f"{ref}: no such folder")
    if "/" in ref and "@" not in ref and ":" not in ref:
        folder = _hub(ref)
        check_folder(folder, ref)
        return Located(ref, folder)
    return _registered(Registry(storage).resolve(ref), storage)


def identity(folder: Path, *only: str) -> str:
    """sha256 over the names and bytes of a model's files (of the named components, or all): what it is, wherever it lies.

    What is no part of the model does not count: other files beside it, a safety checker, weights of another precision.
    """
    files = [path for name in only or components(folder) for path in (folder / name).rglob("*")]
    files += [] if only else [folder / INDEX]
    lines = [
        f"{path.relative_to(folder).as_posix()} {sha256_of(path.resolve())}" for path in sorted(files) if is_part(path)
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def identity_of(version: Version, storage: Storage) -> str:
    """`identity` of a whole model in the registry, from its manifest and its index: no weights are read.

    Raises IntegrityError for an index that is missing or damaged.
    """
    files = {PurePosixPath(file.path): file for file in version.files}
    index = files.get(PurePosixPath(INDEX))
    if index is None:
        raise IntegrityError(f"{version.ref}: has no {INDEX}: use another version")
    local = cache_folder() / "blobs" / index.sha256
    ensure(storage, blob_path(index.sha256), index, local, f"{version.ref}: {INDEX}", "use another version")
    parts = {INDEX, *named(local.read_bytes())}
    lines = [f"{path} {files[path].sha256}" for path in sorted(files) if path.parts[0] in parts and is_parts_name(path)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _registered(version: Version, storage: Storage) -> Located:
    folder = Registry(storage).fetch(version)
    adapters = [file.path for file in version.files if is_adapter(file.path)]
    if not adapters:
        return Located(version.ref, folder, version=version)
    base = locate(version.record["base"], storage)
    if identity(base.folder) != version.record["base_digest"]:
        raise IntegrityError(
            f"{version.ref}: its base {version.record['base']} is not the one it was trained on; put that model back"
        )
    return Located(version.ref, base.folder, folder / adapters[0], version)


def _hub(ref: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = [INDEX, "*/*.json", "*/*.txt", "*/*.safetensors"]
    try:
        return Path(snapshot_download(ref, allow_patterns=patterns, ignore_patterns=["*.fp16.*", "safety_checker/*"]))
    except RepositoryNotFoundError:
        raise NotFound(f"{ref}: no such model on the hub, or it is private (set HF_TOKEN)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise NotFound(f"{ref}: not on this machine, and the hub did not answer: {reason}") from None


def _single_file(path: Path) -> Path:
    """Convert a single-file checkpoint to a diffusers folder, once; kept beside the other local caches by content."""
    if not path.is_file():
        raise NotFound(f"{path}: no such file")
    out = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "raysd" / "single-file" / sha256_of(path)
    if not (out / INDEX).exists():
        beside = path.with_suffix("")
        try:
            pipeline = family_of_file(path).open_single_file(path, beside if beside.is_dir() else None)
        except RequestError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise RequestError(
                f"{path}: not loadable as a single-file checkpoint: {reason}\n"
                f"without access to the hub, put the model's configuration and tokenizer into {beside}/"
            ) from None
        _save_whole(pipeline, out)
    return out


def _save_whole(pipeline: object, out: Path) -> None:
    """Save under a temporary name and rename: another process sees the folder whole or not at all."""
    scratch = out.with_name(f"{out.name}.{os.getpid()}")
    pipeline.save_pretrained(scratch, safe_serialization=True)  # type: ignore[attr-defined]
    json.loads((scratch / INDEX).read_text())
    try:
        scratch.rename(out)
    except OSError:
        if not (out / INDEX).exists():
            raise
