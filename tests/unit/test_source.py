"""Opening sources: every kind, every format, every way to caption; and errors that name the row."""

import hashlib
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from raysd.data.source import open_source, public, read_picture, without_secrets
from raysd.errors import DataError, StorageError
from raysd.storage import Storage
from tests.pictures import encoded, folder, photo


@pytest.fixture
def uploads(tmp_path):
    return Storage(str(tmp_path / "storage")).child("uploads")


def zipped(files: dict[str, bytes]) -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return body.getvalue()


def opened(root, uploads):
    return {entry.name: entry.caption for entry in open_source(str(root), uploads).entries}


# --- folders and zips


def test_a_folder_is_listed_by_name_and_what_is_not_used_is_said(tmp_path, uploads):
    root = folder(tmp_path / "set", 3)
    folder(root / "deep" / "er", 1, first=7)
    for junk in (".hidden.png", "__MACOSX/p0.png", ".git/x.png"):
        (root / junk).parent.mkdir(exist_ok=True)
        (root / junk).write_bytes(b"x")
    (root / "phone.HEIC").write_bytes(b"x")
    (root / "README.md").write_text("hello")
    (root / "stray.txt").write_text("nobody's caption")
    source = open_source(str(root), uploads)
    assert [e.name for e in source.entries] == ["deep/er/p7.png", "p0.png", "p1.png", "p2.png"]
    assert [e.folder for e in source.entries] == ["deep/er", "", "", ""]
    assert source.entries[0].caption == "a photo number 7"
    notes = "\n".join(source.notes)
    assert "1 picture left out" in notes
    assert "phone.HEIC" in notes
    assert "stray.txt" in notes
    assert "README.md" in notes
    assert "hidden" not in notes
    assert "MACOSX" not in notes


def test_links_and_special_files_are_named(tmp_path, uploads):
    root, other = folder(tmp_path / "set", 2), folder(tmp_path / "other", 3)
    (root / "linked.png").symlink_to(other / "p2.png")
    (root / "more").symlink_to(other)
    (root / "annexed.png").symlink_to(root / ".git" / "annex" / "gone")
    (root / ".away").symlink_to(other)
    os.mkfifo(root / "pipe.png")
    source = open_source(str(root), uploads)
    assert [e.name for e in source.entries] == ["linked.png", "p0.png", "p1.png"]
    assert source.notes == [
        "1 linked folder not followed: more",
        "1 broken link left out: annexed.png",
        "1 special file left out: pipe.png",
    ]


def test_a_folder_of_nothing_but_a_linked_folder_says_so(tmp_path, uploads):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "pictures").symlink_to(folder(tmp_path / "other", 3))
    with pytest.raises(DataError, match=r"0 other files; 1 linked folder not followed: pictures"):
        open_source(str(tmp_path / "set"), uploads)


@pytest.mark.parametrize("inner", ["", "top/", "a/b/c/"])
def test_a_zip_of_any_inner_structure_becomes_readable_files(tmp_path, uploads, inner):
    body = encoded(photo(1))
    files = {f"{inner}é 1.png": body, f"{inner}é 1.txt": b"caf\xc3\xa9", "__MACOSX/._x.png": b"junk", "notes.md": b"n"}
    (tmp_path / "set.zip").write_bytes(zipped(files))
    source = open_source(str(tmp_path / "set.zip"), uploads)
    assert [(e.name, e.caption) for e in source.entries] == [(f"{inner}é 1.png", "café")]
    assert read_picture(source.entries[0].path).size == (128, 128)
    assert "notes.md" in source.notes[0]


def test_names_that_a_zip_does_not_say_are_utf_8_are_read_so(tmp_path, uploads):
    """As Info-ZIP and macOS write them."""
    body = zipped({"é.png": encoded(photo(0)), "captions.csv": "file,caption\né.png,hello\n".encode()})
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = body.index(signature)
        body = body[: place + flags] + b"\0\0" + body[place + flags + 2 :]
    (tmp_path / "set.zip").write_bytes(body)
    assert opened(tmp_path / "set.zip", uploads) == {"é.png": "hello"}


