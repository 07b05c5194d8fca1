"""Token shards on disk: blocks of fixed length in parquet files, and the manifest that lists them.

A prepared folder holds `manifest.json`, `tokenizer/`, `train-00000.parquet` ... and `val-00000.parquet` ... . A shard
has one column, `tokens`: lists of `block_len` ids, 16-bit if the vocabulary allows. The manifest is written last: a
folder without one is not prepared.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from finhpc.errors import ConfigError, DataError
from finhpc.files import file_sha256
from finhpc.models.files.tokens import largest_id

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
Split = Literal["train", "val"]
Tokens = npt.NDArray[Any]  # uint16 or uint32
Ints = npt.NDArray[np.int64]


class ShardFile(BaseModel):
    """One parquet file of a split; `blocks` rows, `bytes` on disk."""

    model_config = ConfigDict(extra="forbid")

    @field_validator("file")
    @classmethod
    def _inside(cls, name: str) -> str:
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise ValueError(f"{name!r} is not the plain name of a file in this folder")
        return name

    file: str
    blocks: int = Field(ge=0)
    sha256: str
    bytes: int = Field(ge=0)


class SplitCounts(BaseModel):
    """The content of a split: documents, their UTF-8 bytes, and the ids in its blocks, including end-of-text."""

    model_config = ConfigDict(extra="forbid")

    documents: int = 0
    bytes: int = 0
    tokens: int = 0


class Manifest(BaseModel):
    """The content of a prepared folder, and where it came from."""

    model_config = ConfigDict(extra="forbid")

    format: int = FORMAT
    block_len: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    eot_id: int
    dtype: Literal["uint16", "uint32"]
    tokenizer_sha256: str
    fingerprint: str
    splits: dict[str, list[ShardFile]]
    counts: dict[str, SplitCounts]
    dropped: dict[str, int]
    val_unigram_entropy_nats: float
    source: list[dict[str, Any]]
    settings: dict[str, Any]
    settings_sha256: str
    versions: dict[str, str]

    @model_validator(mode="after")
    def _whole(self) -> Manifest:
        """Refuse a list of shards that was changed by hand: it no longer has the fingerprint that runs recorded."""
        if missing := {"train", "val"} - set(self.splits):
            raise ValueError(f"no {' and no '.join(sorted(missing))} split")
        shards = [shard for split in self.splits.values() for shard in split]
        if self.fingerprint != dataset_fingerprint(shards, self.tokenizer_sha256, self.block_len):
            raise ValueError("the fingerprint does not match the listed files")
        return self


@dataclass(frozen=True)
class Shards:
    """An open prepared folder. It is cheap to copy to another process, because the tokens stay on disk."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path) -> Shards:
        """Open a folder written by `finhpc prepare`; every file must exist at its full size.

        The content of a shard is checked when it is read. Raises `ConfigError` for another or an unfinished folder,
        `DataError` if a file is missing or cut, or the tokenizer was changed.
        """
        folder = Path(folder).absolute()
        manifest = _read_manifest(folder)
        for shard in (shard for split in manifest.splits.values() for shard in split):
            path = folder / shard.file
            if not path.is_file():
                raise DataError(f"{path} is missing, but the manifest lists it; rerun the prepare into a new folder.")
            if path.stat().st_size != shard.bytes:
                raise DataError(
                    f"{path} has {path.stat().st_size} bytes, the manifest says {shard.bytes}: it is damaged; "
                    "restore it, or rerun the prepare into a new folder."
                )
        shards = cls(folder, manifest)
        shards.check_tokenizer()
        return shards

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's folder; `transformers.AutoTokenizer.from_pretrained` opens it."""
        return self.folder / TOKENIZER

    def verify(self) -> None:
        """Compare every byte with the manifest. Raises `DataError` at the first difference."""
        known = {shard.file: shard.sha256 for split in self.manifest.splits.values() for shard in split}
        known[f"{TOKENIZER}/tokenizer.json"] = self.manifest.tokenizer_sha256
        for name, expected in known.items():
            if file_sha256(self.folder / name) != expected:
                raise DataError(f"{self.folder / name} is not the file that was prepared (sha256 differs); restore it.")

    def check_seq_len(self, seq_len: int, context: int | None = None) -> None:
        """Raise `ConfigError` unless blocks can be cut into samples of `seq_len` tokens; advise at most `context`."""
        block_len = self.manifest.block_len
        if seq_len < 1 or block_len % seq_len:
            divisors = [d for d in range(2, block_len + 1) if block_len % d == 0]
            fitting = [d for d in divisors if context is None or d <= context] or divisors
            near = sorted(fitting, key=lambda d: abs(d - seq_len))[:4]
            raise ConfigError(
                f"data.seq_len={seq_len} does not divide the shards' block_len={block_len}; "
                f"use one of: {', '.join(map(str, sorted(near)))}."
            )

    def shard_samples(self, split: Split, seq_len: int) -> list[int]:
        """Return the number of samples of `seq_len` tokens in each shard of a split, in file order."""
        self.check_seq_len(seq_len)
        per_block = self.manifest.block_len // seq_len
        return [shard.blocks * per_block for shard in self.manifest.splits[split]]

    def num_samples(self, split: Split, seq_len: int) -> int:
        """Return the number of samples of `seq_len` tokens in a split."""
        return sum(self.shard_samples(split, seq_len))

    def check_tokenizer(self) -> None:
        """Raise `DataError` unless the tokenizer in the folder is the one that made the ids."""
        path = self.tokenizer / "tokenizer.json"
        if (sha256 := file_sha256(path)) != self.manifest.tokenizer_sha256:
            raise DataError(
                f"{path} is not the tokenizer these shards were made with (sha256 {sha256[:12]}, the manifest says "
                f"{self.manifest.tokenizer_sha256[:12]}); restore it, or rerun the prepare into a new folder."
            )

    def ids_of_text(self) -> int:
        """Return how many rows the ids of the text need in an embedding; a token that only pads needs none."""
        from finhpc.models.files.tokenizer import has_tokenizer, open_tokenizer

        exists = has_tokenizer(self.tokenizer)
        return largest_id(open_tokenizer(self.tokenizer)) + 1 if exists else self.manifest.vocab_size

    def check_same(self, fingerprint: str) -> None:
        """Raise `DataError` unless the folder has the content it had when a run began (`manifest.fingerprint`)."""
        if self.manifest.fingerprint != fingerprint:
            raise DataError(
                f"data.shards={self.folder} was replaced during the run: it has other data (fingerprint "
                f"{self.manifest.fingerprint[:12]}) than the run began with ({fingerprint[:12]}); restore it and "
                "rerun the command, or use another run.name."
            )

    def read_shard(self, split: Split, index: int) -> Tokens:
        """Return all blocks of a shard: (blocks, block_len), uint16 or uint32, read-only.

        Raises `DataError` if the file cannot be read, is not the parquet file that the manifest describes, has an id
        outside the vocabulary, or has other blocks than those that were prepared.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        shard, manifest = self.manifest.splits[split][index], self.manifest
        path = self.folder / shard.file
        expected = pa.list_(pa.from_numpy_dtype(np.dtype(manifest.dtype)), manifest.block_len)
        try:
            # Read, not mapped: a mapped file that is cut meanwhile kills the process.
            content = path.read_bytes()
            table = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True).read(use_threads=False)
        except (OSError, pa.ArrowException) as error:
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise DataError(f"{path} cannot be read ({reason}); restore it, or prepare again.") from None
        if table.schema.names != ["tokens"] or not table.schema.field("tokens").type.equals(expected):
            held = ", ".join(f"{field.name}: {field.type}" for field in table.schema)
            raise DataError(f"{path} holds {held or 'no column'}, not tokens: {expected}; restore it.")
        if table.num_rows != shard.blocks or table.column("tokens").null_count:
            raise DataError(f"{path} has {table.num_rows} rows, the manifest says {shard.blocks}; restore it.")
        blocks = _flat(table.column("tokens")).reshape(-1, manifest.block_len)
        if blocks.size and int(blocks.max()) >= manifest.vocab_size:
            row, column = divmod(int(np.argmax(blocks >= manifest.vocab_size)), manifest.block_len)
            raise DataError(
                f"{path} holds id {blocks[row, column]} in row {row}, position {column}; the vocabulary ends at "
                f"{manifest.vocab_size - 1}; restore it, or prepare again."
            )
        if (found := hashlib.sha256(content).hexdigest()) != shard.sha256:
            raise DataError(
                f"{path} is not the file that was prepared (sha256 {found[:12]}, the manifest says "
                f"{shard.sha256[:12]}): its blocks were changed or replaced; restore it."
            )
        return blocks

    def spread(self, split: Split, seq_len: int, n: int | None = None) -> Iterator[tuple[Ints, Ints]]:
        """Yield ids and tokens (samples, seq_len) of at most `n` samples (None: all) at even distances, by shard."""
        sizes = self.shard_samples(split, seq_len)
        total = sum(sizes)
        n = total if n is None else min(n, total)
        chosen = np.arange(n, dtype=np.int64) * total // max(n, 1)
        for index, (start, stop) in enumerate(pairwise(np.concatenate([[0], np.cumsum(sizes)]))):
            ids = chosen[(chosen >= start) & (chosen < stop)]
            if len(ids):
                yield ids, self.read_shard(split, index).reshape(-1, seq_len)[ids - start].astype(np.int64)

    def eval_samples(self, n: int, seq_len: int) -> Ints:
        """Return at most `n` held-out samples, (<=n, seq_len), spread evenly over the split; always the same."""
        parts = [tokens for _, tokens in self.spread("val", seq_len, n)]
        return np.concatenate(parts) if parts else np.empty((0, seq_len), np.int64)


def encode_shard(blocks: Tokens) -> bytes:
    """Return the parquet file of blocks (n, block_len); the same bytes for the same blocks."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = pa.array(np.ascontiguousarray(blocks).reshape(-1))
    table = pa.table({"tokens": pa.FixedSizeListArray.from_arrays(flat, blocks.shape[1])})
    sink = pa.BufferOutputStream()
    # Parquet stores 16-bit integers in 32 bits; with the bytes split, zstd removes the zero half.
    # Page checksums let every read notice a flipped bit, at little cost.
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=False,
        column_encoding="BYTE_STREAM_SPLIT",
        write_page_checksum=True,
    )
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def dataset_fingerprint(shards: Sequence[ShardFile], tokenizer_sha256: str, block_len: int) -> str:
    """Return one hash of everything that a model trained on the folder depends on."""
    parts = [*(shard.sha256 for shard in shards), tokenizer_sha256, str(block_len)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _read_manifest(folder: Path) -> Manifest:
    if not folder.is_dir():
        raise ConfigError(f"data.shards={folder} is not a folder; give the folder written by `finhpc prepare`.")
    path = folder / MANIFEST
    if not path.is_file():
        if not any(folder.iterdir()):
            raise ConfigError(
                f"data.shards={folder} is empty; write shards there with `finhpc prepare --out "
                f"{shlex.quote(str(folder))}`."
            )
        raise ConfigError(
            f"data.shards={folder} has no {MANIFEST}: not prepared, or interrupted; run `finhpc prepare` again."
        )
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        reason = first["msg"].removeprefix("Value error, ")
        raise DataError(f"{path} is damaged or of another version ({where}: {reason}); prepare again.") from None


def _flat(column: Any) -> Tokens:
    """Return the values of a fixed-size list column, without a copy if parquet returns one chunk."""
    chunks = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks]
    if len(chunks) == 1:
        return chunks[0]  # type: ignore[no-any-return]
    return np.concatenate(chunks) if chunks else np.empty(0, np.uint16)
