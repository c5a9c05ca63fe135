"""Train tiny-clip, the judge: a CLIP that tells which coloured shape a picture shows.

It learns from the renderer alone, with a seed of its own, so that it owes nothing to the model that it scores.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy, pad

from raysd.assets.judge import SIDE, Judge, TinyClip, save, tokens
from raysd.assets.make.renderer import Scene, caption, render, scenes
from raysd.assets.make.score import PAIRS, PROMPTS, classify, shares
from raysd.assets.make.skeleton import text_encoder
from raysd.assets.make.tokenizer import build_tokenizer

SEED = 97  # not that of the base's training set
MEAN = STD = 0.5
SHIFT = 3  # pixels, at most
CHECK_EVERY = 100  # steps


def build(tokenizer: Any) -> TinyClip:
    return TinyClip(text_encoder(tokenizer))


def training_set(folder: Path, count: int) -> tuple[NDArray[np.uint8], list[Scene]]:
    """Pictures [count, SIDE, SIDE, 3], kept in `folder`, and what they show; never a held-out combination."""
    wanted, kept = scenes(SEED, count), folder / f"pictures-{count}.npy"
    if not kept.exists():
        pictures = [render(scene, SIDE, Random(f"judge {SEED} {place}")) for place, scene in enumerate(wanted)]
        np.save(kept, np.stack([np.asarray(picture) for picture in pictures]))
    found: NDArray[np.uint8] = np.load(kept, allow_pickle=False)
    return found, wanted


def _blurred(pixels: Tensor, sigma: float) -> Tensor:
    """Gaussian blur over 5 pixels each way; sigma in pixels."""
    weights = torch.exp(-(torch.arange(-2.0, 3.0) ** 2) / (2 * sigma**2))
    kernel = (weights[:, None] * weights / weights.sum() ** 2).expand(3, 1, 5, 5)
    return conv2d(pad(pixels, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)


def _shifted(pixels: Tensor, rng: Random) -> Tensor:
    """Each picture of the batch moved by up to SHIFT pixels, its edge repeated."""
    padded = pad(pixels, (SHIFT,) * 4, mode="replicate")
    corners = [(rng.randint(0, 2 * SHIFT), rng.randint(0, 2 * SHIFT)) for _ in pixels]
    return torch.stack([p[:, y : y + SIDE, x : x + SIDE] for p, (y, x) in zip(padded, corners, strict=True)])


def augmented(pictures: NDArray[np.uint8], rng: Random) -> Tensor:
    """uint8 [N, SIDE, SIDE, 3] -> normalised [N, 3, SIDE, SIDE], blurred and noisy as an autoencoder's pictures are."""
    pixels = _shifted(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, rng)
    if rng.random() < 0.4:
        pixels = _blurred(pixels, rng.uniform(0.4, 1.3))
    tint = torch.randn(len(pixels), 3, 1, 1) * 0.015
    grain = torch.randn_like(pixels) * rng.uniform(0, 0.04)
    return ((pixels + tint + grain).clamp(0, 1) - MEAN) / STD


