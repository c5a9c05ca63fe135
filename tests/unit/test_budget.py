"""What ends a search: trials, hours, GPU hours, money; and the nodes that it sees come and go. No trial runs."""

import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from raysd.cli.specs import recipe_of
from raysd.config import SearchSpec, load, override
from raysd.config.search import BudgetSpec
from raysd.errors import RequestError
from raysd.storage import Storage
from raysd.train import runs
from raysd.tune import follow, nodes, records
from raysd.tune import search as searching
from raysd.tune.follow import Budget, Progress, signals_given_back
from raysd.tune.nodes import Timeline
from raysd.tune.records import SearchRecord, TrialRecord
from raysd.tune.room import Room
from raysd.tune.search import DRIVER_MEMORY, Driver
from raysd.tune.space import key_of

CHOICE = {"kind": "choice", "values": [2, 4, 8]}


@pytest.fixture
def store(tmp_path):
    return records.storage_of(Storage(str(tmp_path)), "s")


def tried(store, key, seconds, workers=1, gpus=0):
    trial = TrialRecord(key, {}, f"s-{key}", "running", seconds=seconds, workers=workers, gpus=gpus)
    records.write_trial(store, trial)


def spent(store, before=0.0, **budget):
    found = Budget(BudgetSpec(**budget), store, before)
    assert found("trial", {}) == found.stop_all(), "asked of one trial or of all"
    return found.spent


def test_hours_are_those_of_the_clock_over_all_attempts(store):
    assert spent(store, before=3500, hours=1) is None
    assert spent(store, before=3600, hours=1) == "budget.hours"
    running = Budget(BudgetSpec(hours=1), store, before=3500)
    assert not running.stop_all()
    running.began -= 101
    assert running.stop_all()


def test_gpu_hours_are_those_of_all_gpus_of_all_trials(store):
    tried(store, "a", 1800, workers=2, gpus=2)
    tried(store, "b", 3000, workers=4, gpus=0)
    assert spent(store, gpu_hours=1.1) is None
    tried(store, "c", 361, gpus=1)
    assert spent(store, gpu_hours=1.1) == "budget.gpu_hours"
    assert spent(store, hours=1) is None, "those of the clock are another matter"


def test_money_is_the_price_of_all_worker_hours(store):
    tried(store, "a", 1800, workers=4)
    assert spent(store, money=6.1, price=3) is None
    tried(store, "b", 120)
    assert spent(store, money=6.1, price=3) == "budget.money"
    assert spent(store, money=6.1, price=2) is None


def test_a_trial_that_runs_has_cost_what_it_has_not_written_yet(store):
    """It writes at a validation, and there may be an hour to the next."""
    trial = TrialRecord("a", {}, "s-a", "running", seconds=1800, gpus=1, written=time.time() - 1900)
    records.write_trial(store, trial)
    assert spent(store, gpu_hours=1) == "budget.gpu_hours"
    records.write_trial(store, replace(trial, status="interrupted"))
    assert spent(store, gpu_hours=1) is None


def test_a_search_that_goes_on_does_not_pay_for_the_time_in_between(tmp_path, store, monkeypatch):
    """Its driver was killed an hour ago, and what it wrote says that a trial runs."""
    records.write_trial(store, TrialRecord("a", {}, "s-a", "running", seconds=60, gpus=1, written=time.time() - 3600))
    space = {"method.rank": CHOICE}
    driver = driver_of(tmp_path, {"recipe": "x", "space": space, "budget": {"trials": 3, "gpu_hours": 1}})
    monkeypatch.setattr(driver, "_tune", lambda: spent(store, gpu_hours=1) or "nothing is spent")
    assert driver._tune_and_count() == "nothing is spent"


def test_the_trials_are_not_read_at_every_step_of_every_trial(store, monkeypatch):
    reads = []
    monkeypatch.setattr(records, "trials", lambda store: reads.append(store) or [])
    budget = Budget(BudgetSpec(gpu_hours=1), store, 0)
    assert [budget("trial", {}) for _ in range(5)] == [False] * 5
    assert len(reads) == 1


