"""A corpus of any size from a small source: its documents repeated, salted so that no two are the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from finhpc.data.text import sources
from finhpc.data.text.formats import Faults
from finhpc.data.text.tokenizer import Encoder
from finhpc.errors import DataError
from finhpc.settings.prepare import PrepareConfig

FILES = 8  # several files can be read in parallel


def write_salted(folder: Path, source: list[str], encoder: Encoder, tokens: int) -> int:
    """Write JSON lines of at least `tokens` ids (without end-of-text) into `folder`; returns the number of documents.

    Raises `ConfigError` and `DataError` as reading the source does, `DataError` if it has no text.
    """
    folder.mkdir(parents=True)
    documents = 0
    with ExitStack() as stack:
        paths = [folder / f"{index}.jsonl" for index in range(FILES)]
        files = [stack.enter_context(open(path, "w", encoding="utf-8")) for path in paths]
        for text in _salted(source, encoder):
            files[documents % FILES].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            documents += 1
            tokens -= int(encoder.encode([text])[1][0]) - 1
            if tokens <= 0:
                break
    return documents


def _salted(source: list[str], encoder: Encoder) -> Iterator[str]:
    """Endless texts; those that name a special token are skipped, as the plain way would encode it as one."""
    config = PrepareConfig(source=source)
    units, _ = sources.units(config)
    special = [token.content for token in encoder.tokenizer.get_added_tokens_decoder().values()]
    copy = 0
    while True:
        number = 0
        for unit in units:
            for text in sources.read(unit, config, Faults("strict")):
                if text.strip() and not any(name in text for name in special):
                    yield f"[{copy}-{number}] {text}"
                    number += 1
        if not number:
            raise DataError(f"source={' '.join(source)} has no text; give another --source.")
        copy += 1
