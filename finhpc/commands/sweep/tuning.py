"""Trials run by Ray Tune: those that others start from first, the longest before the shorter ones."""

from __future__ import annotations

import logging
import os
import random
import shutil
import time
from collections.abc import Sequence
from typing import Any

from finhpc.cluster.package import Driver
from finhpc.commands.sweep.actor import run_trial
from finhpc.commands.sweep.plan import SweepPlan
from finhpc.commands.sweep.report import Follower
from finhpc.commands.sweep.shared import prepare_shared
from finhpc.commands.sweep.trial import OUTCOME, Trial, pruned, read_outcome, read_record, write_outcome
from finhpc.errors import TrainingFailedError
from finhpc.runs.launch_warm import free_resources
from finhpc.runs.watch import last_line, watch

TUNE = "tune"  # Ray Tune's own record of a start, which is never read


def train_trials(plan: SweepPlan, parent: str | None = None) -> None:
    """Run every trial of a checked plan that has not ended, on the connected Ray.

    Failed trials are tried again, as a full disk or a missing file may be fixed by now; diverged and pruned ones are
    not. `parent`: the MLflow run of the sweep. Raises `ConfigError` for trials that the cluster cannot place,
    `TrainingFailedError` if a trial that others start from fails.
    """
    plan.check_placement()  # again: only now is the size of another cluster known
    for trial in plan.everyone:
        run = plan.run_folder(trial.name)
        if read_record(run).get("status") == "failed" or (read_record(run) and not plan.has_ended(trial)):
            (run / OUTCOME).unlink()
    starts = {trial.start for trial in plan.everyone}
    first = [trial for trial in plan.everyone if trial.name in starts]
    _train(plan, first, parent, None)
    for trial in first:
        outcome = read_outcome(plan.run_folder(trial.name))
        if outcome["status"] != "finished":
            raise TrainingFailedError(
                f"{trial.name}, from which other trials start, {outcome['status']}: {outcome['error']}"
            )
    _train(plan, [trial for trial in plan.everyone if trial.name not in starts], parent, _scheduler(plan))


def _train(plan: SweepPlan, trials: Sequence[Trial], parent: str | None, scheduler: Any) -> None:
    """Run the trials through Ray Tune, unless all have ended; returns when they have."""
    from ray import tune
    from ray.tune import FailureConfig, RunConfig, TuneConfig

    left = [trial for trial in trials if not plan.has_ended(trial)]
    if not left:
        return
    prepare_shared(plan, left)
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # everything is in our run folders
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a failed trial reports nothing
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # tracebacks of failed trials
    arguments = {trial.name: plan.arguments(trial, parent) for trial in trials}
    train = tune.with_parameters(run_trial, trials=arguments, driver=Driver.here())
    reservations, storage = plan.reservations(), plan.folder / TUNE
    shutil.rmtree(storage, ignore_errors=True)
    tuner = tune.Tuner(
        tune.with_resources(train, lambda point: reservations[point["trial"]]),
        param_space={"trial": tune.grid_search(_in_order(plan, trials, shuffled=scheduler is not None))},
        tune_config=TuneConfig(
            metric="val_loss",
            mode="min",
            scheduler=scheduler,
            max_concurrent_trials=plan.concurrent,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=RunConfig(
            name=f"start-{int(time.time() * 1000)}",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=plan.config.run.max_failures),
            verbose=0,
        ),
    )
    results: list[Any] = []
    follower = Follower(plan, trials)
    try:
        problem = watch(lambda: results.extend(tuner.fit()), follower.update)
    finally:
        follower.update()
        for runs in {plan.run_folder(trial.name).parent for trial in trials}:
            free_resources(runs)
    for result in results:  # whose actor died before it could record an outcome
        run = plan.run_folder(result.config["trial"])
        if read_record(run):
            continue
        if result.error:
            write_outcome(run, {"status": "failed", "error": last_line(result.error)})
        elif result.metrics:  # the scheduler ended it
            write_outcome(run, pruned({key: result.metrics[key] for key in ("step", "val_loss")}))
    if problem is not None:
        raise TrainingFailedError(
            f"Ray Tune stopped: {problem}; the same command goes on with the trials that have not ended."
        ) from problem


def _in_order(plan: SweepPlan, trials: Sequence[Trial], shuffled: bool) -> list[str]:
    """The order of the start: ended trials, then the longest first, so that none is left to run alone at the end.

    Ended trials only report again: the scheduler of a resumed sweep then knows what the interrupted one knew.
    """
    trials = list(trials)
    if shuffled:
        # A scheduler compares a trial with those before it, and grids are often written from worst to best.
        random.Random(plan.options.seed).shuffle(trials)
    trials.sort(key=lambda trial: (not plan.has_ended(trial), -(plan.estimates[trial.name].seconds or 0.0)))
    return [trial.name for trial in trials]


def _scheduler(plan: SweepPlan) -> Any:
    """Ray Tune's scheduler, which counts in steps; None for fifo."""
    from ray.tune.schedulers import create_scheduler

    options, train = plan.options, plan.config.train
    if options.scheduler == "fifo":
        return None
    name = {"asha": "async_hyperband"}.get(options.scheduler, options.scheduler)
    steps = {"grace_period": max(train.eval_every, train.steps // 10)}
    if options.scheduler == "asha":
        steps["max_t"] = train.steps
    return create_scheduler(name, time_attr="step", **steps | options.scheduler_options)
