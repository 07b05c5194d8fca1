"""`finhpc sweep`: a grid or a search over any settings of pretrain or finetune, as one command on Ray Tune.

    SWEEP/            in run.storage; config.yaml, result.json, trials.csv
    SWEEP/trials/     a run folder each, which holds everything that resuming needs
    SWEEP/shared/     what trials share: the dense reference, its factors at each rank

Tune places and schedules the trials; what is known of them is in their run folders and in MLflow. So the
same command goes on where a sweep ended, however it ended.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import time
from typing import Any

from finhpc.cluster.connect import ray_cluster
from finhpc.cluster.package import Driver
from finhpc.cluster.ready import check_ray
from finhpc.commands.study.report import write_csv
from finhpc.commands.sweep.delivery import deliver
from finhpc.commands.sweep.grid import AnySweep
from finhpc.commands.sweep.plan import Planned, plan_sweep, show_plan
from finhpc.commands.sweep.report import FIGURES, Follower, flat, ranked, show
from finhpc.commands.sweep.shared import prepare_shared
from finhpc.commands.sweep.tracking import Parent
from finhpc.commands.sweep.trial import OUTCOME, outcome_of, pruned, run_trial, write_outcome
from finhpc.errors import TrainingFailedError
from finhpc.files import write_atomic
from finhpc.interrupts import terminable
from finhpc.runs.folder import RunFolder
from finhpc.runs.launch import last_line, watched
from finhpc.runs.run import place_whole
from finhpc.settings.base import to_yaml

TUNE = "tune"  # Ray Tune's own record of a start, which nothing is read from
KEPT_FAILURES = ("diverged", "pruned")  # ends of a trial that another start would not change


def sweep(config: AnySweep, dry_run: bool = False) -> dict[str, Any]:
    """Train and score every trial of the grid, rank them, register the best; returns the content of `result.json`.

    The same `run.name` and `run.storage` resume: finished trials stay as they are, others go on from their
    checkpoints. With `dry_run` everything is checked and the plan shown. Raises `ConfigError` with every
    problem of every trial, `RunBusyError` where another process works on the sweep, `TrainingFailedError` where
    no trial ended well.
    """
    begin = time.perf_counter()
    config = config.model_copy(deep=True)
    place_whole(config)
    folder = RunFolder(config.run.storage, config.run.name)
    folder.check_resume(config)
    plan = plan_sweep(config, folder.path)
    show_plan(plan)
    counted = plan.result()
    if dry_run:
        return counted | {"status": "dry_run"}
    check_ray()
    with folder.lock(), terminable():
        write_atomic(folder.path / "config.yaml", to_yaml(config))
        _forget_failures(plan)
        with Parent(config, folder, plan) as parent:
            with ray_cluster():
                plan.check_fits()  # again: only now is another cluster's size known
                prepare_shared(plan)
                _tune(config, plan, parent.id)
            deliver(plan, parent.tracker.run_id)
            rows = ranked(plan)
            result = counted | _outcome(rows) | {"wall_s": time.perf_counter() - begin}
            parent.end(result, {key: result["best"][key] for key in FIGURES} if result["best"] else {})
        write_csv(flat(result["trials"]), folder.path / "trials.csv")
        folder.write_result(result)
    show(config, result)
    if result["best"] is None:
        raise TrainingFailedError(
            f"no trial of sweep {config.run.name} ended well; the first error: {_first_error(result['trials'])}"
        )
    return result


def _outcome(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the rows amount to; the best is the first of them that ended well."""
    best = next((row for row in rows if row["rank"] == 1), None)
    return {
        "status": "finished" if best else "failed",
        "trials": rows,
        "best": best,
        "model": best and best["model"],
        "steps_trained": sum(row["steps"] or 0 for row in rows if not row["scored_only"]),
    }


def _tune(config: AnySweep, plan: Planned, parent: str | None) -> None:
    """Run every trial that has not ended, through Ray Tune; returns when all have."""
    from ray import tune
    from ray.tune import FailureConfig, RunConfig, TuneConfig

    names = _in_order(config, plan)
    if all("status" in outcome_of(plan.run_folder(name)) for name in names):
        return
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # our run folders hold it all
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial that fails reports nothing
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # its tracebacks of trials that failed
    told = {trial.name: plan.told(trial, parent) for trial in plan.trials}
    train = tune.with_parameters(run_trial, trials=told, driver=Driver.here())
    storage = plan.folder / TUNE
    shutil.rmtree(storage, ignore_errors=True)
    follower = Follower(plan)
    tuner = tune.Tuner(
        tune.with_resources(train, lambda point: plan.placement(point["trial"])),
        param_space={"trial": tune.grid_search(names)},
        tune_config=TuneConfig(
            metric="val_loss",
            mode="min",
            scheduler=_scheduler(config),
            max_concurrent_trials=plan.concurrent,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=RunConfig(
            name=f"start-{int(time.time() * 1000)}",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=config.run.max_failures),
            verbose=0,
        ),
    )
    ended: list[Any] = []
    with follower:
        problem = watched(lambda: ended.extend(tuner.fit()), follower.look, lambda: False)
    _write_outcomes(plan, ended)
    if problem is not None:
        raise TrainingFailedError(
            f"Ray Tune stopped: {problem}; the same command goes on with the trials that have not ended."
        ) from problem


def _in_order(config: AnySweep, plan: Planned) -> list[str]:
    """The trials as they are started: those that ended, then the dearest first, so that none is left to the end alone.

    Those that ended only report again: the scheduler of a resumed sweep knows what the interrupted one's knew.
    """
    names = [trial.name for trial in plan.trials]
    if config.sweep.scheduler != "fifo":
        # A scheduler judges a trial by those before it, and grids are often written from worst to best.
        random.Random(config.sweep.seed).shuffle(names)
    return sorted(names, key=lambda n: ("status" not in outcome_of(plan.run_folder(n)), -(plan.seconds[n] or 0.0)))


def _scheduler(config: AnySweep) -> Any:
    """Ray Tune's scheduler of that name, its times in steps; None for fifo."""
    from ray.tune.schedulers import create_scheduler

    if config.sweep.scheduler == "fifo":
        return None
    name = {"asha": "async_hyperband"}.get(config.sweep.scheduler, config.sweep.scheduler)
    steps = {"grace_period": max(config.train.eval_every, config.train.steps // 10)}
    if config.sweep.scheduler == "asha":
        steps["max_t"] = config.train.steps
    return create_scheduler(name, time_attr="step", **steps | config.sweep.scheduler_options)


def _write_outcomes(plan: Planned, ended: list[Any]) -> None:
    """Say how those trials ended whose actors could not."""
    for one in ended:
        run = plan.run_folder(one.config["trial"])
        if "status" in outcome_of(run):
            continue
        if one.error:
            write_outcome(run, {"status": "failed", "error": last_line(one.error)})
        elif one.metrics:  # its actor was gone before it could say that the scheduler ended it
            write_outcome(run, pruned({"step": one.metrics["step"], "val_loss": one.metrics["val_loss"]}))


def _forget_failures(plan: Planned) -> None:
    """Trials that failed for a reason that may have gone (a full disk, a lost file) are tried again."""
    for trial in plan.trials:
        run = plan.run_folder(trial.name)
        if outcome_of(run).get("status") == "failed":
            (run / OUTCOME).unlink()


def _first_error(rows: list[dict[str, Any]]) -> str:
    return next((str(row["error"]) for row in rows if row["error"]), "none was told")
