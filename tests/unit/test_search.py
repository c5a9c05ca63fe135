"""Search specs, spaces, records and reports: what can be said without running a trial."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from raysd.cli.specs import grounded_search
from raysd.config import SearchSpec, TrainingSpec, load, override, read_toml
from raysd.errors import NotFound, RaysdError, RequestError, SpecError
from raysd.storage import Storage
from raysd.tune import records, report
from raysd.tune.records import SearchRecord, TrialRecord
from raysd.tune.room import Room, room_for
from raysd.tune.search import search
from raysd.tune.space import check_choices, check_space, key_of
from tests.cluster import raysd

LR = {"kind": "loguniform", "low": 1e-4, "high": 1e-2}


def spec_of(**changes):
    return load(SearchSpec, {"recipe": "lora-demo", "space": {"optim.lr": LR}, "budget": {"trials": 3}, **changes})


@pytest.fixture(scope="module")
def training():
    from raysd.cli.specs import recipe_of

    return recipe_of("lora-demo")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "space"),
        ({"space": {"optim.lr": {**LR, "low": 0.0}}}, r"^space\.optim\.lr: low 0\.0: a log-uniform range lies above 0"),
        ({"space": {"optim.warmup": {"kind": "integer", "low": 1}}}, r"^space\.optim\.warmup\.high: required"),
        ({"space": {"optim.lr": {**LR, "hihg": 1}}}, r"^space\.optim\.lr\.hihg: unknown"),
        (
            {"space": {"choice": {"kind": "choice", "values": []}}},
            r"^space\.choice\.values: Tuple should have at least 1",
        ),
        ({"space": {"optim.lr": 1e-3}}, r"^space\.optim\.lr: is a table of fields$"),
        ({"space": {"optim.lr": {**LR, "low": 1.0}}}, "low 1.0 is not below high 0.01"),
        ({"space": {"optim.lr": {"kind": "normal"}}}, "space.optim.lr"),
        ({"objective": "fame"}, "objective"),
        ({"budget": {"trials": 0}}, "budget.trials"),
        ({"budget": {}}, "budget.trials: required"),
        ({"budget": {"trials": 3, "money": 5.0}}, "money needs price"),
        ({"searcher": {"kind": "grid"}}, "a grid is made of choices"),
        ({"objective": ["validation_loss", "seconds"]}, "with several objectives"),
        ({"evaluation": {"count": 1}}, "evaluation.count"),
        ({"evaluation": {"data": {"source": "sample"}}}, "evaluation.data: leave it out"),
        (
            {"searcher": {"kind": "grid"}, "space": {"method.rank": {"kind": "choice", "values": [1, 2, 4, 8]}}},
            "the grid has 4",
        ),
    ],
)
def test_a_malformed_search_is_named(changes, message):
    with pytest.raises(SpecError, match=message) as raised:
        spec_of(**changes)
    assert len(str(raised.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"optim.lrr": LR}, "space.optim.lrr: unknown path; did you mean optim.lr?"),
        ({"method.rank": {"kind": "choice", "values": [4, 0]}}, "space.method.rank: 0 does not do"),
        ({"optim.batch_size": {"kind": "integer", "low": 1, "high": 4}}, "at least one picture"),
        ({"optim.steps": {"kind": "uniform", "low": 10, "high": 20}}, "use kind integer or choice"),
        ({"loss.prediction": {"kind": "choice", "values": ["base"]}}, "values cannot be compared"),
        ({"data.source": {"kind": "choice", "values": ["sample"]}}, "values cannot be compared"),
        ({"validation.every": {"kind": "choice", "values": [5, 50]}}, "space.validation.every: the search sees to it"),
        ({"publish.model": {"kind": "choice", "values": ["a", "b"]}}, "space.publish.model: the search sees to it"),
        ({"track.tensorboard": {"kind": "choice", "values": [True, False]}}, "space.track.tensorboard: the search"),
        (
            {
                "method.kind": {"kind": "choice", "values": ["lora", "full"]},
                "method.rank": {"kind": "choice", "values": [4, 8]},
            },
            "space: method.kind 'full', method.rank 4 do not go together: method.rank",
        ),
        (
            {name: {"kind": "integer", "low": 2, "high": 4} for name in ("optim.steps", "optim.epochs")},
            "space: optim.steps 2, optim.epochs 2 do not go together",
        ),
    ],
)
def test_a_space_that_the_training_does_not_have_is_named(training, space, message):
    with pytest.raises(SpecError) as raised:
        check_space(spec_of(space=space), training)
    assert message in str(raised.value)


@pytest.mark.parametrize("kind", ["asha", "median", "none"])
@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("loss.prediction", ["epsilon", "v_prediction"]),
        ("data.resolution", [32, 64]),
        ("validation.timesteps", [1, 8]),
        ("base", ["tiny-sd", "cats@1"]),
        ("seed", [1, 2]),
    ],
)
def test_losses_that_cannot_be_compared_stop_no_trial(training, kind, path, values):
    """Whatever the objective is: the scheduler goes by the loss."""
    space = {path: {"kind": "choice", "values": values}}
    spec = spec_of(space=space, objective="clip_score", scheduler={"kind": kind})
    if kind == "none":
        return check_space(spec, training)
    with pytest.raises(SpecError, match=rf"space\.{path}: .*{kind} goes by it: use scheduler\.kind none"):
        check_space(spec, training)


def test_bases_that_are_not_there_are_said_before_anything_starts(training, tmp_path, monkeypatch):
    """And mean what they meant where the command was typed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("raysd.cluster.join", lambda most: pytest.fail("it went on"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/model_index.json").write_text("{}")
    space = {"base": {"kind": "choice", "values": ["tiny-sd", "./mine", "./absent"]}}
    spec = grounded_search(
        spec_of(space=space, objective="kid", scheduler={"kind": "none"}, searcher={"kind": "random"})
    )
    assert spec.space["base"].values == ("tiny-sd", str(tmp_path / "mine"), "./absent")
    for values, named in ((("tiny-sd", "./absent"), "absent"), (("tiny-sd", "nosuch@1"), "nosuch")):
        asked = override(spec, {"space": {"base": {"kind": "choice", "values": list(values)}}})
        with pytest.raises(RequestError, match=rf"space\.base: .*{named}"):
            search(asked, training, "s", Storage(str(tmp_path / "store")), print)


def joined(monkeypatch, resources):
    """A cluster of that size."""
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("raysd.cluster.capacity", lambda: resources)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"scale.workers": {"kind": "choice", "values": [1, 5]}}, "scale.workers 5 with 1 CPUs each"),
        ({"scale.workers": {"kind": "choice", "values": [1, [5, 8]]}}, "scale.workers 5 with 1 CPUs each"),
        ({"scale.cpus": {"kind": "integer", "low": 1, "high": 8}}, "scale.workers 1 with 8 CPUs each"),
        (
            {f"scale.{name}": {"kind": "choice", "values": [1, 3]} for name in ("workers", "cpus")},
            "scale.workers 3 with 3 CPUs each",
        ),
        ({"scale.gpus": {"kind": "choice", "values": [False, True]}}, "scale.workers 1 with a GPU each"),
    ],
)
def test_a_space_whose_largest_trial_fits_no_cluster_is_refused(training, monkeypatch, space, message):
    """What the recipe itself asks for fits."""
    joined(monkeypatch, {"CPU": 4.0})
    small = override(training, {"scale.workers": 1, "scale.zero_stage": 0})
    assert room_for(spec_of(), small).trials == 3
    with pytest.raises(RequestError, match=r"this cluster has \d .PUs") as raised:
        room_for(spec_of(space=space), small)
    assert message in str(raised.value)


