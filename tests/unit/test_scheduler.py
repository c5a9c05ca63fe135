"""The scheduler: what a picture is does not depend on its company, nobody starves, and one failure is one picture's."""

import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raysd.errors import OutOfMemory, RequestError
from raysd.models import family_of
from raysd.serve import replica as replicas
from raysd.serve import scheduler as scheduling
from raysd.serve.drawing import Drawing
from raysd.serve.predictor import Predictor
from raysd.serve.replica import Replica
from raysd.serve.scheduler import FAILING, Busy, Canceled, Picture, Scheduler
from raysd.serve.torch_backend import TorchBackend
from tests.consistency import consistent

WISHES = [
    Drawing(prompt="a red circle", seed=1, steps=4, guidance=5),
    Drawing(prompt="a blue square", negative="red", seed=2, steps=9, guidance=3, sampler="euler_a"),
    Drawing(prompt="green", seed=3, steps=2, guidance=1, sampler="dpmpp_2m"),
    Drawing(prompt="a red circle", seed=4, steps=6, guidance=7, sampler="unipc"),
    Drawing(prompt="wide", seed=5, steps=3, guidance=2, sampler="euler", width=96, height=64),
    Drawing(prompt="a dot", seed=1, steps=5, guidance=0, sampler="lcm"),
]


