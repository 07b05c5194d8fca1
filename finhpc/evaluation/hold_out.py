"""The part of financial data sets that a finetuning holds out, as files that `finhpc evaluate` scores.

A finetuning splits its files by a hash of each input, so the examples it never learned from are known without it.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from finhpc.data.examples.instructions import is_held_out, split_key
from finhpc.data.examples.schema import FORMATS, fields_of, open_sources
from finhpc.data.examples.values import each
from finhpc.errors import ConfigError
from finhpc.evaluation.documents import SOURCES, stripped
from finhpc.files import write_atomic
from finhpc.settings.finetune import Instructions
from finhpc.settings.reproduce import HoldOutConfig


def hold_out(config: HoldOutConfig) -> dict[str, Any]:
    """Write OUT/TASK.jsonl for every task of the sources; return `files` (task: path), `tasks` and `examples`.

    Sources whose answers are text (Alpaca's, conversations) are left out. Raises `ConfigError` for files that cannot
    be used and if nothing is held out, `DataError` for damaged files.
    """
    documents = held_out_documents(config)
    out = Path(config.out).expanduser().absolute()
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    for task, rows in documents.items():
        path = out / f"{task}.jsonl"
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        files[task] = str(path)
    examples = {task: len(rows) for task, rows in documents.items()}
    return {"status": "finished", "files": files, "tasks": list(files), "examples": examples}


def held_out_documents(config: HoldOutConfig) -> dict[str, list[dict[str, str]]]:
    """Return the held-out examples of each task, of all sources together."""
    task_of = {FORMATS[source.format].template: task for task, source in SOURCES.items() if source.format}
    documents: dict[str, list[dict[str, str]]] = {}
    for table in open_sources(config.source, Instructions(encoding=config.encoding)):
        if table.form is None or (task := task_of.get(table.form.name)) is None:
            continue
        for fields, _ in each(table.records, partial(fields_of, table=table)):
            if is_held_out(split_key(fields["input"]), config.eval_fraction):
                documents.setdefault(task, []).append(stripped(fields))
    if not documents:
        raise ConfigError(
            f"source={', '.join(config.source)} holds out no example of a financial task; give files of PhraseBank, "
            "FiQA, TFNS or CoNLL entities, or a larger eval_fraction."
        )
    return documents
