"""The steps of a reproduction in its recipe, and how their settings refer to inputs and to earlier steps.

A setting that consists of `${NAME}` or `${NAME.KEY}` is an input of the study (text, finance, base, ...) or a value
from an earlier step's result. If that is absent (an input that was not given, a step that failed), the step is not
run; in a list only the item is left out. A list within a list is spliced into it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from finhpc.commands import COMMANDS, Command
from finhpc.errors import ConfigError
from finhpc.runs.folder import RunFolder
from finhpc.settings.base import Section, build, keys, load, nearest, recipes
from finhpc.settings.reproduce import Recipe, ReproduceConfig, Step

REFERENCE = re.compile(r"\$\{([a-z0-9_-]+)((?:\.[a-z0-9_]+)*)\}")
INPUTS = ("text", "general", "finance", "instructions", "base", "base_large", "examples")
SCALES = "reproduce/"  # of the recipes
TRAINED = {"model": "./model", "mlflow_run_id": "its run"}
# Command -> the keys of its result that later steps may refer to, before it has run; ./PATH is in the step's folder.
RESULTS: dict[str, dict[str, Any]] = {
    "prepare": {"out": "."},
    "pretrain": TRAINED,
    "decompose": {"model": "."},
    "hold_out": {"files": {}, "tasks": []},
    "finetune": TRAINED,
    "evaluate": {"mlflow_run_id": "its run"},
    "measure": {},
    "report": {},
}
OWN: dict[str, Command[Any]] = {  # commands that only a reproduction has
    "hold_out": Command(
        "hold_out",
        "write the examples that a finetuning holds out as task files",
        "finhpc.settings.reproduce:HoldOutConfig",
        "finhpc.evaluation.hold_out:hold_out",
        dry_run=None,
    ),
    "measure": Command(
        "measure",
        "measure sizes and the speed of generation",
        "finhpc.settings.reproduce:MeasureConfig",
        "finhpc.commands.reproduce.measure:measure",
        dry_run=None,
    ),
}
STEPS = {name: OWN.get(name) or COMMANDS[name] for name in RESULTS}

Tree = dict[str, Any]


class AbsentError(Exception):
    """A setting refers to something absent. `name`: the input or the step."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(name)


def read_recipe(scale: str) -> Recipe:
    """The steps of a scale, or of a YAML file; raises `ConfigError` with every problem of their form."""
    names = [name.removeprefix(SCALES) for name in recipes() if name.startswith(SCALES)]
    if scale not in names and not scale.endswith((".yaml", ".yml")):
        raise ConfigError(f"scale={scale} is not a scale; {nearest(scale, names)} Or give a YAML file of steps.")
    recipe = load(Recipe, SCALES + scale if scale in names else scale)
    problems = [
        f"inputs.{name} is not an input; {nearest(name, list(INPUTS))}" for name in recipe.inputs if name not in INPUTS
    ]
    verbs = {f"defaults.{verb}": verb for verb in recipe.defaults}
    verbs |= {f"step {step.name}": step.verb for step in recipe.steps}
    problems += [
        f"{at}: unknown command {verb!r}; {nearest(verb, list(STEPS))}"
        for at, verb in verbs.items()
        if verb not in STEPS
    ]
    steps = [step.name for step in recipe.steps]
    twice = sorted({name for name in steps if steps.count(name) > 1})
    problems += [f"step {name} occurs twice; rename one." for name in twice]
    problems += [f"step {name} has the name of an input; rename it." for name in steps if name in INPUTS]
    for at, step in enumerate(recipe.steps):
        for name in dict.fromkeys(references(merged(recipe, step))):
            if name in INPUTS or name in steps[:at]:
                continue
            reason = "is a later step; put it before."
            if name not in steps:
                reason = f"is neither an input nor a step; {nearest(name, [*INPUTS, *steps[:at]])}"
            problems.append(f"step {step.name}: ${{{name}}} {reason}")
    if problems:
        raise ConfigError(problems)
    return recipe


