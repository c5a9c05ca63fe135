"""What is done to a drawn picture before it is stored: a classifier looks at it, and it is marked."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image

from raysd.config.serving import ModelSpec
from raysd.serve import watermark
from raysd.serve.safety import Classifier


class Finish:
    """Does both, or what of them is wanted. May be shared by threads."""

    def __init__(
        self, classifier: Classifier | None = None, mark: Callable[[Image.Image, str], Image.Image] | None = None
    ):
        self.classifier, self._mark = classifier, mark

    @property
    def previews(self) -> bool:
        """Whether unfinished pictures may be shown: a classifier knows finished ones alone."""
        return self.classifier is None

    def flagged(self, images: Sequence[Image.Image]) -> list[bool]:
        """Which pictures are to be held back."""
        return self.classifier.flagged(images) if self.classifier else [False] * len(images)

    def marked(self, image: Image.Image, digest: str) -> Image.Image:
        """The picture with the mark of the version that drew it. Raises RequestError for one that is too small."""
        return self._mark(image, digest) if self._mark else image


def open_finish(spec: ModelSpec) -> Finish:
    """What a model's spec asks for, on this process's device. Raises RequestError naming the field."""
    device = torch.device("cuda" if spec.gpus and torch.cuda.is_available() else "cpu")
    classifier = Classifier(spec.safety, device) if spec.safety else None
    return Finish(classifier, watermark.mark if spec.watermark == "dct" else None)
