"""Fill the caches: latents of pictures and embeddings of captions, in this process for a few, by Ray Data for many."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from raysd.config.data import AugmentSpec
from raysd.config.training import TrainingSpec
from raysd.data.augment import apply, variant
from raysd.data.cache import TensorCache, evict
from raysd.data.source import read_picture
from raysd.errors import RaysdError, TrainingFailed
from raysd.quiet import import_quickly
from raysd.references import locate
from raysd.storage import Storage
from raysd.train.frozen import FrozenData, captions
from raysd.train.threads import preparing

MANY = 300
MANY_ALONE = 10_000
"""More rows than this are encoded by Ray Data; the second on a lone machine of few CPUs, which one process keeps busy:
encoders of their own take some 20 s to start there."""
FEW_CPUS = 8
PIXELS_A_CALL = 2**20
"""Pixels in one forward pass of the autoencoder."""
ROWS_A_SHARD = 256
CACHE_BYTES = 200 * 2**30
CACHE_SECONDS = 90 * 86_400.0
"""The caches keep at most this much, and nothing unused for longer."""
KEEP_PERIOD = 3600.0
"""Seconds between two times that a run marks what it reads as used."""

Rows = dict[str, Any]
Progress = Callable[[str, int, int], None]


class PictureEncoder:
    """Rows {key, path, example, variant} -> latent moments in the cache. One autoencoder a process."""

    def __init__(self, root: str, base: str, space: str, spec: TrainingSpec):
        import_quickly()
        storage = Storage(root)
        located = locate(base, storage)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.family = located.family
        self.autoencoder = self.family.autoencoder(located.folder).to(self.device)
        self.cache = TensorCache(storage.child(space))
        self.spec, self.augment = spec, spec.data.augment
        self.readers = preparing(4, "pictures")

    @torch.inference_mode()
    def __call__(self, rows: Rows) -> Rows:
        """Encode and write one shard; returns the keys written."""
        keys = [str(key) for key in rows["key"]]
        size = max(1, PIXELS_A_CALL // self.spec.data.resolution**2)
        chunks = [range(first, min(first + size, len(keys))) for first in range(0, len(keys), size)]
        pixels = [[self.readers.submit(self._pixels, rows, n) for n in chunk] for chunk in chunks]
        moments: list[torch.Tensor] = []
        for futures in pixels:
            batch = torch.stack([future.result() for future in futures]).to(self.device)
            moments += (
                self.family.moments(self.autoencoder, batch.contiguous(memory_format=torch.channels_last)).float().cpu()
            )
        for n, tensor in enumerate(moments):
            if not torch.isfinite(tensor).all():
                raise TrainingFailed(
                    f"{rows['path'][n]}: the autoencoder of {self.spec.base} gives NaN for this picture"
                )
        self.cache.write(dict(zip(keys, moments, strict=True)))
        return {"key": np.array(keys)}

    def _pixels(self, rows: Rows, n: int) -> torch.Tensor:
        augment: AugmentSpec = self.augment
        chosen = variant(augment, str(rows["example"][n]), int(rows["variant"][n]), self.spec.seed)
        picture = read_picture(str(rows["path"][n]), digest=str(rows["example"][n]))
        return apply(picture, chosen, self.spec.data.resolution)


class CaptionEncoder:
    """Rows {key, caption} -> text embeddings in the cache. One text encoder a process."""

    def __init__(self, root: str, base: str, space: str, spec: TrainingSpec):
        import_quickly()
        storage = Storage(root)
        located = locate(base, storage)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.family = located.family
        self.tokenizer = self.family.tokenizer(located.folder)
        self.text_encoder = self.family.text_encoder(located.folder).eval().to(self.device)
        self.cache = TensorCache(storage.child(space))

    @torch.inference_mode()
    def __call__(self, rows: Rows) -> Rows:
        keys = [str(key) for key in rows["key"]]
        tokens = self.family.tokens(self.tokenizer, [str(caption) for caption in rows["caption"]])
        embeddings = [self.family.conditioning(self.text_encoder, part.to(self.device)) for part in tokens.split(16)]
        self.cache.write(dict(zip(keys, torch.cat(embeddings).float().cpu(), strict=True)))
        return {"key": np.array(keys)}


def is_filled(frozen: FrozenData, storage: Storage) -> bool:
    """Whether the cache has all latents of the run."""
    return not TensorCache(storage.child(frozen.latents)).refresh().missing(_latents(frozen))


@contextmanager
def keeping_caches(frozen: FrozenData, storage: Storage) -> Iterator[None]:
    """Meanwhile mark the run's tensors as used: it may take longer than a use protects them from eviction."""
    ended = threading.Event()
    threading.Thread(target=_keep, args=(frozen, storage, ended), name="caches", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def fill_latents(frozen: FrozenData, storage: Storage, spec: TrainingSpec, progress: Progress) -> int:
    """Encode the pictures that the cache lacks. Returns how many there were."""
    evict(storage.child("cache"), CACHE_BYTES, CACHE_SECONDS)
    cache = TensorCache(storage.child(frozen.latents)).refresh()
    wanted = {
        key: {"key": key, "path": item.path, "example": item.example, "variant": index}
        for item in (*frozen.train, *frozen.validation)
        for index, key in enumerate(item.latents)
    }
    absent = cache.missing(wanted)
    cache.keep_alive(wanted)
    rows = [wanted[key] for key in absent]
    _encode(PictureEncoder, (storage.url, spec.base, frozen.latents, spec), rows, "encode pictures", progress)
    return len(rows)


def fill_text(frozen: FrozenData, storage: Storage, spec: TrainingSpec, progress: Progress) -> int:
    """Encode the captions that the cache lacks. Returns how many there were."""
    cache = TensorCache(storage.child(frozen.text)).refresh()
    wanted = captions(frozen)
    absent = cache.missing(wanted)
    cache.keep_alive(wanted)
    rows = [{"key": key, "caption": wanted[key]} for key in absent]
    _encode(CaptionEncoder, (storage.url, spec.base, frozen.text, spec), rows, "encode captions", progress)
    return len(rows)


def _keep(frozen: FrozenData, storage: Storage, ended: threading.Event) -> None:
    latents, text = (TensorCache(storage.child(space)) for space in (frozen.latents, frozen.text))
    while not ended.wait(KEEP_PERIOD):
        with suppress(RaysdError):  # there is time for another try
            latents.refresh().keep_alive(_latents(frozen))
            text.refresh().keep_alive(captions(frozen))


def _latents(frozen: FrozenData) -> set[str]:
    return {key for item in (*frozen.train, *frozen.validation) for key in item.latents}


def _encode(
    encoder: type[Any], arguments: tuple[Any, ...], rows: Sequence[Rows], what: str, progress: Progress
) -> None:
    if not rows:
        return
    done = _here if len(rows) <= _most_here() and not _gpus_elsewhere() else _by_ray_data
    count = 0
    progress(what, 0, len(rows))
    for written in done(encoder, arguments, rows):
        count += written
        progress(what, count, len(rows))


def _here(encoder: type[Any], arguments: tuple[Any, ...], rows: Sequence[Rows]) -> Iterable[int]:
    encode = encoder(*arguments)
    for first in range(0, len(rows), ROWS_A_SHARD):
        part = rows[first : first + ROWS_A_SHARD]
        encode({name: np.array([row[name] for row in part], dtype=object) for name in part[0]})
        yield len(part)


def _by_ray_data(encoder: type[Any], arguments: tuple[Any, ...], rows: Sequence[Rows]) -> Iterable[int]:
    """Streams rows through a pool of encoders, a GPU each where there are any; no picture passes through the driver."""
    import ray
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    workers = max(1, min(gpus or int(resources.get("CPU", 1)), -(-len(rows) // ROWS_A_SHARD)))
    blocks = max(workers, -(-len(rows) // ROWS_A_SHARD))
    data = ray.data.from_items(list(rows), override_num_blocks=blocks).map_batches(
        encoder,
        fn_constructor_args=arguments,
        batch_size=ROWS_A_SHARD,
        concurrency=workers,
        num_cpus=1,
        num_gpus=1 if gpus else 0,
    )
    for batch in data.iter_batches(batch_size=None):
        yield len(batch["key"])


def _most_here() -> int:
    """Rows that this process encodes itself."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []
    alone = len(nodes) == 1 and not torch.cuda.is_available() and nodes[0]["Resources"].get("CPU", 0) <= FEW_CPUS
    return MANY_ALONE if alone else MANY


def _gpus_elsewhere() -> bool:
    import ray

    return not torch.cuda.is_available() and ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0
