"""`finhpc reproduce`: the whole paper at one scale, one step after the other on one Ray, up to the report.

The steps are in a recipe (`finhpc/recipes/reproduce/SCALE.yaml`, or a file of the user's) and are commands with their
own settings. A step's run is called STUDY-STEP and is stored next to the others in `run.storage`; its own folder says
whether it is finished, so the same command resumes.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from typing import Any

from finhpc.cluster.connect import cluster_resources, dead_process, known_resources, ray_cluster
from finhpc.commands.reproduce.plan import PlannedStep, misplaced, plan_steps
from finhpc.commands.reproduce.recipe import STEPS, AbsentError, inputs_of, merged, read_recipe, resolve, step_config
from finhpc.errors import ConfigError, FinhpcError, TrainingFailedError
from finhpc.files import write_atomic
from finhpc.interrupts import terminable
from finhpc.runs.folder import RunFolder
from finhpc.screen import duration, rows_table
from finhpc.settings.base import to_yaml
from finhpc.settings.reproduce import Recipe, ReproduceConfig
from finhpc.tracking.store import check_store

log = logging.getLogger(__name__)


def reproduce(config: ReproduceConfig, dry_run: bool = False) -> dict[str, Any]:
    """Run every step of `config.scale`; returns the content of the study's result.json.

    First every step is checked, and one `ConfigError` lists every problem; with `dry_run` that is all. A step that
    fails is reported, and steps that do not need it go on; then `TrainingFailedError` names all that failed. The same
    command resumes: finished steps are not repeated.
    """
    folder = RunFolder(config.run.storage, config.run.name)
    recipe = read_recipe(config.scale)
    steps = plan_steps(config, recipe)
    check_store(config.run.mlflow_uri, config.run.experiment)
    total = known_resources()
    problems = misplaced(steps, total) if total is not None else []
    _show(config, recipe, steps)
    result: dict[str, Any] = {
        "status": "dry_run",
        "scale": config.scale,
        "experiment": config.run.experiment,
        "steps": [one.row() for one in steps],
        "does_not_fit": problems,
        "report": None,
        "folder": str(folder.path),
        "wall_s": None,
    }
    if dry_run:
        for problem in problems:
            log.info(f"does not fit here: {problem}")
        return result
    if problems:
        raise ConfigError(problems)
    with folder.lock(), terminable():
        folder.write_settings(config)
        write_atomic(folder.path / "recipe.yaml", to_yaml(recipe))
        folder.write_environment()
        _run_all(config, recipe, steps, folder, result)
    shown = [
        {
            "step": one.step.name,
            "command": one.step.verb,
            "status": one.status,
            "time": "" if one.wall_s is None else duration(one.wall_s),
            "why": one.why,
        }
        for one in steps
    ]
    rows_table(f"reproduce {config.run.name} at scale {config.scale}", shown)
    if failed := [one for one in steps if one.status == "failed"]:
        reasons = "; ".join(f"{one.step.name} ({one.why})" for one in failed)
        raise TrainingFailedError(
            f"{len(failed)} of {len(steps)} steps failed: {reasons}. The others are finished; the same command "
            "retries what is missing."
        )
    return result


def _run_all(
    config: ReproduceConfig, recipe: Recipe, steps: list[PlannedStep], folder: RunFolder, result: dict[str, Any]
) -> None:
    """Run the steps in order; how they end goes into `result` and its file, however the study ends."""
    begin, ended = time.monotonic(), list[PlannedStep]()
    result["status"] = "killed"
    try:
        with ray_cluster():
            if problems := misplaced(steps, cluster_resources()):
                raise ConfigError(problems)
            known, seconds = dict(inputs_of(config, recipe)), dict[str, list[float]]()
            for number, one in enumerate(steps):
                head = f"[{number + 1}/{len(steps)}] {one.step.name} ({one.step.verb})"
                was_finished = one.finished
                _run(config, recipe, one, known, head)
                ended.append(one)
                known[one.step.name] = one.result
                if one.wall_s is None:
                    log.info(f"{head}: not run, {one.why}")
                    continue
                if not was_finished:
                    seconds.setdefault(one.step.verb, []).append(one.wall_s)
                why = f": {one.why}" if one.why else ""
                left = _time_left(steps[number + 1 :], seconds)
                so_far = duration(time.monotonic() - begin)
                log.info(f"{head}: {one.status} in {duration(one.wall_s)}{why}; {so_far} so far{left}")
                if one.status == "failed" and (process := dead_process()):
                    raise TrainingFailedError(
                        f"Ray's {process} died during {one.step.name}, most often of too little memory; finished "
                        "steps are kept: run the same command again."
                    )
        result["status"] = "failed" if any(one.status == "failed" for one in steps) else "finished"
    finally:
        reports = [one.result["out"] for one in ended if one.step.verb == "report" and one.result]
        rows = [
            {
                "step": one.step.name,
                "verb": one.step.verb,
                "status": one.status,
                "wall_s": one.wall_s,
                "why": one.why or None,
            }
            for one in ended
        ]
        result |= {"steps": rows, "wall_s": time.monotonic() - begin, "report": reports[-1] if reports else None}
        folder.write_result(result)


def _run(study: ReproduceConfig, recipe: Recipe, one: PlannedStep, known: dict[str, Any], head: str) -> None:
    """Run one step and record how it ended; only errors that stop the whole study are raised."""
    step, dropped, begin = one.step, list[str](), time.monotonic()
    try:
        tree = resolve(merged(recipe, step), known, dropped)
        for name in dropped:
            log.info(f"{head}: without {name}, which is absent")
        log.info(f"{head}: begins")
        one.result = STEPS[step.verb].run(step_config(study, step, tree))
        one.status, one.why = "finished", ""
    except AbsentError as absent:
        one.why = one.why or f"it needs {absent.name}, which is absent"
        return
    except FinhpcError as error:
        first, *more = str(error).splitlines()
        one.status, one.why = "failed", first + (f" (and {len(more)} more problems)" if more else "")
        log.info(str(error))
    except Exception as error:  # an unexpected failure of one step must not end the others
        traceback.print_exc(file=sys.stderr)
        one.status, one.why = "failed", f"{type(error).__name__}: {error}".splitlines()[0]
    one.wall_s = time.monotonic() - begin


def _time_left(steps: list[PlannedStep], seconds: dict[str, list[float]]) -> str:
    """`, about ... left`, from earlier steps of the same command; `seconds`: command -> what each of them took."""
    commands = [one.step.verb for one in steps if one.config is not None and not one.finished]
    known = [sum(took) / len(took) for command in commands if (took := seconds.get(command))]
    unknown = len(commands) - len(known)
    if not commands:
        return ""
    if not known:
        return f", {unknown} steps left"
    more = f" and {unknown} steps of other commands" if unknown else ""
    return f", about {duration(sum(known))} left{more}"


def _show(config: ReproduceConfig, recipe: Recipe, steps: list[PlannedStep]) -> None:
    """Print what will be done, what is left out, and what could not be checked."""
    shown = [
        {
            "step": one.step.name,
            "command": one.step.verb,
            "state": one.row()["state"],
            "parameters": "" if one.params is None else f"{one.params / 1e6:,.2f} M",
            "tokens": "" if one.tokens is None else f"{one.tokens / 1e6:,.2f} M",
            "workers": "" if one.workers is None else str(one.workers),
            "time": "" if one.hours is None else duration(one.hours * 3600),
        }
        for one in steps
    ]
    rows_table(f"reproduce {config.run.name} at scale {config.scale}", shown)
    where, hours = recipe.device or "this machine", sum(one.hours or 0 for one in steps)
    log.info(
        f"parameters of finetuning: those trained. time: a rough estimate for {where}, of the training alone; "
        f"{duration(hours * 3600)} for the steps with an estimate."
    )
    for one in steps:
        if one.config is None:
            log.info(f"left out: {one.step.name}, {one.why}")
        for note in one.notes:
            log.info(f"note: {one.step.name}: {note}")
    if unchecked := dict.fromkeys(name for one in steps for name in one.unchecked):
        log.info(f"not checked before its step runs: {'; '.join(unchecked)}")
    if recipe.about:
        log.info(recipe.about.strip())
