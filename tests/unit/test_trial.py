"""A trial as Ray Tune sees it, its training replaced: what is told, what is recorded."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from raysd.cli.specs import recipe_of
from raysd.config import SearchSpec, load, override
from raysd.errors import LeaseHeld, OutOfMemory
from raysd.storage import Storage
from raysd.train.hang import EXIT
from raysd.tune import records, trial
from raysd.tune.space import key_of
from raysd.tune.trial import OVER, WORST, Job, SearchTrial

VALUES = {"optim.lr": 1e-3}
LOSSES = [0.5, 0.3, 0.4, 0.2, 0.6]


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYSD_CLUSTER_RESOURCES", "")
    space = {"optim.lr": {"kind": "choice", "values": [1e-3]}}
    spec = load(SearchSpec, {"recipe": "lora-demo", "space": space, "budget": {"trials": 1}})
    return Job(
        root=str(tmp_path),
        search="s",
        spec=spec,
        training=recipe_of("lora-demo"),
        shared_data=False,
        here=False,
        pictures=4,
        gpus=0,
        grows_to="",
        prompts=(),
        real=None,
    )


def results(job, monkeypatch, train):
    """All that the trial tells Ray Tune."""
    monkeypatch.setattr(trial, "train", train)
    tried = SearchTrial.__new__(SearchTrial)  # the rest is Ray Tune's own
    tried.setup(VALUES, job)
    found = [tried.step()]
    while not found[-1][OVER]:
        found.append(tried.step())
    tried.cleanup()
    return found


def record_of(job):
    found = records.read_trial(records.storage_of(Storage(job.root), "s"), key_of(VALUES))
    assert found is not None
    return found


def trains(spec, name, root, watch, frozen, asked, here):
    for step, loss in enumerate(LOSSES, 1):
        watch({"kind": "validation", "step": step, "validation_loss": loss})
    return SimpleNamespace(finished=True)


def never(*_):
    raise AssertionError("it trained again")


def test_the_scheduler_goes_by_the_best_loss_so_far_and_the_record_by_what_was_measured(job, monkeypatch):
    """As the benchmark's replay does: the best checkpoint is what a trial publishes."""
    expected = [0.5, 0.3, 0.3, 0.2, 0.2]
    told = [result["validation_loss"] for result in results(job, monkeypatch, trains)]
    assert told == [*expected, 0.2], "the last one says that it is over"
    assert [report["validation_loss"] for report in record_of(job).reports] == LOSSES
    again = results(job, monkeypatch, never)
    assert [result["validation_loss"] for result in again] == expected, "replayed to a new scheduler"


LENGTHS = {
    "all its steps": {"optim.steps": len(LOSSES)},
    "its patience": {"validation.patience": 1, "optim.steps": 99},
}


@pytest.mark.parametrize("length", LENGTHS)
def test_a_trial_that_trained_to_its_end_is_over_with_its_last_validation(job, monkeypatch, length):
    """Else a rung there would stop it, and a trial that lacks nothing but its scores would have none."""
    whole = replace(job, training=override(job.training, LENGTHS[length]))
    monkeypatch.setattr(SearchTrial, "_scores", lambda self: {"kid": 0.25})
    losses = LOSSES if length == "all its steps" else LOSSES[:3]

    def whole_run(spec, name, root, watch, frozen, asked, here):
        for step, loss in enumerate(losses, 1):
            watch({"kind": "validation", "step": step, "validation_loss": loss})
        return SimpleNamespace(finished=True)

    told = results(whole, monkeypatch, whole_run)
    assert [result[OVER] for result in told] == [False] * (len(losses) - 1) + [True]
    assert record_of(job).reports[-1]["kid"] == 0.25
    assert [result[OVER] for result in results(whole, monkeypatch, never)] == [result[OVER] for result in told]


def test_a_trial_that_lacked_its_scores_when_the_search_ended_is_over_with_them(job, monkeypatch):
    whole = replace(job, training=override(job.training, {"optim.steps": len(LOSSES)}))
    monkeypatch.setattr(SearchTrial, "_scores", lambda self: {})
    results(whole, monkeypatch, trains)
    store = records.storage_of(Storage(job.root), "s")
    records.write_trial(store, replace(record_of(job), status="interrupted"))
    told = results(whole, monkeypatch, lambda *_: SimpleNamespace(finished=True))
    assert [result[OVER] for result in told] == [False] * (len(LOSSES) - 1) + [True]


