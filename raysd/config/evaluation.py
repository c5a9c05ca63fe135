"""One evaluation: which pictures are drawn, with what they are judged, and which data they are compared with."""

from typing import Annotated

from pydantic import Field, PositiveInt

from raysd.config.base import Spec
from raysd.config.data import DataSpec
from raysd.config.training import NonNegative


class EvaluationSpec(Spec):
    """An evaluation. Two models compare where all of this is the same."""

    prompts: str | None = None
    """Prompts, one a line, or a .jsonl of {"prompt", "negative"}; the data's captions, or a bundled list, if not given."""
    count: Annotated[int, Field(ge=2, le=100_000)] = 256
    """Pictures drawn, the prompts in turn."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 25
    """Denoising steps."""
    guidance: Annotated[float, Field(ge=0, le=100)] = 3.5
    """Classifier-free guidance scale."""
    seed: NonNegative = 0
    """The pictures, the subsets and the intervals come from it."""
    batch: Annotated[int, Field(ge=1, le=1024)] = 32
    """Pictures drawn at once by a worker."""
    workers: NonNegative | None = None
    """Ray workers that draw; 0: this process draws, without Ray. If not given, one a GPU or one for 4 CPUs, and this process
    where that is one on a machine of its own."""
    inception: str | None = None
    """FID InceptionV3: a .safetensors file, or a TorchScript file (which runs code). The CLIP's features if not given."""
    clip: str | None = None
    """Folder of a CLIPModel as transformers saves it; the bundled judge if not given."""
    data: DataSpec | None = None
    """Pictures to compare with: reference of FID, KID, precision and recall; split as for training, for the losses."""
    losses: PositiveInt = 32
    """Most pictures of each split on which the loss is measured."""
    timesteps: PositiveInt = 4
    """Timesteps of each of the four bands at which it is."""
