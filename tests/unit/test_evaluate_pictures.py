"""The pictures of an evaluation: the same whoever draws them and in which batch, drawn once, drawn on after a stop."""

import json
import shutil

import numpy as np
import pytest

from raysd.config import EvaluationSpec
from raysd.draw import Request, draw
from raysd.errors import NotFound, RequestError
from raysd.evaluate import pictures
from raysd.evaluate.pictures import Album, Crew, Painter, crew, draw_album, takes_ray
from raysd.evaluate.prompts import BUNDLED, Prompt, read_prompts
from raysd.references import locate

PROMPTS = (Prompt("a red circle"), Prompt("a star", "blue"), Prompt("a ring"))


def spec(**fields):
    return EvaluationSpec(**{"count": 5, "steps": 2, "batch": 2, "workers": 0, **fields})


@pytest.fixture
def located(tiny_base, storage):
    return locate(str(tiny_base), storage)


@pytest.mark.parametrize(
    ("workers", "cores", "gpus", "ray"),
    [
        (0, 64, 8, False),
        (1, 2, 0, True),
        (None, 2, 0, False),
        (None, 7, 1, False),
        (None, 8, 0, True),
        (None, 4, 2, True),
    ],
)
def test_one_worker_on_a_machine_of_its_own_is_this_process(monkeypatch, workers, cores, gpus, ray):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert takes_ray(workers) is ray
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert takes_ray(workers) is (workers != 0)


def test_pictures_do_not_depend_on_the_batch_and_are_those_of_generate(located, storage, tmp_path):
    album = Album(located, PROMPTS, spec(), storage)
    seen = []
    assert draw_album(album, spec(), lambda d, n: seen.append((d, n))) == 5
    assert seen == [(0, 5), (2, 5), (4, 5), (5, 5)]
    images = album.read(range(5))
    for number in (1, 3):
        [alone] = draw(located, [album.requests[number]])
        assert np.abs(np.asarray(alone, int) - np.asarray(images[number], int)).max() <= 1
    assert album.requests[1].negative == "blue"
    assert [album.prompt_of(n) for n in range(5)] == [0, 1, 2, 0, 1]
    assert not np.array_equal(images[0], images[3]), "the same prompt again is another picture"


def test_a_second_call_draws_only_what_lacks(located, storage, monkeypatch):
    album = Album(located, PROMPTS, spec(), storage)
    draw_album(album, spec(), lambda d, n: None)
    before = storage.read(album.path(1))
    storage.delete(album.path(1))
    drawn = []
    plain = Painter.draw
    monkeypatch.setattr(Painter, "draw", lambda self, chunk: drawn.append(chunk) or plain(self, chunk))
    assert draw_album(album, spec(), lambda d, n: None) == 1
    assert [[path for path, _ in chunk] for chunk in drawn] == [[album.path(1)]]
    assert storage.read(album.path(1))[:8] == before[:8]
    assert draw_album(album, spec(), lambda d, n: None) == 0
    longer = Album(located, PROMPTS, spec(count=7), storage)
    assert longer.missing() == [5, 6], "more pictures of the same prompts go on"


def test_another_model_prompt_or_setting_is_another_album(located, tiny_base, storage, tmp_path):
    plain = Album(located, PROMPTS, spec(), storage).folder
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base, copy)
    assert Album(locate(str(copy), storage), PROMPTS, spec(), storage).folder == plain, "wherever it lies"
    (copy / "scheduler" / "more.json").write_text("{}")
    assert Album(locate(str(copy), storage), PROMPTS, spec(), storage).folder != plain
    for other in (spec(seed=1), spec(steps=3), spec(guidance=1.0)):
        assert Album(located, PROMPTS, other, storage).folder != plain
    assert Album(located, PROMPTS[:2], spec(), storage).folder != plain
    assert Album(located, PROMPTS, spec(count=50, batch=9), storage).folder == plain


def test_a_seed_belongs_to_its_prompt_and_not_to_its_place(located, storage):
    first = Album(located, PROMPTS, spec(), storage)
    other = Album(located, PROMPTS[::-1], spec(), storage)
    assert first.requests[0] == other.requests[2]
    assert len({request.seed for request in first.requests}) == 5


def test_a_batch_shares_steps_and_guidance(located):
    from raysd.draw import draw_batch

    with pytest.raises(ValueError, match="share steps and guidance"):
        draw_batch(None, [Request("a", steps=2), Request("a", steps=3)])
    with pytest.raises(ValueError, match="one picture each"):
        draw_batch(None, [Request("a", count=2)])


@pytest.mark.parametrize(
    ("nodes", "chunks", "asked", "wanted"),
    [
        ([{"CPU": 2}], 9, None, Crew(1, 2, 0)),
        ([{"CPU": 16}], 9, None, Crew(4, 4, 0)),
        ([{"CPU": 16}], 3, None, Crew(3, 4, 0)),
        ([{"CPU": 3}, {"CPU": 3}, {"memory": 1}], 9, None, Crew(2, 3, 0)),
        ([{"CPU": 8}], 9, 8, Crew(8, 1, 0)),
        ([{"CPU": 4}], 9, 8, Crew(4, 1, 0)),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8}], 9, None, Crew(2, 1, 1)),
        ([{"CPU": 8, "GPU": 2}], 9, 1, Crew(1, 1, 1)),
    ],
)
def test_workers_fit_on_the_nodes(nodes, chunks, asked, wanted):
    assert crew(nodes, chunks, asked) == wanted


def test_another_process_gets_the_same_files(tiny_base, storage):
    assert pictures._portable(locate("tiny-sd", storage)) == "tiny-sd"
    assert pictures._portable(locate(str(tiny_base), storage)) == str(tiny_base.resolve())


def test_prompts_are_read_once_each(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \na cat\n")
    assert read_prompts(path) == (Prompt("a cat"), Prompt("a dog"))
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a cat", "negative": "a dog"}) + "\n" + json.dumps({"prompt": "a cat"}))
    assert read_prompts(path) == (Prompt("a cat", "a dog"), Prompt("a cat"))
    assert len(read_prompts(BUNDLED)) == 64


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ('{"text": "a"}', "line 2: wanted"),
        ('{"prompt": " "}', "line 2: prompt: required"),
        ('{"prompt": 3}', "line 2: prompt: required, and text"),
        ('{"prompt": "a", "negative": 3}', "line 2: negative: text or null"),
        ('{"prompt": "\\ud800"}', "line 2: prompt"),
        ("[]", "line 2: wanted"),
    ],
)
def test_a_bad_row_is_named(line, message, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(RequestError, match=message):
        read_prompts(path)


def test_a_bad_file_is_named(tmp_path):
    with pytest.raises(NotFound, match=r"absent\.txt: no such file"):
        read_prompts(tmp_path / "absent.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(RequestError, match=r"empty\.txt: 0 prompts in it"):
        read_prompts(tmp_path / "empty.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="not a readable UTF-8 file"):
        read_prompts(tmp_path / "bytes.txt")
