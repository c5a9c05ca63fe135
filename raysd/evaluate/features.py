"""What scores are computed from: features of pictures, class logits, and embeddings of texts in the same space.

Shapes: N pictures or texts, D features, K classes.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from raysd.assets import asset
from raysd.assets.judge import Judge
from raysd.errors import NotFound, RequestError
from raysd.evaluate.inception import load_inception, resized

BATCH = 64


class Features(NamedTuple):
    """Of pictures: vectors [N, D], and logits [N, K] where the extractor classifies."""

    vectors: Tensor
    logits: Tensor | None = None


class Extractor(Protocol):
    """Turns pictures into features. `name` goes into the report: numbers of different extractors do not compare."""

    name: str

    def pictures(self, pictures: Sequence[Image.Image]) -> Features: ...


class Matcher(Extractor, Protocol):
    """An extractor that also embeds texts."""

    scale: float
    """Factor of cosine similarities as logits, learned with the embeddings."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """[N, D], in the space of the pictures' vectors."""
        ...


class BundledJudge:
    """tiny-clip: knows the bundled base's world of shapes, and little else."""

    name = "bundled judge tiny-clip"

    def __init__(self) -> None:
        self.judge = Judge(asset("tiny-clip"))
        self.scale = float(self.judge.model.logit_scale.detach().exp())

    def pictures(self, pictures: Sequence[Image.Image]) -> Features:
        return Features(self.judge.images(pictures))

    def texts(self, texts: Sequence[str]) -> Tensor:
        return self.judge.texts(texts)


class LocalClip:
    """A CLIPModel with its tokenizer and image processor, in a folder as transformers saves them."""

    def __init__(self, folder: Path):
        from transformers import CLIPModel, CLIPTokenizer

        _refuse_unlike_clip(folder)
        self.name = f"CLIP {folder}"
        self.device = _device()
        try:
            self.model: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(folder)
            self.processor: Any = _processor(folder)
        except (OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise RequestError(f"clip {folder}: not a CLIP folder of transformers: {reason}") from None
        self.model.eval().to(self.device)
        self.scale = float(self.model.logit_scale.detach().exp())
        # A tokenizer that was saved without its longest text says a huge number.
        self.longest = min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image.Image]) -> Features:
        return Features(torch.cat([self._embed(batch) for batch in _batches(pictures)]))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        cut = {"truncation": True, "max_length": self.longest}
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt", **cut).to(self.device)
        return _projected(self.model.get_text_features(**tokens))

    def _embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels = self.processor(images=[p.convert("RGB") for p in pictures], return_tensors="pt").pixel_values
        return _projected(self.model.get_image_features(pixel_values=pixels.to(self.device)))


class LocalInception:
    """The FID InceptionV3 from a .safetensors file: features and logits."""

    def __init__(self, path: Path):
        self.name = f"FID InceptionV3 {path}"
        self.device = _device()
        self.model = load_inception(path).to(self.device)

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image.Image]) -> Features:
        parts = [self.model((resized(b).to(self.device).float() - 128) / 128) for b in _batches(pictures)]
        return Features(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))


class ScriptedInception:
    """A TorchScript file that takes uint8 pictures [N, 3, 299, 299] and returns features [N, D].

    TorchScript runs code of the file: it is loaded only because the user names it, and never fetched.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise NotFound(f"inception {path}: no such file")
        self.name = f"TorchScript {path}"
        self.device = _device()
        try:
            self.module = torch.jit.load(str(path), map_location=self.device).eval()
        except RuntimeError:
            raise RequestError(f"inception {path}: neither a .safetensors nor a TorchScript file") from None
        self.options: dict[str, Any] = _feature_option(self.module)

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image.Image]) -> Features:
        parts = [self.module(resized(batch).to(self.device), **self.options) for batch in _batches(pictures)]
        return Features(torch.cat([part.float().flatten(1).cpu() for part in parts]))


def matcher(clip: str | None) -> Matcher:
    """The CLIP of that folder, else the bundled judge. Raises NotFound or RequestError."""
    return BundledJudge() if clip is None else LocalClip(Path(clip).expanduser())


def extractor(inception: str | None, otherwise: Matcher) -> Extractor:
    """The Inception of that file, else what compares pictures with texts. Raises NotFound or RequestError."""
    if inception is None:
        return otherwise
    path = Path(inception).expanduser()
    return LocalInception(path) if path.suffix == ".safetensors" else ScriptedInception(path)


def _batches(pictures: Sequence[Image.Image]) -> Iterator[Sequence[Image.Image]]:
    return (pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _projected(output: Any) -> Tensor:
    """transformers 5 returns the projection inside an output object, 4 alone."""
    return (output if isinstance(output, Tensor) else output.pooler_output).float().cpu()


def _processor(folder: Path) -> Any:
    """The one that needs Pillow alone: the other's resizing needs torchvision."""
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    except ImportError:
        from transformers import CLIPImageProcessor as Processor
    return Processor.from_pretrained(folder)


def _refuse_unlike_clip(folder: Path) -> None:
    if not folder.is_dir():
        raise NotFound(f"clip {folder}: no such folder")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RequestError(f"clip {folder}: no readable config.json with a model_type in it") from None
    if kind != "clip":
        raise RequestError(f"clip {folder}: a model of type {str(kind)[:40]!r}; a CLIPModel is wanted")


def _feature_option(module: Any) -> dict[str, Any]:
    """The usual file of FID returns classes unless asked for features."""
    names = {argument.name for argument in module.forward.schema.arguments}
    return {"return_features": True} if "return_features" in names else {}
