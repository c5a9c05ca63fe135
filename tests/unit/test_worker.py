"""What a worker does besides its steps."""

from types import SimpleNamespace

import ray

from raysd.train.worker import Worker


def test_a_trial_that_is_its_own_worker_hears_that_its_node_is_taken_away(monkeypatch):
    """Ray Train's local mode has no watcher."""
    from ray._private.state import state

    worker = Worker.__new__(Worker)
    worker.job = SimpleNamespace(here=True)
    told: list[str] = []
    worker.leaving, worker._report = set(), lambda kind, text: told.append(text)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "mine"))
    draining = {"another": 0}
    monkeypatch.setattr(state, "get_draining_nodes", lambda: draining)
    assert not worker._notice()
    draining["mine"] = 0
    assert worker._notice()
    assert not worker._notice(), "it was answered with a checkpoint"
    assert len(told) == 1
