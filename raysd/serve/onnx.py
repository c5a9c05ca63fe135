"""A model's networks in ONNX Runtime, for drawing: the other `Backend` beside `torch_backend`."""

from collections.abc import Callable
from typing import Any

from raysd.export.kept import base_of, make
from raysd.export.runtime import Runtime
from raysd.references import Located
from raysd.registry.files import cache_folder
from raysd.storage import Storage


class OnnxBackend(Runtime):
    """A base from the export that is kept with it, every byte verified, and the adapters put on it."""

    @classmethod
    def open(
        cls,
        storage: Storage,
        located: Located,
        precision: str = "fp32",
        *,
        stored: bool = True,
        threads: int | None = None,
        watch: Callable[[dict[str, Any]], None] = lambda event: None,
    ) -> "OnnxBackend":
        """The whole model at or below `located`; its export is made if there is none, which takes a minute or more.

        Without `stored` the exports in the store are left alone, for nobody signs them: this machine makes and keeps its
        own. A LoRA version is put on it with `add_adapter`. Raises IntegrityError, and ExportRefused.
        """
        base = base_of(located, storage)
        place = storage if stored else Storage(str(cache_folder() / "made-here"))
        export = make(place, base, precision, watch, again=not stored)
        return cls(export.folder, base.family, base.family.geometry(base.folder), threads=threads)