def test_workers_of_the_largest_trial_of_a_space_have_room(training, monkeypatch):
    joined(monkeypatch, {"CPU": 4.0, "GPU": 2.0})
    small = override(training, {"scale.workers": 1, "scale.zero_stage": 0, "scale.gpus": False})
    spec = spec_of(space={"scale.workers": {"kind": "choice", "values": [1, 4]}}, concurrent=1)
    assert room_for(spec, small) == Room(trials=1, cpus=1, gpus=0)
    spec = spec_of(space={"scale.gpus": {"kind": "choice", "values": [False, True]}})
    assert room_for(spec, small) == Room(trials=2, cpus=1, gpus=1)


def test_a_search_that_holds_no_picture_out_starts_nothing(tiny_base, tiny_pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("raysd.cluster.join", lambda most: pytest.fail("it went on"))
    data = {"source": str(tiny_pictures), "resolution": 64, "validation": 0.0}
    body = {"base": str(tiny_base), "data": data, "optim": {"steps": 2}}
    root = tmp_path / "store"
    with pytest.raises(RequestError, match=r"data\.validation: no picture is held out"):
        search(spec_of(), load(TrainingSpec, body), "s", Storage(str(root)), lambda event: None)
    assert not root.exists()


def test_optuna_takes_no_lists():
    with pytest.raises(RequestError, match=r"space\.optim\.betas: optuna takes plain values"):
        check_choices(spec_of(space={"optim.betas": {"kind": "choice", "values": [[0.9, 0.99], [0.9, 0.999]]}}))


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "tune").glob("*.toml")), ids=lambda file: file.name
)
def test_the_searches_that_ship_fit_their_recipes(file):
    from raysd.cli.specs import recipe_of

    spec = load(SearchSpec, read_toml(file), file.name)
    check_space(spec, override(recipe_of(spec.recipe), spec.training))