def test_a_trial_that_runs_out_of_memory_is_over_with_a_reason_and_the_worst_of_all(job, monkeypatch):
    def short(spec, name, root, watch, frozen, asked, here):
        watch({"kind": "validation", "step": 1, "validation_loss": 0.5})
        raise OutOfMemory("out of memory on node-1\ntry: a smaller batch")

    told = results(job, monkeypatch, short)
    assert [(result["validation_loss"], result[OVER]) for result in told] == [(0.5, False), (WORST, True)]
    record = record_of(job)
    assert (record.status, record.reason) == ("failed", "out of memory on node-1\ntry: a smaller batch")
    assert [result["validation_loss"] for result in results(job, monkeypatch, never)] == [WORST]


def test_a_value_that_is_no_number_wins_nothing(job, monkeypatch):
    def blows_up(spec, name, root, watch, frozen, asked, here):
        watch({"kind": "validation", "step": 1, "validation_loss": float("nan")})
        return SimpleNamespace(finished=True)

    assert {result["validation_loss"] for result in results(job, monkeypatch, blows_up)} == {WORST}
    assert record_of(job).costs(["validation_loss"]) is None
    assert records.front([record_of(job)], ["validation_loss"]) == []


def test_settings_that_are_none_are_a_failed_trial_with_the_reason(job, monkeypatch):
    """Between the extremes of a space may lie what does not go together."""
    wrong = replace(job, training=override(job.training, {"optim.batch_size": 4, "scale.workers": 4}))
    monkeypatch.setitem(VALUES, "optim.batch_size", 3)
    assert [(r["validation_loss"], r[OVER]) for r in results(wrong, monkeypatch, never)] == [(WORST, True)]
    record = record_of(job)
    assert record.status == "failed"
    assert "optim.batch_size" in record.reason


def test_settings_that_another_trial_is_training_are_not_trained_twice(job, monkeypatch):
    """It waits for the other one's end, tells what that told, and leaves its record alone."""
    store = records.storage_of(Storage(job.root), "s")

    def held(spec, name, root, watch, frozen, asked, here):
        other = records.TrialRecord(key_of(VALUES), VALUES, name, status="finished", reports=reports)
        records.write_trial(store, other)
        raise LeaseHeld("run s-x is held")

    reports = tuple({"step": n, "epoch": float(n), "validation_loss": loss} for n, loss in enumerate(LOSSES, 1))
    told = results(job, monkeypatch, held)
    assert [result["validation_loss"] for result in told] == [0.5, 0.3, 0.3, 0.2, 0.2]
    assert [result[OVER] for result in told] == [False] * 4 + [True]
    assert (record_of(job).status, record_of(job).reports) == ("finished", reports)


class Ended(BaseException):
    """In the place of a process's end."""


def ends(status):
    assert status == EXIT
    raise Ended


def test_a_process_trains_no_second_trial_beside_one_that_does_not_end(job, monkeypatch):
    """Both would be the one worker of this process. It ends in a step: in a reset Ray Tune would give up the new trial."""
    waits = threading.Event()
    monkeypatch.setattr(trial, "STOP_SECONDS", 0.01)
    monkeypatch.setattr(trial.os, "_exit", ends)
    monkeypatch.setattr(trial, "train", lambda *_: waits.wait())
    tried = SearchTrial.__new__(SearchTrial)
    tried.setup(VALUES, replace(job, here=True))
    assert tried.reset_config(VALUES)
    with pytest.raises(Ended):
        tried.step()
    waits.set()


@pytest.mark.parametrize("here", [True, False])
def test_after_a_trial_that_failed_the_next_one_has_a_fresh_process(job, monkeypatch, here):
    """Where it trained in this one: its memory, or a device's, may not be what it was."""

    def fails(*_):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(trial.os, "_exit", ends)
    monkeypatch.setattr(trial, "train", fails)
    tried = SearchTrial.__new__(SearchTrial)
    tried.setup(VALUES, replace(job, here=here))
    assert tried.step()[OVER]
    monkeypatch.setattr(trial, "train", trains)
    tried.reset_config({"optim.lr": 2e-3})
    if here:
        with pytest.raises(Ended):
            tried.step()
    else:
        assert tried.step()["validation_loss"] == 0.5


def test_a_trial_that_is_its_own_worker_scores_its_pictures_itself(job, monkeypatch):
    """A task would wait for the resources that this process holds."""
    asked = replace(job, here=True, spec=job.spec.model_copy(update={"objective": ("clip_score",)}))
    monkeypatch.setattr(trial, "score_run", lambda *_: {"clip_score": 0.25})
    monkeypatch.setattr(trial.ray, "remote", never)
    results(asked, monkeypatch, trains)
    assert record_of(asked).best("clip_score") == 0.25
