"""The check: what it finds, what it does about it, and that it says so."""

import json
import threading
import time

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from raysd.config import DataSpec
from raysd.data import place
from raysd.data.balance import caption_of, weights
from raysd.data.check import check, examine
from raysd.data.compare import OUTLIER, diversity, near_groups, outlier_scores
from raysd.data.facts import Facts
from raysd.data.source import open_source
from raysd.errors import DataError, StorageError
from raysd.storage import Storage
from tests.pictures import encoded, folder, noise, photo


def run(root, **fields):
    spec = DataSpec(source=str(root), resolution=64, **fields)
    return check(open_source(str(root), Storage(str(root / ".storage")).child("uploads")), spec)


def put(root, name, picture, caption="a photo", kind="PNG", **options):
    (root / name).write_bytes(encoded(picture, kind, **options))
    (root / name).with_suffix(".txt").write_text(caption)


def test_a_good_set_has_no_warning_and_the_report_is_json(tmp_path):
    report = run(folder(tmp_path, 12))
    assert (report.found, report.used, report.warnings, report.refusals) == (12, 12, (), ())
    assert type(report).model_validate_json(report.model_dump_json()) == report
    assert json.loads(report.model_dump_json())["used"] == 12


# --- unreadable


def test_one_unreadable_picture_is_left_out_and_named(tmp_path):
    (folder(tmp_path, 6) / "p0.png").write_bytes(b"junk")
    report = run(tmp_path)
    assert (report.found, report.used, report.refusals) == (6, 5, ())
    assert report.unreadable[0].name == "p0.png"
    assert any("1 unreadable picture left out: p0.png (not a readable JPEG" in line for line in report.warnings)


def test_too_many_unreadable_are_refused_by_name_and_the_share_can_be_raised(tmp_path):
    folder(tmp_path, 8)
    for index in range(2):
        (tmp_path / f"p{index}.png").write_bytes(encoded(photo(1))[:500])
    report = run(tmp_path)
    assert "2 of 8 pictures unreadable (p0.png: damaged" in report.refusals[0]
    assert "data.unreadable" in report.refusals[0]
    assert run(tmp_path, unreadable=0.3).refusals == ()
    (tmp_path / "p0.png").write_bytes(encoded(photo(0)))
    assert run(tmp_path, unreadable=0.0).refusals != ()


def test_a_failing_store_is_no_unreadable_picture(tmp_path, monkeypatch):
    source = open_source(str(folder(tmp_path, 6)), Storage(str(tmp_path / ".storage")))

    def broken(self, *args, **kwargs):
        raise ConnectionError("the network is down")

    monkeypatch.setattr(place.fsspec.get_filesystem_class("file"), "cat_file", broken)
    with pytest.raises(StorageError, match="the network is down"):
        check(source, DataSpec(source=str(tmp_path)))


# --- too few, too small


def test_fewer_than_5_are_refused_unless_forced_and_10_are_recommended(tmp_path):
    folder(tmp_path, 4)
    assert "4 pictures, 5 are the least" in run(tmp_path).refusals[0]
    forced = run(tmp_path, force=True)
    assert forced.refusals == ()
    assert "10 to 20 are recommended" in forced.warnings[0]
    folder(tmp_path, 1, first=4)
    assert run(tmp_path).refusals == ()
    assert "10 to 20 are recommended" in run(tmp_path).warnings[0]
    folder(tmp_path, 5, first=5)
    assert run(tmp_path).warnings == ()


def test_no_picture_at_all_is_refused_even_when_forced(tmp_path):
    for index in range(2):
        (tmp_path / f"{index}.png").write_bytes(b"junk")
    assert any("no picture is left" in line for line in run(tmp_path, force=True, prompt="x").refusals)


def test_duplicates_do_not_count_towards_the_least(tmp_path):
    for index in range(6):
        put(tmp_path, f"{index}.png", photo(1))
    assert "1 picture, 5 are the least" in run(tmp_path).refusals[0]


def test_too_small_is_counted_as_scaled_up(tmp_path):
    put(folder(tmp_path, 10), "small.png", photo(99, 200, 63))
    report = run(tmp_path)
    assert (report.upscaled, report.used) == (("small.png",), 11)
    assert any("smaller than data.resolution 64, scaled up: small.png" in line for line in report.warnings)


# --- duplicates


