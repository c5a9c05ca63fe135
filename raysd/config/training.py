"""One training run, whole: what is trained, on what, how, at which scale, and what is kept of it."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from raysd.config.base import Spec
from raysd.config.data import DataSpec, Fraction

NonNegative = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


class FullSpec(Spec):
    """Train every weight of the denoiser, and of the text encoder on request."""

    kind: Literal["full"] = "full"
    text_encoder: bool = False
    """Train the text encoder as well."""


class LoraSpec(Spec):
    """Train low-rank adapters (Hu et al. 2021) on the denoiser's attention."""

    kind: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1, le=512)] = 4
    """Rank r of the update B·A."""
    alpha: PositiveFloat | None = None
    """The update is scaled by alpha/rank; equal to the rank if not given."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    targets: tuple[str, ...] | None = None
    """Names of the modules that get an adapter; the family's attention projections if not given."""


MethodSpec = Annotated[FullSpec | LoraSpec, Field(discriminator="kind")]


class LossSpec(Spec):
    """The objective of one denoising step."""

    prediction: Literal["base", "epsilon", "v_prediction"] = "base"
    """What the denoiser predicts; `base`: what its scheduler's configuration says."""
    min_snr_gamma: PositiveFloat | None = None
    """Weigh timesteps by min(SNR, gamma) (Hang et al. 2023)."""
    noise_offset: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Strength of a noise constant over each channel (lets pictures get darker and brighter)."""
    caption_dropout: Fraction = 0.0
    """Share of the steps in which a picture's caption is the empty one, for classifier-free guidance."""


class OptimSpec(Spec):
    """The optimiser, its schedule, and how long."""

    alternatives: ClassVar = ("steps", "epochs")

    kind: Literal["adamw", "adamw8bit", "adafactor", "prodigy"] = "adamw"
    lr: PositiveFloat = 1e-4
    """Learning rate after warm-up (prodigy: a factor, usually 1)."""
    steps: PositiveInt | None = None
    """Optimiser steps. Give this or `epochs`."""
    epochs: PositiveFloat | None = None
    """Passes over the training pictures. Give this or `steps`."""
    batch_size: PositiveInt = 1
    """Pictures an optimiser step, over all workers."""
    micro_batch: PositiveInt | None = None
    """Most pictures a worker holds at once; more are accumulated. All at once if not given."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after warm-up."""
    warmup: NonNegative = 0
    """Steps in which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    clip: PositiveFloat | None = 1.0
    """Largest norm of the gradient; null: not clipped."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the moving average of the weights; it is validated and published instead of them."""

    @model_validator(mode="after")
    def _one_length(self) -> "OptimSpec":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        return self


class ScaleSpec(Spec):
    """Where it runs: workers, sharding, precision, and what saves memory."""

    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Ray Train workers, or [fewest, most] for an elastic run."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO: 1 shards the optimiser's state, 2 the gradients, 3 the weights too."""
    offload: Literal["none", "optimizer"] = "none"
    """Keep the optimiser's state in the host's memory (zero_stage 1 to 3)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward and backward pass; trained weights and optimiser state stay fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    channels_last: bool = True
    """Memory format of convolutions."""
    compile: bool = False
    """torch.compile the denoiser: minutes at the start, faster steps; pays for long runs."""
    gpus: bool | None = None
    """One GPU a worker; if not given, where the cluster has them."""
    cpus: PositiveInt | None = None
    """CPUs a worker; if not given, an equal share of the cluster's on CPU, 1 beside a GPU."""
    accelerator: str | None = None
    """Kind of GPU that every worker gets, as Ray names it (A100, H100, L4 …); any if not given."""
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"
    """How workers lie on nodes: on as few as there may be, or on as many; strict: or not at all."""
    hang_minutes: PositiveFloat = 30
    """A worker that makes no step for so long is ended, with its threads' stacks, and started again."""
    restarts: NonNegative = 3
    """How often the worker group is started again from the last checkpoint after a worker died."""

    @model_validator(mode="after")
    def _consistent(self) -> "ScaleSpec":
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError("offload needs zero_stage 1, 2 or 3")
        if isinstance(self.workers, tuple) and self.workers[0] > self.workers[1]:
            raise ValueError("workers [fewest, most]: fewest is larger than most")
        return self

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class ValidationSpec(Spec):
    """Validation loss with fixed noise and timesteps, early stopping, and pictures on the way."""

    every: NonNegative = 0
    """Steps between validations; 0: only before the first step and after the last."""
    timesteps: PositiveInt = 4
    """Timesteps, evenly spread, at which each validation picture is judged."""
    patience: PositiveInt | None = None
    """Stop after so many validations without improvement."""
    best: bool = True
    """Publish the weights of the lowest validation loss instead of the last ones (where `every` > 0)."""
    prompts: tuple[str, ...] = ()
    """Pictures are drawn from these at each validation, with fixed seeds."""

    @property
    def keeps_best(self) -> bool:
        """Whether the checkpoint of the lowest validation loss is kept, and what counts in the end."""
        return self.best and self.every > 0


