"""Shards of random ids, for measurements that need no text."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from finhpc.data.shards.shards import (
    MANIFEST,
    TOKENIZER,
    Manifest,
    ShardFile,
    Shards,
    SplitCounts,
    dataset_fingerprint,
    encode_shard,
)
from finhpc.files import write_atomic

VOCAB, SHARD_TOKENS = 50257, 1 << 22


def random_shards(folder: Path, tokens: int, block_len: int) -> Shards:
    """A prepared folder of at least `tokens` train tokens: ids with the frequencies of text (1/rank), seeded."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    rank = np.cumsum(1 / np.arange(1, VOCAB + 1))
    blocks = max(1, min(SHARD_TOKENS, tokens) // block_len)
    ids = np.searchsorted(rank / rank[-1], draw.random(blocks * block_len)).astype(np.uint16).reshape(blocks, block_len)
    splits: dict[str, list[ShardFile]] = {"train": [], "val": []}
    for split, count in (("train", -(-tokens // (blocks * block_len))), ("val", 1)):
        for index in range(count):
            content, name = encode_shard(draw.permutation(ids)), f"{split}-{index:05d}.parquet"
            write_atomic(folder / name, content)
            sha256 = hashlib.sha256(content).hexdigest()
            splits[split].append(ShardFile(file=name, blocks=blocks, sha256=sha256, bytes=len(content)))
    (folder / TOKENIZER).mkdir(parents=True, exist_ok=True)
    write_atomic(folder / TOKENIZER / "tokenizer.json", b"{}\n")
    tokenizer = hashlib.sha256(b"{}\n").hexdigest()
    manifest = Manifest(
        block_len=block_len,
        vocab_size=VOCAB,
        eot_id=VOCAB - 1,
        dtype="uint16",
        tokenizer_sha256=tokenizer,
        fingerprint=dataset_fingerprint([*splits["train"], *splits["val"]], tokenizer, block_len),
        splits=splits,
        counts={split: SplitCounts() for split in splits},
        dropped={},
        val_unigram_entropy_nats=0.0,
        source=[],
        settings={},
        settings_sha256="",
        versions={},
    )
    write_atomic(folder / MANIFEST, manifest.model_dump_json().encode())
    return Shards.open(folder)
