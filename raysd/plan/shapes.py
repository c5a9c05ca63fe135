"""The module that a run would train, without a byte of it: tensors that have shapes, types and layouts alone.

It is built by the method itself (`Method.build`), from configurations instead of weights; so an adapter has the
parameters that it will have.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from raysd.config.training import TrainingSpec
from raysd.errors import NotFound, RequestError
from raysd.methods import METHODS, Batch, TrainedModule
from raysd.models import Family, NoiseSchedule, family_of
from raysd.storage import Storage
from raysd.train.deepspeed_engine import PERSISTENT

CONFIGURATIONS = ("model_index.json", "*/*.json", "*/*.txt")


@dataclass(frozen=True)
class Counts:
    """Parameters of the module. Bytes are as the worker holds them; trained ones are fp32."""

    trained: int
    frozen: int
    frozen_bytes: int
    largest: int
    """Elements of the largest trained tensor."""
    small: int
    """Bytes of tensors of at most `PERSISTENT` elements, trained or frozen: they stay whole at ZeRO stage 3."""
    shapes: dict[str, torch.Size]
    """Of the trained tensors, by name."""

    @property
    def trained_bytes(self) -> int:
        return 4 * self.trained

    @property
    def whole(self) -> int:
        return self.trained + self.frozen


@dataclass(frozen=True)
class Blank:
    """A family whose networks are made from their configurations; the rest of it is the family's own."""

    inner: Family

    def denoiser(self, folder: Path) -> nn.Module:
        return self.inner.blank_denoiser(folder)

    def text_encoder(self, folder: Path) -> nn.Module:
        return self.inner.blank_text_encoder(folder)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@contextmanager
def no_memory() -> Iterator[None]:
    """Tensors made inside have no data; they say they are on the CPU, so that autocast and attention work as there."""
    with FakeTensorMode():
        yield


def build(folder: Path, spec: TrainingSpec) -> TrainedModule:
    """The module of a run, as a worker has it before its engine, on the meta device."""
    family: Any = Blank(family_of(folder))
    random = torch.random.get_rng_state()
    try:
        with torch.device("meta"):
            module = METHODS[spec.method.kind].build(family, folder, spec)
    finally:
        torch.random.set_rng_state(random)
    if spec.scale.channels_last:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


def take_off_meta(module: nn.Module) -> None:
    """Put tensors of the same shapes, types and layouts that say they are on the CPU into it. Inside `no_memory`."""
    made: dict[int, torch.Tensor] = {}

    def like(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if parameter else new
        return made[id(tensor)]

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = like(tensor)  # type: ignore[assignment]


def count(module: nn.Module) -> Counts:
    parameters = dict(module.named_parameters())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    frozen = [p for p in parameters.values() if not p.requires_grad]
    return Counts(
        trained=sum(p.numel() for p in trained.values()),
        frozen=sum(p.numel() for p in frozen),
        frozen_bytes=sum(p.numel() * p.element_size() for p in frozen),
        largest=max((p.numel() for p in trained.values()), default=0),
        small=sum(p.numel() * p.element_size() for p in parameters.values() if p.numel() <= PERSISTENT),
        shapes={name: p.shape for name, p in trained.items()},
    )


def batch_of(folder: Path, spec: TrainingSpec, size: int) -> tuple[Batch, NoiseSchedule]:
    """A micro-batch of that many pictures. Inside `no_memory`."""
    family = family_of(folder)
    geometry = family.geometry(folder)
    side = spec.data.resolution // geometry.factor
    tokens, width = family.text_shape(folder)
    text = torch.zeros(size, tokens, dtype=torch.int64)
    if not METHODS[spec.method.kind].trains_text(spec):
        text = torch.zeros(size, tokens, width)
    latents, noise = (torch.zeros(size, geometry.channels, side, side) for _ in range(2))
    batch = Batch(latents, noise, torch.zeros(size, dtype=torch.int64), text)
    return batch, NoiseSchedule(torch.zeros(1000), "epsilon")


def configurations(ref: str, storage: Storage) -> Path:
    """The folder of a model's configurations; of a hub id nothing else is downloaded.

    Raises NotFound or RequestError naming `base`.
    """
    path = Path(ref).expanduser()
    if ref.endswith(".safetensors") and (path.with_suffix("") / "model_index.json").is_file():
        return path.with_suffix("")
    if "/" in ref and not ref.startswith((".", "/", "~")) and not path.is_dir() and not {"@", ":"} & set(ref):
        return _from_hub(ref)
    from raysd.references import locate

    located = locate(ref, storage, whole=False)
    if located.lora is not None:
        raise RequestError(f"base {ref}: holds an adapter, not a whole model; plan with its base, or a full version")
    return located.folder


def _from_hub(ref: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(ref, allow_patterns=list(CONFIGURATIONS), ignore_patterns=["safety_checker/*"]))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise NotFound(
            f"base {ref}: its configuration is not on this machine, and the hub did not answer: {reason}\n"
            "plan with a folder that holds model_index.json and the config.json of each part that it names"
        ) from None
