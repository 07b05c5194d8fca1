"""Shards and tokeniser changed under a run: it ends with one line that names what changed; restored, it goes on."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from finhpc.commands.pretrain import pretrain
from finhpc.data.shards.shards import Manifest, Shards, dataset_fingerprint, encode_shard
from finhpc.errors import TrainingFailedError
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
from finhpc.training.journal import read
from tests.runs.runs import assert_same_run, command, last_words, outcome, train_workers, wait_for_step
from tests.tiny import pretrain_tree, tiny_shards
from tests.waiting import PATIENCE_S


@pytest.fixture
def shards(run_shards: Path, tmp_path: Path) -> Path:
    """The run's shards, to be hurt."""
    return Path(shutil.copytree(run_shards, tmp_path / "shards"))


def only_error(storage: Path) -> str:
    """The one line with which the command says what went wrong."""
    words = (storage / "stderr").read_text()
    assert "Traceback" not in words
    assert "ray::" not in words
    (line,) = (line for line in words.splitlines() if line.startswith("error: "))
    (storage / "stderr").unlink()
    return line


def put_id(folder: Path, name: str, value: int) -> None:
    """A shard with one id of another value, listed in the manifest as if it had been prepared so."""
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    blocks = Shards(folder, manifest).read_shard("train", int(name[6:11])).copy()
    blocks[2, 3] = value
    content = encode_shard(blocks)
    (folder / name).write_bytes(content)
    files = [shard for split in manifest.splits.values() for shard in split]
    for shard in files:
        if shard.file == name:
            shard.bytes, shard.sha256 = len(content), hashlib.sha256(content).hexdigest()
    manifest.fingerprint = dataset_fingerprint(files, manifest.tokenizer_sha256, manifest.block_len)
    (folder / "manifest.json").write_text(manifest.model_dump_json())


@pytest.mark.usefixtures("quick_training")
def test_an_id_above_the_vocabulary_ends_a_run_before_the_embedding(shards: Path, tmp_path: Path) -> None:
    put_id(shards, "train-00001.parquet", 300)
    tree = pretrain_tree(shards, tmp_path, train={"steps": 4})
    with pytest.raises(TrainingFailedError) as caught:
        pretrain(build(PretrainConfig, tree))
    where = shards / "train-00001.parquet"
    assert f"{where} holds id 300 in row 2, position 3; the vocabulary ends at 299" in str(caught.value)
    assert "\n" not in str(caught.value)
    records, _ = read(tmp_path / "run" / "journal.jsonl")
    assert not [record for record in records if record["kind"] == "train"]
    assert len([record for record in records if record["kind"] == "start"]) == 1, "not tried again"


@pytest.mark.slow
def test_a_shard_damaged_under_a_run_ends_it_and_the_restored_one_goes_on(
    shards: Path, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    victim = shards / "train-00001.parquet"
    good = victim.read_bytes()
    with command(tmp_path, shards) as process:
        wait_for_step(tmp_path, 20, process)
        bad = bytearray(good)
        bad[len(bad) // 3] ^= 1
        victim.write_bytes(bad)
        random.choice(train_workers(process)).kill()  # the restarted worker reads the shards anew
        assert process.wait(PATIENCE_S) == 1, last_words(tmp_path)
    assert f"{victim} cannot be read" in only_error(tmp_path)
    hurt = outcome(tmp_path)
    assert hurt["status"] == "failed"
    assert len(hurt["starts"]) == 2, "a restart would only repeat it"
    victim.write_bytes(good)
    with command(tmp_path, shards) as process:
        assert process.wait(PATIENCE_S) == 0, last_words(tmp_path)
    assert_same_run(outcome(tmp_path), unbroken)


@pytest.mark.slow
def test_a_folder_replaced_under_a_run_is_refused(shards: Path, tmp_path: Path) -> None:
    other = tiny_shards(tmp_path / "other", seed=1)
    with command(tmp_path, shards) as process:
        wait_for_step(tmp_path, 20, process)
        shards.rename(tmp_path / "first")
        other.rename(shards)
        random.choice(train_workers(process)).kill()
        assert process.wait(PATIENCE_S) == 1, last_words(tmp_path)
    assert f"data.shards={shards} was replaced during the run: it has other data" in only_error(tmp_path)
    with command(tmp_path, shards) as process:
        assert process.wait(PATIENCE_S) == 2, last_words(tmp_path)
    line = only_error(tmp_path)
    assert f"data.shards={shards}" in line
    for folder in (tmp_path / "first", shards):
        manifest = json.loads((folder / "manifest.json").read_text())
        assert any(manifest[key][:12] in line for key in ("fingerprint", "tokenizer_sha256")), "the difference is named"


@pytest.mark.slow
def test_a_tokeniser_changed_under_a_run_never_goes_into_its_model(
    shards: Path, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    file = shards / "tokenizer" / "tokenizer.json"
    good = file.read_bytes()
    with command(tmp_path, shards) as process:
        wait_for_step(tmp_path, 20, process)
        file.write_bytes(good + b"\n")
        assert process.wait(PATIENCE_S) == 1, last_words(tmp_path)
    assert f"{file} is not the tokenizer these shards were made with" in only_error(tmp_path)
    assert not (tmp_path / "run" / "model").exists()
    file.write_bytes(good)
    with command(tmp_path, shards) as process:
        assert process.wait(PATIENCE_S) == 0, last_words(tmp_path)
    assert_same_run(outcome(tmp_path), unbroken)
    assert (tmp_path / "run" / "model" / "tokenizer.json").read_bytes() == good
