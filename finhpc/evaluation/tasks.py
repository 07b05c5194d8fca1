"""Task files for lm-eval: finhpc's, which name the examples on this machine, and the user's own.

Every task of finhpc becomes NAME.yaml and NAME.jsonl in a folder, so that lm-eval's own command gives the same
scores: `lm_eval --model hf --model_args pretrained=MODEL --tasks NAME --include_path FOLDER`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finhpc.errors import ConfigError, collect
from finhpc.evaluation.documents import SOURCES, TOKENS, documents, takes_labels
from finhpc.evaluation.task_file import read_task, rendering
from finhpc.files import file_sha256, json_sha256, write_atomic
from finhpc.settings.base import nearest
from finhpc.settings.evaluate import EvaluateConfig

PERPLEXITY = "perplexity"
TASKS = (*SOURCES, PERPLEXITY)


@dataclass(frozen=True)
class TaskFile:
    """A task for lm-eval. `sha256`: of the file, what it includes, and those of its examples that are on disk.

    `total`: examples before any limit; `own`: the user's file, read where it is; `trusted`: it may run code; `notes`:
    what was guessed about its examples; `tokens`: per example, roughly.
    """

    name: str
    path: Path
    sha256: str
    examples: int | None
    total: int | None
    own: bool
    trusted: bool = False
    notes: tuple[str, ...] = ()
    tokens: int = TOKENS


def prepare_tasks(config: EvaluateConfig, folder: Path, write: bool = True) -> list[TaskFile]:
    """Return all tasks except perplexity; with `write`, write their files into `folder`.

    Raises one `ConfigError` with every problem.
    """
    problems: list[str] = []
    tasks: list[TaskFile] = []
    if write:
        folder.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(config.tasks):
        with collect(problems):
            if name.lower().endswith((".yaml", ".yml")):
                tasks.append(_own(Path(name).expanduser(), config))
            elif name in SOURCES or name in config.data.files:
                tasks.append(_ours(name, config, folder, write))
            elif name != PERPLEXITY:
                problems.append(
                    f"unknown task tasks={name}; {nearest(name, list(TASKS))} Or give a task file (.yaml), or "
                    f"your own labeled file with --data.files.{name} FILE."
                )
    unknown = [task for task in config.data.files if task not in (*SOURCES, *config.tasks)]
    problems += [
        f"data.files.{task} names no task; {nearest(task, list(SOURCES))} Or name it in tasks." for task in unknown
    ]
    problems += _unused(config)
    names = [task.name for task in tasks]
    problems += [f"tasks: {name} is given twice; once is enough." for name in set(names) if names.count(name) > 1]
    if problems:
        raise ConfigError(problems)
    return tasks


def _unused(config: EvaluateConfig) -> list[str]:
    """Return problems for settings of a user's own task if there is no such task."""
    data = config.data
    if any(name in data.files and name not in SOURCES for name in config.tasks):
        return []
    given = {name: getattr(data, name) for name in ("template", "templates", "columns")}
    if not any(takes_labels(task, data.labels) for task in config.tasks):
        given["labels"] = data.labels
    return [
        f"data.{name} is given, but is for a task of your own alone (--tasks NAME --data.files.NAME FILE); remove it."
        for name, value in given.items()
        if value
    ]


def _ours(name: str, config: EvaluateConfig, folder: Path, write: bool) -> TaskFile:
    examples = documents(name, config.data, config.limit, config.seed)
    data, path = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    named = yaml.safe_dump({"dataset_kwargs": {"data_files": {"test": str(data.absolute())}}})
    contents = {
        path: (examples.definition + named).encode(),
        data: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in examples.rows).encode(),
    }
    if write:
        for file, content in contents.items():
            write_atomic(file, content)
    sha256 = "".join(hashlib.sha256(content).hexdigest()[:32] for content in contents.values())
    tokens = SOURCES[name].tokens if name in SOURCES else TOKENS
    notes = tuple(examples.notes)
    return TaskFile(name, path, sha256, len(examples.rows), examples.total, False, notes=notes, tokens=tokens)


def _own(path: Path, config: EvaluateConfig) -> TaskFile:
    """Return a task file of the user's. Raises `ConfigError` if it runs code and was not trusted."""
    if not path.is_file():
        raise ConfigError(f"tasks={path} is not a file; give an lm-eval task file or one of: {', '.join(TASKS)}.")
    if config.trust_task_code:
        from lm_eval.tasks._yaml_loader import load_yaml

        try:
            tree: dict[str, Any] = load_yaml(path, resolve_func=False)
        except (yaml.YAMLError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"tasks={path} cannot be read ({reason}); correct it.") from None
    else:
        tree = read_task(path)
    name = tree.get("task")
    if not isinstance(name, str):
        raise ConfigError(f"tasks={path} names no single task (task: NAME); give a task file, not a group.")
    if tree.get("output_type") != "multiple_choice":
        raise ConfigError(f"tasks={path} has output_type={tree.get('output_type')}; multiple_choice is what is scored.")
    return TaskFile(name, path.absolute(), _hash(tree), None, None, True, config.trust_task_code)


def _hash(tree: dict[str, Any]) -> str:
    """Return one hash of a task's settings and of the files of examples they name."""
    named = (tree.get("dataset_kwargs") or {}).get("data_files") or []
    values = list(named.values()) if isinstance(named, dict) else [named]
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    paths = [Path(name) for name in names if isinstance(name, str) and Path(name).is_file()]
    return json_sha256([tree, [file_sha256(path) for path in paths]])


def load_task(task: TaskFile) -> Any:
    """Return the task as lm-eval opens it, with all its examples; a user's file that is not trusted is read as data.

    Render its prompts within `rendering(task.trusted)` only.
    """
    from lm_eval.tasks import TaskManager

    given: Any = read_task(task.path) if task.own and not task.trusted else str(task.path)
    try:
        with rendering(task.trusted):
            return TaskManager(include_defaults=False).load([given])["tasks"][task.name]
    except Exception as error:  # lm-eval and datasets raise many kinds for files that are not as the task says
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"tasks={task.path} cannot be opened ({reason}); correct the task file or its data."
        ) from None
