"""The ways of tokenizing that `finhpc bench prepare` compares: `python -m finhpc.bench.plain.prepare JSON`.

Each runs in its own process. It prepares, prints the line "ready", does its work, and prints its figures as a JSON
line; the check of the ids follows as another line.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from finhpc.cluster.own_ray import own_ray
from finhpc.data.shards.shards import Shards
from finhpc.data.text.encoding import digest, held_out
from finhpc.errors import FinhpcError

BATCH = 100  # documents that `datasets.map` passes to the tokenizer at a time


def finhpc_prepare(corpus: str, tokenizer: str, out: str, workers: int, shape: dict[str, Any]) -> None:
    """finhpc's whole job, Ray already up: reading, duplicates, split, ids, blocks, verified shards on disk."""
    from finhpc.commands.prepare import prepare
    from finhpc.settings.prepare import PrepareConfig

    with own_ray(workers):
        _say("ready")
        config = PrepareConfig(source=[corpus], tokenizer=tokenizer, out=out, workers=workers, **shape)
        began = time.perf_counter()
        result = prepare(config)
        wall_s = time.perf_counter() - began
    tokens = result["tokens"] + result["dropped"]["tail_tokens"] - result["documents"]
    _say({"wall_s": wall_s, "tokens": tokens, "documents": result["documents"]})


def datasets_map(corpus: str, tokenizer: str, out: str, workers: int, shards: str) -> None:
    """Ids alone, by `datasets.map` and the fast tokenizer; JSON is read before the measurement."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(tokenizer)
    files = sorted(map(str, Path(corpus).glob("*.jsonl")))
    texts = load_dataset("json", data_files=files, split="train", cache_dir=out).select_columns(["text"])

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        ids = fast(batch["text"]).input_ids
        return {"ids": ids, "n": [len(row) for row in ids]}

    _say("ready")
    began = time.perf_counter()
    mapped = texts.map(
        encode, batched=True, batch_size=BATCH, num_proc=workers, remove_columns=["text"], load_from_cache_file=False
    )
    wall_s = time.perf_counter() - began
    _say({"wall_s": wall_s, "tokens": sum(mapped["n"][:]), "documents": len(mapped)})
    _say({"identical": same_ids(texts, mapped, Shards.open(shards))})


def tiktoken_alone(corpus: str, tokenizer: str) -> None:
    """Ids alone, by tiktoken on one core, from texts in memory."""
    from finhpc.data.text.bpe import MergedBytes

    merged = MergedBytes(json.loads((Path(tokenizer) / "tokenizer.json").read_bytes()))
    lines = (line for path in sorted(Path(corpus).glob("*.jsonl")) for line in path.read_bytes().splitlines())
    texts = [json.loads(line)["text"] for line in lines]
    _say("ready")
    began = time.perf_counter()
    tokens = sum(len(merged.ranks(text) or ()) for text in texts)
    _say({"wall_s": time.perf_counter() - began, "tokens": tokens, "documents": len(texts)})


def same_ids(texts: Any, mapped: Any, shards: Shards) -> bool:
    """Whether the blocks of both splits are exactly the ids of `datasets.map`, document for document."""
    manifest = shards.manifest
    splits = list(manifest.splits)
    expected = {split: hashlib.sha256() for split in splits}
    left = {split: manifest.counts[split].tokens for split in splits}
    documents = dict.fromkeys(splits, 0)
    for text, ids in _pairs(texts, mapped):
        held = held_out(np.frombuffer(digest(text.encode()), "<u8")[None], manifest.settings["val_fraction"])[0]
        split = "val" if held else "train"
        documents[split] += 1
        # The end of a split that fills no block is dropped.
        row = np.append(ids, manifest.eot_id)[: left[split]].astype(manifest.dtype)
        left[split] -= len(row)
        expected[split].update(row.tobytes())
    for split in ("train", "val"):
        actual = hashlib.sha256()
        for index in range(len(manifest.splits[split])):
            actual.update(shards.read_shard(split, index).tobytes())  # type: ignore[arg-type]
        if left[split] or actual.digest() != expected[split].digest():
            return False
    return documents == {split: manifest.counts[split].documents for split in splits}


def _pairs(texts: Any, mapped: Any) -> Iterator[tuple[str, Any]]:
    """Each document's text and ids."""
    for batch, rows in zip(
        texts.with_format("arrow").iter(BATCH), mapped.with_format("arrow").iter(BATCH), strict=True
    ):
        yield from zip(batch["text"].to_pylist(), (np.asarray(row.values) for row in rows["ids"]), strict=True)


def _say(line: Any) -> None:
    print(line if isinstance(line, str) else json.dumps(line), flush=True)


WAYS: dict[str, Callable[..., None]] = {
    "finhpc": finhpc_prepare,
    "datasets.map": datasets_map,
    "tiktoken": tiktoken_alone,
}

if __name__ == "__main__":
    way, arguments = json.loads(sys.argv[1])
    try:
        WAYS[way](**arguments)
    except FinhpcError as error:
        sys.exit(f"error: {error}")