def test_an_empty_caption_contradicts_none(tmp_path, uploads):
    root = folder(tmp_path / "set", 2)
    (root / "p0.txt").write_text("")
    (root / "p1.txt").write_text("hi")
    rows = ({"file_name": "p0.png", "text": "a cat"}, {"file_name": "p1.png", "text": ""})
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert opened(root, uploads) == {"p0.png": "a cat", "p1.png": "hi"}


def test_a_picture_that_is_not_the_one_it_was_is_refused_by_name(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(photo(0)))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_picture(str(path), digest=digest)
    path.write_bytes(encoded(photo(1)))
    with pytest.raises(DataError, match=r"a\.png: changed since the run began"):
        read_picture(str(path), digest=digest)


def test_a_zip_is_unpacked_once_under_its_sha256(tmp_path, uploads, monkeypatch):
    path = tmp_path / "set.zip"
    path.write_bytes(zipped({"a.png": encoded(photo(1)), "a.txt": b"one"}))
    first = open_source(str(path), uploads)
    written = []
    monkeypatch.setattr(Storage, "write", lambda self, path, data: written.append(path))
    assert open_source(str(path), uploads) == first
    assert written == []
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert {entry.path.split("/", 1)[0] for entry in uploads.list()} == {digest}


def test_archives_that_nobody_names_any_more_go_when_another_comes(tmp_path, uploads):
    kept, gone = (tmp_path / name for name in ("kept.zip", "gone.zip"))
    for number, path in enumerate((kept, gone)):
        path.write_bytes(zipped({"a.png": encoded(photo(number, 32))}))
        [entry] = open_source(str(path), uploads).entries
        os.utime(Path(entry.path).with_name("index.json"), (0, 0))
    uploads.write("picture.png", b"of somebody else")
    pictures = [Path(entry.path) for entry in open_source(str(kept), uploads).entries]
    (tmp_path / "new.zip").write_bytes(zipped({"a.png": encoded(photo(3, 32))}))
    pictures += [Path(entry.path) for entry in open_source(str(tmp_path / "new.zip"), uploads).entries]
    assert all(picture.exists() for picture in pictures)
    names = {hashlib.sha256((tmp_path / f"{name}.zip").read_bytes()).hexdigest() for name in ("kept", "new")}
    assert {entry.path.split("/")[0] for entry in uploads.list()} == {"picture.png", *names}


def test_an_unpacking_that_died_is_done_again(tmp_path, uploads, monkeypatch):
    path = tmp_path / "set.zip"
    path.write_bytes(zipped({f"{n}.png": encoded(photo(n)) for n in range(3)}))
    write = Storage.write

    def dies(self, path, data):
        if path == "index.json":
            raise StorageError("killed")
        write(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", dies)
        with pytest.raises(StorageError):
            open_source(str(path), uploads)
    assert len(open_source(str(path), uploads).entries) == 3


def test_an_fsspec_url_is_listed_and_read_in_place(uploads):
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe("/bucket/set/one.png", encoded(photo(1)))
    store.pipe("/bucket/set/one.caption", b"one")
    source = open_source("memory://bucket/set", uploads)
    assert [(e.name, e.caption) for e in source.entries] == [("one.png", "one")]
    assert source.entries[0].path == "memory:///bucket/set/one.png"
    assert read_picture(source.entries[0].path).size == (128, 128)


def test_the_bundled_sample_opens(uploads):
    from raysd.assets import asset

    try:
        asset("sample")
    except FileNotFoundError:
        pytest.skip("the sample is not built yet")
    assert all(entry.caption for entry in open_source("sample", uploads).entries)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", "data.source is empty"),
        ("/no/such/place", "no such folder or zip"),
        ("ftp://host/x", "ftp:// is not read"),
        ("simplecache::s3://bucket/x", "chained"),
        ("s3://bucket::file:///etc", "chained"),
    ],
)
def test_what_cannot_be_opened_is_refused_by_name(uploads, source, said):
    with pytest.raises(DataError, match=said):
        open_source(source, uploads)


