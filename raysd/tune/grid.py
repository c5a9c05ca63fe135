"""Ray Tune's searcher for a grid."""

from collections.abc import Iterable
from typing import Any

from ray.tune.search import Searcher


class Grid(Searcher):
    """Suggests given settings one after the other.

    Ray Tune's own generator takes them too, but descends into lists, and no value of a space may be one then.
    """

    def __init__(self, points: Iterable[dict[str, Any]]):
        super().__init__()
        self.left = list(points)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        return self.left.pop(0) if self.left else self.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: a grid learns nothing."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a search that goes on begins with its first setting, and what was tried is told again."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""
