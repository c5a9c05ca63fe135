"""What a service serves, and how."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from raysd.config.base import Spec
from raysd.config.http import HttpSpec


class ReplicasSpec(Spec):
    """How many processes draw with a model. Between `least` and `most` they follow the work that waits."""

    least: int = Field(default=1, ge=0)
    """With 0 a model that nobody asks for holds no machine; its first request waits until it is loaded."""
    most: int = Field(default=1, ge=1)
    """Replicas at most."""
    target: float = Field(default=8, gt=0)
    """Pictures a replica should have in work or waiting."""
    idle_seconds: float = Field(default=600, gt=0)
    """Before the last replica goes, where `least` is 0."""

    @model_validator(mode="after")
    def _ordered(self) -> "ReplicasSpec":
        if self.least > self.most:
            raise ValueError("least: is more than most")
        return self


class SafetySpec(Spec):
    """A classifier that looks at each finished picture; what it flags is neither kept nor shown."""

    path: str
    """A local folder, in every replica: an image classifier of transformers, or Stable Diffusion's own safety_checker."""
    labels: tuple[str, ...] = Field(default=("nsfw",), min_length=1)
    """Those of the classifier's labels that are flagged. Stable Diffusion's checker has none."""
    threshold: float = Field(default=0.5, gt=0, lt=1)
    """Probability of these labels above which a picture is flagged. Stable Diffusion's checker has its own."""


class ModelSpec(Spec):
    """A model that is served. What its alias or traffic says may change at any time, without a deployment."""

    ref: str
    """cats:production, cats@3, cats, tiny-sd, a folder, org/name."""
    name: str | None = None
    """What clients call it; null: the model's own name."""
    backend: Literal["torch", "onnx"] = "torch"
    """What runs the networks: PyTorch, or ONNX Runtime with the version's export, which is made where there is none."""
    precision: Literal["fp32", "bf16", "fp16", "int8"] | None = None
    """Arithmetic. PyTorch: fp32, bf16 or fp16; ONNX Runtime: fp32, fp16 or int8. Null: bf16 (ONNX: fp16) on a GPU, else fp32."""
    compile: bool = False
    """torch.compile: some minutes at start, faster steps after."""
    cpus: float = Field(default=1, gt=0)
    """CPUs a replica."""
    gpus: float = Field(default=0, ge=0)
    """GPUs a replica."""
    rows: int = Field(default=16, ge=2)
    """The denoiser's batch; a picture with guidance takes two."""
    admitted: int = Field(default=64, ge=1)
    """Pictures a replica that take turns."""
    waiting: int = Field(default=256, ge=1)
    """Pictures that wait before clients are told to come back later."""
    bases: int = Field(default=2, ge=1)
    """Bases a replica holds: two, so that a new version is loaded beside the old one."""
    adapters: int = Field(default=16, ge=1)
    """LoRA versions a base."""
    memory: float | None = Field(default=None, gt=0)
    """GiB for the weights that a replica holds, reckoned by the size of their safetensors files; null: no bound but by number.

    An estimate: weights that are kept in another precision than their files' take more or less, and what a step needs
    besides (activations, the libraries themselves) is not in it. Leave room for that."""
    loras: bool = True
    """Whether a request may name a LoRA version of the same base."""
    safety: SafetySpec | None = None
    """A classifier of pictures; null: none."""
    watermark: Literal["dct"] | None = None
    """An invisible mark of the version in each picture; null: none."""
    replicas: ReplicasSpec = ReplicasSpec()

    @model_validator(mode="after")
    def _backend_has_it(self) -> "ModelSpec":
        lacks = "int8" if self.backend == "torch" else "bf16"
        if self.precision == lacks:
            raise ValueError(f"precision: {self.backend} has no {lacks}")
        if self.compile and self.backend == "onnx":
            raise ValueError("compile: is for backend torch; ONNX Runtime compiles its graphs itself")
        return self

    @property
    def export_precision(self) -> str:
        """That of the exports which ONNX Runtime draws with."""
        return self.precision or ("fp16" if self.gpus else "fp32")

    @property
    def served_name(self) -> str:
        return self.name or self.ref.rstrip("/").rpartition("/")[2].partition("@")[0].partition(":")[0]


class ServingSpec(Spec):
    """A service."""

    models: tuple[ModelSpec, ...] = Field(min_length=1)
    storage: str | None = None
    """The root; null: RAYSD_STORAGE."""
    database: str | None = None
    """SQLite or PostgreSQL; null: RAYSD_DATABASE, or a file beside a local storage."""
    public: bool = False
    """Whether others than this machine reach it: then every request needs a key."""
    signers: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{43}=$")], ...] = ()
    """Public keys (Ed25519, base64): where there are any, only versions that one of them signed are drawn with."""
    retention_days: float = Field(default=30, gt=0)
    """How long pictures are kept."""
    page: bool = True
    """Whether there is a page to draw at /."""
    http: HttpSpec = HttpSpec()

    @field_validator("models")
    @classmethod
    def _names_differ(cls, models: tuple[ModelSpec, ...]) -> tuple[ModelSpec, ...]:
        names = [model.served_name for model in models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{twice[0]} is served twice: give one of them another name")
        return models
