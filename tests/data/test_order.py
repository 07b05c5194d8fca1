import numpy as np
import pytest

from finhpc.data.shards.order import Order, replica_mask

SIZES = [7, 0, 5, 11, 1]
EPOCH = sum(SIZES)


def stream(order: Order, start: int, stop: int) -> list[tuple[int, int]]:
    """(position, sample id) of every position in [start, stop), by way of the visits."""
    found = []
    for visit in order.visits(start, stop):
        found += [(visit.first + i, int(sample)) for i, sample in enumerate(order.samples(visit))]
    return [(position, sample) for position, sample in found if start <= position < stop]


@pytest.mark.parametrize("group", [1, 2, 3, 9])
def test_every_epoch_takes_every_sample_once_in_another_order(group):
    order = Order(SIZES, seed=3, shards_per_visit=group)
    epochs = [[sample for _, sample in stream(order, e * EPOCH, (e + 1) * EPOCH)] for e in range(3)]
    assert all(sorted(epoch) == list(range(EPOCH)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_visits_stand_side_by_side_without_gap_over_epoch_ends():
    visits = list(Order(SIZES, seed=3).visits(0, 5 * EPOCH))
    assert [visit.first for visit in visits] == np.cumsum([0] + [visit.size for visit in visits])[:-1].tolist()
    assert len(visits) == 5 * 4  # the empty shard is never visited


@pytest.mark.parametrize("group", [1, 2, 9])
def test_any_start_gives_the_tail_of_the_whole_stream(group):
    order = Order(SIZES, 1, group)
    whole = stream(order, 0, 3 * EPOCH)
    assert [position for position, _ in whole] == list(range(3 * EPOCH))
    for start in range(3 * EPOCH):
        assert stream(Order(SIZES, 1, group), start, 3 * EPOCH) == whole[start:]


def test_only_overlapping_visits_are_named():
    order = Order(SIZES, seed=1)
    for start in range(EPOCH):
        assert all(v.first < start + 1 and v.first + v.size > start for v in order.visits(start, start + 1))
        assert len(list(order.visits(start, start + 1))) == 1
    assert not list(order.visits(4, 4))


@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
def test_replicas_partition_each_step_in_contiguous_parts(replicas):
    positions = np.arange(12 * 5)
    parts = [positions[replica_mask(positions, 12, r, replicas)] for r in range(replicas)]
    size = 12 // replicas
    for step in range(5):
        joined = np.concatenate([part[step * size : (step + 1) * size] for part in parts])
        assert joined.tolist() == list(range(step * 12, (step + 1) * 12))


def test_the_order_depends_on_the_seed_and_is_fixed_for_ever():
    assert stream(Order(SIZES, 0), 0, 24) != stream(Order(SIZES, 1), 0, 24)
    # Written down: an upgrade that changed this would silently break every resumed run.
    assert [sample for _, sample in stream(Order([4, 3, 5], 7, shards_per_visit=2), 0, 24)] == [
        *[11, 2, 3, 10, 8, 7, 1, 0, 9, 5, 4, 6],
        *[8, 7, 10, 11, 0, 3, 9, 1, 2, 6, 4, 5],
    ]


def test_no_samples_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        Order([0, 0], 0)


def test_an_endless_stream_is_not_planned_to_its_end():
    assert next(Order(SIZES, seed=1).visits(EPOCH, 10**18)).first == EPOCH
