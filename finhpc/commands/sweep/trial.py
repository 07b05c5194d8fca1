"""What a Ray Tune actor does for one trial of a sweep: train it, score it, tell Tune of every evaluation.

A trial is a run like any other, in its own run folder, and goes on from its checkpoint when it is started
again. What earlier starts reported is reported again first, so that the scheduler of a resumed sweep knows
all that the interrupted one's knew.
"""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from finhpc.cluster.package import Driver
from finhpc.errors import FinhpcError, ImplausibleError, RunBusyError
from finhpc.files import write_json
from finhpc.runs.folder import RunFolder
from finhpc.runs.job import Job
from finhpc.settings.base import build
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.training.journal import WORKER_FILE, latest, read

OUTCOME = "trial.json"  # in the run folder: how the trial ended
LET_GO_S = 60  # how long a trial waits for the actor of a killed sweep to let its folder go


def run_trial(point: dict[str, Any], trials: dict[str, dict[str, Any]], driver: Driver) -> None:
    """Train and score `trials[point["trial"]]`; a mistake of the user's ends this trial, not the sweep.

    Any other exception goes to Tune, which starts the trial again as often as run.max_failures says.
    """
    # A scheduler's verdict comes while the run's record is still being sent to MLflow.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(LET_GO_S)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    trial = trials[point["trial"]]
    run = Path(trial["config"]["run"]["storage"]) / trial["config"]["run"]["name"]
    _replay(run)
    if outcome_of(run).get("status") == "pruned":
        return
    from finhpc.runs.run import Pruned

    begin = time.perf_counter()
    try:
        driver.enter()
        found = _train(trial, run)
    except Pruned:
        raise SystemExit(0) from None  # as `tune.report` wants it
    except FinhpcError as error:
        diverged = "is not finite" in str(error)
        found = {"status": "diverged" if diverged else "failed", "error": str(error)}
    found["trial_s"] = time.perf_counter() - begin
    write_outcome(run, found)
    if (loss := found.get("val_loss")) is not None:
        _report({"step": found["steps"], "val_loss": loss})


def outcome_of(run: Path) -> dict[str, Any]:
    """How the trial in a run folder ended; empty as long as it has not."""
    path = run / OUTCOME
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _train(trial: dict[str, Any], run: Path) -> dict[str, Any]:
    job = job_of(trial)
    folder = RunFolder(job.config.run.storage, job.config.run.name)
    result = _run(job, folder)
    records, _ = read(folder.path / WORKER_FILE)
    spans = [record["train_wall_s"] for record in records if record["kind"] == "finished"]
    result["train_s"] = spans[-1] if spans else None
    return result | {"status": "finished", "scored": _score(trial, job, folder, result)}


def job_of(trial: dict[str, Any]) -> Job:
    """The training of a trial, from what its actor is told."""
    from finhpc.commands.finetune import Finetune
    from finhpc.commands.pretrain import Pretrain

    job: Job
    if "lora" in trial["config"]:
        job = Finetune(build(FinetuneConfig, trial["config"]))
    else:
        job = Pretrain(build(PretrainConfig, trial["config"]))
    job.tags, job.varied = trial["tags"], trial["varied"]
    return job


def _run(job: Job, folder: RunFolder) -> dict[str, Any]:
    from finhpc.runs.launch_here import fit_here
    from finhpc.runs.launch_warm import fit_warm
    from finhpc.runs.run import run

    alone = job.config.parallel.workers == 1
    start: Any = (
        partial(fit_here, on_eval=partial(_on_eval, folder.path)) if alone else partial(fit_warm, look=_Follow(folder))
    )
    deadline = time.monotonic() + LET_GO_S
    while True:
        try:
            return run(job, fit=start)
        except RunBusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def _score(trial: dict[str, Any], job: Job, folder: RunFolder, result: dict[str, Any]) -> dict[str, Any]:
    """Bits -> figures of the trained model at those, each an MLflow run beside the training's."""
    from finhpc.commands.sweep.score import score_at
    from finhpc.commands.sweep.tracking import track_score

    scored: dict[str, Any] = {}
    for name, bits in trial["scores"].items():
        assert isinstance(job.config, PretrainConfig)
        try:
            figures = score_at(bits, job.config, folder.path, result["val_loss"])
        except ImplausibleError as error:
            track_score(job, folder, name, bits, {"status": "failed", "run": name, "error": str(error)}, "FAILED")
            raise
        figures = {**_lasting(result), "status": "finished", "run": name, **figures}
        scored[name] = figures | {"mlflow_run_id": track_score(job, folder, name, bits, figures)}
    return scored


def _lasting(result: dict[str, Any]) -> dict[str, Any]:
    """Of a training's result, what is as true of its quantized model: all but what names the training's own files.

    So every point of a sweep has the same metrics.
    """
    own = ("checkpoint", "model", "sample", "mlflow_run_id", "run", "status", "val_loss", "val_perplexity", "train_s")
    return {key: value for key, value in result.items() if key not in own}


# -- what Tune is told ----------------------------------------------------------------------


def _on_eval(run: Path, record: dict[str, Any]) -> None:
    """Tell Tune of an evaluation; where it ends the trial, say so on disk and stop."""
    from finhpc.runs.run import Pruned

    try:
        _report(record)
    except SystemExit:
        write_outcome(run, pruned(record))
        raise Pruned from None


class _Follow:
    """Tells Tune of the evaluations that the workers of a pipeline write down."""

    def __init__(self, folder: RunFolder) -> None:
        self.run = folder.path
        _, self.offset = read(self.run / WORKER_FILE)

    def __call__(self) -> None:
        records, self.offset = read(self.run / WORKER_FILE, self.offset)
        evals = [record for record in records if record["kind"] == "eval"]
        for record in evals:
            _on_eval(self.run, {key: record[key] for key in ("step", "tokens", "val_loss", "val_perplexity")})


def _replay(run: Path) -> None:
    records, _ = read(run / WORKER_FILE)
    for step, record in sorted(latest(records, "eval").items()):
        _report({"step": step, "val_loss": record["val_loss"]})


def _report(record: dict[str, Any]) -> None:
    from ray import tune

    tune.report({"step": record["step"], "val_loss": record["val_loss"]})


def pruned(record: dict[str, Any]) -> dict[str, Any]:
    """The outcome of a trial that the scheduler ended at the evaluation `record`."""
    return {"status": "pruned", **record, "steps": record["step"]}


def write_outcome(run: Path, found: dict[str, Any]) -> None:
    """Say on disk how a trial ended."""
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / OUTCOME, found)
