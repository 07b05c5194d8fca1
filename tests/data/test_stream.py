import os
import threading
from pathlib import Path

import numpy as np
import pytest

from finhpc.data.shards import reader as reading
from finhpc.data.shards.decoded import decoded
from finhpc.data.shards.reader import ReplicaStream, local_stream, micro_batches
from finhpc.data.shards.shards import Shards, encode_shard
from finhpc.data.shards.stream import _read, ray_stream
from finhpc.errors import ConfigError, DataError

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


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each shard that is read; decoded shards are shared in a folder of the test's own."""
    sizes: list[int] = []
    whole = Shards.read_shard

    def reading_shard(self, split, index):
        sizes.append(self.manifest.splits[split][index].bytes)
        return whole(self, split, index)

    monkeypatch.setattr(Shards, "read_shard", reading_shard)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return sizes


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_replicas_of_a_machine_read_each_shard_once(shards_folder, read, replicas):
    folder = shards_folder(TRAIN)
    text = sum(shard.bytes for shard in Shards.open(folder).manifest.splits["train"])
    once = {"stop_step": 9, "samples_per_step": 8}  # one epoch
    parts = [sample_ids(local_stream(make(folder, replicas=replicas, replica=r, **once))) for r in range(replicas)]
    assert sum(read) == text, "all replicas together"
    own = [np.array(part).reshape(9, 8 // replicas) for part in parts]
    read.clear()
    assert np.concatenate(own, axis=1).ravel().tolist() == sample_ids(local_stream(make(folder, **once)))


def test_a_shard_that_was_decoded_elsewhere_is_verified(shards_folder, read):
    folder = shards_folder(TRAIN)
    file = folder / "train-00001.parquet"
    other = encode_shard(np.zeros((3, 64), np.uint16))
    file.write_bytes(other + bytes(file.stat().st_size - len(other)))
    with pytest.raises(DataError, match=r"train-00001\.parquet"):
        list(local_stream(make(folder, replicas=2)))


def test_the_shared_shards_take_limited_room_and_may_be_lost(shards_folder, read, tmp_path, monkeypatch):
    folder = shards_folder(TRAIN)
    shards = Shards.open(folder)
    cache = tmp_path / f"finhpc-shards-{os.getuid()}"
    for _ in range(2):
        for index, blocks in enumerate(TRAIN):
            found = decoded(shards, index, limit=2 * 9 * 64)  # of ids of two bytes
            assert (found == shards.read_shard("train", index)).all()
            assert found.shape == (blocks, 64)
            assert sum(file.stat().st_size for file in cache.iterdir()) <= 2 * 9 * 64
    (file,) = cache.glob(f"{shards.manifest.splits['train'][3].sha256}-????????-*[0-9a-f]")
    file.unlink()  # `found` stays mapped
    file.write_bytes(b"cut")
    assert (decoded(shards, 3, 10**6) == found).all()
    cache.chmod(0o755)  # another user could have written there
    read.clear()
    assert (decoded(shards, 3, 10**6) == found).all()
    assert len(read) == 1


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
    with pytest.raises(ConfigError, match="8 samples per step do not split into 3 replicas"):
        make(folder, replicas=3)
    with pytest.raises(ConfigError, match="whole micro-batches of 3; use a multiple of 3"):
        make(folder, micro_batch_size=3)


@pytest.mark.parametrize("size", [1, 2, 5, 7, 40])
def test_pieces_of_any_size_are_cut_into_micro_batches(size):
    lengths = [3, 1, 0, 9, 4, 4, 16, 2]
    ids = np.arange(sum(lengths))
    pieces = [{"tokens": i[:, None].astype(np.uint16), "sample": i} for i in np.split(ids, np.cumsum(lengths))[:-1]]
    batches = list(micro_batches(pieces, size))
    assert [len(batch["sample"]) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert 0 < len(batches[-1]["sample"]) <= size
    assert sample_ids(batches) == ids.tolist()
    for batch in batches:
        assert (batch["tokens"][:, 0] == batch["sample"]).all()
        assert batch["tokens"].dtype == batch["sample"].dtype == np.int64


def test_segments_are_the_visits_in_order(shards_folder, monkeypatch):
    stream = make(shards_folder(TRAIN))
    visits = list(stream.visits())
    assert list(stream.segments()) == [visits]
    monkeypatch.setattr(reading, "SEGMENT_TOKENS", 2 * 72 * 16)
    assert [len(segment) for segment in stream.segments()] == [2, 2]
    assert [visit for segment in stream.segments() for visit in segment] == visits
    halves = make(stream.shards.folder, replicas=2)
    assert [len(segment) for segment in halves.segments()] == [4], "a replica has half of each visit"


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("segment", "tasks"), [(1 << 24, 4), (72 * 16, 4), (2 * 72 * 16, 1)])
def test_ray_gives_the_local_stream(shards_folder, monkeypatch, segment, tasks):
    monkeypatch.setattr(reading, "SEGMENT_TOKENS", segment)
    monkeypatch.setattr("finhpc.data.shards.stream.MAX_TASKS", tasks)
    folder = shards_folder(TRAIN)
    for replica in range(2):
        stream = make(folder, start_step=5, replicas=2, replica=replica)
        assert_equal(ray_stream(stream), local_stream(stream))


@pytest.mark.usefixtures("ray_cluster")
def test_ray_data_is_done_with_a_segment_before_it_is_consumed(shards_folder):
    stream = make(shards_folder(TRAIN))
    pieces = _read(stream, next(stream.segments()))
    assert not [thread.name for thread in threading.enumerate() if "StreamingExecutor" in thread.name]
    assert len(pieces) > 0, "read, not to be read"
    assert sum(len(piece["sample"]) for piece in pieces) == 30 * 8


@pytest.mark.usefixtures("ray_cluster")
def test_a_stream_left_early_ends_its_reading(shards_folder, monkeypatch):
    monkeypatch.setattr(reading, "SEGMENT_TOKENS", 72 * 16)
    before = set(threading.enumerate())  # trainings of other tests in this process may read ahead, too
    stream = ray_stream(make(shards_folder(TRAIN)))
    next(stream)
    assert any(thread.name.startswith("read-ahead") for thread in set(threading.enumerate()) - before)
    stream.close()
    assert not [t.name for t in set(threading.enumerate()) - before if t.name.startswith("read-ahead")]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: os.truncate(path, 100), "cannot be read"),
        (lambda path: path.unlink(), r"cannot be read \(No such file or directory\)"),
        (lambda path: path.write_bytes(encode_shard(np.ones((4, 64), np.uint16))), "is not the file that was prepared"),
        (lambda path: path.write_bytes(encode_shard(np.full((4, 64), 60001, np.uint16))), "holds id 60001 in row 0"),
    ],
)
def test_a_shard_damaged_under_a_run_ends_it_with_one_line(shards_folder, monkeypatch, damage, message):
    monkeypatch.setattr(reading, "SEGMENT_TOKENS", 72 * 16)
    folder = shards_folder(TRAIN)
    stream = ray_stream(make(folder))
    first = [next(stream) for _ in range(4)]
    damage(folder / "train-00002.parquet")
    with pytest.raises(DataError, match=rf"train-00002.parquet {message}") as caught:
        first += list(stream)
    assert type(caught.value) is DataError, "not Ray's around it"
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert sample_ids(first)[:72] == sample_ids(local_stream(make(restored(folder))))[: len(sample_ids(first))][:72]


def restored(folder: Path) -> Path:
    """The folder with the shard of the fixture's counting ids again."""
    ids = np.arange(8 * 64, 12 * 64).astype(np.uint16).reshape(4, 64)
    (folder / "train-00002.parquet").write_bytes(encode_shard(ids))
    return folder
