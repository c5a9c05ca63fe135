"""Successive halving over a recorded grid: what the benchmark says of it holds, and needs no training."""

import json

from benchmarks import asha
from benchmarks.results import FOLDER


def test_successive_halving_finds_the_best_of_a_recorded_grid_for_a_third_of_its_epochs():
    lines = (FOLDER / "grid-amd-epyc-2-cores-cpu.curves").read_text().splitlines()
    curves = asha.curves_of([json.loads(line) for line in lines])
    assert len(curves) == 27
    replays = [asha.replay(curves, seed) for seed in range(asha.SEEDS)]
    assert asha.count_good(curves, replays) >= asha.OFTEN
    assert (asha.SEEDS, asha.OFTEN, asha.CLOSE, asha.SHARE) == (100, 90, 1.01, 0.35)
