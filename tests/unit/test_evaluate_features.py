"""Extractors. No public weights are at hand: InceptionV3 has random weights of the public layout, CLIP is a tiny one."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from raysd.assets import asset
from raysd.errors import NotFound, RequestError
from raysd.evaluate import features
from raysd.evaluate.inception import Inception, _average, load_inception, resized
from raysd.evaluate.scores import clip_scores
from tests.pictures import photo

PUBLIC_KEYS = {  # some of pt_inception-2015-12-05, with their shapes
    "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
    "Conv2d_4a_3x3.bn.running_var": (192,),
    "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
    "Mixed_5d.branch_pool.conv.weight": (64, 288, 1, 1),
    "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
    "Mixed_6b.branch7x7dbl_4.conv.weight": (128, 128, 7, 1),
    "Mixed_6e.branch7x7_2.conv.weight": (192, 192, 1, 7),
    "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
    "Mixed_7b.branch3x3dbl_1.conv.weight": (448, 1280, 1, 1),
    "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
    "fc.weight": (1008, 2048),
    "fc.bias": (1008,),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights whose activations neither vanish nor explode."""
    torch.manual_seed(0)
    model = Inception()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save_file({k: t for k, t in model.state_dict().items() if not k.endswith("num_batches_tracked")}, path)
    return path


def test_inception_has_the_public_layout(weights):
    state = load_inception(weights).state_dict()
    assert {name: tuple(state[name].shape) for name in PUBLIC_KEYS} == PUBLIC_KEYS
    assert sum(t.numel() for n, t in state.items() if "running" not in n and "tracked" not in n) == 23_850_960
    assert len([name for name in state if name.endswith("conv.weight")]) == 94


def test_inception_gives_features_and_logits_of_the_pictures(weights):
    extractor = features.extractor(str(weights), None)
    pictures = [photo(n, 64) for n in range(2)]
    found = extractor.pictures(pictures)
    assert (found.vectors.shape, found.logits.shape) == ((2, 2048), (2, 1008))
    assert torch.isfinite(found.vectors).all()
    assert not torch.allclose(found.vectors[0], found.vectors[1])
    assert torch.allclose(found.logits, found.vectors @ load_file(weights)["fc.weight"].T, atol=1e-3)
    assert str(weights) in extractor.name


def test_the_average_pool_leaves_the_padding_out_and_the_last_block_takes_the_maximum():
    assert torch.equal(_average(torch.ones(1, 1, 5, 5)), torch.ones(1, 1, 5, 5))
    model = Inception()
    assert (model.Mixed_7b.maximum, model.Mixed_7c.maximum) == (False, True)


def test_resizing_is_antialiased():
    stripes = np.zeros((1196, 1196, 3), np.uint8)
    stripes[:, ::2] = 255
    small = resized([Image.fromarray(stripes)])
    assert small.shape == (1, 3, 299, 299)
    assert (small.float() - 127.5).abs().max() < 15, "no moiré"


def test_weights_of_another_layout_are_refused(weights, tmp_path):
    state = load_file(weights)
    del state["Mixed_7c.branch1x1.conv.weight"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(RequestError, match=r"Mixed_7c.branch1x1.conv.weight is missing"):
        load_inception(tmp_path / "less.safetensors")
    save_file(load_file(weights) | {"fc.bias": torch.zeros(1000)}, tmp_path / "other.safetensors")
    with pytest.raises(RequestError, match="not the weights of the FID InceptionV3"):
        load_inception(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_bytes(b"nothing")
    with pytest.raises(RequestError, match="not the weights"):
        load_inception(tmp_path / "text.safetensors")
    with pytest.raises(NotFound, match="no such file"):
        features.extractor(str(tmp_path / "absent.pt"), None)
    (tmp_path / "text.pt").write_bytes(b"nothing")
    with pytest.raises(RequestError, match=r"neither a \.safetensors nor a TorchScript"):
        features.extractor(str(tmp_path / "text.pt"), None)


class Scripted(torch.nn.Module):
    """As the usual file: classes, or features on request."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        means = x.float().mean((2, 3))
        return means if return_features else means[:, :1]


def test_a_torchscript_file_returns_features(tmp_path):
    torch.jit.script(Scripted()).save(str(tmp_path / "inception.pt"))
    found = features.extractor(str(tmp_path / "inception.pt"), None).pictures(
        [Image.new("RGB", (20, 30), (10, 20, 30))]
    )
    assert found.vectors.tolist() == [[10, 20, 30]]
    assert found.logits is None


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(asset("tiny-clip"))
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    vision = {**small, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.text_projection.weight.data.neg_()  # with this seed the similarities are then positive
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def clip_by_hand(folder, pictures, texts):
    """Resize, crop, normalise, embed and compare without the processor, from the paper's constants."""
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    pixels = [np.asarray(p.resize((32, 32), Image.Resampling.BICUBIC), np.float32) / 255 for p in pictures]
    mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels = torch.from_numpy(np.stack([(p - np.float32(mean)) / np.float32(deviation) for p in pixels]))
    with torch.no_grad():
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        out = model(**tokens, pixel_values=pixels.permute(0, 3, 1, 2))
        cosines = (out.logits_per_image / model.logit_scale.exp()).diagonal().numpy()
    return 100 * np.clip(cosines, 0, None)


def test_clip_score_against_transformers_by_hand(clip_folder):
    pictures, texts = [photo(n, 48) for n in range(4)], ["a red circle", "a large blue star", "zorb", "a ring"]
    clip = features.matcher(str(clip_folder))
    ours = clip_scores(clip.pictures(pictures).vectors, clip.texts(texts))
    assert ours == pytest.approx(clip_by_hand(clip_folder, pictures, texts), abs=1e-3)
    assert (ours > 0).sum() > 1
    assert len(set(ours.round(3))) > 1
    assert str(clip_folder) in clip.name


def test_a_long_text_is_cut_to_what_the_model_takes(clip_folder, tmp_path):
    """77 tokens, of which two are the ends, though the tokenizer was saved without knowing it."""
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    file = folder / "tokenizer_config.json"
    said = json.loads(file.read_text())
    said.pop("model_max_length")
    file.write_text(json.dumps(said))
    longest, longer = features.matcher(str(folder)).texts(["a red circle " * 25, "a red circle " * 400])
    assert torch.equal(longest, longer)


def test_what_is_no_clip_is_refused(tmp_path, clip_folder):
    with pytest.raises(NotFound, match="no such folder"):
        features.matcher(str(tmp_path / "absent"))
    with pytest.raises(RequestError, match=r"no readable config\.json"):
        features.matcher(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(RequestError, match="type 'bert'"):
        features.matcher(str(tmp_path))
    (tmp_path / "config.json").write_text((clip_folder / "config.json").read_text())
    with pytest.raises(RequestError, match="not a CLIP folder"):
        features.matcher(str(tmp_path))


def test_the_bundled_judge_stands_in_and_says_so():
    judge = features.matcher(None)
    assert judge.name == "bundled judge tiny-clip"
    assert features.extractor(None, judge) is judge
    red = Image.open(asset("tiny-clip").parent / "sample" / "zorb-01.jpg")
    assert judge.pictures([red, red]).vectors.shape == judge.texts(["a", "b"]).shape
    assert judge.scale > 1
