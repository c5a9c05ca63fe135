"""Searches with real trials: each a Ray Train run with DeepSpeed, on a shared cluster."""

import json
import math

import psutil
import pytest

from raysd.storage import Storage
from raysd.train import checkpoint
from raysd.tune import records
from tests.base import toml
from tests.cluster import json_of, raysd, start
from tests.integration.test_survive import wait_until


@pytest.fixture
def recipe(tiny_base, tiny_pictures, tmp_path):
    changes = {"data__validation": 0.3, "optim__clip": None, "scale__cpus": 1, "checkpoint__every": 4}
    return toml(tmp_path, tiny_base, tiny_pictures, **changes)


def search_file(folder, recipe, space, objective="validation_loss", **tables):
    file = folder / "search.toml"
    rest = {"scheduler": {"kind": "none", "every": 2}, **tables}
    text = f'recipe = "{recipe}"\nobjective = {json.dumps(objective)}\n[space]\n'
    text += "".join(f'"{path}" = {_inline(value)}\n' for path, value in space.items())
    for name, table in rest.items():
        text += f"[{name}]\n" + "".join(f'"{key}" = {json.dumps(value)}\n' for key, value in table.items())
    file.write_text(text)
    return file


def _inline(table):
    return "{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) + " }"


def nothing_is_held():
    """No CPU taken and no placement group left on the cluster."""
    import ray
    from ray.util import placement_group_table

    left = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    return not left and ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]


def test_a_grid_publishes_its_best_and_a_failed_trial_says_why(recipe, ray_address, tmp_path):
    """A learning rate that ends in NaN is a finished trial with a reason, and harms no other."""
    space = {"optim.lr": {"kind": "choice", "values": [1e-3, 1e30]}}
    objective, evaluation = ["validation_loss", "kid", "clip_score"], {"count": 8, "steps": 2}
    tables = {"searcher": {"kind": "grid"}, "budget": {"price": 2.0}, "evaluation": evaluation}
    file = search_file(tmp_path, recipe, space, objective, **tables)
    done = raysd("tune", str(file), "--name", "grid", "--json", storage=tmp_path / "store", address=ray_address)
    body = json_of(done)
    found = {trial["values"]["optim.lr"]: trial for trial in body["trials"]}
    assert (body["status"], body["ended_by"]) == ("finished", "trials")
    assert found[1e-3]["status"] == "finished"
    assert found[1e30]["status"] == "failed"
    assert "lower optim.lr" in found[1e30]["reason"]
    assert body["best"] == [found[1e-3]["key"]]
    assert body["versions"] == ["cats@1"]
    record = json_of(raysd("models", "show", "cats@1", "--json", storage=tmp_path / "store"))["record"]
    assert record["run"]["name"] == found[1e-3]["run"]
    assert record["spec"]["optim"]["lr"] == 1e-3
    trial = found[1e-3]
    reports = found[1e-3]["reports"]
    scores = {name: reports[-1][name] for name in ("kid", "clip_score")}
    scores["validation_loss"] = min(report["validation_loss"] for report in reports)
    searched = {"name": "grid", "trial": trial["key"], "values": {"optim.lr": 1e-3}, "scores": scores}
    assert record["search"] == searched
    assert record["metrics"]["validation_loss"] == scores["validation_loss"]
    assert {"kid", "clip_score"} <= reports[-1].keys()
    assert not {"kid", "clip_score"} & reports[0].keys(), "pictures are drawn once, at the end"
    page = tmp_path / "page.html"
    assert raysd("tune", "report", "grid", "--html", str(page), storage=tmp_path / "store").returncode == 0
    assert found[1e-3]["run"] in page.read_text()
    words = ["tune", "resume", "grid", "--retrain", "--json"]
    again = json_of(raysd(*words, storage=tmp_path / "store", address=ray_address))
    assert (again["versions"], again["trials"]) == (["cats@2"], body["trials"])
    whole = json_of(raysd("models", "show", "cats@2", "--json", storage=tmp_path / "store"))["record"]
    best = min(reports, key=lambda report: report["validation_loss"])
    assert whole["search"] == record["search"]
    assert whole["pictures"] == {"train": 10, "validation": 0}
    assert whole["spec"]["optim"]["epochs"] == best["epoch"]
    assert whole["run"]["step"] == math.ceil(best["epoch"] * 10 / 4)
    wait_until(nothing_is_held, seconds=30)


