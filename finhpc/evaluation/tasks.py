"""Task files that lm-eval reads: those that ship, pointed at the examples at hand, and the user's own.

For every task of ours a folder gets NAME.yaml and NAME.jsonl, so that lm-eval's own command gives the same
scores: `lm_eval --model hf --model_args pretrained=MODEL --tasks NAME --include_path FOLDER`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from finhpc.errors import ConfigError, DataError
from finhpc.evaluation.documents import SOURCES, documents, takes_labels
from finhpc.evaluation.own_task import own_task
from finhpc.evaluation.task_file import read_task, rendering
from finhpc.files import file_sha256, write_atomic
from finhpc.settings.base import nearest
from finhpc.settings.evaluate import EvaluateConfig

PERPLEXITY = "perplexity"
GENERAL = {  # lm-eval's own definitions, under its tasks/
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
}
TASKS = (*SOURCES, PERPLEXITY)


@dataclass(frozen=True)
class TaskFile:
    """A task as lm-eval finds it. `sha256`: of the file, what it includes, and its examples as far as they are on disk.

    `total`: examples there are in all; `trusted`: whether the file may run code.
    """

    name: str
    path: Path
    sha256: str
    examples: int | None
    total: int | None
    own: bool  # the user's, read where it lies
    trusted: bool = False
    notes: tuple[str, ...] = ()  # what was guessed about its examples


def prepare_tasks(config: EvaluateConfig, folder: Path, write: bool = True) -> list[TaskFile]:
    """Write the files of all tasks but perplexity into `folder`, or without `write` only describe them.

    Raises one `ConfigError` with every problem.
    """
    problems: list[str] = []
    found: list[TaskFile] = []
    if write:
        folder.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(config.tasks):
        try:
            if name.lower().endswith((".yaml", ".yml")):
                found.append(_own(Path(name).expanduser(), config))
            elif name in SOURCES or name in config.data.files:
                found.append(_ours(name, config, folder, write))
            elif name != PERPLEXITY:
                problems.append(
                    f"tasks={name} is no task; {nearest(name, list(TASKS))} Or give a task file (.yaml), or "
                    f"your own labelled file with --data.files.{name} FILE."
                )
        except (ConfigError, DataError) as error:
            problems += str(error).splitlines()
    unknown = [task for task in config.data.files if task not in (*SOURCES, *config.tasks)]
    problems += [
        f"data.files.{task} names no task; {nearest(task, list(SOURCES))} Or name it in tasks." for task in unknown
    ]
    problems += _unused(config)
    names = [task.name for task in found]
    problems += [f"tasks: {name} is given twice; once is enough." for name in set(names) if names.count(name) > 1]
    if problems:
        raise ConfigError(problems)
    return found


def _unused(config: EvaluateConfig) -> list[str]:
    """Settings of a task of the user's own that no task follows."""
    data = config.data
    if any(name in data.files and name not in SOURCES for name in config.tasks):
        return []
    given = {name: getattr(data, name) for name in ("template", "templates", "columns")}
    if not any(takes_labels(task, data.labels) for task in config.tasks):
        given["labels"] = data.labels
    return [
        f"data.{name} is given, but no task of yours (--tasks NAME --data.files.NAME FILE) follows it; leave it out."
        for name, value in given.items()
        if value
    ]


def _ours(name: str, config: EvaluateConfig, folder: Path, write: bool) -> TaskFile:
    if name in SOURCES:
        found = documents(name, config.data, config.limit, config.seed)
        text, split = _definition(name)
    else:
        text, found = own_task(name, config.data, config.limit, config.seed)
        split = "test"
    examples, path = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    data = {"data_files": {split: str(examples.absolute())}}
    contents = {
        path: (text + yaml.safe_dump({"dataset_kwargs": data})).encode(),
        examples: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows).encode(),
    }
    if write:
        for file, content in contents.items():
            write_atomic(file, content)
    sha256 = "".join(hashlib.sha256(content).hexdigest()[:32] for content in contents.values())
    return TaskFile(name, path, sha256, len(found.rows), found.total, False, notes=tuple(found.notes))


def _definition(name: str) -> tuple[str, str]:
    """The task file but for its examples, and the split that lm-eval scores."""
    if name not in GENERAL:
        return (files("finhpc.evaluation") / "tasks" / f"{name}.yaml").read_text(encoding="utf-8"), "test"
    import lm_eval.tasks

    path = Path(lm_eval.tasks.__file__).parent / GENERAL[name]
    changed: dict[str, Any] = {"dataset_path": "json", "dataset_name": None, "training_split": None}
    # lm-eval's definition by its path: functions it names are found beside it.
    return f"include: {path}\n" + yaml.safe_dump({"task": name, **changed}), "validation"


def _own(path: Path, config: EvaluateConfig) -> TaskFile:
    """A task file of the user's, with what it includes; refused if it runs code and that was not trusted."""
    if not path.is_file():
        raise ConfigError(f"tasks={path} is not a file; give an lm-eval task file or one of: {', '.join(TASKS)}.")
    tree = _trusted(path) if config.trust_task_code else read_task(path)
    name = tree.get("task")
    if not isinstance(name, str):
        raise ConfigError(f"tasks={path} names no single task (task: NAME); give a task file, not a group.")
    if tree.get("output_type") != "multiple_choice":
        raise ConfigError(f"tasks={path} has output_type={tree.get('output_type')}; multiple_choice is what is scored.")
    return TaskFile(name, path.absolute(), _hash(tree), None, None, True, config.trust_task_code)


def _trusted(path: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        tree: dict[str, Any] = load_yaml(path, resolve_func=False)
    except (yaml.YAMLError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"tasks={path} cannot be read ({reason}); correct it.") from None
    return tree


def _hash(tree: dict[str, Any]) -> str:
    """Of a task's settings and of the files of examples they name."""
    named = (tree.get("dataset_kwargs") or {}).get("data_files") or []
    names = [name for value in (named.values() if isinstance(named, dict) else [named]) for name in _listed(value)]
    files = [file_sha256(Path(name)) for name in names if isinstance(name, str) and Path(name).is_file()]
    return hashlib.sha256(json.dumps([tree, files], sort_keys=True, default=str).encode()).hexdigest()


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def load_task(task: TaskFile) -> Any:
    """The task, opened by lm-eval with all its examples; a file of the user's that is not trusted, as data alone.

    Call it, and all that renders the task's prompts, within `rendering(task.trusted)`.
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