def loss_of(
    model: TinyClip, tokenizer: Any, pixels: Tensor, captions: list[str], classes: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss, and the share of pictures that the prompts sort right.

    Half of what is learnt is what the judge is asked later, which prompt fits; the other half, which caption fits,
    teaches it backgrounds, sizes and places too.
    """
    scale = model.logit_scale.exp().clamp(max=100)
    images = model.pictures(pixels)
    embedded = model.texts(tokens(tokenizer, PROMPTS + captions))
    choices = scale * images @ embedded[: len(PROMPTS)].T
    pairs = scale * images @ embedded[len(PROMPTS) :].T
    # Pictures with one caption between them are all right answers.
    same = torch.tensor([[float(one == other) for other in captions] for one in captions])
    same /= same.sum(dim=1, keepdim=True)
    contrast = (cross_entropy(pairs, same) + cross_entropy(pairs.T, same)) / 2
    right = (choices.argmax(dim=1) == classes).float().mean()
    return cross_entropy(choices, classes) + 0.3 * contrast, right


def _optimizer(model: Any, rate: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


def _rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """The learning rate: a linear rise, then half a cosine down to a hundredth."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2)


def _moments(model: Any, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    return {
        f"{name} {key}": optimizer.state[p][key]
        for name, p in model.named_parameters()
        for key in ("exp_avg", "exp_avg_sq")
        if p in optimizer.state
    }


def save_checkpoint(folder: Path, model: Any, optimizer: torch.optim.AdamW, step: int) -> None:
    """The weights, the optimizer's moments and the number of steps done, in one file that replaces the last."""
    weights = {f"model {name}": p.detach() for name, p in model.named_parameters()}
    part = folder / "checkpoint.part"
    save_file(weights | _moments(model, optimizer), part, metadata={"step": str(step)})
    part.replace(folder / "checkpoint.safetensors")
    (folder / "progress.json").write_text(json.dumps({"step": step}), encoding="utf-8")


def load_checkpoint(folder: Path, model: Any, optimizer: torch.optim.AdamW) -> int:
    """Puts back what was saved; returns the number of steps done, 0 where nothing was saved."""
    from safetensors import safe_open

    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as opened:
        step = int(opened.metadata()["step"])
    saved = load_file(path)
    for name, p in model.named_parameters():
        p.data.copy_(saved[f"model {name}"])
        moments = {key: saved[f"{name} {key}"] for key in ("exp_avg", "exp_avg_sq") if f"{name} {key}" in saved}
        if moments:
            optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
    return step


def train(folder: Path, steps: int, batch: int, count: int, rate: float) -> Any:
    """The trained model; carries on from the checkpoint in `folder`."""
    torch.manual_seed(SEED)
    folder.mkdir(parents=True, exist_ok=True)
    pictures, wanted = training_set(folder, count)
    tokenizer = build_tokenizer()
    model = build(tokenizer)
    optimizer = _optimizer(model, rate)
    first, began, recent = load_checkpoint(folder, model, optimizer), time.monotonic(), 0.0
    for step in range(first, steps):
        rng = Random(f"judge batch {SEED} {step}")
        torch.manual_seed(rng.getrandbits(32))
        chosen = rng.sample(range(count), batch)
        classes = torch.tensor([PAIRS.index((wanted[place].colour, wanted[place].shape)) for place in chosen])
        captions = [caption(wanted[place], rng) for place in chosen]
        loss, right = loss_of(model, tokenizer, augmented(pictures[chosen], rng), captions, classes)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps, rate)
        optimizer.step()
        optimizer.zero_grad()
        recent = 0.95 * recent + 0.05 * right.item() if step > first else right.item()
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == steps:
            pace = (time.monotonic() - began) / (step + 1 - first)
            print(f"step {step + 1}/{steps} loss {loss.item():.3f} right {recent:.1%} {pace:.2f} s/step", flush=True)
            save_checkpoint(folder, model, optimizer, step + 1)
    return model.eval()


def measure(folder: Path, count: int = 500) -> dict[str, float]:
    """Shares right on renderings of combinations that no training ever saw."""
    wanted = scenes(SEED + 1, count, held_out=True)
    pictures = [render(scene, SIDE, Random(f"judge test {place}")) for place, scene in enumerate(wanted)]
    return shares(classify(Judge(folder), pictures), wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="for the checkpoint and the pictures")
    parser.add_argument("--publish", type=Path, help="the model's folder (default: --out's 'model')")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--count", type=int, default=8000)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.publish or args.out / "model"
    save(train(args.out, args.steps, args.batch, args.count, args.rate), build_tokenizer(), folder)
    right = measure(folder)
    print(f"held out: {right['both']:.1%} right (colour {right['colour']:.1%}, shape {right['shape']:.1%})")


if __name__ == "__main__":
    main()
