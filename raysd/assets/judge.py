"""tiny-clip, the bundled judge: a small two-tower model that embeds pictures and texts in one space (Radford et al. 2021).

Its picture tower is convolutional: on pictures of 64 pixels that learns shapes in minutes where patches take hours. It
stands in wherever a CLIP is wanted and none is given.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

SIDE = 64  # pixels
WIDTH = 64  # of the embeddings
CHANNELS = (32, 64, 96, 128)


class TinyClip(nn.Module):
    """0.4 M parameters. Both towers end in embeddings of length 1."""

    def __init__(self, text_tower: nn.Module):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((3, *CHANNELS), CHANNELS, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(1, after), nn.ReLU()]
        self.picture_tower = nn.Sequential(*layers, nn.Flatten(), nn.Linear(CHANNELS[-1] * (SIDE // 16) ** 2, WIDTH))
        self.text_tower = text_tower
        self.text_projection = nn.Linear(64, WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))  # ln(1 / 0.07)

    def pictures(self, pixels: Tensor) -> Tensor:
        """[N, 3, 64, 64] in [-1, 1] -> [N, 64]"""
        return normalize(self.picture_tower(pixels), dim=-1)

    def texts(self, tokens: Tensor) -> Tensor:
        """[N, L] token ids -> [N, 64]"""
        return normalize(self.text_projection(self.text_tower(tokens).pooler_output), dim=-1)


def save(model: TinyClip, tokenizer: Any, folder: Path) -> None:
    """Weights in half precision, the tokenizer, and a config that names the kind."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.half().contiguous() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    config = {"kind": "tiny-clip", "text": model.text_tower.config.to_dict()}  # type: ignore[union-attr, operator]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class Judge:
    """A saved tiny-clip that embeds pictures and texts."""

    def __init__(self, folder: Path):
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.model = TinyClip(CLIPTextModel(CLIPTextConfig(**config["text"]))).eval()
        self.model.load_state_dict({name: t.float() for name, t in load_file(folder / "model.safetensors").items()})
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pictures of any size -> [N, 64]"""
        batches = [pictures[start : start + 64] for start in range(0, len(pictures), 64)]
        return torch.cat([self.model.pictures(pixels(batch)) for batch in batches])

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """-> [N, 64]"""
        return self.model.texts(tokens(self.tokenizer, texts))


def pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of any size -> [N, 3, 64, 64] in [-1, 1], resized with antialiasing."""
    small = [picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC) for picture in pictures]
    values = torch.from_numpy(np.stack([np.asarray(picture) for picture in small])).permute(0, 3, 1, 2)
    return values.float() / 127.5 - 1


def tokens(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """[N, L] token ids, padded to the longest."""
    return tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").input_ids
