"""The part of financial sets that a finetuning holds out, as files that `finhpc evaluate` scores.

A finetuning splits its files by a hash of each input, so which examples it never learned from can be told without it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finhpc.config import EvaluateData, HoldOutConfig, Instructions
from finhpc.data.examples import is_held_out
from finhpc.data.instructions import FORMATS, format_of
from finhpc.data.records import split_name
from finhpc.errors import ConfigError
from finhpc.evaluation.documents import documents
from finhpc.files import write_atomic

TASKS = {"phrasebank": "fpb", "fiqa": "fiqa_sa", "tfns": "tfns", "conll": "ner"}  # format -> task
NAMED = ("phrasebank", "conll")  # formats of text files, which a task's file must be told


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
    settings = Instructions(encoding=config.encoding)
    for source in config.source:
        kind = format_of(source, settings)
        if (task := TASKS.get(kind)) is None:
            continue
        path, _ = split_name(source, FORMATS)
        file = f"{path}:{kind}" if kind in NAMED else path
        rows, _ = documents(task, EvaluateData(files={task: file}, encoding=config.encoding), None, 0)
        found.setdefault(task, []).extend(row for row in rows if is_held_out(row["input"], config.eval_fraction))
    if not any(found.values()):
        raise ConfigError(
            f"source={', '.join(config.source)} holds out no example of a financial task; give files of PhraseBank, "
            "FiQA, TFNS or CoNLL entities, or a larger eval_fraction."
        )
    return {task: rows for task, rows in found.items() if rows}
