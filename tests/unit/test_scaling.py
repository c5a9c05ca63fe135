"""Replicas follow the pictures at hand; the policy is asked with Ray Serve's own context."""

import time
from collections.abc import Sequence
from typing import Any

import pytest
from ray.serve._private.autoscaling_state import AutoscalingContext
from ray.serve._private.common import DeploymentID
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import DeploymentSchema

from raysd.config import load
from raysd.config.serving import ModelSpec
from raysd.serve.app import _deployment
from raysd.serve.scaling import by_work


def context(told: Sequence[tuple[float, float, float]], target: float = 8.0) -> Any:
    """Of one replica for each (pictures, occupancy, queued)."""
    named = zip(("pictures", "occupancy", "queued"), zip(*told, strict=True), strict=True)
    return AutoscalingContext(
        deployment_id=DeploymentID("model-cats", "raysd"),
        deployment_name="model-cats",
        app_name="raysd",
        current_num_replicas=max(1, len(told)),
        target_num_replicas=max(1, len(told)),
        running_replicas=[],
        total_num_requests=0,
        total_queued_requests=0,
        aggregated_metrics={name: dict(enumerate(values)) for name, values in named} if told else {},
        raw_metrics={},
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=4,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=time.time(),
        config=AutoscalingConfig(min_replicas=1, max_replicas=4, target_ongoing_requests=target),
    )


@pytest.mark.parametrize(
    ("told", "replicas"),
    [
        ([], 1),  # before the first report
        ([(0, 0, 0)], 0),
        ([(8, 0.9, 0)], 1),
        ([(8, 0.9, 16)], 3),  # what nobody has claimed counts once, however many see it
        ([(8, 0.9, 8), (8, 0.9, 8)], 3),
        ([(2, 0.2, 0), (2, 0.2, 0)], 0.5),
        ([(2, 0.8, 0), (2, 0.8, 0)], 2),  # few pictures that fill the steps: large ones
    ],
)
def test_pictures_and_full_steps_decide(told: Sequence[tuple[float, float, float]], replicas: float) -> None:
    assert by_work(context(told)) == (replicas, {})


def test_a_deployment_that_may_grow_goes_by_this_policy() -> None:
    spec = load(ModelSpec, {"ref": "cats", "replicas": {"least": 0, "most": 3, "target": 5, "idle_seconds": 7}})
    config = _deployment(spec)._deployment_config.autoscaling_config
    assert config.policy.get_policy() is not None
    assert config.policy.policy_function == "raysd.serve.scaling:by_work"
    assert (config.min_replicas, config.max_replicas, config.downscale_to_zero_delay_s) == (0, 3, 7)
    assert DeploymentSchema(name="x", autoscaling_config=config.model_dump(exclude_unset=True))
    assert _deployment(load(ModelSpec, {"ref": "cats"}))._deployment_config.autoscaling_config is None