@pytest.mark.long
def test_a_search_whose_driver_was_killed_goes_on_and_runs_no_finished_trial_again(recipe, ray_address, tmp_path):
    store = tmp_path / "store"
    space = {"optim.lr": {"kind": "choice", "values": [1e-4, 3e-3, 1e-2]}}
    file = search_file(tmp_path, recipe, space, searcher={"kind": "grid"}, budget={})
    words = ["--name", "killed", "--concurrent", "1", "--optim.steps", "12", "--scale.workers", "2"]
    process = start("tune", str(file), *words, storage=store, address=ray_address)
    folder = records.storage_of(Storage(str(store)), "killed")

    def one_done_and_one_begun():
        found = records.trials(folder)
        return [t for t in found if t.status == "finished"] and any(t.status == "running" and t.reports for t in found)

    wait_until(one_done_and_one_begun, process, seconds=600)
    process.kill()
    process.wait()
    before = {trial.key: trial for trial in records.trials(folder)}
    assert json_of(raysd("tune", "status", "killed", "--json", storage=store))["status"] == "interrupted"
    process = start("tune", "resume", "killed", "--json", storage=store, address=ray_address)

    def goes_on():
        return any(
            t.status == "running" and len(t.reports) > len(before[t.key].reports)
            for t in records.trials(folder)
            if t.key in before
        )

    wait_until(goes_on, process, seconds=600)
    own("RayTrainWorker")[-1].kill()
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    body = json.loads(out)
    assert [trial["status"] for trial in body["trials"]] == ["finished"] * 3
    assert len({trial["run"] for trial in body["trials"]}) == 3
    after = {trial.key: trial for trial in records.trials(folder)}
    for key, trial in before.items():
        if trial.status == "finished":
            assert after[key] == trial, "a finished trial was run again"
        else:
            assert after[key].reports[: len(trial.reports)] == trial.reports
            steps = [report["step"] for report in after[key].reports]
            assert steps == sorted(set(steps)), "a validation was reported twice"
    wait_until(nothing_is_held, seconds=30)


@pytest.mark.long
def test_median_stopping_with_random_settings_ends_and_stops_nobody_early(recipe, ray_address, tmp_path):
    """Two at once, of the searcher and the scheduler that no other search here has."""
    space = {"optim.lr": {"kind": "loguniform", "low": 1e-6, "high": 1e-2}}
    tables = {"searcher": {"kind": "random"}, "scheduler": {"kind": "median", "every": 2, "grace": 2}}
    file = search_file(tmp_path, recipe, space, **tables, budget={"trials": 4})
    words = ["--name", "median", "--concurrent", "2", "--optim.steps", "12", "--json"]
    body = json_of(raysd("tune", str(file), *words, storage=tmp_path / "store", address=ray_address))
    assert (body["status"], body["ended_by"], body["versions"]) == ("finished", "trials", ["cats@1"])
    assert len({trial["values"]["optim.lr"] for trial in body["trials"]}) == 4
    assert {trial["status"] for trial in body["trials"]} <= {"finished", "stopped"}
    assert all(trial["reports"][-1]["epoch"] >= 2 for trial in body["trials"])
    assert "finished" in {trial["status"] for trial in body["trials"]}
    wait_until(nothing_is_held, seconds=30)


