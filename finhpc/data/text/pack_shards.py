"""Unit files -> shards, without Ray: remove duplicates, divide documents into splits, fill blocks with ids."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finhpc.data.shards.shards import ShardFile, Split, SplitCounts, Tokens, encode_shard
from finhpc.data.text.encoding import DIGEST_BYTES, held_out, unit_batches
from finhpc.errors import ConfigError
from finhpc.files import write_atomic
from finhpc.screen import Progress
from finhpc.settings.prepare import PrepareConfig


@dataclass
class Packed:
    """The shards of each split, its counts, and what was dropped."""

    splits: dict[str, list[ShardFile]]
    counts: dict[str, SplitCounts]
    dropped: dict[str, int]
    val_unigram_entropy_nats: float


@dataclass
class Packer:
    """Fills blocks of one split with ids and writes every full shard. It keeps the ids of one shard in memory."""

    out: Path
    split: Split
    config: PrepareConfig
    vocab_size: int
    shards: list[ShardFile] = field(default_factory=list)
    counts: SplitCounts = field(default_factory=SplitCounts)
    pending: list[Tokens] = field(default_factory=list)
    pending_tokens: int = 0

    def __post_init__(self) -> None:
        self.frequencies = np.zeros(self.vocab_size, np.int64)

    def add(self, ids: Tokens) -> None:
        """Add the ids of complete documents; they are copied, because a view would keep its file in memory."""
        self.pending.append(ids.copy())
        self.pending_tokens += len(ids)
        full = self.config.block_len * self.config.shard_blocks
        while self.pending_tokens >= full:
            self._write(self.config.shard_blocks)

    def close(self) -> int:
        """Write the last shard; return how many ids at the end fill no block and are dropped."""
        if blocks := self.pending_tokens // self.config.block_len:
            self._write(blocks)
        return self.pending_tokens

    def _write(self, blocks: int) -> None:
        ids = np.concatenate(self.pending)
        size = blocks * self.config.block_len
        self.pending, self.pending_tokens = [ids[size:]], len(ids) - size
        content = encode_shard(ids[:size].reshape(blocks, self.config.block_len))
        name = f"{self.split}-{len(self.shards):05d}.parquet"
        write_atomic(self.out / name, content)
        sha256 = hashlib.sha256(content).hexdigest()
        self.shards.append(ShardFile(file=name, blocks=blocks, sha256=sha256, bytes=len(content)))
        self.counts.tokens += size
        if self.split == "val":
            self.frequencies += np.bincount(ids[:size], minlength=self.vocab_size)


def pack(files: list[Path], out: Path, config: PrepareConfig, vocab_size: int) -> Packed:
    """Write the shards of both splits into `out` from unit files, in their order.

    Needs memory for about 48 bytes per document (digests and their sorting) and one shard of each split. Raises
    `ConfigError` if a split would have no block.
    """
    digests = _digests(files)
    keep, val = first_occurrences(digests), held_out(digests, config.val_fraction)
    duplicates = len(keep) - int(keep.sum())
    del digests
    splits: tuple[Split, ...] = ("train", "val")
    packers = {split: Packer(out, split, config, vocab_size) for split in splits}
    done = 0
    with Progress("packing", sum(path.stat().st_size for path in files)) as progress:
        for path in files:
            for tokens, ends, sizes in _documents(path):
                here = slice(done, done + len(sizes))
                for split, packer in packers.items():
                    chosen = keep[here] & (val[here] == (split == "val"))
                    packer.counts.documents += int(chosen.sum())
                    packer.counts.bytes += int(sizes[chosen].sum())
                    for start, stop in runs(chosen):
                        packer.add(tokens[ends[start] : ends[stop]])
                done = here.stop
            progress.advance(path.stat().st_size)
    tail = sum(packer.close() for packer in packers.values())
    if problems := [_too_small(split, packers, config) for split in packers if not packers[split].shards]:
        raise ConfigError(problems)
    return Packed(
        splits={split: packer.shards for split, packer in packers.items()},
        counts={split: packer.counts for split, packer in packers.items()},
        dropped={"duplicate": duplicates, "tail_tokens": tail},
        val_unigram_entropy_nats=entropy_nats(packers["val"].frequencies),
    )


def first_occurrences(digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Return a mask of the rows of (n, 2) digests that appear for the first time."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal digests stay in their order
    ordered = digests[order]
    keep = np.ones(len(digests), np.bool_)
    keep[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return keep


def runs(chosen: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return [start, stop) of each run of True in a mask; they are few, because most documents go to train."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def entropy_nats(frequencies: npt.NDArray[np.int64]) -> float:
    """Return -sum p log p: the loss, in nats per token, of the best guess that knows only how often ids occur."""
    p = frequencies[frequencies > 0] / frequencies.sum()
    return float(-(p * np.log(p)).sum())


def _digests(files: list[Path]) -> npt.NDArray[np.uint64]:
    """Return all documents' digests, in order: (n, 2) uint64."""
    parts = [np.empty(0, np.dtype("<u8"))]
    for path in files:
        for batch in unit_batches(path):
            column = batch.column(1)
            view = np.frombuffer(column.buffers()[1], "<u8", len(column) * 2, column.offset * DIGEST_BYTES)
            parts.append(view.copy())  # a view would keep the file mapped
    return np.concatenate(parts).reshape(-1, 2)


def _documents(path: Path) -> Iterator[tuple[Tokens, npt.NDArray[np.int32], npt.NDArray[np.int64]]]:
    """Yield a unit file by batches: all ids, the offsets of each document, and the bytes of each document."""
    for batch in unit_batches(path):
        rows = batch.column(0)
        yield rows.values.to_numpy(), rows.offsets.to_numpy(), batch.column(2).to_numpy()


def _too_small(split: Split, packers: dict[Split, Packer], config: PrepareConfig) -> str:
    """Why a split has no block, and what to change: hold out more if that helps, else more text or smaller blocks."""
    packer = packers[split]
    what, count = "held-out" if split == "val" else "train", packer.counts.documents
    problem = (
        f"the {what} split has {count} document{'' if count == 1 else 's'} with {packer.pending_tokens} tokens, less "
        f"than one block of {config.block_len}; "
    )
    documents = sum(one.counts.documents for one in packers.values())
    tokens = sum(one.counts.tokens + one.pending_tokens for one in packers.values())
    # Documents are chosen by hash: with this share a split of five documents and two blocks is expected.
    share = max(5 / max(documents, 1), 2 * config.block_len / max(tokens, 1))
    if split == "val" and share <= 0.5:
        return problem + f"raise --val_fraction to {math.ceil(100 * share) / 100:g} (now {config.val_fraction:g})."
    return problem + f"give more text or a smaller --block_len (now {config.block_len})."
