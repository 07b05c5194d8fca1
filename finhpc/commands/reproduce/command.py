"""`finhpc reproduce`: the whole paper at one scale, a step after the other on one Ray, ending in the report.

The steps stand in a recipe (`finhpc/recipes/reproduce/SCALE.yaml`, or a file of the user's) and are the verbs' own
functions with their own settings. A step's run is called STUDY-STEP and lies beside the others in `run.storage`; its
own folder says whether it is finished, so the same command goes on where a stopped one was.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from finhpc.cluster.connect import cluster_resources, dead_process, known_resources, ray_cluster
from finhpc.commands.reproduce.check import Planned, check, misplaced, rows_of
from finhpc.commands.reproduce.recipe import AbsentError, inputs_of, merged, read_recipe, resolve, step_config
from finhpc.commands.reproduce.verbs import VERBS
from finhpc.errors import ConfigError, FinhpcError, TrainingFailedError
from finhpc.files import redact, write_atomic
from finhpc.interrupts import terminable
from finhpc.runs.folder import RunFolder
from finhpc.runs.run import place_whole_run, tracking_uri_of
from finhpc.screen import rows_table
from finhpc.settings.base import to_yaml
from finhpc.settings.reproduce import Recipe, ReproduceConfig
from finhpc.tracking.store import check_store

log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """What became of a step. `status`: finished, failed, or not run; `why`: in one line, of the last two."""

    name: str
    verb: str
    status: str
    why: str | None = None
    wall_s: float | None = None
    result: dict[str, Any] | None = None

    def row(self) -> dict[str, Any]:
        return {"step": self.name, "verb": self.verb, "status": self.status, "wall_s": self.wall_s, "why": self.why}


def reproduce(config: ReproduceConfig, dry_run: bool = False) -> dict[str, Any]:
    """Run every step of `config.scale`; returns what the study's result.json holds.

    A step that fails is reported, and those that do not need it go on; then `TrainingFailedError` names all of them.
    Before anything starts every step is checked, and one `ConfigError` lists every problem. With `dry_run` that is
    all. The same command goes on: finished steps are found finished.
    """
    config = config.model_copy(deep=True)
    place_whole_run(config.run)
    folder = RunFolder(config.run.storage, config.run.name)
    recipe = read_recipe(config.scale)
    planned = check(config, recipe)
    check_store(tracking_uri_of(config.run), config.run.experiment)
    total = known_resources()
    problems = misplaced(planned, total) if total is not None else []
    _show(config, recipe, planned)
    result: dict[str, Any] = {
        "status": "dry_run",
        "scale": config.scale,
        "experiment": config.run.experiment,
        "steps": rows_of(planned),
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
        run = config.run.model_copy(update={"tracking_uri": redact(config.run.tracking_uri or "") or None})
        write_atomic(folder.path / "config.yaml", to_yaml(config.model_copy(update={"run": run})))
        write_atomic(folder.path / "recipe.yaml", to_yaml(recipe))
        folder.write_environment()
        done = _work(config, recipe, planned, folder, result)
    rows_table(f"reproduce {config.run.name} at scale {config.scale}", [_shown(one) for one in done])
    if bad := [one for one in done if one.status == "failed"]:
        named = "; ".join(f"{one.name} ({one.why})" for one in bad)
        raise TrainingFailedError(
            f"{len(bad)} of {len(done)} steps failed: {named}. The others are finished; the same command tries again "
            "what is missing."
        )
    return result


def _work(
    config: ReproduceConfig, recipe: Recipe, planned: list[Planned], folder: RunFolder, result: dict[str, Any]
) -> list[Outcome]:
    """Run the steps; what became of them goes to `result` and its file, however it ends."""
    begin = time.monotonic()
    done: list[Outcome] = []
    result["status"] = "killed"
    try:
        with ray_cluster():
            if problems := misplaced(planned, cluster_resources()):
                raise ConfigError(problems)
            _run_all(config, recipe, planned, done)
        result["status"] = "failed" if any(one.status == "failed" for one in done) else "finished"
    finally:
        last = next((one.result["out"] for one in reversed(done) if one.verb == "report" and one.result), None)
        result |= {"steps": [one.row() for one in done], "wall_s": time.monotonic() - begin, "report": last}
        folder.write_result(result)
    return done


def _run_all(study: ReproduceConfig, recipe: Recipe, planned: list[Planned], done: list[Outcome]) -> None:
    """Run the steps in order and add what became of each to `done`."""
    begin = time.monotonic()
    known: dict[str, Any] = dict(inputs_of(study, recipe))
    pace = _Pace(planned)
    for number, one in enumerate(planned):
        head = f"[{number + 1}/{len(planned)}] {one.step.name} ({one.step.verb})"
        was_finished, started = one.finished, time.monotonic()
        outcome = _run(study, recipe, one, known, head)
        done.append(outcome)
        known[one.step.name] = outcome.result
        if outcome.status == "not run":
            log.info(f"{head}: not run, {outcome.why}")
            continue
        pace.note(one, time.monotonic() - started, was_finished)
        told = f"{outcome.status} in {_clock(outcome.wall_s)}" + (f": {outcome.why}" if outcome.why else "")
        left = pace.left(planned[number + 1 :])
        log.info(f"{head}: {told}; {_clock(time.monotonic() - begin)} so far{left}")
        if outcome.status == "failed" and (dead := dead_process()):
            raise TrainingFailedError(
                f"Ray's {dead} died during {one.step.name}, most often of too little memory; finished steps are kept: "
                "run the same command again."
            )


def _run(study: ReproduceConfig, recipe: Recipe, one: Planned, known: dict[str, Any], head: str) -> Outcome:
    """One step; whatever it raises becomes its outcome, but for what stops the whole study."""
    step, dropped, begin = one.step, list[str](), time.monotonic()
    outcome = Outcome(step.name, step.verb, "not run", one.why or None)
    try:
        tree = resolve(merged(recipe, step), known, dropped)
        for name in dropped:
            log.info(f"{head}: without {name}, which is not there")
        log.info(f"{head}: begins")
        outcome.result = VERBS[step.verb].run(step_config(study, step, tree))
        outcome.status, outcome.why = "finished", None
    except AbsentError as absent:
        outcome.why = one.why or f"it needs {absent.name}, which is not there"
        return outcome
    except FinhpcError as error:
        first, *more = str(error).splitlines()
        outcome.status, outcome.why = "failed", first + (f" (and {len(more)} more problems)" if more else "")
        log.info(str(error))
    except Exception as error:  # a step that fails for a reason nobody foresaw must not end the others
        traceback.print_exc(file=sys.stderr)
        outcome.status, outcome.why = "failed", f"{type(error).__name__}: {error}".splitlines()[0]
    outcome.wall_s = time.monotonic() - begin
    return outcome


class _Pace:
    """How long steps took, by verb, for a guess of what is left."""

    def __init__(self, planned: list[Planned]) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.hours = {one.step.name: one.hours for one in planned}

    def note(self, one: Planned, seconds: float, was_finished: bool) -> None:
        if not was_finished:
            self.seconds.setdefault(one.step.verb, []).append(seconds)

    def left(self, coming: list[Planned]) -> str:
        """`, about ... left`, from steps of the same verb; nothing before there is one of each that is to come."""
        verbs = [one.step.verb for one in coming if one.config is not None and not one.finished]
        if not verbs:
            return ""
        known = [sum(took) / len(took) for verb in verbs if (took := self.seconds.get(verb))]
        more = len(verbs) - len(known)
        unknown = f" and {more} steps of verbs not seen yet" if more else ""
        return f", about {_clock(sum(known))} left{unknown}" if known else f", {more} steps left"


def _show(config: ReproduceConfig, recipe: Recipe, planned: list[Planned]) -> None:
    """What is going to be done, what is left out, and what could not be looked at."""
    rows = rows_of(planned)
    shown = [
        {
            "step": row["step"],
            "verb": row["verb"],
            "state": row["state"],
            "parameters": "" if row["params"] is None else f"{row['params'] / 1e6:,.2f} M",
            "tokens": "" if row["tokens"] is None else f"{row['tokens'] / 1e6:,.2f} M",
            "workers": "" if row["workers"] is None else str(row["workers"]),
            "time": "" if row["hours"] is None else _clock(row["hours"] * 3600),
        }
        for row in rows
    ]
    rows_table(f"reproduce {config.run.name} at scale {config.scale}", shown)
    where, hours = recipe.device or "this machine", sum(row["hours"] or 0 for row in rows)
    log.info(
        f"parameters of finetuning: those trained. time: a rough estimate for {where}, of the steps' work alone; "
        f"{_clock(hours * 3600)} for the steps that it is known of."
    )
    for row in rows:
        if row["state"] == "left out":
            log.info(f"left out: {row['step']}, {row['why']}")
        for note in row["notes"]:
            log.info(f"note: {row['step']}: {note}")
    unchecked = dict.fromkeys(what for row in rows for what in row["unchecked"])
    if unchecked:
        log.info(f"not checked before its step runs: {'; '.join(unchecked)}")
    if recipe.about:
        log.info(recipe.about.strip())


def _shown(outcome: Outcome) -> dict[str, str]:
    row = outcome.row()
    return {
        "step": row["step"],
        "verb": row["verb"],
        "status": row["status"],
        "time": "" if row["wall_s"] is None else _clock(row["wall_s"]),
        "why": (row["why"] or "").splitlines()[0] if row["why"] else "",
    }


def _clock(seconds: float | None) -> str:
    """1:02:03"""
    return str(timedelta(seconds=round(seconds or 0)))
