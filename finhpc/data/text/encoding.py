"""One unit of text -> one file of ids: the work of one parallel task of `prepare`, without Ray.

A unit's file has a row per document: `tokens` (its ids and end-of-text), `digest` (128 bits of blake2b over its UTF-8
bytes) and `bytes`. It is an Arrow file, so that it is packed without decoding.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finhpc.data.text import sources, tokenizer
from finhpc.data.text.formats import Faults, Unit
from finhpc.data.text.tokenizer import Encoder
from finhpc.files import partial_file
from finhpc.settings.prepare import PrepareConfig

BATCH_BYTES = 1 << 20  # text encoded at a time, which bounds a task's memory
DIGEST_BYTES = 16
CHECKED_CHARS = 20_000  # of a unit's first document, which the Hugging Face tokenizer encodes as well
DROPPED = "finhpc.dropped"


def unit_file(work: Path, index: int) -> Path:
    return work / f"unit-{index:05d}.arrow"


def encode_unit(unit: Unit, config: PrepareConfig, folder: Path, target: Path, tiktoken: bool | None = None) -> None:
    """Write the ids of a unit's documents to `target`, complete or not at all; its last batch counts dropped ones.

    `folder` holds the tokenizer; `tiktoken`: whether tiktoken can do its work, None if unknown. Raises `DataError` as
    reading does, and if tiktoken's ids differ from the tokenizer's.
    """
    import pyarrow as pa

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tasks are parallel already
    encoder = _encoder(folder, (folder / "tokenizer.json").stat().st_mtime_ns, tiktoken)
    schema = work_schema(encoder.dtype)
    faults, dropped = Faults(config.on_error), Counter({"empty": 0})
    with partial_file(target) as partial, open(partial, "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for index, texts in enumerate(_batches(sources.read(unit, config, faults), dropped)):
            if index == 0:
                encoder.check(texts[0][:CHECKED_CHARS])
            writer.write_batch(_rows(texts, encoder, schema))
        dropped["broken"] = faults.broken
        writer.write_batch(_rows([], encoder, schema), custom_metadata={DROPPED: json.dumps(dropped)})


def unit_batches(path: Path) -> Iterator[Any]:
    """Yield the record batches of a unit's file, mapped from disk."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_file(file)
        for index in range(reader.num_record_batches - 1):
            yield reader.get_batch(index)


def unit_dropped(path: Path) -> dict[str, int]:
    """Return how many documents of a unit were dropped, by reason."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_file(file)
        metadata = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1).custom_metadata
        counts: dict[str, int] = json.loads(metadata[DROPPED.encode()])
    return counts


def _rows(texts: list[str], encoder: Encoder, schema: Any) -> Any:
    import pyarrow as pa

    raw = [text.encode() for text in texts]
    ids, lengths = encoder.encode(texts)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    digests = pa.py_buffer(b"".join(map(digest, raw)))
    columns = [
        pa.ListArray.from_arrays(offsets, ids),
        pa.Array.from_buffers(pa.binary(DIGEST_BYTES), len(raw), [None, digests]),
        pa.array(list(map(len, raw)), pa.int64()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def digest(text: bytes) -> bytes:
    """Return the digest by which documents are the same, and by which some are held out."""
    return blake2b(text, digest_size=DIGEST_BYTES).digest()


def held_out(digests: npt.NDArray[np.uint64], fraction: float) -> npt.NDArray[np.bool_]:
    """Return a mask of the documents that are held out, by their digests (n, 2)."""
    mask: npt.NDArray[np.bool_] = digests[:, 0] < np.uint64(fraction * 2**64)
    return mask


def training_sample(units: list[Unit], config: PrepareConfig) -> Iterator[str]:
    """Yield text to train a tokenizer: the beginning of every unit, evenly, without held-out documents."""
    total = tokenizer.TRAINING_BYTES * (tokenizer.trained_size(config.tokenizer) or 0)
    quota = total // max(1, len(units))
    for unit in units:
        left = quota
        for text in sources.read(unit, config, Faults(config.on_error)):
            raw = text.encode()
            if held_out(np.frombuffer(digest(raw), np.dtype("<u8"))[None], config.val_fraction)[0]:
                continue
            yield text if len(raw) <= left else raw[:left].decode(errors="ignore")
            left -= len(raw)
            if left <= 0:
                break


def work_schema(dtype: np.dtype[Any]) -> Any:
    import pyarrow as pa

    ids = pa.list_(pa.from_numpy_dtype(dtype))
    return pa.schema({"tokens": ids, "digest": pa.binary(DIGEST_BYTES), "bytes": pa.int64()})


def _batches(texts: Iterator[str], dropped: Counter[str]) -> Iterator[list[str]]:
    """Yield texts in groups of about `BATCH_BYTES`; texts without a visible character are dropped and counted."""
    group: list[str] = []
    size = 0
    for text in texts:
        if not text or text.isspace():
            dropped["empty"] += 1
            continue
        group.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


@lru_cache(maxsize=1)
def _encoder(folder: Path, changed_ns: int, tiktoken: bool | None) -> Encoder:
    """Open an encoder once per process; `changed_ns` tells a tokenizer from an earlier one in the same folder."""
    return Encoder(folder, tiktoken)
