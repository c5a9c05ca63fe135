"""Pictures drawn step by step equal diffusers' own pipeline, for each sampler, alone and among strangers."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from raysd.errors import RequestError
from raysd.models import family_of
from raysd.models.base import Geometry
from raysd.serve.drawing import Drawing
from raysd.serve.predictor import Predictor
from raysd.serve.samplers import SAMPLERS, timetable
from raysd.serve.torch_backend import TorchBackend
from tests.consistency import consistent, rescheduled

PIPELINES = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}
TOLERANCE = 2e-3
"""Of latents whose spread is about 1, after up to 20 steps in fp32."""


@pytest.fixture(scope="module")
def predictor(tiny_base: Path) -> Predictor:
    return opened_model(tiny_base)


@pytest.fixture(scope="module")
def consistency(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """A latent consistency model, the only kind that takes the sampler lcm."""
    return opened_model(consistent(tiny_base, tmp_path_factory.mktemp("lcm") / "tiny"))


def opened_model(folder: Path) -> Predictor:
    family = family_of(folder)
    return Predictor(family, folder, TorchBackend(family, folder, torch.device("cpu")))


def latents(
    predictor: Predictor, drawing: Drawing, image: bytes | None = None, mask: bytes | None = None
) -> torch.Tensor:
    sample = predictor.begin(drawing, image, mask)
    while not sample.done:
        predictor.advance([sample], None)
    return sample.latents


def theirs(
    predictor: Predictor, drawing: Drawing, kind: str = "StableDiffusionPipeline", **more: object
) -> torch.Tensor:
    """The latents of diffusers' pipeline."""
    import diffusers

    pipeline = predictor.family.pipeline(predictor.folder)
    if kind != "StableDiffusionPipeline":
        pipeline = getattr(diffusers, kind)(**pipeline.components, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
    scheduler = getattr(diffusers, PIPELINES[drawing.sampler])
    exact = {"algorithm_type": "dpmsolver++"} if drawing.sampler == "dpmpp_2m" else {}
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, clip_sample=False, **exact)
    return pipeline(
        drawing.prompt,
        negative_prompt=drawing.negative,
        generator=[torch.Generator().manual_seed(drawing.seed)],
        num_inference_steps=drawing.steps,
        guidance_scale=drawing.guidance,
        output_type="latent",
        **more,
    ).images[0]


@pytest.mark.parametrize("sampler", PIPELINES)
@pytest.mark.parametrize(("steps", "guidance"), [(1, 1.0), (5, 4.0), (20, 7.5)])
def test_each_sampler_draws_what_diffusers_draws(
    predictor: Predictor, consistency: Predictor, sampler: str, steps: int, guidance: float
) -> None:
    predictor = consistency if sampler == "lcm" else predictor
    drawing = Drawing(prompt="a red circle", negative="blue", seed=5, steps=steps, guidance=guidance, sampler=sampler)
    assert torch.allclose(latents(predictor, drawing), theirs(predictor, drawing), atol=TOLERANCE, rtol=TOLERANCE)


def test_a_velocity_model_is_sampled_as_diffusers_does(tiny_base: Path, tmp_path: Path) -> None:
    velocity = opened_model(rescheduled(tiny_base, tmp_path / "velocity", prediction_type="v_prediction"))
    both = opened_model(consistent(tiny_base, tmp_path / "both", prediction_type="v_prediction"))
    for sampler in PIPELINES:
        predictor = both if sampler == "lcm" else velocity
        drawing = Drawing(prompt="a", seed=2, steps=6, guidance=3, sampler=sampler)
        ours, wanted = latents(predictor, drawing), theirs(predictor, drawing)
        assert torch.allclose(ours, wanted, atol=TOLERANCE, rtol=TOLERANCE), sampler


