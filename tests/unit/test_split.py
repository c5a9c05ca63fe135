"""The split and the data set: by content, duplicates together, the same whatever the files are called."""

import random

import pytest

from raysd.config import DataSpec
from raysd.data.check import Examination, Picture
from raysd.data.dataset import assemble, prepare, split
from raysd.data.facts import Facts
from raysd.data.source import Entry
from raysd.errors import DataError
from raysd.seeding import seed_of
from raysd.storage import Storage
from tests.pictures import encoded, folder, photo


def picture(content, group=None, name="x.png", caption="c", where=""):
    key = f"{seed_of(content):064x}"
    facts = Facts(key, 8, 8, 0, None, 0.0, None)
    return Picture(Entry(name, name, caption, where), facts, f"{seed_of(group or content):064x}", caption)


def ids(pictures):
    return [p.facts.id for p in pictures]


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(20, 0.1, 2), (5, 0.1, 1), (4, 0.5, 0), (100, 0.25, 25), (50, 0.0, 0), (6, 0.99, 5)],
)
def test_sizes(count, share, expected):
    train, validation = split([picture(f"p{n}") for n in range(count)], share)
    assert (len(train), len(validation)) == (count - expected, expected)


def test_neither_names_nor_order_matter():
    pictures = [picture(f"p{n}", name=f"{n}.png") for n in range(30)]
    renamed = [picture(f"p{n}", name=f"other {30 - n}.jpg") for n in range(30)]
    random.Random(0).shuffle(renamed)
    assert [ids(part) for part in split(pictures, 0.2)] == [ids(part) for part in split(renamed, 0.2)]


def test_no_duplicate_straddles_and_the_share_holds_with_groups_of_any_size():
    for trial in range(50):
        rng = random.Random(trial)
        pictures = [picture(f"{trial} {n}", group=f"{trial} g{rng.randrange(8)}") for n in range(40)]
        train, validation = split(pictures, 0.2)
        assert not {p.group for p in train} & {p.group for p in validation}
        assert len(train) + len(validation) == 40
        assert 1 <= len(validation) <= 12


def test_groups_all_larger_than_the_share_still_give_one():
    pictures = [picture(f"{n}", group=f"g{n % 5}") for n in range(50)]
    assert len(split(pictures, 0.1)[1]) == 10


def test_added_pictures_move_few_of_the_others():
    before = {p.facts.id for p in split([picture(f"p{n}") for n in range(100)], 0.2)[1]}
    after = {p.facts.id for p in split([picture(f"p{n}") for n in range(105)], 0.2)[1]}
    assert len(before - after) <= 6


# --- whole data sets


def prepared(root, tmp_path, **fields):
    return prepare(DataSpec(source=str(root), resolution=64, **fields), Storage(str(tmp_path / "storage")))


def test_kept_duplicates_stay_on_one_side(tmp_path):
    root = folder(tmp_path / "set", 8)
    for index in range(8):
        (root / f"copy{index}.jpg").write_bytes(encoded(photo(index), "JPEG", quality=60))
        (root / f"copy{index}.txt").write_text("a copy")
    data = prepared(root, tmp_path, duplicates="keep", validation=0.25)
    assert (len(data.train), len(data.validation)) == (12, 4)
    number = {example.name[-5] for example in data.validation}
    assert not number & {example.name[-5] for example in data.train}


def test_the_same_content_under_other_names_is_the_same_data_set(tmp_path):
    one, other = folder(tmp_path / "one", 8), tmp_path / "other" / "deep"
    other.mkdir(parents=True)
    for index in range(8):
        (other / f"z{9 - index}.png").write_bytes((one / f"p{index}.png").read_bytes())
        (other / f"z{9 - index}.txt").write_text((one / f"p{index}.txt").read_text())
    first, second = prepared(one, tmp_path), prepared(tmp_path / "other", tmp_path)
    assert first.digest == second.digest
    assert [e.id for e in first.train] == [e.id for e in second.train]


@pytest.mark.parametrize("change", [{"validation": 0.3}, {"prompt": "x"}, {"prompt": "x {caption}"}])
def test_the_digest_holds_captions_and_split(tmp_path, change):
    root = folder(tmp_path / "set", 8)
    assert prepared(root, tmp_path).digest != prepared(root, tmp_path, **change).digest


def test_the_digest_holds_content_and_not_resolution(tmp_path):
    root = folder(tmp_path / "set", 8)
    before = prepared(root, tmp_path)
    assert prepared(root, tmp_path, force=True).digest == before.digest
    (root / "p0.png").write_bytes(encoded(photo(77)))
    assert prepared(root, tmp_path).digest != before.digest


def test_examples_say_what_training_needs(tmp_path):
    data = prepared(folder(tmp_path / "set", 6), tmp_path, prompt="sks, {caption}")
    example = next(e for e in data.train if e.name == "p1.png")
    assert example.caption == "sks, a photo number 1"
    assert (example.width, example.height, example.weight) == (128, 128, 1.0)
    assert example.path == str(tmp_path / "set" / "p1.png")
    assert (data.report.train, data.report.validation) == (5, 1)


@pytest.mark.parametrize("axis", ["caption", "folder"])
def test_balance_weighs_the_training_pictures(axis):
    pictures = [picture(f"{n}", caption="a" if n < 9 else "b", where="x" if n < 9 else "y") for n in range(12)]
    from raysd.data.findings import Report

    report = Report.model_construct(warnings=())
    data = assemble(Examination(report, pictures), DataSpec(source="x", balance=axis, validation=0.1))
    by_caption = {c: sum(e.weight for e in data.train if e.caption == c) for c in "ab"}
    assert by_caption["a"] == pytest.approx(by_caption["b"])
    assert sum(by_caption.values()) == pytest.approx(len(data.train))
    assert {e.weight for e in data.validation} == {1.0}


def test_too_few_for_a_validation_set_is_said(tmp_path):
    data = prepared(folder(tmp_path / "set", 4), tmp_path, force=True)
    assert data.validation == ()
    assert any("no validation set" in line for line in data.report.warnings)


def test_what_the_check_refuses_is_not_prepared(tmp_path):
    with pytest.raises(DataError, match="5 are the least"):
        prepared(folder(tmp_path / "set", 3), tmp_path)