def test_how_the_process_ends_is_given_back(store):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with signals_given_back():
        Progress(None, None, print, store, threading.Event()).setup()
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (None, ""),
        ("exit code 75", ""),
        ("ray.exceptions.OutOfMemoryError: killed", ": the last one was killed, as its node ran out of memory"),
    ],
)
def test_a_trial_whose_own_process_dies_too_often_has_failed_with_a_reason(store, tmp_path, error, said):
    values = {"optim.lr": 1e-3}
    records.write_trial(store, TrialRecord(key_of(values), values, "s-x", "running"))
    spec = load(
        SearchSpec,
        {"recipe": "x", "space": {"optim.lr": {"kind": "choice", "values": [1e-3]}}, "budget": {"trials": 1}},
    )
    told = []
    (tmp_path / "error.txt").write_text(error or "")
    trial = SimpleNamespace(config=values, error_file=error and str(tmp_path / "error.txt"))
    Progress(spec, None, told.append, store, threading.Event()).on_trial_error(1, [], trial)
    record = records.read_trial(store, key_of(values))
    assert (record.status, record.reason) == ("failed", f"its process died too often{said}")
    assert told[0]["text"] == f"trial 1/1: its process died too often{said}"


def test_what_is_spent_stays_spent_and_trials_alone_never_stop_what_runs(store):
    tried(store, "a", 10**6, workers=8, gpus=8)
    assert spent(store, before=10**6, trials=1) is None
    budget = Budget(BudgetSpec(gpu_hours=1), store, 0)
    assert budget.stop_all()
    tried(store, "a", 0)
    assert budget.stop_all()


@pytest.mark.parametrize(
    ("searcher", "budget", "samples", "trials"),
    [("random", {"trials": 5}, 5, 5), ("optuna", {"trials": 5}, 5, 5), ("grid", {}, 9, 9)],
)
def test_no_more_trials_are_asked_for_than_the_budget_says(tmp_path, store, searcher, budget, samples, trials):
    space = {"method.rank": CHOICE, "optim.batch_size": CHOICE}
    body = {"recipe": "lora-demo", "space": space, "searcher": {"kind": searcher}, "budget": budget}
    assert driver_of(tmp_path, body)._tune_config().num_samples == samples
    assert load(SearchSpec, body).trials == trials


def driver_of(tmp_path, body):
    """A driver that starts nothing by itself."""
    spec, root = load(SearchSpec, body), Storage(str(tmp_path))
    frozen, room = SimpleNamespace(train=(0, 1, 2, 3)), Room(2, 1, 0)
    store, record = records.storage_of(root, "s"), SearchRecord("s", {}, {})
    return Driver(spec, recipe_of("lora-demo"), record, root, store, frozen, (), room, print, threading.Event())


def test_the_hours_of_a_driver_that_is_killed_count(tmp_path, monkeypatch):
    """Else a budget of hours would begin again with each of them."""
    monkeypatch.setattr(follow, "NOTE_SECONDS", 0.0)
    driver = driver_of(tmp_path, {"recipe": "lora-demo", "space": {"optim.lr": CHOICE}, "budget": {"trials": 1}})
    driver.timeline = SimpleNamespace(rows=[(0.0, 1)])
    driver.record, driver.before, driver.began = replace(driver.record, seconds=50.0), 50.0, time.monotonic() - 7
    Progress(driver.spec, None, print, driver.store, driver.lost, driver._note).on_step_begin(1, [])
    kept = records.read(Storage(str(tmp_path)), "s")
    assert kept.seconds == pytest.approx(57, abs=2)
    assert kept.nodes == ((0.0, 1),)


def test_the_best_on_all_pictures_is_a_run_for_each_number_of_epochs(tmp_path, monkeypatch):
    """A search that goes on may find another number, and the run of the former one is another run. All names are short."""
    names, longest = [], "s" * records.LONGEST_NAME
    body = {"recipe": "lora-demo", "space": {"optim.lr": CHOICE}, "budget": {"trials": 1}}
    monkeypatch.setattr(searching, "train", lambda spec, name, *_: names.append(name) or SimpleNamespace(finished=True))
    driver = driver_of(tmp_path, body)
    driver.record = replace(driver.record, name=longest)
    for epoch in (1.5, 123.456789, 1.5):
        reports = ({"step": 3, "epoch": epoch, "validation_loss": 0.1},)
        driver._retrain(TrialRecord("k", {"optim.lr": 2}, "s-k", "finished", reports=reports))
    assert names[0] == names[2] != names[1]
    for name in (*names, records.run_of(longest, key_of({"optim.lr": 2}))):
        assert name.startswith(longest)
        runs.storage_of(Storage(str(tmp_path)), name)
    with pytest.raises(RequestError, match="48 characters at most"):
        records.storage_of(Storage(str(tmp_path)), longest + "s")


