"""How many replicas a model needs: Ray Serve's autoscaling policy, by the pictures at hand and by how full the steps are.

What each replica tells of itself every few seconds (`Replica.record_autoscaling_stats`): `pictures` in its scheduler,
`occupancy` of its denoising steps (rows used of those there are), and `queued`, the pictures in the database that no
replica has claimed, which all of a model see alike.
"""

from collections.abc import Mapping
from typing import Any

POLICY = "raysd.serve.scaling:by_work"
FULL = 0.75
"""Occupancy from which on fewer replicas could not do the same steps."""


def by_work(context: Any) -> tuple[float, dict[str, Any]]:
    """The replicas that Ray's `AutoscalingContext` calls for; Serve applies bounds and delays, and starts the first one."""
    told: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
    if not told.get("pictures"):  # nobody has told anything yet: what is there stays
        return context.target_num_replicas, {}
    pictures = sum(told["pictures"].values()) + max(told["queued"].values())
    occupancy = sum(told["occupancy"].values()) / len(told["occupancy"])
    target = context.config.get_target_ongoing_requests()
    return wanted(pictures, occupancy, context.current_num_replicas, target), {}


def wanted(pictures: float, occupancy: float, replicas: int, target: float) -> float:
    """Replicas for so many pictures, `target` each; none is let go while the steps of all are full."""
    by_pictures = pictures / target
    return max(by_pictures, replicas) if occupancy >= FULL else by_pictures
