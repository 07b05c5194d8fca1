"""Prepared folders for the data room's tests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from finhpc.data.shards.shards import Manifest, ShardFile, SplitCounts, dataset_fingerprint, encode_shard
from finhpc.files import write_atomic

BLOCK = 64
TOKENIZER_JSON = b"{}"  # never opened here, only hashed


@pytest.fixture
def shards_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a prepared folder of given blocks a train shard, of counting ids, with an empty tokeniser."""

    def make(train: tuple[int, ...] = (5, 3, 4), val: tuple[int, ...] = (4, 3), vocab_size: int = 60000) -> Path:
        folder = tmp_path / "shards"
        folder.mkdir()
        dtype = "uint16" if vocab_size <= 65536 else "uint32"
        start, splits = 0, {}
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "tokenizer.json").write_bytes(TOKENIZER_JSON)
        for split, sizes in (("train", train), ("val", val)):
            splits[split] = []
            for index, blocks in enumerate(sizes):
                ids = np.arange(start, start + blocks * BLOCK).astype(dtype).reshape(blocks, BLOCK)
                start += blocks * BLOCK
                content, name = encode_shard(ids), f"{split}-{index:05d}.parquet"
                write_atomic(folder / name, content)
                sha256 = hashlib.sha256(content).hexdigest()
                splits[split].append(ShardFile(file=name, blocks=blocks, sha256=sha256, bytes=len(content)))
        tokenizer_sha256 = hashlib.sha256(TOKENIZER_JSON).hexdigest()
        manifest = Manifest(
            block_len=BLOCK,
            vocab_size=vocab_size,
            eot_id=0,
            dtype=dtype,
            tokenizer_sha256=tokenizer_sha256,
            fingerprint=dataset_fingerprint([*splits["train"], *splits["val"]], tokenizer_sha256, BLOCK),
            splits=splits,
            counts={"train": SplitCounts(), "val": SplitCounts()},
            dropped={},
            val_unigram_entropy_nats=1.0,
            source=[],
            settings={},
            settings_sha256="",
            versions={},
        )
        write_atomic(folder / "manifest.json", manifest.model_dump_json().encode())
        return folder

    return make