@pytest.mark.parametrize(
    ("space", "scale", "here"),
    [
        ({"optim.lr": CHOICE}, {}, True),
        ({"optim.lr": CHOICE}, {"scale.workers": 2}, False),
        ({"optim.lr": CHOICE}, {"scale.workers": (1, 2)}, False),
        ({"scale.workers": {"kind": "choice", "values": [1, 2]}}, {}, False),
        ({"scale.gpus": {"kind": "choice", "values": [False, None]}}, {}, False),
    ],
)
def test_trials_of_one_worker_train_in_their_own_processes(tmp_path, space, scale, here):
    """Which have a worker's resources then, and none else: several workers have theirs beside."""
    driver = driver_of(tmp_path, {"recipe": "lora-demo", "space": space, "budget": {"trials": 1}})
    driver.training = override(driver.training, {"scale.workers": 1, "scale.zero_stage": 0, **scale})
    assert driver._one_worker() is here
    driver.training = override(driver.training, {"scale.accelerator": "A100"})
    assert driver._bundle(True) == {"CPU": 1, "GPU": 0, "accelerator_type:A100": 0.001}
    assert driver._bundle(False) == {"CPU": 0, "memory": DRIVER_MEMORY}


def test_a_search_that_goes_on_gives_optuna_what_was_tried_and_tries_something_else(tmp_path, store):
    """Else its generator would begin again, and the first settings would be tried twice."""
    space = {"optim.lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-2}}
    body = {"recipe": "lora-demo", "space": space, "budget": {"trials": 4}}
    searcher = driver_of(tmp_path, body)._tune_config().search_alg
    first = [searcher.suggest(name) for name in ("a", "b")]
    for number, values in enumerate(first):
        records.write_trial(store, TrialRecord(f"k{number}", values, f"s-{number}", "finished", started=number))
    again = driver_of(tmp_path, body)._tune_config().search_alg
    second = [again.suggest(name) for name in ("a", "b", "c", "d")]
    assert second[:2] == first
    assert len({values["optim.lr"] for values in second}) == 4


def test_each_point_of_a_grid_is_a_trial_though_its_values_are_lists(tmp_path):
    """As Ray Tune makes trials of them, in the same order whenever the search goes on."""
    from ray.tune import Trainable
    from ray.tune.experiment import Experiment
    from ray.tune.search import SearchGenerator

    values = {"optim.betas": [[0.9, 0.99], [0.9, 0.999]], "scale.workers": [[1, 2], 2], "scale.compile": [True, False]}
    space = {path: {"kind": "choice", "values": each} for path, each in values.items()}
    body = {"recipe": "lora-demo", "space": space, "searcher": {"kind": "grid"}, "budget": {}}
    orders = []
    for _ in range(2):
        config = driver_of(tmp_path, body)._tune_config()
        generator = SearchGenerator(config.search_alg)
        generator.add_configurations(Experiment("s", Trainable, num_samples=config.num_samples))
        orders.append([generator.next_trial().config for _ in range(8)])
        assert generator.is_finished()
        assert config.max_concurrent_trials == 2
    assert orders[0] == orders[1]
    assert len({key_of(values) for values in orders[0]}) == 8
    assert all(found[path] in values[path] for found in orders[0] for path in values)


def rows_of(counts, monkeypatch, given_up=False, most=30.0):
    """The timeline of a cluster that has these numbers of nodes, one look after the other, and the last from then on."""
    monkeypatch.setattr(nodes, "PERIOD", 0.01)
    left = list(counts)
    stop = threading.Event()
    if given_up:
        stop.set()
    with Timeline([], 0.0, lambda: left.pop(0) if len(left) > 1 else left[0]) as timeline:
        end = time.monotonic() + 10
        while timeline.most < max(counts):
            assert time.monotonic() < end
            time.sleep(0.001)
        timeline.wait(stop, most)
    return [count for _, count in timeline.rows], timeline.grown


def test_the_timeline_goes_on_until_the_nodes_that_came_have_gone(monkeypatch):
    assert rows_of([1, 1, 2, 3, *[3] * 20, 2, 1], monkeypatch) == ([1, 2, 3, 2, 1], False)


def test_nothing_is_waited_for_where_no_node_came_and_not_for_ever(monkeypatch):
    began = time.monotonic()
    assert rows_of([2, 1], monkeypatch)[1] is False
    assert rows_of([1, 3], monkeypatch, most=0.1) == ([1, 3], True)
    assert rows_of([1, 3], monkeypatch, given_up=True) == ([1, 3], True)
    assert time.monotonic() - began < 20


def test_a_later_attempt_goes_on_after_the_rows_of_the_one_before():
    with Timeline([(0.0, 1), (130.0, 3)], 100.0, lambda: 1) as timeline:
        assert timeline.rows[:2] == [(0.0, 1), (130.0, 3)]
        assert timeline.rows[2][0] >= 130.0
