"""The work of a Ray Tune actor: train one trial of a sweep, score it, and report its evaluations to Tune.

A trial is a run like any other, in its own run folder, and resumes from its checkpoint. The evaluations of earlier
starts are reported again first, so the scheduler of a resumed sweep knows everything that the interrupted one knew.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from finhpc.cluster.package import Driver
from finhpc.commands.sweep.trial import TrialArguments, pruned, read_outcome, write_outcome
from finhpc.errors import FinhpcError, ImplausibleError, RunBusyError
from finhpc.runs.job import Job
from finhpc.settings.pretrain import PretrainConfig
from finhpc.training.journal import WORKER_FILE, latest, read

BUSY_S = 60  # how long a trial waits while the actor of a killed sweep still works in its folder
NOT_OF_WEIGHTS = {  # what a result says of the training's own files and losses
    "checkpoint", "model", "sample", "mlflow_run_id", "run", "status", "val_loss", "val_perplexity",
    "final_val_loss", "final_val_loss_se", "final_val_tokens",
}  # fmt: skip


def run_trial(point: dict[str, Any], trials: dict[str, TrialArguments], driver: Driver) -> None:
    """Train and score `trials[point["trial"]]`. A user error ends this trial alone, not the sweep.

    Any other exception goes to Tune, which restarts the trial up to run.max_failures times.
    """
    # A scheduler may decide while the run's record is still being sent to MLflow.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(BUSY_S)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    trial = trials[point["trial"]]
    run, begin = trial.folder.path, time.perf_counter()
    from finhpc.runs.run import Pruned

    reports = EvaluationReports(run, trial)
    try:
        reports.send()
        if read_outcome(run).get("status") == "pruned":
            return
        driver.enter()
        job = trial.job()
        result = _run(job, reports)
        records, _ = read(run / WORKER_FILE)
        spans = [record["train_wall_s"] for record in records if record["kind"] == "finished"]
        outcome = {"status": "finished", "train_s": spans[-1] if spans else None, "scored": _score(trial, job, result)}
    except Pruned:
        raise SystemExit(0) from None  # as `tune.report` expects
    except FinhpcError as error:
        status = "diverged" if "is not finite" in str(error) else "failed"
        outcome = {"status": status, "error": str(error), "kind": type(error).__name__}
    write_outcome(run, outcome | {"trial_s": time.perf_counter() - begin})
    if outcome["status"] == "finished" and result["val_loss"] is not None:
        _report(result["steps"], result["val_loss"])


def _run(job: Job, reports: EvaluationReports) -> dict[str, Any]:
    from finhpc.runs.launch import launch_here
    from finhpc.runs.launch_warm import launch_warm
    from finhpc.runs.run import run

    alone = job.config.parallel.workers == 1
    launch: Any = partial(launch_warm, poll=reports.send)
    if alone:
        launch = partial(launch_here, on_eval=reports.send)
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            return run(job, launch=launch)
        except RunBusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def _score(trial: TrialArguments, job: Job, result: dict[str, Any]) -> dict[str, Any]:
    """Grid point -> figures of the trained model at its bits, each logged as an MLflow run of its own."""
    from finhpc.commands.sweep.score import score_at
    from finhpc.commands.sweep.tracking import track_score

    scored: dict[str, Any] = {}
    for name, bits in trial.scores.items():
        assert isinstance(job.config, PretrainConfig)
        try:
            figures = score_at(bits, job.config, trial.folder.path, result["val_loss"])
        except ImplausibleError as error:
            failed = {"status": "failed", "run": name, "error": str(error)}
            track_score(job, trial.folder, name, bits, failed, "FAILED")
            raise
        # Every point of a sweep gets the same metrics; most are as true of the quantized model.
        shared = {key: value for key, value in result.items() if key not in NOT_OF_WEIGHTS}
        figures = {**shared, "status": "finished", "run": name, **figures}
        scored[name] = figures | {"mlflow_run_id": track_score(job, trial.folder, name, bits, figures)}
    return scored


class EvaluationReports:
    """Reports the evaluations in a trial's journal to Ray Tune, each once.

    The last one is left to the end of the trial: a scheduler must not prune what has finished.
    """

    def __init__(self, run: Path, trial: TrialArguments) -> None:
        self.run, self.steps, self.offset = run, trial.steps, 0

    def send(self, _: object = None) -> None:
        """Report what is new. Raises `Pruned`, and records it, when the scheduler ends the trial."""
        from finhpc.runs.run import Pruned

        records, self.offset = read(self.run / WORKER_FILE, self.offset)
        for step, record in sorted(latest(records, "eval").items()):
            if step >= self.steps:
                continue
            try:
                _report(step, record["val_loss"])
            except SystemExit:
                if not read_outcome(self.run):
                    keys = ("step", "tokens", "val_loss", "val_perplexity")
                    write_outcome(self.run, pruned({key: record[key] for key in keys}))
                raise Pruned from None


def _report(step: int, val_loss: float) -> None:
    from ray import tune

    tune.report({"step": step, "val_loss": val_loss})