@pytest.fixture(scope="module")
def predictor(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """Of a model that takes all samplers but the flow's."""
    folder = consistent(tiny_base, tmp_path_factory.mktemp("lcm") / "tiny")
    family = family_of(folder)
    return Predictor(family, folder, TorchBackend(family, folder, torch.device("cpu")))


def finish(scheduler: Scheduler) -> int:
    """Turns until nothing is left."""
    turns = 0
    while scheduler.turn():
        turns += 1
    return turns


def distance(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of a channel, of 255."""
    assert one.size == other.size
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


def alone(predictor: Predictor, drawing: Drawing) -> Image.Image:
    scheduler, picture = Scheduler(), Picture(predictor, drawing)
    scheduler.submit([picture])
    finish(scheduler)
    return picture.future.result(0)


def test_a_picture_in_a_batch_of_strangers_is_the_one_drawn_alone(predictor: Predictor) -> None:
    scheduler = Scheduler(rows=7)
    pictures = [Picture(predictor, drawing) for drawing in WISHES]
    scheduler.submit(pictures[:2])
    scheduler.turn()  # the others join in the middle
    scheduler.submit(pictures[2:])
    finish(scheduler)
    for picture in pictures:
        assert distance(picture.future.result(0), alone(predictor, picture.drawing)) <= 1, picture.drawing


def test_other_seeds_are_other_pictures(predictor: Predictor) -> None:
    """That the comparison above can fail."""
    assert distance(alone(predictor, WISHES[0]), alone(predictor, WISHES[0].of(1))) > 10


def test_nobody_waits_longer_than_the_bound_whatever_arrives(predictor: Predictor) -> None:
    """A picture of s steps is done within s x `admitted` turns, beside a stream of newcomers of other sizes."""
    chance, admitted = random.Random(0), 5
    scheduler = Scheduler(rows=2, admitted=admitted, waiting=1000)
    slow = Picture(predictor, Drawing(prompt="slow", steps=6, guidance=1))
    scheduler.submit([slow])
    turns = 0
    while not slow.future.done():
        sizes = [chance.choice([64, 96, 128]) for _ in range(3)]
        scheduler.submit([Picture(predictor, Drawing(prompt="x", steps=1, guidance=1, width=size)) for size in sizes])
        assert scheduler.turn()
        turns += 1
        assert turns <= 6 * admitted
    assert scheduler.load > 10  # the stream had not ended


def test_short_ones_are_not_held_up_by_long_ones(predictor: Predictor) -> None:
    scheduler = Scheduler(rows=4, admitted=8)
    long = [Picture(predictor, Drawing(prompt="long", seed=seed, steps=20, guidance=1)) for seed in range(4)]
    short = Picture(predictor, Drawing(prompt="short", steps=2, guidance=1))
    scheduler.submit([*long, short])
    turns = 0
    while not short.future.done():
        scheduler.turn()
        turns += 1
    assert turns <= 4
    assert not any(picture.future.done() for picture in long)


def test_occupancy_says_how_full_the_steps_are(predictor: Predictor) -> None:
    scheduler = Scheduler(rows=4, admitted=8)
    assert scheduler.occupancy == 0
    scheduler.submit([Picture(predictor, Drawing(prompt="a", seed=n, steps=40, guidance=1)) for n in range(4)])
    for _ in range(39):
        scheduler.turn()
    assert scheduler.occupancy > 0.95
    finish(scheduler)
    assert scheduler.occupancy == 0
    scheduler.submit([Picture(predictor, Drawing(prompt="a", steps=60, guidance=1))])
    for _ in range(59):
        scheduler.turn()
    assert scheduler.occupancy == pytest.approx(0.25, abs=0.02)
    finish(scheduler)


def test_cancelled_and_late_pictures_leave_at_the_next_step(predictor: Predictor) -> None:
    scheduler = Scheduler()
    wish = Drawing(prompt="a", steps=5, guidance=1)
    gone, late, kept = (
        Picture(predictor, wish),
        Picture(predictor, wish, deadline=time.time() + 3600),
        Picture(predictor, wish),
    )
    scheduler.submit([gone, late, kept])
    scheduler.turn()
    gone.cancel()
    late.deadline = time.time() - 1
    scheduler.turn()
    assert gone.started.step == late.started.step == 1
    for picture, reason in ((gone, "canceled"), (late, "deadline")):
        with pytest.raises(Canceled, match=reason):
            picture.future.result(0)
    finish(scheduler)
    assert kept.future.result(0).size == (64, 64)


def test_a_full_scheduler_takes_all_or_none(predictor: Predictor) -> None:
    scheduler = Scheduler(waiting=2)
    wish = Drawing(prompt="a", steps=1, guidance=1)
    with pytest.raises(Busy):
        scheduler.submit([Picture(predictor, wish) for _ in range(3)])
    assert scheduler.load == 0


def test_what_fails_is_one_pictures_own(predictor: Predictor) -> None:
    scheduler = Scheduler()
    good = Picture(predictor, Drawing(prompt="a", steps=2, guidance=1))
    bad = Picture(predictor, Drawing(prompt="a", steps=2, guidance=1, image="0" * 64), image=b"no picture")
    broken = Picture(predictor, Drawing(prompt="b", steps=2, guidance=1))
    scheduler.submit([good, bad, broken])
    scheduler.turn()
    broken.started.latents.fill_(float("nan"))
    finish(scheduler)
    assert good.future.result(0)
    with pytest.raises(FloatingPointError):
        broken.future.result(0)
    with pytest.raises(Exception, match="cannot identify"):
        bad.future.result(0)


def test_a_batch_that_does_not_fit_is_made_smaller(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    true, sizes = predictor.backend.denoise, []

    def denoise(latents: torch.Tensor, *rest: object) -> torch.Tensor:
        sizes.append(len(latents))
        if len(latents) > 2:
            raise torch.OutOfMemoryError("no memory")
        return true(latents, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(predictor.backend, "denoise", denoise)
    scheduler = Scheduler(rows=8)
    pictures = [Picture(predictor, Drawing(prompt="a", seed=seed, steps=2, guidance=2)) for seed in range(4)]
    scheduler.submit(pictures)
    finish(scheduler)
    assert max(sizes) == 8
    assert all(picture.future.result(0) for picture in pictures)
    monkeypatch.setattr(predictor.backend, "denoise", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    lone = Picture(predictor, Drawing(prompt="a", steps=2))
    scheduler.submit([lone])
    finish(scheduler)
    with pytest.raises(OutOfMemory):
        lone.future.result(0)


def test_a_batch_that_did_not_fit_grows_again(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """When what took the memory has gone, strangers of whoever met it draw as before."""
    true, short = predictor.backend.denoise, [True]

    def denoise(latents: torch.Tensor, *rest: object) -> torch.Tensor:
        if short and len(latents) > 2:
            raise torch.OutOfMemoryError("no memory")
        return true(latents, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(predictor.backend, "denoise", denoise)
    monkeypatch.setattr(scheduling, "CALM", 2)
    scheduler = Scheduler(rows=8)
    scheduler.submit([Picture(predictor, Drawing(prompt="a", seed=n, steps=12, guidance=1)) for n in range(8)])
    while scheduler.rows > 2:
        scheduler.turn()
    short.clear()
    finish(scheduler)
    assert scheduler.rows == 8


def test_pictures_that_fit_alone_are_decoded_alone(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    true, most = predictor.backend.decode, [1]

    def decode(latents: torch.Tensor) -> torch.Tensor:
        if len(latents) > most[0]:
            raise torch.OutOfMemoryError("no memory")
        return true(latents)

    monkeypatch.setattr(predictor.backend, "decode", decode)
    scheduler = Scheduler(rows=8)
    for most[0], kind in ((1, type(None)), (0, OutOfMemory)):
        pictures = [Picture(predictor, Drawing(prompt="a", seed=n, steps=2, guidance=1)) for n in range(3)]
        scheduler.submit(pictures)
        finish(scheduler)
        assert [type(picture.future.exception(0)) for picture in pictures] == [kind] * 3


def test_two_without_guidance_that_do_not_fit_together_are_drawn_one_by_one(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = predictor.backend.denoise

    def denoise(latents: torch.Tensor, *rest: object) -> torch.Tensor:
        if len(latents) > 1:
            raise torch.OutOfMemoryError("no memory")
        return true(latents, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(predictor.backend, "denoise", denoise)
    scheduler = Scheduler(rows=8)
    pictures = [Picture(predictor, Drawing(prompt="a", seed=seed, steps=2, guidance=1)) for seed in range(2)]
    scheduler.submit(pictures)
    for _ in range(20):
        scheduler.turn()
    assert all(picture.future.result(0) for picture in pictures)


def test_previews_come_in_order_and_near_the_picture_in_the_end(predictor: Predictor) -> None:
    seen: list[tuple[int, Image.Image]] = []
    drawing = Drawing(prompt="a", steps=8, guidance=1, partial_images=3)
    picture = Picture(predictor, drawing, preview=lambda index, image: seen.append((index, image)))
    scheduler = Scheduler()
    scheduler.submit([picture])
    finish(scheduler)
    assert [index for index, _ in seen] == [0, 1, 2]
    apart = [np.abs(np.asarray(image, float) - np.asarray(picture.future.result(0), float)).mean() for _, image in seen]
    assert apart[-1] < apart[0]


def test_the_thread_draws_and_stops(predictor: Predictor) -> None:
    scheduler = Scheduler()
    scheduler.start()
    pictures = [Picture(predictor, drawing) for drawing in WISHES[:3]]
    scheduler.submit(pictures)
    assert all(picture.future.result(300) for picture in pictures)
    endless = Picture(predictor, Drawing(prompt="a", steps=200))
    scheduler.submit([endless])
    scheduler.stop()
    with pytest.raises(Canceled):
        endless.future.result(0)
    with pytest.raises(Busy):
        scheduler.submit([endless])


def spoiled(scheduler: Scheduler, predictor: Predictor, *requests: str) -> None:
    """Pictures that are not finite, one a request, drawn in one batch."""
    wish = Drawing(prompt="a", steps=2, guidance=1)
    pictures = [Picture(predictor, wish, request=request) for request in requests]
    scheduler.submit(pictures)
    scheduler.turn()
    for picture in pictures:
        picture.started.latents.fill_(float("nan"))
    finish(scheduler)
    assert all(isinstance(picture.future.exception(0), FloatingPointError) for picture in pictures)


def test_a_replica_that_draws_nothing_but_nan_is_not_healthy(predictor: Predictor) -> None:
    replica = Replica.__new__(Replica)
    replica._scheduler = scheduler = Scheduler()
    spoiled(scheduler, predictor, *"abcd")
    replica.check_health()
    good = Picture(predictor, Drawing(prompt="a", steps=1, guidance=1))
    scheduler.submit([good])
    finish(scheduler)
    assert good.future.result(0)
    spoiled(scheduler, predictor, *"efgh")  # a finite one came between
    replica.check_health()
    spoiled(scheduler, predictor, *"hhh")  # all of one request
    replica.check_health()
    spoiled(scheduler, predictor, "i")
    with pytest.raises(RuntimeError, match="the pictures of 5 requests in a row were not finite"):
        replica.check_health()


def failed(scheduler: Scheduler, predictor: Predictor, *requests: str) -> None:
    """Requests of two pictures each, whose steps raise."""
    for request in requests:
        wishes = [Drawing(prompt="a", seed=seed, steps=2, guidance=1) for seed in range(2)]
        pictures = [Picture(predictor, wish, request=request) for wish in wishes]
        scheduler.submit(pictures)
        finish(scheduler)
        assert all(isinstance(picture.future.exception(0), RuntimeError) for picture in pictures)


def test_a_replica_whose_engine_fails_is_not_healthy(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for one request that fails wherever it is drawn, nor for one that is too large or wrong."""

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    replica = Replica.__new__(Replica)
    replica._scheduler = scheduler = Scheduler()
    with monkeypatch.context() as patch:
        patch.setattr(predictor.backend, "denoise", broken)
        failed(scheduler, predictor, *["the same"] * FAILING, *"abc")
        replica.check_health()
    good = Picture(predictor, Drawing(prompt="a", steps=1, guidance=1))
    scheduler.submit([good])
    finish(scheduler)
    assert good.future.result(0)
    for error in (torch.OutOfMemoryError("no memory"), RequestError("no")):
        with monkeypatch.context() as patch:
            patch.setattr(predictor, "begin", lambda *_, error=error: (_ for _ in ()).throw(error))
            scheduler.submit([Picture(predictor, good.drawing, request=str(n)) for n in range(FAILING)])
            finish(scheduler)
    monkeypatch.setattr(predictor.backend, "denoise", broken)
    failed(scheduler, predictor, *"defg")  # a picture came between
    replica.check_health()
    failed(scheduler, predictor, "h")
    with pytest.raises(RuntimeError, match="5 requests in a row"):
        replica.check_health()


def test_a_replica_whose_step_hangs_is_not_healthy(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    true, hanging, leave = predictor.backend.denoise, threading.Event(), threading.Event()

    def denoise(*inputs: Any) -> torch.Tensor:
        hanging.set()
        assert leave.wait(60)
        return true(*inputs)

    monkeypatch.setattr(predictor.backend, "denoise", denoise)
    monkeypatch.setattr(replicas, "STUCK", 0.3)
    replica = Replica.__new__(Replica)
    replica._scheduler = scheduler = Scheduler()
    scheduler.start()
    time.sleep(0.4)
    replica.check_health()  # nothing to do is not stuck
    picture = Picture(predictor, Drawing(prompt="a", steps=1, guidance=1))
    scheduler.submit([picture])
    assert hanging.wait(60)
    assert not scheduler.stuck(60)
    time.sleep(0.4)
    with pytest.raises(RuntimeError, match="no denoising step"):
        replica.check_health()
    leave.set()
    assert picture.future.result(60)
    replica.check_health()
    scheduler.stop()


def test_work_that_comes_after_a_long_rest_is_not_stuck(predictor: Predictor) -> None:
    scheduler = Scheduler()  # whose thread has not woken yet
    scheduler._beat -= 3600
    assert not scheduler.stuck(300)
    scheduler.submit([Picture(predictor, Drawing(prompt="a", steps=1, guidance=1))])
    assert not scheduler.stuck(300)
    scheduler._beat -= 3600
    scheduler.submit([Picture(predictor, Drawing(prompt="a", steps=1, guidance=1))])
    assert scheduler.stuck(300)  # what comes later excuses nothing


def test_pixels_that_are_not_finite_are_one_pictures_own(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a decoder that overflows in half precision: the latents are numbers, and what is made of them is not."""
    true, scheduler = predictor.backend.decode, Scheduler()
    pictures = [Picture(predictor, Drawing(prompt="a", seed=seed, steps=2, guidance=1)) for seed in range(3)]
    scheduler.submit(pictures)
    scheduler.turn()
    pictures[1].started.latents.fill_(1e9)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        pixels = true(latents).clone()
        pixels[latents.abs().amax((1, 2, 3)) > 1e6] = float("nan")
        return pixels

    monkeypatch.setattr(predictor.backend, "decode", decode)
    finish(scheduler)
    assert pictures[0].future.result(0).size == pictures[2].future.result(0).size == (64, 64)
    assert isinstance(pictures[1].future.exception(0), FloatingPointError)


def test_a_preview_that_is_not_finite_ends_nobodys_picture(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, shown = predictor.backend.decode, []
    drawing = Drawing(prompt="a", steps=4, guidance=1, partial_images=1)
    pictures = [
        Picture(predictor, drawing.model_copy(update={"seed": seed}), preview=lambda _, image, n=seed: shown.append(n))  # type: ignore[misc]
        for seed in range(2)
    ]
    calls = []

    def decode(latents: torch.Tensor) -> torch.Tensor:
        calls.append(len(latents))
        pixels = true(latents).clone()
        if len(calls) <= 2:  # the first is of both previews, the second of one alone
            pixels[0] = float("nan")
        return pixels

    monkeypatch.setattr(predictor.backend, "decode", decode)
    scheduler = Scheduler()
    scheduler.submit(pictures)
    finish(scheduler)
    monkeypatch.undo()
    assert shown == [1]
    for seed, picture in enumerate(pictures):
        assert distance(picture.future.result(0), alone(predictor, drawing.model_copy(update={"seed": seed}))) <= 1
