import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finhpc.data.shards.shards import ShardFile, Shards, dataset_fingerprint, encode_shard
from finhpc.errors import ConfigError, DataError
from finhpc.files import write_atomic


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
    with pytest.raises(ConfigError, match="is not a folder; give the folder written by `finhpc prepare`"):
        Shards.open(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is empty; write shards there"):
        Shards.open(tmp_path)
    (tmp_path / "train-00000.parquet").write_bytes(b"x")
    with pytest.raises(ConfigError, match="interrupted; run `finhpc prepare` again"):
        Shards.open(tmp_path)


def test_a_missing_or_cut_shard_is_named(shards_folder):
    folder = shards_folder()
    victim = folder / "train-00001.parquet"
    for size in (victim.stat().st_size - 1, 0):
        os.truncate(victim, size)
        with pytest.raises(DataError, match=rf"train-00001.parquet has {size} bytes, the manifest says \d+"):
            Shards.open(folder)
    victim.unlink()
    with pytest.raises(DataError, match=r"train-00001.parquet is missing"):
        Shards.open(folder)


def changed_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    tree = json.loads((folder / "manifest.json").read_bytes())
    change(tree)
    (folder / "manifest.json").write_text(json.dumps(tree))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.update(block_len="many"), r"\(block_len: Input should be a valid integer"),
        (lambda tree: tree["splits"].pop("val"), r"\(the file: no val split\)"),
        (lambda tree: tree["splits"]["train"].pop(), r"the fingerprint does not match the listed files"),
        (lambda tree: tree.update(tokenizer_sha256="0" * 64), r"the fingerprint does not match the listed files"),
    ],
)
def test_a_damaged_manifest_is_said(shards_folder, change, message):
    folder = changed_manifest(shards_folder(), change)
    with pytest.raises(DataError, match=f"manifest.json is damaged or of another version .*{message}.*prepare again"):
        Shards.open(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", pickle.dumps({"format": 1})])
def test_a_manifest_that_is_not_json_is_said(shards_folder, content):
    folder = shards_folder()
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest.json is damaged or of another version"):
        Shards.open(folder)


@pytest.mark.parametrize("name", ["../train-00000.parquet", "/etc/passwd", "more/train-00000.parquet", "..", ""])
def test_a_manifest_cannot_name_a_file_outside_its_folder(shards_folder, name):
    folder = changed_manifest(shards_folder(), lambda tree: tree["splits"]["train"][0].update(file=name))
    with pytest.raises(DataError, match=r"splits.train.0.file: '.*' is not the plain name of a file in this folder"):
        Shards.open(folder)


def test_another_tokeniser_in_the_folder_is_refused(shards_folder):
    folder = shards_folder()
    shards = Shards.open(folder)
    (folder / "tokenizer" / "tokenizer.json").write_text('{"other": 1}')
    with pytest.raises(DataError, match=r"tokenizer.json is not the tokenizer these shards were made with \(sha256"):
        Shards.open(folder)
    with pytest.raises(DataError, match=r"not the tokenizer"):
        shards.check_tokenizer()
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer.json cannot be read \(No such file or directory\)"):
        Shards.open(folder)


def test_a_folder_replaced_since_the_run_began_is_refused(shards_folder):
    shards = Shards.open(shards_folder())
    shards.check_same(shards.manifest.fingerprint)
    with pytest.raises(DataError, match=r"was replaced .* other data \(fingerprint \w{12}\) than the run began with"):
        shards.check_same("0" * 64)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "cut": (lambda path: os.truncate(path, path.stat().st_size // 2), "cannot be read"),
    "flipped in a page": (lambda path: flip(path, path.stat().st_size // 3), "cannot be read"),
    "flipped in the footer": (
        lambda path: flip(path, path.stat().st_size - 300),
        "(cannot be read|holds|is not the file)",
    ),
    "zeros": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "cannot be read"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(list(range(500)))), "cannot be read"),
    "text": (lambda path: path.write_text('{"text": "no parquet"}\n' * 9), "cannot be read"),
    "gone": (lambda path: path.unlink(), r"cannot be read \(No such file or directory\)"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), r"cannot be read \(Is a directory\)"),
    "another column": (
        lambda path: pq.write_table(pa.table({"text": ["a"] * 5}), path),
        "holds text: string, not tokens",
    ),
    "other blocks of the same size": (
        lambda path: path.write_bytes(encode_shard(np.ones((5, 64), np.uint16))),
        r"is not the file that was prepared \(sha256 \w{12}, the manifest says \w{12}\): .* changed or replaced",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_shard_damaged_after_the_folder_was_opened_is_named(shards_folder, damage):
    folder = shards_folder()
    shards = Shards.open(folder)
    act, message = DAMAGE[damage]
    act(folder / "train-00000.parquet")
    with pytest.raises(DataError, match=rf"train-00000.parquet {message}.*; restore it"):
        shards.read_shard("train", 0)


def replace(folder: Path, table: pa.Table) -> Shards:
    """Put another parquet in the place of a shard, and its size and sha256 into the manifest."""
    pq.write_table(table, folder / "train-00000.parquet")
    content = (folder / "train-00000.parquet").read_bytes()
    tree = json.loads((folder / "manifest.json").read_bytes())
    tree["splits"]["train"][0] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    files = [ShardFile(**shard) for split in ("train", "val") for shard in tree["splits"][split]]
    tree["fingerprint"] = dataset_fingerprint(files, tree["tokenizer_sha256"], tree["block_len"])
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
        (pa.table({"tokens": pa.array([[1, 2]] * 5, pa.list_(pa.uint16()))}), "holds tokens: list<.*>, not tokens"),
        (
            blocks_table(np.where(np.arange(5 * 64) == 3 * 64 + 7, 60000, 1).astype(np.uint16).reshape(5, 64)),
            "holds id 60000 in row 3, position 7; the vocabulary ends at 59999",
        ),
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
