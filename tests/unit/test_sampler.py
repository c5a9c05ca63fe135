"""Which examples a step trains on: nothing repeated, nothing skipped, the same at every world size."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from raysd.data.sampler import Sampler, share


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 99))
def test_each_epoch_holds_every_example_once(length, batch_size, seed):
    sampler = Sampler(length, batch_size, seed)
    steps = -(-3 * length // batch_size)
    drawn = [draw.example for step in range(steps) for draw in sampler.batch(step)]
    for epoch in range(3):
        assert Counter(drawn[epoch * length : (epoch + 1) * length]) == Counter(range(length))


def test_a_resumed_sampler_goes_on_where_the_other_stopped():
    whole = [Sampler(7, 3, seed=1).batch(step) for step in range(20)]
    assert [Sampler(7, 3, seed=1).batch(step) for step in range(11, 20)] == whole[11:]


def test_epochs_have_orders_of_their_own():
    sampler = Sampler(30, 30, seed=0)
    assert [d.example for d in sampler.batch(0)] != [d.example for d in sampler.batch(1)]
    assert [d.example for d in sampler.batch(0)] != [d.example for d in Sampler(30, 30, seed=1).batch(0)]


def test_each_example_passes_through_all_its_variants():
    sampler = Sampler(5, 5, seed=0, variants=3)
    seen = Counter((d.example, d.variant) for step in range(3) for d in sampler.batch(step))
    assert seen == Counter({(example, variant): 1 for example in range(5) for variant in range(3)})


def test_weights_even_out_how_often_examples_are_drawn():
    sampler = Sampler(10, 10, seed=0, weights=[9.0] + [1.0] * 9)
    drawn = Counter(d.example for step in range(400) for d in sampler.batch(step))
    assert 0.45 < drawn[0] / 4000 < 0.55


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 33), st.integers(1, 8), st.one_of(st.none(), st.integers(1, 9)))
def test_ranks_share_a_batch_whole_in_equally_many_micro_steps(batch_size, world, micro_batch):
    world = min(world, batch_size)
    batch = Sampler(50, batch_size, seed=0).batch(3)
    parts = [share(batch, rank, world, micro_batch) for rank in range(world)]
    assert [draw for rank in parts for micro in rank for draw in micro] == batch
    assert len({len(rank) for rank in parts}) == 1
    assert all(micro for rank in parts for micro in rank)
    if micro_batch and batch_size % world == 0:
        assert max(len(micro) for rank in parts for micro in rank) <= micro_batch
