"""The InceptionV3 of the Fréchet Inception Distance: the TensorFlow network of 2015-12-05, in PyTorch.

It differs from the usual InceptionV3 (Szegedy et al. 2015) in its pools: averages leave the padding out, and the last
block takes the maximum. Names of the weights are those of pytorch-fid's file pt_inception-2015-12-05 (and of torchvision).

Shapes: N pictures.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d

from raysd.errors import NotFound, RequestError

SIDE = 299  # pixels
WIDTH = 2048  # of the features
CLASSES = 1008


class Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, before: int, after: int, kernel: int | tuple[int, int], stride: int = 1, padding: Any = 0):
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


def _row(before: int, after: int, length: int) -> Conv:
    return Conv(before, after, (1, length), padding=(0, length // 2))


def _column(before: int, after: int, length: int) -> Conv:
    return Conv(before, after, (length, 1), padding=(length // 2, 0))


def _average(x: Tensor) -> Tensor:
    return avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    def __init__(self, before: int, pooled: int):
        super().__init__()
        self.branch1x1 = Conv(before, 64, 1)
        self.branch5x5_1 = Conv(before, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(before, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(before, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], 1)


class BlockB(nn.Module):
    def __init__(self, before: int):
        super().__init__()
        self.branch3x3 = Conv(before, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(before, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    def __init__(self, before: int, inner: int):
        super().__init__()
        self.branch1x1 = Conv(before, 192, 1)
        self.branch7x7_1 = Conv(before, inner, 1)
        self.branch7x7_2 = _row(inner, inner, 7)
        self.branch7x7_3 = _column(inner, 192, 7)
        self.branch7x7dbl_1 = Conv(before, inner, 1)
        self.branch7x7dbl_2 = _column(inner, inner, 7)
        self.branch7x7dbl_3 = _row(inner, inner, 7)
        self.branch7x7dbl_4 = _column(inner, inner, 7)
        self.branch7x7dbl_5 = _row(inner, 192, 7)
        self.branch_pool = Conv(before, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], 1)


class BlockD(nn.Module):
    def __init__(self, before: int):
        super().__init__()
        self.branch3x3_1 = Conv(before, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(before, 192, 1)
        self.branch7x7x3_2 = _row(192, 192, 7)
        self.branch7x7x3_3 = _column(192, 192, 7)
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """`maximum`: whether the pool before the last branch takes the maximum, as only the last block does."""

    def __init__(self, before: int, maximum: bool):
        super().__init__()
        self.maximum = maximum
        self.branch1x1 = Conv(before, 320, 1)
        self.branch3x3_1 = Conv(before, 384, 1)
        self.branch3x3_2a = _row(384, 384, 3)
        self.branch3x3_2b = _column(384, 384, 3)
        self.branch3x3dbl_1 = Conv(before, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _row(384, 384, 3)
        self.branch3x3dbl_3b = _column(384, 384, 3)
        self.branch_pool = Conv(before, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = max_pool2d(x, 3, stride=1, padding=1) if self.maximum else _average(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(parts, 1)


class Inception(nn.Module):
    """23.9 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c = BlockC(768, 128), BlockC(768, 160)
        self.Mixed_6d, self.Mixed_6e = BlockC(768, 160), BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, maximum=False), BlockE(2048, maximum=True)
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, 299, 299] in [-1, 1] -> features [N, 2048], logits [N, 1008].

        The logits are without the bias, as the Inception Score has always been computed (Salimans et al. 2016).
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        features = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean(dim=(2, 3))
        return features, features @ self.fc.weight.T


def load_inception(path: Path) -> Inception:
    """The network with the weights of a .safetensors file. Raises NotFound, RequestError naming what does not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise NotFound(f"inception {path}: no such file")
    model = Inception()
    try:
        weights = {name: tensor.float() for name, tensor in load_file(path).items()}
        found = model.load_state_dict(weights, strict=False)
    except (SafetensorError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[-1].strip()[:200]
        raise RequestError(f"inception {path}: not the weights of the FID InceptionV3: {reason}") from None
    absent = [name for name in found.missing_keys if not name.endswith("num_batches_tracked")]
    if absent or found.unexpected_keys:
        name = (absent or found.unexpected_keys)[0]
        raise RequestError(
            f"inception {path}: not the weights of the FID InceptionV3 ({name} {'is missing' if absent else 'is extra'})"
        )
    return model.eval()


def resized(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of any size -> [N, 3, 299, 299] uint8, by Pillow's antialiased bicubic (Parmar et al. 2022)."""
    small = [picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC) for picture in pictures]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in small])).permute(0, 3, 1, 2)
