"""Which scores a set of pictures gets, and with what beside them."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from raysd.evaluate import scores
from raysd.evaluate.judging import By, Drawn, Reference, difference, judge

BY = By("extractor", "matcher", 10.0)


def drawn(n=40, prompts=8, shift=0.0, logits=None):
    rng = torch.Generator().manual_seed(1)
    features = torch.randn(n, 6, generator=rng) + shift
    texts = torch.eye(8)[[k % prompts for k in range(n)]]
    images = normalize(texts + 0.3 * torch.randn(n, 8, generator=rng), dim=-1)
    return Drawn(features, logits, images, texts, [k % prompts for k in range(n)])


def reference(n=100):
    return Reference(torch.randn(n, 6, generator=torch.Generator().manual_seed(2)), n - 10)


def named(found):
    return {score.name: score for score in found}


def test_without_data_there_is_nothing_to_compare_with():
    found = named(judge(drawn(), None, BY, 0))
    assert set(found) == {"clip_score", "inception_score", "diversity"}
    clip = found["clip_score"]
    assert clip.low < clip.value < clip.high
    assert (clip.n, clip.extractor, clip.better) == (40, "matcher", "higher")
    assert found["inception_score"].note.startswith("over the 8 prompts as classes")
    assert 1 < found["inception_score"].value <= 8
    assert found["diversity"].n == 8


def test_fid_never_comes_without_its_n_and_a_null_band_at_that_n():
    pictures, data = drawn(), reference(60)
    found = named(judge(pictures, data, BY, 3))
    fid = found["fid"]
    assert fid.n == 30, "the reference has 2 x 30"
    assert fid.null == scores.null_band(data.vectors, 30, scores.fid, 20, 3)
    chooser = torch.Generator().manual_seed(3)
    one, two = (torch.randperm(count, generator=chooser)[:30] for count in (60, 40))
    assert fid.value == scores.fid(data.vectors[one], pictures.features[two]), (
        "by lot: the first show the first prompts"
    )
    far = named(judge(drawn(shift=1.0), data, BY, 3))
    assert far["fid"].value > far["fid"].null[1]
    assert far["kid"].value > far["kid"].null[1]
    assert far["precision"].value < found["precision"].value
    assert found["kid"].deviation > 0
    assert found["nearest_training"].note.startswith("1: a copy; held-out pictures: 0.")


def test_few_pictures_are_said_to_be_few():
    wide = Reference(torch.randn(20, 64), 20)
    pictures = Drawn(torch.randn(8, 64), None, torch.randn(8, 4), torch.randn(8, 4), [0] * 8)
    found = named(judge(pictures, wide, BY, 0))
    assert found["fid"].note == "n below the 64 features: read KID"
    assert "inception_score" not in found, "one prompt, one class"
    assert found["nearest_training"].note == "1: a copy"
    tiny = named(judge(pictures, Reference(torch.randn(3, 64), 3), BY, 0))
    assert "fid" not in tiny
    assert "precision" not in tiny
    assert tiny["kid"].null is None


def test_classes_of_the_extractor_come_first():
    logits = torch.randn(40, 5)
    found = named(judge(drawn(logits=logits), None, BY, 1))["inception_score"]
    assert found.value == scores.inception_score(logits, 1)[0]
    assert (found.extractor, found.note) == ("extractor", "")


def test_one_picture_a_prompt_has_no_diversity():
    assert "diversity" not in named(judge(drawn(n=8), None, BY, 0))


def test_a_difference_is_paired():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 50)  # how hard each prompt is, the same for both
    found = difference("clip_score", hard + 1 + rng.normal(0, 0.1, 50), hard, "higher", "matcher", 0)
    assert found.value == pytest.approx(1, abs=0.1)
    assert 0.9 < found.low < found.high < 1.1