def test_flow_matching_follows_diffusers_scheduler() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    table = timetable("flow_euler", {**scheduler.config, "_class_name": "FlowMatchEulerDiscreteScheduler"}, 7)
    scheduler.set_timesteps(7)
    x = wanted = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for row, t in zip(table.rows, scheduler.timesteps, strict=True):
        assert row.timestep == pytest.approx(float(t))
        wanted = scheduler.step(torch.sin(wanted), t, wanted).prev_sample
        clean = row.x_of_x * x + row.x_of_m * torch.sin(x)
        x = row.next[0] * x + row.next[2] * clean
    assert torch.allclose(x, wanted, atol=1e-5)


@pytest.mark.parametrize("sampler", PIPELINES)
def test_drawing_from_a_picture_is_diffusers_img2img(
    predictor: Predictor, consistency: Predictor, sampler: str
) -> None:
    predictor, picture = consistency if sampler == "lcm" else predictor, png(64, 64)
    drawing = Drawing(prompt="a", seed=3, steps=10, guidance=4, sampler=sampler, image="0" * 64, strength=0.6)
    wanted = theirs(predictor, drawing, "StableDiffusionImg2ImgPipeline", image=opened(picture), strength=0.6)
    assert torch.allclose(latents(predictor, drawing, picture), wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("sampler", PIPELINES)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_drawing_behind_a_mask_is_diffusers_inpainting(
    predictor: Predictor, consistency: Predictor, sampler: str, strength: float
) -> None:
    predictor, picture, mask = consistency if sampler == "lcm" else predictor, png(64, 64), png_mask(64)
    asked = {"image": "0" * 64, "mask": "1" * 64, "strength": strength}
    drawing = Drawing(prompt="a", seed=3, steps=8, guidance=4, sampler=sampler, **asked)
    wanted = theirs(
        predictor,
        drawing,
        "StableDiffusionInpaintPipeline",
        image=opened(picture),
        mask_image=opened(mask),
        strength=strength,
        height=64,
        width=64,
    )
    assert torch.allclose(latents(predictor, drawing, picture, mask), wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("side", "shape", "box"),
    [
        (64, "ellipse", (13, 13, 50, 50)),
        (64, "rectangle", (17, 17, 40, 40)),  # a pixel beside the latents' grid
        (64, "rectangle", (21, 0, 22, 63)),
        (200, "ellipse", (40, 40, 156, 156)),
    ],
)
def test_a_mask_whose_edges_are_anywhere_is_diffusers_mask(
    predictor: Predictor, side: int, shape: str, box: tuple[int, int, int, int]
) -> None:
    mask = Image.new("L", (side, side))
    getattr(ImageDraw.Draw(mask), shape)(box, fill=255)
    asked = {"image": "0" * 64, "mask": "1" * 64, "strength": 0.8, "width": 64, "height": 64}
    drawing, picture = Drawing(prompt="a", seed=3, steps=8, guidance=4, **asked), png(side, side)
    more: dict[str, Any] = {"image": opened(picture), "mask_image": mask, "strength": 0.8, "height": 64, "width": 64}
    wanted = theirs(predictor, drawing, "StableDiffusionInpaintPipeline", **more)
    ours = latents(predictor, drawing, picture, encoded(mask))
    assert torch.allclose(ours, wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("masked", [False, True])
def test_a_picture_that_is_not_square_keeps_its_shape_where_no_size_is_asked_for(
    predictor: Predictor, masked: bool
) -> None:
    """It is what diffusers draws from the picture in that size; in company too."""
    picture = png(144, 96)
    mask = Image.new("L", (144, 96))
    mask.paste(255, (48, 0, 96, 64))
    more: dict[str, Any] = {"image": opened(picture).resize((72, 48), Image.Resampling.LANCZOS), "strength": 0.5}
    asked = {"image": "0" * 64, "strength": 0.5}
    kind, inputs = "StableDiffusionImg2ImgPipeline", [picture]
    if masked:
        kind, inputs = "StableDiffusionInpaintPipeline", [picture, encoded(mask)]
        more |= {"mask_image": mask, "height": 48, "width": 72}
        asked |= {"mask": "1" * 64}
    drawing = Drawing(prompt="a", seed=3, steps=8, guidance=4, **asked)
    wanted = theirs(predictor, drawing, kind, **more)
    assert wanted.shape == (4, 12, 18)
    assert torch.allclose(latents(predictor, drawing, *inputs), wanted, atol=TOLERANCE, rtol=TOLERANCE)
    both = [predictor.begin(each, *inputs) for each in (drawing, drawing.of(1))]
    while not both[0].done:
        predictor.advance(both, None)
    assert torch.allclose(both[0].latents, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    sized = drawing.model_copy(update={"width": 64, "height": 64})
    assert latents(predictor, sized, *inputs).shape == (4, 16, 16)


@pytest.mark.parametrize(
    ("picture", "drawn"),
    [
        ((512, 512), (512, 512)),
        ((64, 64), (512, 512)),
        ((1200, 800), (576, 384)),
        ((800, 600), (576, 448)),
        ((1920, 1080), (576, 320)),
        ((2048, 1), (2048, 64)),
    ],
)
def test_a_picture_is_drawn_anew_in_about_its_shape_and_no_larger_than_the_model_draws(
    picture: tuple[int, int], drawn: tuple[int, int]
) -> None:
    geometry = Geometry(channels=4, factor=8, size=512, unit=64)
    assert geometry.like(*picture, 2048) == drawn
    assert geometry.like(*picture[::-1], 2048) == drawn[::-1]


def test_a_size_that_the_model_cannot_draw_and_a_sampler_that_it_has_not_are_refused(predictor: Predictor) -> None:
    with pytest.raises(RequestError, match="width 72: this model draws multiples of 64"):
        Geometry(channels=4, factor=8, size=512, unit=64).latents(72, None)
    assert predictor.geometry.latents(None, 96) == (4, 24, 16)
    with pytest.raises(RequestError, match="sampler flow_euler"):
        predictor.begin(Drawing(prompt="a", sampler="flow_euler"))
    assert set(SAMPLERS) == set(PIPELINES) | {"flow_euler"}


def test_lcm_is_for_models_whose_scheduler_says_so(predictor: Predictor, consistency: Predictor) -> None:
    drawing = Drawing(prompt="a", steps=4, guidance=1, sampler="lcm")
    assert consistency.check(drawing) == (4, 16, 16)
    assert consistency.check(drawing.model_copy(update={"sampler": "ddim"}))
    with pytest.raises(RequestError, match="sampler lcm: is for consistency models"):
        predictor.check(drawing)


def test_a_model_that_takes_its_guidance_as_an_input_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    """Without its input it would draw as if no guidance had been asked for, whatever was."""
    folder = consistent(tiny_base, tmp_path / "distilled")
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"time_cond_proj_dim": 32}))
    family = family_of(folder)
    assert (family.guidance_width(folder), family.guidance_width(tiny_base)) == (32, None)
    assert family.blank_denoiser(folder).time_embedding.cond_proj.in_features == 32  # diffusers' name for it
    predictor = Predictor(family, folder, TorchBackend(family, tiny_base, torch.device("cpu")))
    for sampler in ("lcm", "ddim"):
        with pytest.raises(RequestError, match="takes guidance as an input"):
            predictor.begin(Drawing(prompt="a", steps=2, guidance=8, sampler=sampler))


def png(width: int, height: int) -> bytes:
    return encoded(Image.radial_gradient("L").resize((width, height)).convert("RGB"))


def png_mask(size: int) -> bytes:
    mask = Image.new("L", (size, size))
    mask.paste(255, (size // 4, 0, size // 2, size))
    return encoded(mask)


def encoded(picture: Image.Image) -> bytes:
    body = io.BytesIO()
    picture.save(body, "PNG")
    return body.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))