def test_exact_duplicates_are_dropped_or_kept(tmp_path):
    put(folder(tmp_path, 10), "again.png", photo(3), "another caption")
    report = run(tmp_path)
    assert report.used == 10
    assert [(set(g.names), g.exact, g.captions_differ) for g in report.duplicates] == [
        ({"again.png", "p3.png"}, True, True)
    ]
    assert any("different captions" in line for line in report.warnings)
    kept = run(tmp_path, duplicates="keep")
    assert (kept.used, kept.dropped, len(kept.duplicates)) == (11, (), 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: (p, "JPEG", {"quality": 30}),
        lambda p: (p.resize((150, 150)), "PNG", {}),
        lambda p: (p.crop((3, 3, 253, 253)), "WEBP", {"quality": 80}),
        lambda p: (ImageEnhance.Brightness(p).enhance(1.03), "PNG", {}),
    ],
    ids=["jpeg", "smaller", "cropped", "brighter"],
)
def test_near_duplicates_are_found_and_the_largest_is_kept(tmp_path, change):
    folder(tmp_path, 10, side=256)
    picture, kind, options = change(photo(3, 256))
    put(tmp_path, f"a-copy.{kind.lower()}", picture, "a photo number 3", kind, **options)
    report = run(tmp_path)
    assert len(report.duplicates) == 1
    assert set(report.duplicates[0].names) == {"p3.png", f"a-copy.{kind.lower()}"}
    assert not report.duplicates[0].exact
    assert report.used == 10
    if picture.size != (256, 256):
        assert report.dropped == (f"a-copy.{kind.lower()}",)


def letter(which):
    picture = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(picture).text((88, 60), which, "black", ImageFont.load_default(120))
    return picture


def test_pictures_that_look_alike_are_kept_where_their_captions_differ(tmp_path):
    """Their hashes and colours do not tell them apart, what is said of them does."""
    for which in "ABCDEFGHIJKLMNOPQRSTUVWX":
        put(tmp_path, f"{which}.png", letter(which), f"letter {which}")
    report = run(tmp_path)
    assert (report.used, report.duplicates, report.dropped) == (24, (), ())
    for which in "AB":
        put(tmp_path, f"{which}-again.jpg", letter(which), f"letter {which}", "JPEG", quality=60)
    again = run(tmp_path)
    assert again.used == 24
    assert {frozenset(group.names) for group in again.duplicates} == {
        frozenset({f"{which}.png", f"{which}-again.jpg"}) for which in "AB"
    }


def test_a_copy_without_a_caption_goes_and_takes_none_with_another_caption_along(tmp_path):
    folder(tmp_path, 10, side=256)
    put(tmp_path, "other.jpg", photo(3, 256), "quite another caption", "JPEG", quality=60)
    (tmp_path / "bare.jpg").write_bytes(encoded(photo(3, 256), "JPEG", quality=50))
    report = run(tmp_path)
    assert (report.dropped, report.missing_captions) == (("bare.jpg",), ())


def test_every_duplicate_that_goes_is_named(tmp_path):
    folder(tmp_path, 10)
    for copy in "abc":
        put(tmp_path, f"{copy}.png", photo(3), "a photo number 3")
    report = run(tmp_path)
    assert len(report.dropped) == 3
    assert any(all(f"{name} (= " in line for name in report.dropped) for line in report.warnings)


