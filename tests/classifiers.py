"""Tiny classifiers of random weights in the layouts that are published."""

import json
from pathlib import Path

import torch


def image_classifier(folder: Path, *, flags: bool, labels: tuple[str, ...] = ("normal", "nsfw")) -> Path:
    """As Falconsai/nsfw_image_detection: a ViT whose bias decides, so that it flags every picture or none."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    names = dict(enumerate(labels))
    config = ViTConfig(**small, image_size=32, patch_size=16, id2label=names, label2id={v: k for k, v in names.items()})
    model = ViTForImageClassification(config)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([-9.0, 9.0] if flags else [9.0, -9.0]))
    model.save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def safety_checker(folder: Path, *, flags: bool) -> Path:
    """Stable Diffusion's, with its processor beside it as in a model's folder. Thresholds of -1 flag everything, of 2 nothing."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    torch.manual_seed(0)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = CLIPConfig(vision_config={**vision, "image_size": 32, "patch_size": 16}, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(-1.1 if flags else 2)
        checker.special_care_embeds_weights.fill_(2)
    checker.save_pretrained(folder / "safety_checker")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder / "feature_extractor")
    return folder / "safety_checker"
