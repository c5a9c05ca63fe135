"""The validation loss of a model: by hand, the same for the same weights, and with its adapter."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from raysd.config import TrainingSpec, load
from raysd.data.augment import Variant, apply
from raysd.evaluate.losses import Meter, fixed_noise, losses, middles
from raysd.methods import METHODS, TrainedModule
from raysd.models.sd import StableDiffusion
from raysd.references import Located
from tests.pictures import photo


@pytest.fixture(scope="module")
def pictures():
    return [(apply(photo(n, 80), Variant(), 64), f"picture {n}") for n in range(3)]


def test_the_loss_equals_that_of_diffusers_components(tiny_base, pictures, monkeypatch):
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    monkeypatch.delattr(StableDiffusion, "pipeline")  # what its parts are called, not every family's are
    found = Meter(Located("base", tiny_base)).errors(pictures, each=1, batch=5)
    assert found.shape == (3, 4, 1)
    vae, unet = (
        kind.from_pretrained(tiny_base, subfolder=name).eval()
        for kind, name in ((AutoencoderKL, "vae"), (UNet2DConditionModel, "unet"))
    )
    tokenizer = CLIPTokenizer.from_pretrained(tiny_base, subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(tiny_base, subfolder="text_encoder").eval()
    scheduler = DDPMScheduler.from_pretrained(tiny_base, subfolder="scheduler")
    assert scheduler.config.prediction_type == "epsilon"
    pixels, caption = pictures[2]
    with torch.no_grad():
        latents = vae.encode(pixels[None]).latent_dist.mean * vae.config.scaling_factor
        ids = tokenizer(
            caption, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
        ).input_ids
        for band, step in enumerate((125, 375, 625, 875)):
            noise = fixed_noise(2, step, latents.shape[1:])[None]
            noisy = scheduler.add_noise(latents, noise, torch.tensor([step]))
            predicted = unet(noisy, torch.tensor([step]), encoder(ids)[0]).sample
            assert found[2, band, 0] == pytest.approx(float((predicted - noise).square().mean()), rel=1e-4)


def test_the_same_weights_give_the_same_numbers_and_others_do_not(tiny_base, pictures, tmp_path):
    first = Meter(Located("base", tiny_base)).errors(pictures, each=2)
    torch.manual_seed(99)
    seen = []
    again = Meter(Located("base", tiny_base)).errors(pictures, each=2, progress=lambda d, n: seen.append((d, n)))
    assert (first == again).all()
    assert seen[-1] == (24, 24)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base, copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: t + 0.05 * torch.randn_like(t) for name, t in load_file(weights).items()}, weights)
    assert (Meter(Located("copy", copy)).errors(pictures, each=2) != first).all()


def test_an_adapter_is_on(tiny_base, pictures, tmp_path):
    plain = {"base": str(tiny_base), "data": {"source": "x"}, "method": {"kind": "lora", "rank": 2}}
    spec = load(TrainingSpec, {**plain, "optim": {"steps": 1}, "publish": {"precision": "fp32"}})
    base = Located("base", tiny_base)
    module = METHODS["lora"].build(base.family, tiny_base, spec)
    tensors = {name: 0.2 * torch.randn(p.shape) for name, p in module.named_parameters() if p.requires_grad}
    METHODS["lora"].write(base.family, tiny_base, tensors, spec, tmp_path)
    [adapter] = tmp_path.glob("*.safetensors")
    meter = Meter(base)
    without, found = meter.errors(pictures, each=1), Meter(Located("cats", tiny_base, adapter)).errors(pictures, each=1)
    assert (found != without).all()
    meter.model = TrainedModule(base.family, base.family.pipeline(tiny_base, adapter).unet).eval()
    assert (found == meter.errors(pictures, each=1)).all(), "as strong as what draws has it"


def test_the_summary_is_of_pictures_and_the_gap_is_validation_minus_train():
    rng = np.random.default_rng(0)
    validation, train = rng.normal(0.5, 0.1, (12, 4, 3)), rng.normal(0.3, 0.1, (20, 4, 3))
    found = losses(validation, train)
    assert found.validation.value == pytest.approx(validation.mean())
    assert (found.validation.n, found.train.n) == (12, 20)
    assert [band.value for band in found.bands] == pytest.approx(validation.mean(axis=(0, 2)))
    assert found.gap.value == pytest.approx(validation.mean() - train.mean())
    assert 0 < found.gap.low < found.gap.value < found.gap.high
    alone = losses(validation, None)
    assert (alone.train, alone.gap, alone.train_bands) == (None, None, ())


def test_timesteps_are_the_middles_of_equal_bands():
    assert middles(1000, 4) == [125, 375, 625, 875]
    assert middles(1000, 8)[:2] == [62, 187]
