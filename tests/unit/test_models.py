"""Every method with every family, and the family `sd` against diffusers' own components, used by hand."""

import json
import shutil
from typing import get_args

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from raysd import draw as module
from raysd.assets import asset
from raysd.config import TrainingSpec, load, override
from raysd.config.training import MethodSpec
from raysd.data.cache import TensorCache
from raysd.data.sampler import Sampler
from raysd.diffusion import sample_posterior
from raysd.draw import Request, draw
from raysd.errors import NotFound, RequestError
from raysd.methods import METHODS, Batch
from raysd.models import FAMILIES, family_of, is_adapter
from raysd.models.sd import StableDiffusion
from raysd.references import identity, locate
from raysd.storage import Storage
from raysd.train.batches import Batches, Item, Source

SPEC = load(TrainingSpec, {"data": {"source": "x"}, "optim": {"steps": 1}})
BASES = {"sd": "tiny_base"}
"""Of each family the fixture of a folder that trains in seconds."""


@pytest.fixture
def located(tiny_base, tmp_path):
    return locate(str(tiny_base), Storage(str(tmp_path)))


def _by_hand(folder, pixels, caption, noise, timesteps, posterior):
    """The training loss of diffusers' train_text_to_image.py, from its own parts."""
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    with torch.no_grad():
        distribution = vae.encode(pixels).latent_dist
        latents = (distribution.mean + distribution.std * posterior) * vae.config.scaling_factor
        noisy = scheduler.add_noise(latents, noise, timesteps)
        length = tokenizer.model_max_length
        ids = tokenizer(
            caption, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        predicted = unet(noisy, timesteps, text_encoder(ids)[0]).sample
        wanted = noise
        if scheduler.config.prediction_type == "v_prediction":
            wanted = scheduler.get_velocity(latents, noise, timesteps)
        return torch.nn.functional.mse_loss(predicted, wanted)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_loss_equals_that_of_diffusers_components(located, prediction, method, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(located.folder, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": prediction}))
    torch.manual_seed(0)
    pixels, captions = torch.rand(3, 3, 64, 64) * 2 - 1, ["a red circle", "a zorb", ""]
    noise, posterior, timesteps = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16), torch.tensor([3, 500, 990])

    family = located.family
    with torch.no_grad():
        moments = family.moments(family.autoencoder(folder), pixels)
        text = family.conditioning(family.text_encoder(folder), family.tokens(family.tokenizer(folder), captions))
        latents = sample_posterior(moments, posterior, *family.latent_scale(folder))
        module = METHODS[method].build(family, folder, override(SPEC, {"method.kind": method}))
        errors = METHODS[method].loss(
            module, Batch(latents, noise, timesteps, text), family.noise_schedule(folder), SPEC
        )
    by_hand = _by_hand(folder, pixels, captions, noise, timesteps, posterior)
    assert errors.mean().item() == pytest.approx(by_hand.item(), rel=1e-5)


def _guess(noisy, timesteps, text):
    """A denoiser that is wrong by another amount at each timestep."""
    return 0.5 * noisy + 0.1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_min_snr_weighs_each_timestep_as_the_paper_says(located, prediction, method):
    """Hang et al. 2023, sec. 3.4, a sample and a number at a time; the timesteps' ratios lie on both sides of gamma."""
    torch.manual_seed(0)
    latents, noise, timesteps = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), [3, 120, 500, 990]
    schedule = located.family.noise_schedule(located.folder)
    spec = override(SPEC, {"loss.prediction": prediction, "loss.min_snr_gamma": 5.0})
    batch = Batch(latents, noise, torch.tensor(timesteps), torch.zeros(4, 24, 64))
    losses = METHODS[method].loss(_guess, batch, schedule, spec)
    ratios = []
    for n, timestep in enumerate(timesteps):
        alpha = schedule.alphas_cumprod[timestep].item()
        ratio = alpha / (1 - alpha)
        noisy = alpha**0.5 * latents[n] + (1 - alpha) ** 0.5 * noise[n]
        velocity = alpha**0.5 * noise[n] - (1 - alpha) ** 0.5 * latents[n]
        wanted, over = (noise[n], ratio) if prediction == "epsilon" else (velocity, ratio + 1)
        error = (_guess(noisy, None, None) - wanted).square().mean().item()
        assert losses[n].item() == pytest.approx(error * min(ratio, 5.0) / over, rel=1e-4)
        ratios.append(ratio)
    assert ratios[1] > 5 > ratios[2]


def test_noise_offset_adds_one_number_to_each_channel_of_each_sample(tmp_path):
    """And nothing else of a batch depends on it."""
    cache = TensorCache(Storage(str(tmp_path)).child("latents"))
    cache.write({f"picture{n}": torch.randn(8, 6, 6) for n in range(16)})
    items = [Item((f"picture{n}",), "", "text", "", "") for n in range(16)]
    source = Source(cache, {"text": torch.zeros(24, 64), "empty": torch.ones(24, 64)}, (1.0, 0.0))
    schedule = FAMILIES["sd"].noise_schedule(asset("tiny-sd"))

    def batch(offset):
        spec = override(SPEC, {"loss.noise_offset": offset, "loss.caption_dropout": 0.5, "optim.batch_size": 16})
        [made] = Batches(items, "empty", source, Sampler(16, 16, seed=0), schedule, spec, 0, 1).of(3)
        return made

    plain, shifted, twice = batch(0.0), batch(0.1), batch(0.2)
    shift = shifted.noise - plain.noise
    numbers = shift.mean(dim=(2, 3))
    assert torch.allclose(shift, numbers[:, :, None, None].expand_as(shift), atol=1e-6)
    assert numbers.flatten().unique().numel() == 16 * 4, "a number of its own for every channel of every sample"
    assert numbers.std().item() == pytest.approx(0.1, rel=0.2)
    assert torch.allclose(twice.noise - plain.noise, 2 * shift, atol=1e-6)
    for name in ("latents", "timesteps", "text"):
        assert torch.equal(getattr(shifted, name), getattr(plain, name))


def test_every_family_has_a_base_here_and_every_method_a_spec():
    assert BASES.keys() == FAMILIES.keys() == {family.name for family in FAMILIES.values()}
    variants, _ = get_args(MethodSpec)
    kinds = {variant.model_fields["kind"].default for variant in get_args(variants)}
    assert kinds == METHODS.keys() == {method.kind for method in METHODS.values()}
    assert {method.lighter for method in METHODS.values()} <= {None, *METHODS}


@pytest.mark.parametrize("kind", sorted(METHODS))
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_method_runs_with_every_family(request, tmp_path, name, kind):
    family, method, folder = FAMILIES[name], METHODS[kind], request.getfixturevalue(BASES[name])
    assert family_of(folder) is family
    spec = override(SPEC, {"method.kind": kind})
    method.check(family, folder, spec)
    module = method.build(family, folder, spec)
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    batch = _batch(family, folder, method.trains_text(spec))
    method.loss(module, batch, family.noise_schedule(folder), spec).sum().backward()
    assert trained
    assert all(parameter.grad is not None for parameter in trained.values())

    method.write(family, folder, {name: parameter.detach() for name, parameter in trained.items()}, spec, tmp_path)
    adapters = [path for path in tmp_path.rglob("*") if is_adapter(path.name)]
    assert adapters or family_of(tmp_path) is family, "a version is an adapter or a whole model"
    family.pipeline(folder if adapters else tmp_path, *adapters)


def _batch(family, folder, ids):
    """Two pictures of the family's own size."""
    shape, (length, width) = family.geometry(folder).latents(None, None), family.text_shape(folder)
    latents, noise = torch.randn(2, *shape), torch.randn(2, *shape)
    text = torch.ones(2, length, dtype=torch.int64) if ids else torch.randn(2, length, width)
    return Batch(latents, noise, torch.tensor([1, 9]), text)


def test_an_adapter_predicts_what_its_base_does_and_finds_its_modules(located):
    lora = override(SPEC, {"method.kind": "lora"})
    before = torch.random.get_rng_state()
    for changes, said in (
        ({"loss.prediction": "v_prediction"}, r"an adapter predicts what its base does \(epsilon\)"),
        ({"method.targets": ["nothing"]}, "method.targets: nothing fit no module of"),
    ):
        with pytest.raises(RequestError, match=said):
            METHODS["lora"].check(located.family, located.folder, override(lora, changes))
    for changes in ({"loss.prediction": "epsilon"}, {"method.targets": ["to_q"]}):
        METHODS["lora"].check(located.family, located.folder, override(lora, changes))
    assert torch.equal(torch.random.get_rng_state(), before)
    whole = override(SPEC, {"method.kind": "full", "loss.prediction": "v_prediction"})
    METHODS["full"].check(located.family, located.folder, whole)


def test_latents_have_as_many_channels_as_the_autoencoder_makes(located, tmp_path):
    """A denoiser for inpainting takes a mask and a masked picture beside them."""
    folder = tmp_path / "base"
    shutil.copytree(located.folder, folder)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "in_channels": 9}))
    assert located.family.geometry(folder).latents(None, None) == (4, 16, 16)