@pytest.mark.long
def test_optuna_goes_on_with_what_it_was_told_and_publishes_the_front(recipe, ray_address, tmp_path):
    """Two objectives, and the driver killed after the first trial that finished: it is not run again, and it counts."""
    store, objective = tmp_path / "store", ["validation_loss", "seconds"]
    space = {"optim.lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-2}}
    file = search_file(tmp_path, recipe, space, objective, budget={"trials": 4})
    words = ["--name", "front", "--concurrent", "2", "--optim.steps", "6"]
    process = start("tune", str(file), *words, storage=store, address=ray_address)
    folder = records.storage_of(Storage(str(store)), "front")
    wait_until(lambda: any(t.status == "finished" for t in records.trials(folder)), process, seconds=600)
    process.kill()
    process.wait()
    before = {trial.key: trial for trial in records.trials(folder)}
    body = json_of(raysd("tune", "resume", "front", "--json", storage=store, address=ray_address))
    after = {trial.key: trial for trial in records.trials(folder)}
    assert [trial.status for trial in after.values()] == ["finished"] * 4
    assert before.keys() <= after.keys(), "the searcher was not given what was tried"
    assert [key for key, trial in before.items() if trial.status == "finished" and after[key] != trial] == []
    points = {key: (trial.best("validation_loss"), trial.best("seconds")) for key, trial in after.items()}
    beaten = {
        key for key, (a, b) in points.items() if any(c <= a and d <= b and (c, d) != (a, b) for c, d in points.values())
    }
    assert set(body["best"]) == points.keys() - beaten
    assert body["versions"] == [f"cats@{number}" for number in range(1, 5 - len(beaten))]
    for ref, key in zip(body["versions"], body["best"], strict=True):
        record = json_of(raysd("models", "show", ref, "--json", storage=store))["record"]
        assert (record["search"]["trial"], record["run"]["name"]) == (key, after[key].run)
    wait_until(nothing_is_held, seconds=30)


@pytest.mark.long
def test_a_trial_whose_process_dies_goes_on_and_its_neighbour_notices_nothing(recipe, ray_address, tmp_path):
    """With one worker a trial is its process; the test before this one kills one of several workers."""
    store, steps = tmp_path / "store", 24
    space = {"optim.lr": {"kind": "choice", "values": [1e-3, 3e-3]}}
    file = search_file(tmp_path, recipe, space, searcher={"kind": "grid"}, budget={})
    words = ["--name", "pair", "--concurrent", "2", "--optim.steps", str(steps), "--json"]
    process = start("tune", str(file), *words, storage=store, address=ray_address)
    folder = records.storage_of(Storage(str(store)), "pair")

    def both_have_checkpoints():
        found = records.trials(folder)
        runs = [Storage(str(store)).child(f"runs/{trial.run}") for trial in found]
        return len(found) == 2 and all(trial.reports for trial in found) and all(map(checkpoint.latest, runs))

    wait_until(both_have_checkpoints, process, seconds=600)
    before = {trial.key: trial for trial in records.trials(folder)}
    assert [trial.status for trial in before.values()] == ["running"] * 2
    own("ResourceTrainable")[-1].kill()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    trials = {trial["key"]: trial for trial in json.loads(out)["trials"]}
    assert [trial["status"] for trial in trials.values()] == ["finished"] * 2
    taken = {key: steps_of_last_attempt(store, trial["run"]) for key, trial in trials.items()}
    assert sorted(taken.values())[0] < steps, "no worker was started again"
    assert sorted(taken.values())[1] == steps, "the neighbour was started again"
    for key, trial in trials.items():
        assert trial["reports"][: len(before[key].reports)] == list(before[key].reports)
    wait_until(nothing_is_held, seconds=30)


def own(name):
    """Processes of this session's cluster by what Ray calls them: another one's may run on this machine."""
    family = psutil.Process().children(recursive=True)
    return [p for p in family if p.is_running() and name in " ".join(p.cmdline())]


def steps_of_last_attempt(store, run):
    return json.loads((store / "runs" / run / "usage.json").read_text())["steps"]


@pytest.mark.long
def test_ending_a_search_holds_nothing_and_what_the_scheduler_stopped_stays_stopped(recipe, ray_address, tmp_path):
    store = tmp_path / "store"
    space = {"optim.lr": {"kind": "choice", "values": [1e-2, 1e-6, 2e-6]}}
    scheduler = {"kind": "asha", "every": 2, "grace": 2, "reduction": 3}
    file = search_file(tmp_path, recipe, space, searcher={"kind": "grid"}, scheduler=scheduler, budget={})
    words = ["--name", "asha", "--concurrent", "1", "--optim.steps", "40"]
    process = start("tune", str(file), *words, storage=store, address=ray_address)
    folder = records.storage_of(Storage(str(store)), "asha")
    wait_until(lambda: len(records.trials(folder)) == 2 and records.trials(folder)[1].reports, process, seconds=600)
    process.terminate()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "go on: raysd tune resume asha" in err
    wait_until(nothing_is_held, seconds=60)
    body = json_of(raysd("tune", "resume", "asha", "--json", storage=store, address=ray_address))
    states = {trial["values"]["optim.lr"]: trial["status"] for trial in body["trials"]}
    assert states == {1e-2: "finished", 1e-6: "stopped", 2e-6: "stopped"}
    epochs = {trial["values"]["optim.lr"]: trial["reports"][-1]["epoch"] for trial in body["trials"]}
    assert max(epochs[1e-6], epochs[2e-6]) < epochs[1e-2]


def test_more_than_the_cluster_may_ever_have_is_refused_before_anything_is_written(recipe, ray_address, tmp_path):
    file = search_file(tmp_path, recipe, {"optim.lr": {"kind": "choice", "values": [1e-3]}}, budget={"trials": 1})
    done = raysd("tune", str(file), "--scale.gpus", "true", storage=tmp_path / "store", address=ray_address)
    assert done.returncode == 2
    assert "this cluster has 0 GPUs; if it grows, say how far: RAYSD_CLUSTER_RESOURCES=" in done.stderr
    assert not list((tmp_path / "store").rglob("*.json"))
