"""A base against copies of it with more and more noise in their weights: which scores order all four."""

import pytest

from benchmarks import damage
from benchmarks.options import Options


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_losses_and_scores_order_a_base_and_three_damaged_ones(tmp_path, found):
    targets = damage.run(Options(tmp_path)).targets
    found["n"] = f"{damage.PICTURES} pictures"
    assert {target.what for target in targets} == {f"{name} orders all four" for name in damage.MUST}
    assert [target.what for target in targets if not target.met] == []