def test_a_folder_without_pictures_and_a_file_that_is_no_zip_are_refused(tmp_path, uploads):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="no JPEG, PNG or WebP"):
        open_source(str(tmp_path), uploads)
    with pytest.raises(DataError, match="not a zip"):
        open_source(str(tmp_path / "a.txt"), uploads)


def test_paths_have_no_secrets_to_lose():
    for path in ("sample", "./what?", "/a/b@c.zip"):
        assert without_secrets(path) == path


def test_messages_show_no_credentials():
    assert public("https://me:secret@host/x.zip?sig=abc#f") == "https://host/x.zip"
    assert public("abfs://box@account.dfs/x") == "abfs://box@account.dfs/x"


def test_a_file_name_that_is_not_utf8_is_named(tmp_path, uploads):
    (tmp_path / "caf\udce9.png").write_bytes(encoded(photo(1)))
    with pytest.raises(DataError, match=r"caf .png: a file name that is not UTF-8"):
        open_source(str(tmp_path), uploads)


# --- pictures


def saved(tmp_path, picture, kind, **options):
    path = tmp_path / f"picture.{kind.lower()}"
    path.write_bytes(encoded(picture, kind, **options))
    return str(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_formats_come_back_as_rgb(tmp_path, kind):
    smooth = photo(1, 40, 30).filter(ImageFilter.GaussianBlur(2))
    picture = read_picture(saved(tmp_path, smooth, kind))
    assert (picture.mode, picture.size) == ("RGB", (40, 30))
    assert np.abs(np.asarray(picture, float) - np.asarray(smooth, float)).mean() < 4


@pytest.mark.parametrize(("orientation", "turn"), [(1, None), (3, 180), (6, 270), (8, 90)])
def test_exif_orientation_is_applied(tmp_path, orientation, turn):
    plain = photo(2, 40, 24)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = plain if turn is None else plain.rotate(-turn, expand=True)
    read = read_picture(saved(tmp_path, stored, "PNG", exif=exif))
    assert np.array_equal(np.asarray(read), np.asarray(plain))


def test_alpha_is_flattened_on_white(tmp_path):
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert read_picture(saved(tmp_path, half, "PNG")).getpixel((4, 4)) == (255, 127, 127)
    assert read_picture(saved(tmp_path, clear, "WEBP", lossless=True)).getpixel((4, 4)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert read_picture(saved(tmp_path, palette, "PNG", transparency=0)).getpixel((4, 4)) == (255, 255, 255)


def test_cmyk_grey_and_16_bits_are_converted(tmp_path):
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    red, green, blue = read_picture(saved(tmp_path, cyan, "JPEG")).getpixel((8, 8))
    assert (red < 20, green > 230, blue > 230) == (True, True, True)
    deep = Image.fromarray(np.full((8, 8), 32896, dtype=np.uint16))
    assert read_picture(saved(tmp_path, deep, "PNG")).getpixel((4, 4)) == (128, 128, 128)
    assert read_picture(saved(tmp_path, Image.new("L", (8, 8), 77), "PNG")).getpixel((4, 4)) == (77, 77, 77)


@pytest.mark.parametrize("body", [b"", b"not a picture", encoded(photo(1))[:900], encoded(photo(1), "JPEG")[:1500]])
def test_a_damaged_picture_is_a_data_error_with_its_path(tmp_path, body):
    (tmp_path / "bad.jpg").write_bytes(body)
    with pytest.raises(DataError, match=r"bad\.jpg"):
        read_picture(str(tmp_path / "bad.jpg"))


# --- captions


def test_text_and_caption_files_are_both_read(tmp_path, uploads):
    folder(tmp_path, 3, captions=False)
    (tmp_path / "p0.txt").write_text("from txt\n")
    (tmp_path / "p1.caption").write_text("from\n caption")
    assert opened(tmp_path, uploads) == {"p0.png": "from txt", "p1.png": "from caption", "p2.png": None}


@pytest.mark.parametrize("file_key", ["file", "file_name", "filename", "image"])
@pytest.mark.parametrize("text_key", ["caption", "text", "prompt"])
def test_csv_headers_of_all_kinds(tmp_path, uploads, file_key, text_key):
    folder(tmp_path, 2, captions=False)
    (tmp_path / "captions.csv").write_text(f'\ufeff{file_key},{text_key}\np0.png,"a, quoted"\np1.png,plain\n', "utf-8")
    assert opened(tmp_path, uploads) == {"p0.png": "a, quoted", "p1.png": "plain"}


def test_metadata_jsonl_of_the_datasets_library_in_its_own_folder(tmp_path, uploads):
    folder(tmp_path / "train", 2, captions=False)
    rows = [{"file_name": f"p{n}.png", "text": f"number {n}", "extra": 1} for n in range(2)]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    assert opened(tmp_path, uploads) == {"train/p0.png": "number 0", "train/p1.png": "number 1"}


def test_names_match_in_either_unicode_form(tmp_path, uploads):
    (tmp_path / "cafe\u0301.png").write_bytes(encoded(photo(1)))
    (tmp_path / "captions.csv").write_text("file,caption\ncaf\u00e9.png,coffee\n", "utf-8")
    assert list(opened(tmp_path, uploads).values()) == ["coffee"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("captions.csv", "file,caption\np0.png,a\n\np9.png,b\n", r"captions\.csv row 4: names 'p9\.png'"),
        ("captions.csv", "file,caption\n../p0.png,a\n", "row 2: names"),
        ("captions.csv", "file,caption\np0.png,a,b\n", "row 2: 3 fields"),
        ("captions.csv", "file,words\np0.png,a\n", "row 1: no caption"),
        ("captions.csv", "file,image,caption\np0.png,p0.png,a\n", "row 1: more than one picture: file, image"),
        ("captions.csv", "", "row 1: no picture"),
        ("captions.csv", "file,caption\np0.png,a\np0.png,b\n", "two captions, in captions.csv row 2 and in .* row 3"),
        ("captions.csv", 'file,caption\np0.png,"a\n', "not CSV"),
        ("metadata.jsonl", '{"file_name": "p0.png", "text": "a"}\n{"file_name":\n', r"metadata\.jsonl row 2: not JSON"),
        ("metadata.jsonl", "[1]\n", "row 1: not an object"),
        ("metadata.jsonl", '{"file_name": "p0.png"}', "row 1: no caption"),
        ("metadata.jsonl", '{"file_name": 3, "text": "a"}', "row 1: file_name and text must be text"),
        ("metadata.jsonl", '{"file_name": "p0.png", "text": "a", "caption": "b"}', "more than one caption"),
        ("metadata.jsonl", '{"file_name": "p0.png", "text": "a \\ud800"}', "row 1: half a character"),
        ("p0.txt", "x" * 70_000, "larger than 64 KiB"),
    ],
)
def test_a_broken_or_ambiguous_caption_is_named(tmp_path, uploads, name, text, said):
    folder(tmp_path, 1, captions=False)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said) as caught:
        open_source(str(tmp_path), uploads)
    assert str(caught.value).count("\n") < 3


def test_two_sources_that_disagree_are_an_error_and_that_agree_are_not(tmp_path, uploads):
    folder(tmp_path, 1)
    (tmp_path / "p0.caption").write_text("a photo number 0 ")
    assert opened(tmp_path, uploads) == {"p0.png": "a photo number 0"}
    (tmp_path / "p0.caption").write_text("another")
    with pytest.raises(DataError, match=r"p0\.png: two captions, in p0\.caption and in p0\.txt"):
        open_source(str(tmp_path), uploads)


def test_captions_that_are_not_utf8_are_named(tmp_path, uploads):
    folder(tmp_path, 1, captions=False)
    (tmp_path / "p0.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match=r"p0\.txt: not UTF-8"):
        open_source(str(tmp_path), uploads)
