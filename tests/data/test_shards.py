import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finhpc.data.shards import Shards, encode_shard, write_atomic
from finhpc.errors import ConfigError, DataError


def test_blocks_come_back_as_written(shards_folder):
    shards = Shards.open(shards_folder())
    blocks = shards.read_shard("train", 1)
    assert blocks.dtype == np.uint16
    assert blocks.reshape(-1).tolist() == list(range(5 * 64, 8 * 64))
    assert shards.num_samples("train", 16) == 12 * 4
    assert shards.num_samples("val", 64) == 7


def test_wide_ids_where_the_vocabulary_needs_them(shards_folder):
    shards = Shards.open(shards_folder(vocab_size=70000))
    assert shards.read_shard("train", 0).dtype == np.uint32
    assert encode_shard(np.full((2, 4), 69999, np.uint32))


def test_a_seq_len_that_does_not_divide_names_those_that_do(shards_folder):
    shards = Shards.open(shards_folder())
    shards.check_seq_len(16)
    with pytest.raises(ConfigError, match=r"data.seq_len=20 does not divide .*block_len=64; use one of: 4, 8, 16, 32"):
        shards.check_seq_len(20)
    with pytest.raises(ConfigError, match="use one of"):
        shards.check_seq_len(128)


def test_eval_samples_spread_evenly_over_the_split(shards_folder):
    shards = Shards.open(shards_folder())
    everything = np.concatenate([shards.read_shard("val", i).reshape(-1, 32) for i in range(2)])
    chosen = shards.eval_samples(7, 32)
    assert chosen.dtype == np.int64
    assert (chosen == everything[::2]).all()
    assert (shards.eval_samples(1000, 32) == everything).all()


def test_missing_empty_and_unfinished_folders_are_told_apart(tmp_path):
    with pytest.raises(ConfigError, match="is no folder; give the folder written by `finhpc prepare`"):
        Shards.open(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is empty; write shards there"):
        Shards.open(tmp_path)
    (tmp_path / "train-00000.parquet").write_bytes(b"x")
    with pytest.raises(ConfigError, match="interrupted; run `finhpc prepare` again"):
        Shards.open(tmp_path)


def test_a_missing_or_cut_shard_is_named(shards_folder):
    folder = shards_folder()
    victim = folder / "train-00001.parquet"
    os.truncate(victim, victim.stat().st_size - 1)
    with pytest.raises(DataError, match=r"train-00001.parquet has \d+ bytes, the manifest says \d+"):
        Shards.open(folder)
    victim.unlink()
    with pytest.raises(DataError, match=r"train-00001.parquet is missing"):
        Shards.open(folder)


def test_a_damaged_manifest_is_said(shards_folder):
    folder = shards_folder()
    tree = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_text(json.dumps(tree | {"block_len": "many"}))
    with pytest.raises(DataError, match=r"manifest.json is damaged or of another version \(block_len"):
        Shards.open(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        Shards.open(folder)


def replace(folder, table: pa.Table) -> Shards:
    """Put another parquet in the place of a shard, and its size into the manifest."""
    pq.write_table(table, folder / "train-00000.parquet")
    tree = json.loads((folder / "manifest.json").read_bytes())
    tree["splits"]["train"][0]["bytes"] = (folder / "train-00000.parquet").stat().st_size
    (folder / "manifest.json").write_text(json.dumps(tree))
    return Shards.open(folder)


def blocks_table(blocks: np.ndarray, name: str = "tokens") -> pa.Table:
    return pa.table({name: pa.FixedSizeListArray.from_arrays(pa.array(blocks.reshape(-1)), blocks.shape[1])})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (blocks_table(np.zeros((5, 64), np.uint16), "text"), "not tokens"),
        (blocks_table(np.zeros((5, 64), np.uint32)), "not tokens"),
        (blocks_table(np.zeros((5, 32), np.uint16)), "not tokens"),
        (blocks_table(np.zeros((4, 64), np.uint16)), "has 4 rows, the manifest says 5"),
        (blocks_table(np.full((5, 64), 60000, np.uint16)), "holds id 60000, the vocabulary ends at 59999"),
    ],
)
def test_a_shard_that_is_not_what_it_should_be_is_named(shards_folder, table, message):
    with pytest.raises(DataError, match=message) as error:
        replace(shards_folder(), table).read_shard("train", 0)
    assert "train-00000.parquet" in str(error.value)


def test_verify_finds_a_changed_byte(shards_folder):
    folder = shards_folder()
    path = folder / "val-00000.parquet"
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    shards = Shards.open(folder)
    with pytest.raises(DataError, match=r"val-00000.parquet is not the file that was prepared"):
        shards.verify()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
