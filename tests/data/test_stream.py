from pathlib import Path

import numpy as np
import pytest

from finhpc.data import reading
from finhpc.data.reading import ReplicaStream, local_stream
from finhpc.data.shards import Shards
from finhpc.data.stream import ray_dataset, worker_batches
from finhpc.errors import ConfigError

TRAIN = (5, 3, 4, 6)  # 18 blocks of 64: 72 samples of 16 an epoch


def make(folder: Path, **changes) -> ReplicaStream:
    settings = {"seed": 3, "start_step": 0, "stop_step": 30, "samples_per_step": 8, "micro_batch_size": 2}
    return ReplicaStream(Shards.open(folder), 16, **settings | changes)


def sample_ids(batches) -> list[int]:
    return [int(sample) for batch in batches for sample in batch["sample"]]


def assert_equal(left, right) -> None:
    left, right = list(left), list(right)
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a["tokens"].dtype == b["tokens"].dtype == a["sample"].dtype == np.int64
        assert (a["tokens"] == b["tokens"]).all()
        assert (a["sample"] == b["sample"]).all()


def test_batches_hold_the_tokens_of_their_samples(shards_folder):
    batches = list(local_stream(make(shards_folder(TRAIN))))
    assert len(batches) == 30 * 4
    for batch in batches:
        assert batch["tokens"].shape == (2, 16)
        # The fixture's ids count up from 0, so sample i begins with id 16 * i.
        assert (batch["tokens"] == batch["sample"][:, None] * 16 + np.arange(16)).all()
    assert sorted(sample_ids(batches)[:72]) == list(range(72))


def test_replicas_together_read_the_global_order(shards_folder):
    folder = shards_folder(TRAIN)
    whole = np.array(sample_ids(local_stream(make(folder)))).reshape(30, 8)
    parts = [sample_ids(local_stream(make(folder, replicas=2, replica=r))) for r in range(2)]
    assert np.concatenate([np.array(part).reshape(30, 4) for part in parts], axis=1).tolist() == whole.tolist()


def test_a_later_start_is_the_tail(shards_folder):
    folder = shards_folder(TRAIN)
    whole = sample_ids(local_stream(make(folder)))
    for step in (1, 8, 9, 10, 29):
        assert sample_ids(local_stream(make(folder, start_step=step))) == whole[step * 8 :]


def test_a_visit_mixes_the_shards_it_holds(shards_folder, monkeypatch):
    folder = shards_folder(TRAIN)
    ends = np.cumsum([4 * blocks for blocks in TRAIN])
    monkeypatch.setattr(reading, "VISIT_TOKENS", 1)
    alone = np.searchsorted(ends, sample_ids(local_stream(make(folder)))[:72], side="right")
    assert (np.diff(alone) != 0).sum() == 3, "one shard after the other"
    monkeypatch.setattr(reading, "VISIT_TOKENS", 6 * 64 * 2)
    batches = list(local_stream(make(folder)))
    pairs = np.searchsorted(ends, sample_ids(batches)[:72], side="right")
    assert (np.diff(pairs) != 0).sum() > 10
    changes = [set(pairs[:i]) & set(pairs[i:]) for i in range(73)]
    assert sum(not change for change in changes) == 3, "two visits of two shards: start, border, end"
    for batch in batches:
        assert (batch["tokens"] == batch["sample"][:, None] * 16 + np.arange(16)).all()


def test_small_pieces_give_the_same_batches(shards_folder, monkeypatch):
    stream = make(shards_folder(TRAIN), micro_batch_size=4)
    expected = list(local_stream(stream))
    monkeypatch.setattr(reading, "PIECE_TOKENS", 48)
    assert_equal(local_stream(stream), expected)


def test_numbers_that_do_not_fit_are_refused(shards_folder):
    folder = shards_folder(TRAIN)
    with pytest.raises(ConfigError, match="8 samples a step do not split into 3 replicas"):
        make(folder, replicas=3)
    with pytest.raises(ConfigError, match="whole micro-batches of 3; use a multiple of 3"):
        make(folder, micro_batch_size=3)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("max_tasks", [512, 3])
def test_ray_gives_the_local_stream(shards_folder, monkeypatch, max_tasks):
    monkeypatch.setattr("finhpc.data.stream.MAX_TASKS", max_tasks)
    folder = shards_folder(TRAIN)
    for replica in range(2):
        stream = make(folder, start_step=5, replicas=2, replica=replica)
        assert_equal(worker_batches(ray_dataset(stream).iterator(), 2), local_stream(stream))
