"""ONNX exports: as PyTorch in numbers and pictures, adapters as inputs and merged, kept whole, refused where damaged."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.bases import lora_of
from raysd.assets.make.tokenizer import LENGTH, build_tokenizer
from raysd.config import load
from raysd.config.serving import ModelSpec
from raysd.errors import ExportRefused, IntegrityError, RaysdError, RequestError
from raysd.export import kept as keeping
from raysd.export import onnx as exporting
from raysd.export import runtime as running
from raysd.export.gate import measure, pass_gate
from raysd.export.kept import REFUSED, Export, base_of, digest_of, export_onnx, kept, make, place_of, write
from raysd.export.networks import Networks
from raysd.export.precision import PRECISIONS
from raysd.export.runtime import Runtime, usable_providers
from raysd.references import Located, identity, locate
from raysd.registry import Registry
from raysd.serve.drawing import Drawing
from raysd.serve.onnx import OnnxBackend
from raysd.serve.pool import Pool
from raysd.serve.predictor import Predictor
from raysd.serve.replica import open_base
from raysd.serve.torch_backend import Backend, TorchBackend
from raysd.storage import Storage
from tests.versions import flip

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Located:
    """A Stable Diffusion folder of random weights with one attention block, so that it is traced in seconds."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
    )
    folder = tmp_path_factory.mktemp("onnx") / "base"
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return Located(str(folder), folder)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return Storage(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def exported(base: Located, storage: Storage) -> Export:
    return make(storage, base, "fp32", lambda event: None)


@pytest.fixture
def backend(base: Located, exported: Export) -> OnnxBackend:
    return OnnxBackend(exported.folder, base.family, base.family.geometry(base.folder), threads=1)


@pytest.fixture
def torched(base: Located) -> TorchBackend:
    return TorchBackend(base.family, base.folder, CPU)


@pytest.fixture
def traced_before(exported: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs in fp32 are those of `exported` instead of traced again."""
    trace = exporting.trace

    def lookup(graph: Any) -> Any:
        half = any(tensor.dtype == torch.float16 for tensor in graph.module.parameters())
        if half:
            return trace(graph)
        return onnx_ir.external_data.load_to_model(onnx_ir.load(exported.folder / f"{graph.name}.onnx"))

    monkeypatch.setattr(exporting, "trace", lookup)


def inputs(batch: int, height: int = 8, width: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(batch)
    latents = torch.randn(batch, 4, height, width, generator=chance)
    return latents, torch.linspace(1, 998.5, batch), torch.randn(batch, LENGTH, 16, generator=chance)


def close(one: torch.Tensor, two: torch.Tensor) -> None:
    assert one.shape == two.shape
    assert (one - two).abs().max() < 1e-4 * two.abs().max()


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (3, 8, 8), (5, 4, 12)])
def test_every_graph_says_what_pytorch_says_at_any_batch_and_size(
    backend: Backend, torched: Backend, batch: int, height: int, width: int
) -> None:
    latents, timesteps, text = inputs(batch, height, width)
    close(backend.denoise(latents, timesteps, text, None), torched.denoise(latents, timesteps, text, None))
    pictures = torched.decode(latents)
    close(backend.decode(latents), pictures)
    close(backend.encode(pictures.clamp(-1, 1)), torched.encode(pictures.clamp(-1, 1)))
    tokens = torch.randint(3, 20, (batch, LENGTH))
    close(backend.encode_text(tokens), torched.encode_text(tokens))


def test_adapters_are_inputs_of_one_session_and_equal_peft(
    base: Located, backend: Backend, torched: Backend, tmp_path: Path
) -> None:
    given, bare = inputs(3), backend.denoise(*inputs(3), None)
    for name, seed, rank in (("first", 1, 1), ("second", 2, 5)):
        file = lora_of(base.folder, tmp_path / name, seed, rank)
        backend.add_adapter(name, file)
        torched.add_adapter(name, file)
    for name in ("second", "first", "second"):
        adapted = backend.denoise(*given, name)
        close(adapted, torched.denoise(*given, name))
        assert (adapted - bare).abs().max() > 1e-2 * bare.abs().max()
    backend.remove_adapter("first")
    with pytest.raises(KeyError):
        backend.denoise(*given, "first")
    assert torch.equal(backend.denoise(*given, None), bare)


def test_an_adapter_that_the_export_has_no_input_for_is_refused_by_name(
    base: Located, backend: Backend, tmp_path: Path
) -> None:
    file = lora_of(base.folder, tmp_path / "lora", 1)
    elsewhere = {name.replace("attn1.to_q", "ff.net.2"): tensor for name, tensor in load_file(file).items()}
    assert elsewhere.keys() != load_file(file).keys()
    _rewrite(file, elsewhere)
    with pytest.raises(RequestError, match=r"safetensors: adapts .*ff\.net\.2, for which .*`backend: torch`"):
        backend.add_adapter("other", file)
    _rewrite(file, {"unet.mid_block.to_q.lora_magnitude_vector": torch.ones(3)})
    with pytest.raises(RequestError, match=r"has mid_block.to_q.lora_magnitude_vector, which ONNX exports do not know"):
        backend.add_adapter("other", file)


def _rewrite(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened_file:
        header = opened_file.metadata()
    save_file(tensors, file, metadata=header)


def test_a_lora_version_is_exported_merged_and_equals_peft(base: Located, torched: Backend, tmp_path: Path) -> None:
    file = lora_of(base.folder, tmp_path / "lora", 7, rank=3)
    torched.add_adapter("lora", file)
    networks = Networks(Located("cats@1", base.folder, file))
    close(networks.denoise(*inputs(3), {}), torched.denoise(*inputs(3), "lora"))
    denoiser = networks.graphs()[0]
    assert denoiser.inputs == ("latents", "timesteps", "conditioning")
    close(denoiser.module(*denoiser.example), networks.denoise(*denoiser.example[:3], {}))


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_a", "dpmpp_2m", "unipc", "lcm"])
def test_both_backends_draw_the_same_picture_in_any_company(
    base: Located, backend: Backend, torched: Backend, tmp_path: Path, sampler: str
) -> None:
    file = lora_of(base.folder, tmp_path / "lora", 3)
    drawing = Drawing(prompt="a red circle", negative="a star", seed=3, steps=4, guidance=3, sampler=sampler)
    stranger = Drawing(prompt="a blue star", seed=4, steps=9, guidance=1, sampler="euler")
    pictures = []
    for drawn_by, company in ((backend, [stranger, stranger.of(1)]), (torched, [])):
        drawn_by.add_adapter("lora", file)
        predictor = Predictor(base.family, base.folder, drawn_by)
        if sampler == "lcm":  # which a model has that names this scheduler
            predictor._config = {**predictor._config, "_class_name": "LCMScheduler"}
        pictures.append(picture_of(predictor, drawing, "lora", company))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert pictures[0].std() > 5


@pytest.mark.usefixtures("traced_before")
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_less_precise_exports_are_smaller_and_pass_the_gate(
    base: Located, exported: Export, tmp_path: Path, precision: str
) -> None:
    made = write(base, precision, tmp_path / precision, lambda event: None)
    assert made.manifest["gate"]["denoiser_relative"] > 10 * exported.manifest["gate"]["denoiser_relative"]
    weights = "denoiser.onnx.data"
    assert (made.folder / weights).stat().st_size < 0.95 * (exported.folder / weights).stat().st_size
    runtime = Runtime(made.folder, base.family, base.family.geometry(base.folder), threads=1)
    runtime.add_adapter("lora", lora_of(base.folder, tmp_path / "lora", 1))
    adapted, bare = (runtime.denoise(*inputs(2), name) for name in ("lora", None))
    assert not torch.allclose(adapted, bare, atol=1e-2)


def test_the_gate_passes_what_is_equal_and_refuses_damage_with_the_figures(base: Located, backend: Runtime) -> None:
    networks = Networks(base)
    assert pass_gate(base, networks, backend, "fp32").denoiser_relative < 1e-5
    weight = networks.denoiser.get_parameter("conv_in.weight")
    weight *= 1.05
    with pytest.raises(RaysdError, match=r"fp32 export is not kept: .*denoiser_relative 0\.\d+, at most 0\.001"):
        pass_gate(base, networks, backend, "fp32")
    figures = measure(base, networks, backend)
    assert figures.decoder_relative < 1e-5
    assert figures.psnr < 60
    weight *= float("nan")
    with pytest.raises(RaysdError, match="denoiser_relative inf"):
        pass_gate(base, networks, backend, "fp32")


@pytest.mark.usefixtures("traced_before")
def test_an_export_that_the_gate_refuses_leaves_nothing(
    base: Located, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(model: Any) -> Any:
        for value in model.graph.initializers.values():
            if value.name.endswith("conv_out.weight"):
                value.const_value = onnx_ir.tensor(-value.const_value.numpy(), name=value.name)
        return model

    monkeypatch.setattr(exporting, "quantise", damaged)
    before = [entry.path for entry in storage.list("exports")]
    with pytest.raises(ExportRefused, match="the int8 export is not kept"):
        make(storage, base, "int8", lambda event: None)
    assert kept(storage, base, "int8") is None
    refused = f"{place_of(digest_of(base), 'int8')}/{REFUSED}"
    assert [entry.path for entry in storage.list("exports") if entry.path != refused] == before
    with pytest.raises(ExportRefused, match="the int8 export is not kept"):  # said again, not made again
        make(storage, base, "int8", made_again)
    with pytest.raises(RaysdError, match="the int8 export is not kept"):
        export_onnx(base.ref, storage, tmp_path / "out", "int8", lambda event: None)
    assert not (tmp_path / "out").exists()


def test_an_export_is_made_once_and_says_what_it_is(base: Located, storage: Storage, exported: Export) -> None:
    assert make(storage, base, "fp32", made_again).folder == exported.folder
    manifest = exported.manifest
    assert manifest["source"] == identity(base.folder) == digest_of(base)
    assert (manifest["precision"], manifest["opset"], manifest["adapters"]) == ("fp32", 20, "inputs")
    assert {"torch", "onnxruntime", "onnx", "raysd"} <= manifest["versions"].keys()
    assert {f"{name}.onnx" for name in ("denoiser", "decoder", "encoder", "text_encoder")} <= {
        file["path"] for file in manifest["files"]
    }
    assert kept(storage, base, "fp16") is None


@pytest.mark.parametrize("name", ["denoiser.onnx", "decoder.onnx.data"])
def test_a_tampered_file_is_refused_by_name(
    base: Located, storage: Storage, exported: Export, tmp_path: Path, name: str
) -> None:
    flip(exported.folder / name)  # in this machine's cache: fetched again
    again = kept(storage, base, "fp32")
    assert again is not None
    assert opened_files(again) == {file["path"]: file["sha256"] for file in exported.manifest["files"]}

    copy = _copy(storage, tmp_path)
    (stored,) = Path(copy.url).glob(f"exports/*/fp32/*/{name}")
    flip(stored)
    shutil.rmtree(exported.folder)
    with pytest.raises(IntegrityError, match=rf"fp32 export: {name} is damaged in the store.*export it again"):
        kept(copy, base, "fp32")
    stored.unlink()
    with pytest.raises(IntegrityError, match=rf"{name} is missing in the store"):
        OnnxBackend.open(copy, base)
    assert kept(storage, base, "fp32") is not None  # the true one, for the tests after this one


def opened_files(export: Export) -> dict[str, str]:
    from raysd.storage import sha256_of

    return {path.name: sha256_of(path) for path in export.folder.iterdir()}


@pytest.mark.usefixtures("exported")
@pytest.mark.parametrize("change", ["bytes", "source", "path"])
def test_a_manifest_that_is_not_what_was_written_is_refused(
    base: Located, storage: Storage, tmp_path: Path, change: str
) -> None:
    copy = _copy(storage, tmp_path)
    (path,) = Path(copy.url).glob("exports/*/fp32/manifest.json")
    body = json.loads(path.read_text())
    body.pop("check")
    if change == "source":
        body["source"] = "0" * 64
    if change == "path":
        body["files"][0]["path"] = "../../escape.onnx"
    check = "0" * 64 if change == "bytes" else keeping._check(body)
    path.write_text(json.dumps({**body, "check": check}))
    with pytest.raises(IntegrityError, match=r"fp32 export .*the manifest is damaged"):
        kept(copy, base, "fp32")


def test_the_later_of_two_makers_keeps_the_files_of_the_first(
    base: Located, storage: Storage, exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = _copy(storage, tmp_path)
    files = {entry.path for entry in copy.list("exports")}

    def late(located: Located, precision: str, folder: Path, watch: Any) -> Export:
        """Finds that another's manifest is there when it comes to write its own."""
        shutil.copytree(exported.folder, folder, dirs_exist_ok=True)
        (folder / "denoiser.onnx").write_bytes(b"other bytes")
        (folder / "manifest.json").write_text("{}")
        path = folder / "denoiser.onnx"
        ours = {"path": path.name, "sha256": "1" * 64, "size": path.stat().st_size}
        return Export(folder, {"files": [ours]})

    monkeypatch.setattr(keeping, "write", late)
    found, answers = kept(copy, base, "fp32"), iter([None])
    monkeypatch.setattr(keeping, "kept", lambda *given: next(answers, found))
    assert make(copy, base, "fp32", lambda event: None) == found
    assert {entry.path for entry in copy.list("exports")} == files


def _copy(storage: Storage, tmp_path: Path) -> Storage:
    shutil.copytree(storage.url, tmp_path / "copy")
    return Storage(str(tmp_path / "copy"))


def test_a_replica_draws_lora_versions_on_the_one_export_of_their_base(
    base: Located, storage: Storage, exported: Export, registry: Registry, tmp_path: Path
) -> None:
    """The export that the base has already is used, and both versions share it."""
    shutil.copytree(str(storage.local_path("exports")), str(registry.storage.local_path("exports")))
    spec = load(ModelSpec, {"ref": "cats", "backend": "onnx"})
    pool = Pool(registry.storage, lambda located: open_base(spec, located, registry.storage))
    drawing = Drawing(prompt="a red circle", seed=3, steps=3, guidance=3)
    record = {"base": str(base.folder), "base_digest": identity(base.folder)}
    for seed in (1, 2):
        file = lora_of(base.folder, tmp_path / str(seed), seed)
        version = registry.publish("cats", {file.name: file}, record, key=str(seed))
        assert digest_of(base_of(locate(version.ref, registry.storage), registry.storage)) == identity(base.folder)
        wanted = TorchBackend(base.family, base.folder, CPU)
        wanted.add_adapter("lora", file)
        with pool.use(version.ref, version.digest) as ready:
            assert isinstance(ready.predictor.backend, OnnxBackend)
            ours = picture_of(ready.predictor, drawing, ready.adapter)
        theirs = picture_of(Predictor(base.family, base.folder, wanted), drawing, "lora")
        assert np.abs(ours - theirs).max() <= 1
    assert len(pool.loaded()) == 3


def test_serving_finds_what_was_exported_before_it(
    base: Located, storage: Storage, exported: Export, registry: Registry, tmp_path: Path
) -> None:
    """Of a LoRA version and of a model outside the registry alike: the export of the whole model."""
    shutil.copytree(str(storage.local_path("exports")), str(registry.storage.local_path("exports")))
    file = lora_of(base.folder, tmp_path / "lora", 1)
    record = {"base": str(base.folder), "base_digest": identity(base.folder)}
    version = registry.publish("cats", {file.name: file}, record, key="1")
    for ref in (version.ref, base.ref):
        where = export_onnx(ref, registry.storage, None, "fp32", made_again)
        assert where == f"{registry.storage.url}/exports/{identity(base.folder)}/fp32"


def test_a_service_with_signers_trusts_no_export_in_the_store(
    base: Located, storage: Storage, exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can write to the store could put graphs there that no signature covers."""
    forged, made = _copy(storage, tmp_path), []
    (path,) = Path(forged.url).glob("exports/*/fp32/manifest.json")
    path.write_text("{}")

    def write_here(located: Located, precision: str, folder: Path, watch: Any) -> Export:
        made.append(located)
        shutil.copytree(exported.folder, folder, dirs_exist_ok=True)
        body = exported.manifest
        (folder / "manifest.json").write_text(json.dumps({**body, "check": keeping._check(body)}))
        return Export(folder, body)

    monkeypatch.setattr(keeping, "write", write_here)
    spec = load(ModelSpec, {"ref": "cats", "backend": "onnx"})
    with pytest.raises(IntegrityError, match="the manifest is damaged"):
        open_base(spec, base, forged)
    for _ in range(2):  # the second time it is there
        backend = open_base(spec, base, forged, signed=True).backend
        close(backend.denoise(*inputs(1), None), TorchBackend(base.family, base.folder, CPU).denoise(*inputs(1), None))
    assert made == [base]
    assert path.read_text() == "{}"


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "unipc"])
def test_pictures_are_those_of_diffusers_pipeline(base: Located, backend: OnnxBackend, sampler: str) -> None:
    schedulers = {"ddim": DDIMScheduler, "euler_a": EulerAncestralDiscreteScheduler, "unipc": UniPCMultistepScheduler}
    pipeline = base.family.pipeline(base.folder)
    pipeline.scheduler = schedulers[sampler].from_config(pipeline.scheduler.config)
    drawing = Drawing(prompt="a red circle", negative="blue", seed=3, steps=6, guidance=4, sampler=sampler)
    wanted = pipeline(
        drawing.prompt,
        negative_prompt=drawing.negative,
        generator=torch.Generator().manual_seed(drawing.seed),
        num_inference_steps=drawing.steps,
        guidance_scale=drawing.guidance,
    ).images[0]
    ours = picture_of(Predictor(base.family, base.folder, backend), drawing, None)
    assert ours.std() > 5
    assert np.abs(ours - np.asarray(wanted, int)).max() <= 1


def test_what_does_not_fit_is_told_as_pytorch_tells_it() -> None:
    runtime = Runtime.__new__(Runtime)
    runtime.device, runtime._sessions = CPU, {"greedy": greedy()}
    with pytest.raises(torch.OutOfMemoryError, match="Failed to allocate memory"):
        runtime._run("greedy", {"latents": torch.zeros(1, 4, 8, 8)}, (1, 1, 1, 1))


def greedy() -> Any:
    """A graph that needs an exbibyte."""
    import onnx
    import onnxruntime

    latents = onnx.helper.make_tensor_value_info("latents", onnx.TensorProto.FLOAT, [1, 4, 8, 8])
    output = onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, None)
    shape = onnx.helper.make_tensor("shape", onnx.TensorProto.INT64, [4], [2**50, 4, 8, 8])
    nodes = [
        onnx.helper.make_node("Expand", ["latents", "shape"], ["large"]),
        onnx.helper.make_node("ReduceMean", ["large"], ["pixels"]),
    ]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "greedy", [latents], [output], [shape]),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def made_again(event: dict[str, Any]) -> None:
    raise AssertionError("it was made again")


def picture_of(
    predictor: Predictor, drawing: Drawing, adapter: str | None, company: Sequence[Drawing] = ()
) -> np.ndarray:
    sample, *strangers = map(predictor.begin, [drawing, *company])
    while not sample.done:
        predictor.advance([*strangers, sample], adapter)
    return np.asarray(predictor.pictures([sample.latents])[0], int)


def test_providers_are_those_whose_libraries_load_the_fastest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    every = ["CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: every)
    here = {"libcuda.so.1"}
    monkeypatch.setattr(running, "_loads", lambda library: library in here)
    assert usable_providers() == ("CUDAExecutionProvider", "CPUExecutionProvider")
    here.add("libnvinfer.so.10")
    assert usable_providers() == tuple(reversed(every))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: every[:1])
    assert usable_providers() == ("CPUExecutionProvider",)


def test_wrong_requests_are_named(base: Located, storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="exists and is not empty"):
        export_onnx(base.ref, storage, tmp_path, "fp32", lambda event: None)
    with pytest.raises(RequestError, match=f"precision bf16: one of {', '.join(PRECISIONS)}"):
        kept(storage, base, "bf16")
