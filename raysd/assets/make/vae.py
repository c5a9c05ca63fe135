"""Trains the autoencoder of tiny-sd on renderings and clutter, and measures its scaling factor.

The first three latent channels are drawn towards the picture's own colours, averaged over 4 x 4 pixels, strongly at
first: a small autoencoder otherwise takes thousands of steps to tell flat colours apart. For the same reason its
GroupNorm has one group, which keeps the proportions between channels.
"""

import argparse
import json
import math
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from raysd.assets.make.clutter import clutter
from raysd.assets.make.renderer import render, scenes
from raysd.assets.make.skeleton import autoencoder

SIDE = 64
BATCH = 8
PEAK_LR = 2e-3
WARMUP = 50
KL_WEIGHT = 1e-6
COLOUR_SCALE = 1.5
"""Colours in [-1, 1] lie in the first latents at this scale."""
COLOUR_STEPS = 400
"""Steps in which the pull towards colours falls to a tenth."""
SAVE_EVERY = 100


def pictures(scene_count: int, clutter_count: int, seed: int = 5) -> Tensor:
    """uint8 [N, 3, 64, 64]: training scenes, then clutter."""
    drawn = [render(scene, SIDE, Random(f"vae {i}")) for i, scene in enumerate(scenes(seed, scene_count))]
    drawn += [clutter(SIDE, Random(f"clutter {i}")) for i in range(clutter_count)]
    return _tensor(drawn)


def held_out(count: int) -> Tensor:
    """uint8 [N, 3, 64, 64]: combinations of shape, colours and background that no training sees."""
    return _tensor([render(s, SIDE, Random(f"held out {i}")) for i, s in enumerate(scenes(6, count, held_out=True))])


def objective(vae: Any, pixels: Tensor, step: int, chooser: torch.Generator) -> Tensor:
    """L1 + MSE + 1e-6 KL, and the pull of the first latents towards colours."""
    posterior = vae.encode(pixels).latent_dist
    decoded = vae.decode(posterior.sample(generator=chooser)).sample
    colours = COLOUR_SCALE * torch.nn.functional.avg_pool2d(pixels, 4)
    pull = max(0.1, 1 - step / COLOUR_STEPS) * (posterior.mean[:, :3] - colours).abs().mean()
    error = decoded - pixels
    return error.abs().mean() + error.square().mean() + KL_WEIGHT * posterior.kl().mean() + pull


def train(out: Path, steps: int) -> Any:
    """Train, or go on from `out`/training.safetensors; returns the trained autoencoder."""
    torch.manual_seed(11)
    data, vae = pictures(6000, 2000), autoencoder()
    vae.quant_conv.bias.data[4:].fill_(-6.0)  # begin with little noise in the latents
    vae = vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=1e-4)
    start = _resume(out, vae, optimizer)
    began = time.monotonic()
    for step in range(start, steps):
        chooser = torch.Generator().manual_seed(step)
        chosen = data[torch.randint(len(data), (BATCH,), generator=chooser)]
        for group in optimizer.param_groups:
            group["lr"] = _lr(step, steps)
        optimizer.zero_grad()
        loss = objective(vae, _pixels(chosen), step, chooser)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            _save(out, vae, optimizer, step + 1)
            rate = (step + 1 - start) / (time.monotonic() - began)
            print(f"step {step + 1}/{steps} loss {loss.item():.4f} {(steps - step - 1) / rate:.0f} s left", flush=True)
    return vae.eval()


@torch.no_grad()
def finish(vae: Any, out: Path) -> None:
    """Set the scaling factor to 1 / the standard deviation of the latents, save, and say how well it does."""
    latents = vae.encode(_pixels(pictures(512, 0, seed=8))).latent_dist.sample()
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    vae.save_pretrained(out)
    pixels = _pixels(held_out(256))
    decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    print(f"L1 on held-out renderings {(decoded - pixels).abs().mean():.4f} (pixels in [-1, 1])")
    sheet(torch.cat([pixels[:12], decoded[:12]]), 12).save(out / "sheet.png")


def sheet(pixels: Tensor, columns: int) -> Image.Image:
    """[N, 3, H, W] in [-1, 1] -> one picture, `columns` a row."""
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(list(levels[n : n + columns]), axis=1) for n in range(0, len(levels), columns)]
    return Image.fromarray(np.concatenate(rows, axis=0))


def _tensor(drawn: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in drawn])).permute(0, 3, 1, 2).contiguous()


def _pixels(levels: Tensor) -> Tensor:
    return (levels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _lr(step: int, steps: int) -> float:
    return PEAK_LR * min(1.0, (step + 1) / WARMUP) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _save(out: Path, vae: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    state = {f"weight/{name}": tensor.contiguous() for name, tensor in vae.state_dict().items()}
    for name, parameter in vae.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            state[f"{key}/{name}"] = optimizer.state[parameter][key].contiguous()
    out.mkdir(parents=True, exist_ok=True)
    save_file(state, out / "training.tmp", metadata={"step": str(step)})
    (out / "training.tmp").rename(out / "training.safetensors")


def _resume(out: Path, vae: Any, optimizer: torch.optim.Optimizer) -> int:
    path = out / "training.safetensors"
    if not path.exists():
        return 0
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        step = int(json.loads(file.metadata()["step"]))
    state = load_file(path)
    vae.load_state_dict({name.removeprefix("weight/"): t for name, t in state.items() if name.startswith("weight/")})
    for name, parameter in vae.named_parameters():
        moments = {key: state[f"{key}/{name}"] for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    finish(train(args.out, args.steps), args.out)


if __name__ == "__main__":
    main()
