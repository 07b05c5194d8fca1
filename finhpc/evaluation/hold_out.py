"""The part of financial sets that a finetuning holds out, as files that `finhpc evaluate` scores.

A finetuning splits its files by a hash of each input, so which examples it never learned from can be told without it.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from finhpc.data.examples.examples import is_held_out
from finhpc.data.examples.problems import each
from finhpc.data.examples.schema import fields_of, open_sources
from finhpc.errors import ConfigError
from finhpc.files import write_atomic
from finhpc.settings.finetune import Instructions
from finhpc.settings.reproduce import HoldOutConfig

TASKS = {"phrasebank": "fpb", "fiqa": "fiqa_sa", "tfns": "tfns", "ner": "ner"}  # template -> task


def hold_out(config: HoldOutConfig) -> dict[str, Any]:
    """Write OUT/TASK.jsonl for every task of the sources; returns `files` (task: path), `tasks`, `examples`.

    Sources of other formats (Alpaca's, chats) ask for text and are left out. Raises `ConfigError` for files that
    cannot be used, and where nothing is held out, `DataError` for damaged ones.
    """
    found = held_out_documents(config)
    out = Path(config.out).expanduser().absolute()
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    for task, rows in found.items():
        path = out / f"{task}.jsonl"
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        files[task] = str(path)
    examples = {task: len(rows) for task, rows in found.items()}
    return {"status": "finished", "files": files, "tasks": list(files), "examples": examples}


def held_out_documents(config: HoldOutConfig) -> dict[str, list[dict[str, Any]]]:
    """Task -> its held-out examples, of all sources together."""
    found: dict[str, list[dict[str, Any]]] = {}
    for table in open_sources(config.source, Instructions(encoding=config.encoding)):
        if table.form is None or (task := TASKS.get(table.form.name)) is None:
            continue
        for fields, _ in each(table.records, partial(fields_of, one=table)):
            if is_held_out(fields["input"], config.eval_fraction):
                found.setdefault(task, []).append({name: text.strip() for name, text in sorted(fields.items())})
    if not any(found.values()):
        raise ConfigError(
            f"source={', '.join(config.source)} holds out no example of a financial task; give files of PhraseBank, "
            "FiQA, TFNS or CoNLL entities, or a larger eval_fraction."
        )
    return {task: rows for task, rows in found.items() if rows}
