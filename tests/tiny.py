"""A small prepared folder made in a second, without Ray: real tokeniser, real parquet, synthetic text."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from finhpc.data.shards.shards import (
    MANIFEST,
    Manifest,
    ShardFile,
    SplitCounts,
    dataset_fingerprint,
    encode_shard,
)
from finhpc.files import file_sha256, write_atomic

TEXT = "the bank rate rises and falls as prices move while markets wait for news of growth"
WORDS = TEXT.split()


def tiny_shards(folder: Path, blocks: int = 96, block_len: int = 64, vocab: int = 300, seed: int = 0) -> Path:
    """Three train shards and one held-out shard of a Markov chain over a few words."""
    folder.mkdir(parents=True)
    draw = random.Random(seed)
    follows = {word: draw.sample(WORDS, 3) for word in WORDS}
    text, word = [], WORDS[0]
    for _ in range(blocks * block_len):
        text.append(word)
        word = draw.choice(follows[word])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(text)], trainer)
    size = tokenizer.get_vocab_size()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    fast.save_pretrained(folder / "tokenizer")
    ids = np.array(tokenizer.encode(" ".join(text)).ids, dtype=np.uint16)[: (blocks + 16) * block_len]
    ids = np.resize(ids, (blocks + 16) * block_len).reshape(-1, block_len)
    files: dict[str, list[ShardFile]] = {"train": [], "val": []}
    cuts = np.array_split(ids[:blocks], 3)
    for split, parts in (("train", cuts), ("val", [ids[blocks:]])):
        for i, part in enumerate(parts):
            name, content = f"{split}-{i:05d}.parquet", encode_shard(part)
            write_atomic(folder / name, content)
            sha = file_sha256(folder / name)
            files[split].append(ShardFile(file=name, blocks=len(part), sha256=sha, bytes=len(content)))
    counts = np.bincount(ids[blocks:].reshape(-1), minlength=size)
    share = counts[counts > 0] / counts.sum()
    tokenizer_sha256 = file_sha256(folder / "tokenizer" / "tokenizer.json")
    manifest = Manifest(
        block_len=block_len,
        vocab_size=size,
        eot_id=0,
        dtype="uint16",
        tokenizer_sha256=tokenizer_sha256,
        fingerprint=dataset_fingerprint([f for fs in files.values() for f in fs], tokenizer_sha256, block_len),
        splits=files,
        counts={"train": SplitCounts(), "val": SplitCounts()},
        dropped={},
        val_unigram_entropy_nats=float(-(share * np.log(share)).sum()),
        source=[],
        settings={},
        settings_sha256="",
        versions={},
    )
    write_atomic(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
    return folder


def pretrain_tree(shards: Path, storage: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Settings of a pretraining of seconds, named `run`; `sections` are merged into them."""
    tree: dict[str, Any] = {
        "model": {"preset": "gpt2-tiny", "layers": 2, "width": 32, "context": 64},
        "method": {"rank": 8},
        "data": {"shards": str(shards), "seq_len": 32, "eval_samples": 16},
        "run": {"name": "run", "storage": str(storage)},
    }
    return tree | {section: tree.get(section, {}) | values for section, values in sections.items()}


def with_tokenizer(folder: Path, shards: Path | None = None) -> Path:
    """The folder with the tokenizer of `shards` in it, or with one of 300 ids."""
    shards = shards or tiny_shards(folder.with_name(f"{folder.name}-shards"), blocks=8)
    shutil.copytree(shards / "tokenizer", folder, dirs_exist_ok=True)
    return folder


def word_tokenizer(folder: Path, size: int) -> Path:
    """A tokenizer of exactly `size` ids, however few: a word each."""
    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, size)}
    made = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, unk_token=end).save_pretrained(folder)
    return folder