def test_configurations_that_do_not_say_the_size_are_refused(located, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(located.folder, folder)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": None}))
    with pytest.raises(RequestError, match="do not say at which sizes it draws"):
        located.family.geometry(folder)


def test_trained_weights_are_written_where_the_family_has_them(located, tmp_path, monkeypatch):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(located.folder, base)
    (base / "unet").rename(base / "transformer")
    index = base / "model_index.json"
    index.write_text(index.read_text().replace('"unet"', '"transformer"'))
    monkeypatch.setattr(StableDiffusion, "trained_parts", (("denoiser", "transformer"),))
    [path] = (base / "transformer").glob("*.safetensors")
    weights = {f"denoiser.{name}": tensor + 1 for name, tensor in load_file(path).items()}
    METHODS["full"].write(located.family, base, weights, override(SPEC, {"publish.precision": "fp32"}), out)
    written = load_file(out / "transformer" / path.name)
    assert written.keys() == {name.removeprefix("denoiser.") for name in weights}
    assert all(torch.equal(tensor, weights[f"denoiser.{name}"]) for name, tensor in written.items())


def test_the_text_encoder_is_trained_on_request(located):
    spec = override(SPEC, {"method.kind": "full", "method.text_encoder": True})
    module = METHODS["full"].build(located.family, located.folder, spec)
    tokens = located.family.tokens(located.family.tokenizer(located.folder), ["a red circle", "a star"])
    batch = Batch(torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16), torch.tensor([1, 9]), tokens)
    METHODS["full"].loss(module, batch, located.family.noise_schedule(located.folder), spec).sum().backward()
    assert all(parameter.grad is not None for parameter in module.text_encoder.parameters())


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_a_trained_text_encoder_is_written_under_the_names_of_its_base(located, tmp_path, prefix):
    """Folders of Stable Diffusion 1.x have names with `text_model.`, and positions that are no weights."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(located.folder, base)
    [path] = (base / "text_encoder").glob("*.safetensors")
    tensors = {prefix + name.removeprefix("text_model."): tensor for name, tensor in load_file(path).items()}
    save_file({**tensors, f"{prefix}embeddings.position_ids": torch.arange(24)[None]}, path, {"format": "pt"})
    spec = override(SPEC, {"method.kind": "full", "method.text_encoder": True, "publish.precision": "fp32"})
    module = METHODS["full"].build(located.family, base, spec)
    trained = {name: parameter.detach() + 0.5 for name, parameter in module.named_parameters()}
    METHODS["full"].write(located.family, base, trained, spec, out)

    written = load_file(out / "text_encoder" / "model.safetensors")
    assert written.keys() == tensors.keys()
    pipeline = StableDiffusionPipeline.from_pretrained(out, safety_checker=None)
    loaded = {f"text_encoder.{name}": p for name, p in pipeline.text_encoder.named_parameters()}
    assert loaded
    assert all(torch.equal(tensor, trained[name]) for name, tensor in loaded.items())


def test_drawing_equals_the_diffusers_pipeline_picture_by_picture(located, monkeypatch):
    request = Request("a red circle", negative="a star", seed=5, steps=4, guidance=3.0, count=3)
    monkeypatch.setattr(module, "BATCH", 2)
    seen = []
    drawn = draw(located, [request], lambda done, total: seen.append((done, total)))
    assert seen == [(done, 8) for done in range(1, 9)], "two batches of four steps"
    assert len(drawn) == 3
    pipeline = StableDiffusionPipeline.from_pretrained(located.folder, safety_checker=None)
    for number, image in enumerate(drawn):
        seeded = torch.Generator().manual_seed(5 + number)
        alone = pipeline(
            "a red circle", negative_prompt="a star", generator=seeded, num_inference_steps=4, guidance_scale=3.0
        ).images[0]
        difference = torch.tensor(list(image.tobytes())).int() - torch.tensor(list(alone.tobytes())).int()
        assert difference.abs().max() <= 1


def test_a_model_that_is_not_there_is_named(tmp_path):
    storage = Storage(str(tmp_path / "store"))
    with pytest.raises(NotFound, match=r"\./nowhere: no such folder"):
        locate("./nowhere", storage)
    with pytest.raises(NotFound, match="cats@3"):
        locate("cats@3", storage)
    with pytest.raises(NotFound, match=r"model\.safetensors: no such file"):
        locate(str(tmp_path / "model.safetensors"), storage)
    (tmp_path / "folder").mkdir()
    with pytest.raises(RequestError, match=r"not a diffusers model \(no readable model_index\.json\)"):
        locate(str(tmp_path / "folder"), storage)


def test_a_model_of_another_kind_is_refused_by_name(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "AudioLDMPipeline"}')
    with pytest.raises(RequestError, match="AudioLDMPipeline is not supported; supported families: sd"):
        family_of(tmp_path)


def test_identity_is_that_of_content_not_of_place(located, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(located.folder, copy)
    assert identity(copy) == identity(located.folder)
    before = identity(copy, "text_encoder")
    config = copy / "vae" / "config.json"
    config.write_text(config.read_text().replace("0.18215", "0.5"))
    assert identity(copy) != identity(located.folder)
    assert identity(copy, "vae") != identity(located.folder, "vae")
    assert identity(copy, "text_encoder") == before