def test_a_wrong_search_ends_before_anything_is_written(tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text(
        'recipe = "lora-demo"\nbudget = { trials = 2 }\n[space]\n"optim.lrr" = {kind="choice", values=[1]}\n'
    )
    done = raysd("tune", str(file), storage=tmp_path / "store")
    assert done.returncode == 2
    assert "did you mean optim.lr?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "store").exists()
    assert raysd("tune", "status", "nosuch", storage=tmp_path / "store").returncode == 2


def trial(number, losses, status="finished", **changes):
    reports = tuple(
        {"step": 2 * n, "epoch": float(n), "validation_loss": loss, "seconds": 3.0 * n}
        for n, loss in enumerate(losses, 1)
    )
    values = {"optim.lr": 10 ** (-2 - number / 3), "method.rank": 4 * number}
    return TrialRecord(
        key_of(values), values, f"s-{number}", status, reports=reports, started=number, seconds=60, **changes
    )


TRIALS = [
    trial(1, [0.5, 0.3, 0.4]),
    trial(2, [0.5, 0.2]),
    trial(3, [0.9], "stopped", reason="worse than others by then"),
    trial(4, [], "failed", reason="out of memory <b>&"),
    trial(5, [0.25, 0.25, 0.21]),
]
SPEC = {
    "recipe": "lora-demo",
    "space": {"optim.lr": LR, "method.rank": {"kind": "choice", "values": [4, 8, 12, 16, 20]}},
}


def test_trials_are_ranked_by_the_best_they_reported():
    assert [found.run for found in records.ranked(TRIALS, ["validation_loss"])] == ["s-2", "s-5", "s-1", "s-3"]
    assert [found.run for found in records.front(TRIALS, ["validation_loss"])] == ["s-2"]


def test_a_trial_that_failed_is_the_last_whatever_it_reported_before():
    failed = trial(6, [0.3, 0.01], "failed", reason="the loss is nan")
    waiting = trial(7, [], "running")
    found = [failed, *TRIALS, waiting]
    assert failed not in records.ranked(found, ["validation_loss"])
    order = [row.run for row in report._ordered(load(SearchSpec, {**SPEC, "budget": {"trials": 9}}), found)]
    assert order == ["s-2", "s-5", "s-1", "s-3", "s-7", "s-6", "s-4"]


def test_what_was_cut_short_wins_no_race():
    cut = trial(6, [0.9], "cut", reason="budget.hours is spent")
    for objective in (["seconds"], ["validation_loss", "seconds"]):
        assert cut not in records.front([*TRIALS, cut], objective)
        assert records.front([cut], objective) == []


def test_the_front_holds_what_nothing_beats():
    """In loss and seconds: (0.3, 9), (0.2, 6), (0.21, 9), (0.6, 3)."""
    fast = trial(6, [0.6])
    assert {found.run for found in records.front([*TRIALS, fast], ["validation_loss", "seconds"])} == {"s-2", "s-6"}


def test_a_score_that_is_better_higher_ranks_the_highest_first():
    high, low = trial(1, [0.5, 0.3]), trial(2, [0.5, 0.2])
    scored = [
        replace(t, reports=(*t.reports[:-1], {**t.reports[-1], "clip_score": s}))
        for t, s in ((high, 30.0), (low, 20.0))
    ]
    assert [found.run for found in records.ranked(scored, ["clip_score"])] == ["s-1", "s-2"]
    assert [found.run for found in records.front(scored, ["clip_score"])] == ["s-1"]
    assert {found.run for found in records.front(scored, ["validation_loss", "clip_score"])} == {"s-1", "s-2"}
    assert records.ranked([trial(3, [0.1])], ["clip_score"]) == [], "it has drawn nothing"


def test_what_the_budget_cut_short_is_published_where_it_is_better():
    cut = trial(6, [0.5, 0.1], "cut", reason="budget.hours is spent")
    assert [found.run for found in records.front([*TRIALS, cut], ["validation_loss"])] == ["s-6"]
    assert records.front([cut], ["validation_loss", "kid"]) == [], "it has drawn nothing"


def test_what_the_scheduler_stopped_stays_stopped_though_its_process_wrote_last(tmp_path):
    """The driver may die at any time after, and the process of the trial may write that it was interrupted."""
    store = records.storage_of(Storage(str(tmp_path)), "s")
    mine, other = trial(1, [0.5], "running"), trial(2, [0.4], "interrupted")
    for found in (mine, other):
        records.write_trial(store, found)
    records.mark_stopped(store, mine.key)
    records.write_trial(store, replace(mine, status="interrupted"))
    assert [found.status for found in records.trials(store)] == ["stopped", "interrupted"]
    again = records.read_trial(store, mine.key)
    assert (again.status, again.reason, again.reports) == ("stopped", records.WORSE, mine.reports)


def test_records_survive_being_written(tmp_path, training):
    store = records.storage_of(Storage(str(tmp_path)), "s")
    for found in TRIALS:
        records.write_trial(store, found)
    assert records.trials(store) == TRIALS
    assert records.read_trial(store, "nosuch") is None
    record = SearchRecord("s", spec_of().model_dump(mode="json"), training.model_dump(mode="json"), nodes=((0.0, 1),))
    records.write(store, record)
    assert records.read(Storage(str(tmp_path)), "s").status == "interrupted", "nobody holds it"
    assert records.read(Storage(str(tmp_path)), "s").search_spec() == spec_of()
    with pytest.raises(NotFound):
        records.read(Storage(str(tmp_path)), "other")
    with pytest.raises(RaysdError, match="search name"):
        records.read(Storage(str(tmp_path)), "../up")


def test_a_search_of_that_name_with_another_training_is_refused(tmp_path, training):
    root, spec = Storage(str(tmp_path)), spec_of()
    record = SearchRecord("s", spec.model_dump(mode="json"), training.model_dump(mode="json"))
    records.write(records.storage_of(root, "s"), record)
    with pytest.raises(RequestError, match="search s exists with other settings"):
        search(spec, override(training, {"optim.steps": 7}), "s", root, print)
    with pytest.raises(RequestError, match="search s exists with other settings"):
        search(override(spec, {"searcher.seed": 1}), training, "s", root, print)


def test_a_search_goes_on_with_a_larger_budget(tmp_path, training, monkeypatch):
    """One that is whole is only told again."""
    root, spec = Storage(str(tmp_path)), spec_of()
    record = SearchRecord(
        "s", spec.model_dump(mode="json"), training.model_dump(mode="json"), "finished", versions=("a@1",)
    )
    records.write(records.storage_of(root, "s"), record)
    assert search(spec, training, "s", root, print).record == record
    monkeypatch.setattr("raysd.tune.search.check_space", lambda *_: pytest.fail("it goes on"))
    with pytest.raises(pytest.fail.Exception, match="it goes on"):
        search(override(spec, {"budget.trials": 9, "concurrent": 2}), training, "s", root, print)


def test_a_judge_that_is_not_there_is_said_before_a_trial_is_trained(tiny_base, tiny_pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("raysd.cluster.join", lambda most: pytest.fail("it went on"))
    data = {"source": str(tiny_pictures), "resolution": 64, "validation": 0.3}
    asked = load(TrainingSpec, {"base": str(tiny_base), "data": data, "optim": {"steps": 2}})
    spec = spec_of(objective="clip_score", scheduler={"kind": "none"}, evaluation={"clip": str(tmp_path / "absent")})
    root = tmp_path / "store"
    with pytest.raises(NotFound, match="absent"):
        search(spec, asked, "s", Storage(str(root)), lambda event: None)
    assert not list(root.rglob("*.json"))


def test_what_trials_are_judged_with_means_what_it_meant_where_the_command_was_typed(tmp_path, monkeypatch):
    """Ray runs each trial in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    spec = grounded_search(spec_of(evaluation={"clip": "./my-clip", "prompts": "prompts.txt"}))
    found = (spec.evaluation.clip, spec.evaluation.prompts, spec.evaluation.inception)
    assert found == (str(tmp_path / "my-clip"), str(tmp_path / "prompts.txt"), None)


def test_a_searchs_secrets_are_not_shown(training, monkeypatch):
    from raysd.cli import tune

    told = []
    monkeypatch.setattr(tune, "show", lambda body, *_: told.append(json.dumps(body)))

    asked = override(training, {"data.source": "https://user:word@host.test/x.zip?X-Amz-Signature=deadbeef"})
    record = SearchRecord("s", spec_of().model_dump(mode="json"), asked.model_dump(mode="json"))
    tune._show_search(record, [], as_json=True)
    assert "https://host.test/x.zip" in told[0]
    assert not [word for word in ("word@", "deadbeef") if word in told[0]]


def test_what_the_command_says_goes_before_what_the_file_says(tmp_path, monkeypatch):
    """The file sets optim.epochs for every trial; an option of the command replaces it."""
    from raysd.cli import tune

    seen = []
    monkeypatch.setattr(
        tune, "_search", lambda spec, training, name, retrain, as_json: seen.append(training.optim.epochs)
    )
    file = tmp_path / "s.toml"
    file.write_text(
        'recipe = "lora-demo"\nbudget = { trials = 2 }\n[training]\n"optim.epochs" = 48\n'
        '[space]\n"optim.lr" = {kind="choice", values=[1e-3]}\n'
    )
    for words in ([], ["--optim.epochs", "4"]):
        CliRunner().invoke(tune.app, [str(file), *words], catch_exceptions=False)
    assert seen == [48, 4]


def test_a_path_that_is_set_for_every_trial_does_not_vary(training, tmp_path):
    from raysd.cli import tune

    with pytest.raises(SpecError, match=r"space\.optim\.lr: set for every trial as well"):
        check_space(spec_of(training={"optim.lr": 1e-3}), training)
    file = tmp_path / "s.toml"
    file.write_text(
        'recipe = "lora-demo"\nbudget = { trials = 2 }\n[space]\n"optim.batch_size" = {kind="choice", values=[4]}\n'
    )
    with pytest.raises(SpecError, match=r"space\.optim\.batch_size: set for every trial as well"):
        CliRunner().invoke(tune.app, [str(file), "--optim.batch-size", "8"], catch_exceptions=False)


def test_the_same_values_are_the_same_trial():
    assert key_of({"a": 1, "b": 2.0}) == key_of({"b": 2.0, "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})


def test_the_report_counts_and_escapes(tmp_path, training):
    spec = load(SearchSpec, {**SPEC, "budget": {"trials": 5, "price": 3.0}})
    record = SearchRecord(
        "s", spec.model_dump(mode="json"), training.model_dump(mode="json"), "finished", nodes=((0.0, 1), (4.0, 3))
    )
    spent = report.cost(record, TRIALS)
    assert spent.trials == {"finished": 3, "stopped": 1, "failed": 1}
    assert spent.epochs == 3 + 2 + 1 + 3
    assert spent.saved == training.optim.steps / 2 - 1, "a report every two steps, an epoch each"
    assert spent.worker_hours == pytest.approx(5 / 60)
    assert spent.money == pytest.approx(5 / 60 * 3.0)
    report.page(record, TRIALS, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "out of memory &lt;b&gt;&amp;" in page
    assert page.count("<svg") == 1 + 2 + 1 + 1 + 1, "curves, two parameters, parallel, importances, nodes"
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_importances_find_the_parameter_that_matters(training):
    spec = load(SearchSpec, {**SPEC, "budget": {"trials": 40}})
    found = []
    for n in range(40):
        values = {"optim.lr": 1e-4 * 1.12**n, "method.rank": [4, 8, 12, 16, 20][n * 7 % 5]}
        reports = ({"step": 1, "epoch": 1.0, "validation_loss": (n - 20) ** 2 + 0.1, "seconds": 1.0},)
        found.append(TrialRecord(key_of(values), values, f"s-{n}", "finished", reports=reports))
    weights = report.importances(spec, found)
    assert weights["optim.lr"] > 0.8
    assert sum(weights.values()) == pytest.approx(1)


def test_a_value_that_rounding_put_outside_its_range_counts_as_its_end():
    spec = load(SearchSpec, {**SPEC, "budget": {"trials": 8}})
    end, found = spec.space["optim.lr"].high, []
    for n in range(8):
        values = {"optim.lr": math.nextafter(end, 1) if n % 2 else end / (n + 2), "method.rank": 4}
        reports = ({"step": 1, "epoch": 1.0, "validation_loss": n % 2 + 0.01 * n, "seconds": 1.0},)
        found.append(TrialRecord(f"k{n}", values, f"s-{n}", "finished", reports=reports))
    assert report.importances(spec, found) == {"optim.lr": pytest.approx(1)}


def test_a_trial_that_failed_counts_as_the_worst_for_importances():
    """Those of one rank look best until they fail: that does not make the rank what decides who is best."""
    spec = load(SearchSpec, {**SPEC, "budget": {"trials": 40}})
    found = []
    for n in range(40):
        rank = [4, 8, 12, 16, 20][n * 7 % 5]
        values, loss = {"optim.lr": 1e-4 * 1.12**n, "method.rank": rank}, 0.0 if rank == 20 else (n - 20) ** 2 + 0.1
        reports = ({"step": 1, "epoch": 1.0, "validation_loss": loss, "seconds": 1.0},)
        status = "failed" if rank == 20 else "finished"
        found.append(TrialRecord(key_of(values), values, f"s-{n}", status, reports=reports))
    weights = report.importances(spec, found)
    assert weights["optim.lr"] > weights["method.rank"]
    assert report.importances(spec, [trial for trial in found if trial.status == "failed"]) == {}


def test_importances_of_choices_that_are_lists(training):
    lists = [[0.9, 0.99], [0.9, 0.999]]
    space = {"optim.betas": {"kind": "choice", "values": lists}}
    spec = load(SearchSpec, {**SPEC, "space": space, "searcher": {"kind": "random"}, "budget": {"trials": 8}})
    found = []
    for n in range(8):
        values = {"optim.betas": lists[n % 2]}
        reports = ({"step": 1, "epoch": 1.0, "validation_loss": n % 2 + 0.01 * n, "seconds": 1.0},)
        found.append(TrialRecord(f"k{n}", values, f"s-{n}", "finished", reports=reports))
    weights = report.importances(spec, found)
    assert weights == {"optim.betas": pytest.approx(1)}
    assert json.dumps(weights)