def inputs_of(config: ReproduceConfig, recipe: Recipe) -> Tree:
    """Input -> its value: the flag's, else the recipe's, else None. `general` becomes one file per task.

    Raises `ConfigError` if files of the tasks are missing in the general folder.
    """
    from finhpc.evaluation.documents import SOURCES, find
    from finhpc.settings.evaluate import EvaluateData

    given = {name: getattr(config, name) or None for name in INPUTS}
    if config.general:
        given["general"] = {
            task: find(task, EvaluateData(folder=config.general)) for task, of in SOURCES.items() if of.lm_eval
        }
    return {name: recipe.inputs.get(name) if value is None else value for name, value in given.items()}


def merged(recipe: Recipe, step: Step) -> Tree:
    """The step's settings over the defaults of its command, by section; a `model` with a path has its own shape."""
    tree = dict(recipe.defaults.get(step.verb, {}))
    for section, values in step.settings.items():
        before = tree.get(section)
        stands_alone = section == "model" and isinstance(values, dict) and "path" in values
        both = isinstance(before, dict) and isinstance(values, dict)
        tree[section] = before | values if both and not stands_alone else values  # type: ignore[operator]
    return tree


def references(value: Any) -> Iterator[str]:
    """The names of inputs and steps to which settings refer."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)
    elif isinstance(value, str) and (match := REFERENCE.fullmatch(value)):
        yield match[1]


def resolve(value: Any, known: Mapping[str, Any], dropped: list[str]) -> Any:
    """Settings with every reference replaced; items left out of lists are added to `dropped`.

    `known`: input or step -> value or result, or None. Raises `AbsentError`, and `ConfigError` for a key that a
    result does not have.
    """
    if isinstance(value, Mapping):
        return {key: resolve(inner, known, dropped) for key, inner in value.items()}
    if isinstance(value, list):
        return _resolve_list(value, known, dropped)
    match = REFERENCE.fullmatch(value) if isinstance(value, str) else None
    return value if match is None else _look_up(match[1], match[2].split(".")[1:], known, dropped)


def _resolve_list(value: list[Any], known: Mapping[str, Any], dropped: list[str]) -> list[Any]:
    resolved: list[Any] = []
    for item in value:
        try:
            new = resolve(item, known, dropped)
        except AbsentError as absent:
            dropped.append(absent.name)
            continue
        resolved += new if isinstance(new, list) and not isinstance(item, list) else [new]
    if value and not resolved:
        raise AbsentError(dropped[-1])
    return resolved


def _look_up(name: str, path: list[str], known: Mapping[str, Any], dropped: list[str]) -> Any:
    value = known.get(name)
    if value is None:
        raise AbsentError(name)
    if name in INPUTS:
        value = resolve(value, known, dropped)  # an input may come from a step, such as the base
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            has = ", ".join(value) if isinstance(value, Mapping) else "a single value"
            raise ConfigError(f"${{{'.'.join([name, *path])}}}: the result of {name} has no {key}; it has: {has}.")
        value = value[key]
    if value is None:
        raise AbsentError(name)
    return value


def step_config(study: ReproduceConfig, step: Step, tree: Tree) -> Section:
    """A step's checked settings: `tree`, without references, stored and tracked with the study."""
    cls: type[Section] = STEPS[step.verb].settings_class()
    fields, tree = cls.model_fields, dict(tree)
    name = f"{study.run.name}-{step.name}"
    folder = RunFolder(study.run.storage, name).path
    own = study.run.model_dump() | {"name": name, "storage": str(folder.parent)}
    if "run" in fields:  # not every command has all its keys: a report has no name
        known = [key.removeprefix("run.") for key in keys(cls) if key.startswith("run.")]
        tree["run"] = {key: own[key] for key in known} | tree.get("run", {})
    if "out" in fields:
        tree.setdefault("out", str(folder))
    if "experiments" in fields:
        tree.setdefault("experiments", [study.run.experiment])
    if "resources" in fields and (given := study.resources.model_dump(exclude_unset=True)):
        tree["resources"] = tree.get("resources", {}) | given
    return build(cls, tree)