class CheckpointSpec(Spec):
    every: NonNegative | None = None
    """Steps between checkpoints; a tenth of the run, at least 50, if not given; 0: only the last."""
    keep: PositiveInt = 2
    """How many of the newest are kept; the best is kept besides."""

    def interval(self, total: int) -> int:
        """Steps between the checkpoints of a run of `total` steps; 0: only the last."""
        return self.every if self.every is not None else max(50, -(-total // 10))


class PublishSpec(Spec):
    model: Name | None = None
    """Name of the model in the registry; nothing is published if not given."""
    alias: Name | None = None
    """Alias to move to the new version."""
    precision: Literal["fp16", "fp32"] = "fp16"
    """Precision of the published weights."""


class TrackSpec(Spec):
    tensorboard: bool = True
    """Write TensorBoard files beside metrics.jsonl."""
    mlflow: str | None = None
    """Tracking URI of an MLflow server (extra `mlflow`)."""
    wandb: str | None = None
    """Weights & Biases project (extra `wandb`)."""
    profile: bool = False
    """Write a torch.profiler trace of a few steps of rank 0."""


class TrainingSpec(Spec):
    """A training run."""

    seed: NonNegative = 0
    """All randomness comes from it."""
    base: str = "tiny-sd"
    """The model to start from: tiny-sd, a folder, file.safetensors, org/name, name@version or name:alias."""
    data: DataSpec
    method: MethodSpec = LoraSpec()
    loss: LossSpec = LossSpec()
    optim: OptimSpec
    scale: ScaleSpec = ScaleSpec()
    validation: ValidationSpec = ValidationSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    publish: PublishSpec = PublishSpec()
    track: TrackSpec = TrackSpec()

    @model_validator(mode="after")
    def _consistent(self) -> "TrainingSpec":
        if self.optim.batch_size < self.scale.most_workers:
            raise ValueError(
                f"optim.batch_size {self.optim.batch_size} is the global batch: it needs at least one picture "
                f"for each of scale.workers {self.scale.most_workers}"
            )
        if isinstance(self.scale.workers, tuple) and self.checkpoint.every == 0:
            raise ValueError(
                "checkpoint.every 0: a run of scale.workers [fewest, most] goes on from its last checkpoint whenever "
                "the number of workers changes; leave it out, or give a number of steps"
            )
        sharded = self.scale.zero_stage > 0
        if sharded and self.optim.kind in ("adafactor", "prodigy", "adamw8bit"):
            raise ValueError(
                f"optim.kind {self.optim.kind} looks at whole tensors, and scale.zero_stage {self.scale.zero_stage} "
                "shards them: use scale.zero_stage 0, or optim.kind adamw"
            )
        return self