def test_a_recoloured_or_mirrored_picture_is_not_a_duplicate(tmp_path):
    folder(tmp_path, 10)
    put(tmp_path, "grey.png", photo(3).convert("L"))
    put(tmp_path, "mirrored.png", photo(4).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert run(tmp_path).duplicates == ()


def test_a_captioned_copy_is_preferred_to_one_without(tmp_path):
    folder(tmp_path, 10)
    (tmp_path / "a.png").write_bytes(encoded(photo(3)))
    report = run(tmp_path)
    assert report.dropped == ("a.png",)
    assert report.missing_captions == ()


def test_a_sharp_copy_is_preferred_to_a_blurred_larger_one(tmp_path):
    folder(tmp_path, 10, side=200)
    soft = photo(3, 200).resize((400, 400)).filter(ImageFilter.GaussianBlur(8))
    put(tmp_path, "soft.png", soft, "a photo number 3")
    report = run(tmp_path)
    assert report.dropped == ("soft.png",)
    assert report.blurry == ()


def facts(hash_, thumb=0):
    return Facts("0", 1, 1, hash_, np.full((8, 8, 3), thumb, np.int16), 0.0, np.zeros(1, np.float32))


def test_groups_are_transitive_and_cross_blocks():
    rng = np.random.default_rng(0)
    hashes = [int(h) for h in rng.integers(0, 2**64, 600, dtype=np.uint64)]
    hashes[7], hashes[300], hashes[599] = 0, 0xFF, 0xFFFF  # 8 bits apart each, 16 from end to end
    expected = list(range(600))
    expected[300] = expected[599] = 7
    assert near_groups([facts(h) for h in hashes]) == expected
    assert near_groups([facts(0), facts(0, thumb=7)]) == [0, 1]
    assert near_groups([]) == []


def test_duplicates_of_20_000_pictures_take_seconds_even_if_all_are_alike():
    rng = np.random.default_rng(0)
    several = [facts(int(h)) for h in rng.integers(0, 2**64, 20_000, dtype=np.uint64)]
    started = time.process_time()
    assert len(set(near_groups(several))) == 20_000
    assert set(near_groups([facts(1)] * 20_000)) == {0}
    assert time.process_time() - started < 20


# --- blur, outliers, diversity


@pytest.mark.parametrize("side", [128, 400])
def test_blur_is_found_at_any_size_and_dropped_on_request(tmp_path, side):
    folder(tmp_path, 10, side=side)
    soft = photo(50, side).filter(ImageFilter.GaussianBlur(side / 40))
    put(tmp_path, "soft.png", soft)
    put(tmp_path, "blank.png", Image.new("RGB", (side, side), "teal"))
    report = run(tmp_path)
    assert {f.name for f in report.blurry} == {"soft.png", "blank.png"}
    assert report.used == 12
    assert any("2 blurry or blank pictures kept: blank.png, soft.png" in line for line in report.warnings)
    assert set(run(tmp_path, blurry="drop").dropped) == {"soft.png", "blank.png"}


def test_a_flat_drawing_with_crisp_edges_is_not_blurry(tmp_path):
    folder(tmp_path, 10)
    disc = np.hypot(*np.mgrid[-1:1:300j, -1:1:300j]) < 0.6
    put(tmp_path, "disc.png", Image.fromarray(np.where(disc, 200, 90).astype(np.uint8)))
    blue, purple = (45, 95, 220), (120, 57, 218)  # of the same brightness
    put(tmp_path, "blue.png", Image.fromarray(np.where(disc[..., None], blue, purple).astype(np.uint8)))
    assert run(tmp_path).blurry == ()


def test_noise_and_an_irrelevant_picture_are_outliers_and_dropped_on_request(tmp_path):
    folder(tmp_path, 30)
    put(tmp_path, "noise.png", noise(1))
    put(tmp_path, "noise copy.png", noise(1))
    page = np.full((128, 128, 3), 255, np.uint8)
    page[8::8] = 0
    put(tmp_path, "page.png", Image.fromarray(page))
    report = run(tmp_path)
    assert {f.name for f in report.outliers} == {"noise copy.png", "page.png"}
    assert report.dropped == ("noise.png",)
    assert len(run(tmp_path, duplicates="keep").outliers) == 3
    assert any("pictures unlike all others kept" in line for line in report.warnings)
    assert run(tmp_path, outliers="drop").used == 30


def test_a_subject_at_the_edge_is_no_outlier_nor_is_anything_in_the_sample(tmp_path):
    for index in range(12):
        scene, place = np.full((128, 128, 3), (200, 180, 40), np.uint8), 90 if index == 5 else 44
        scene[44:84, place : place + 30 + index % 3] = photo(index, 40).resize((30 + index % 3, 40))
        put(tmp_path, f"{index}.png", Image.fromarray(scene))
    assert run(tmp_path, duplicates="keep").outliers == ()
    sample = open_source("sample", Storage(str(tmp_path / "s")))
    assert check(sample, DataSpec(source="sample", resolution=64)).warnings == ()


def test_a_small_or_uniform_set_has_no_outliers():
    rows = np.eye(201, dtype=np.float32)
    assert outlier_scores(rows[:9]).tolist() == [0] * 9
    some = np.abs(np.random.default_rng(0).normal(1, 0.1, (50, 201))).astype(np.float32)
    some /= np.linalg.norm(some, axis=1, keepdims=True)
    assert outlier_scores(some).max() < OUTLIER


def test_diversity_is_the_effective_share_of_different_pictures(tmp_path):
    same, different = np.eye(64, dtype=np.float32)[[0] * 20], np.eye(64, dtype=np.float32)[:20]
    assert diversity(same) == pytest.approx(1 / 20)
    assert diversity(different) == pytest.approx(1, abs=0.01)
    assert diversity(np.eye(64, dtype=np.float32)[[0, 1] * 10]) == pytest.approx(2 / 20, abs=0.005)
    for index in range(12):
        put(tmp_path, f"{index}.jpg", photo(1), kind="JPEG", quality=90 - index)
    report = run(tmp_path, duplicates="keep")
    assert report.diversity < 0.12
    assert any("much alike" in line for line in report.warnings)


# --- captions


def test_missing_captions_are_refused_with_names_and_remedy(tmp_path):
    folder(tmp_path, 6)
    (tmp_path / "p1.txt").unlink()
    (tmp_path / "p4.txt").write_text("  \n")
    report = run(tmp_path)
    assert "2 pictures without a caption (p1.png, p4.png)" in report.refusals[0]
    assert "data.prompt" in report.refusals[0]


def test_a_prompt_fills_in_and_is_counted(tmp_path):
    folder(tmp_path, 6)
    (tmp_path / "p1.txt").unlink()
    templated = run(tmp_path, prompt="art of sks, {caption}")
    assert (templated.refusals, templated.missing_captions, templated.replaced_captions) == ((), ("p1.png",), 0)
    assert any("1 picture without a caption, data.prompt is used: p1.png" in line for line in templated.warnings)
    plain = run(tmp_path, prompt="a photo of sks")
    assert (plain.refusals, plain.replaced_captions) == ((), 5)
    assert any("5 captions not used" in line for line in plain.warnings)
    assert "1 picture without a caption" in run(tmp_path, prompt="{caption}").refusals[0]


@pytest.mark.parametrize(
    ("own", "prompt", "final"),
    [
        ("a cat", None, "a cat"),
        (None, None, ""),
        ("a cat", "sks", "sks"),
        ("a cat", "photo of sks, {caption}", "photo of sks, a cat"),
        (None, "photo of sks, {caption}", "photo of sks"),
        (None, "sks, {caption}, oil", "sks, oil"),
        ("{caption} {0} %s", "x {caption}", "x {caption} {0} %s"),
    ],
)
def test_final_captions(own, prompt, final):
    assert caption_of(own, prompt) == final


# --- balance


def test_imbalance_is_reported_with_the_weights_that_even_it_out(tmp_path):
    for index in range(12):
        put(tmp_path, f"{index}.png", photo(index), "a cat" if index < 9 else "a dog")
    report = run(tmp_path)
    (balance,) = report.balance
    assert [(g.key, g.count, g.weight) for g in balance.groups] == [
        ("a cat", 9, pytest.approx(12 / 18)),
        ("a dog", 3, pytest.approx(2)),
    ]
    assert any('data.balance = "caption"' in line for line in report.warnings)
    assert not any('data.balance = "caption"' in line for line in run(tmp_path, balance="caption").warnings)


def test_folders_are_groups_too(tmp_path):
    folder(tmp_path / "a", 8)
    folder(tmp_path / "b", 2, first=20)
    (balance,) = run(tmp_path).balance
    assert (balance.axis, balance.ratio) == ("folder", 4.0)


def test_weights_give_groups_equal_chances_and_average_1():
    given = weights(["a", "a", "a", "b"])
    assert sum(given) == pytest.approx(4)
    assert sum(given[:3]) == pytest.approx(given[3])


# --- how it is done


def test_the_report_does_not_depend_on_the_order_in_which_threads_finish(tmp_path, monkeypatch):
    import raysd.data.check as module

    folder(tmp_path, 12)
    put(tmp_path, "again.png", photo(3))
    first, gate, measure = run(tmp_path), threading.Event(), module.measure

    def later(path, store):
        if path.endswith("again.png"):
            gate.wait(5)
        if path.endswith("p5.png"):
            gate.set()
        return measure(path, store)

    monkeypatch.setattr(module, "measure", later)
    assert run(tmp_path) == first


def test_progress_counts_every_picture_and_only_facts_are_kept(tmp_path):
    folder(tmp_path, 6)
    (tmp_path / "p0.png").write_bytes(b"junk")
    calls = []
    source = open_source(str(tmp_path), Storage(str(tmp_path / ".s")))
    found = examine(source, DataSpec(source=str(tmp_path)), lambda done, total: calls.append((done, total)))
    assert calls == [(n, 6) for n in range(1, 7)]
    kept = found.pictures[0].facts
    assert kept.thumb.nbytes + kept.features.nbytes < 2048


def test_refusals_end_in_three_lines_at_most(tmp_path):
    for index in range(3):
        (tmp_path / f"bad{index}\nname.png").write_bytes(b"junk")
        (tmp_path / f"p{index}.png").write_bytes(encoded(photo(index)))
    with pytest.raises(DataError) as caught:
        run(tmp_path).raise_if_refused()
    assert str(caught.value).count("\n") == 2
