"""`finhpc study`: variants of one run, screened on few steps, the best trained for long over several seeds.

A study is a sweep whose trials are named variants at their learning rates and seeds: every run is a trial of its own
in `run.storage` and in one MLflow experiment, named STUDY-screen-VARIANT-lrLR-sSEED or STUDY-final-.... The same
command resumes; runs that have ended are not repeated.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from finhpc.cluster.connect import ray_cluster
from finhpc.cluster.ready import check_ray
from finhpc.commands.study import report
from finhpc.commands.study.report import Trained
from finhpc.commands.study.step_times import step_times
from finhpc.commands.study.variants import SCREEN, check, final_trials, plan_trials, shortened, trial_of
from finhpc.commands.sweep.estimate import Estimate
from finhpc.commands.sweep.trial import Trial, read_outcome
from finhpc.commands.sweep.tuning import train_trials
from finhpc.errors import ImplausibleError, TrainingFailedError
from finhpc.files import write_atomic, write_csv
from finhpc.interrupts import terminable
from finhpc.lowrank.registry import BLEND, SVD
from finhpc.runs.folder import RunFolder
from finhpc.screen import rows_table
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.study import StudyConfig
from finhpc.tracking.store import check_store
from finhpc.training.journal import WORKER_FILE, latest, read

log = logging.getLogger(__name__)


def study(config: StudyConfig, dry_run: bool = False) -> dict[str, Any]:
    """Screen, train the finalists, measure their step times; returns the content of `result.json`.

    Also writes the table (`table.csv`) and the loss curves (`curves.png`) into run.storage/run.name. With `dry_run`
    everything is checked and the variants are listed. Raises `ConfigError` with the problems of every variant,
    `TrainingFailedError` if a run fails; a run that diverges in the screening only drops out.
    """
    begin = time.perf_counter()
    folder = RunFolder(config.run.storage, config.run.name)
    estimates = check(config)
    check_store(config.run.mlflow_uri, config.run.experiment)
    for note in shortened(config):
        log.info(note)
    if dry_run:
        return _dry_run(config, estimates)
    check_ray()
    with folder.lock(), terminable():
        folder.write_settings(config)
        with ray_cluster():
            screened = _screen(config)
            lr_of = finalists(config, screened)
            finals: list[Trained] = []
            for seed in config.study.seeds:  # seed after seed, so that a study cut short is still balanced
                finals += _train(config, list(final_trials(config, lr_of, seed).items()))
                if diverged := [one for one in finals if not one.curve]:
                    raise TrainingFailedError(
                        f"{diverged[0].variant} at lr {diverged[0].lr:g} diverged in its final run of seed {seed}; "
                        "lower its learning rates."
                    )
            log.info("measuring the step times of the finalists, in turn")
            seconds = step_times(_measured_runs(finals), config.study.pace_steps, config.study.pace_rounds)
        rows = report.final_rows(config, finals, seconds)
        screening = [
            {
                "variant": one.variant,
                "params_total": one.result.get("params_total"),
                "lr": one.lr,
                "val_loss": one.loss if one.curve else None,  # null if it diverged
            }
            for one in screened
        ]
        result: dict[str, Any] = {
            "status": "finished",
            "study": config.run.name,
            "reference": config.study.reference,
            "screening": screening,
            "finals": rows,
            "step_s": seconds,
            "ratios": {f"time_to_reference_loss_{row['variant']}": row["time_to_reference_loss"] for row in rows},
            "folder": str(folder.path),
            "wall_s": time.perf_counter() - begin,
        }
        write_csv(folder.path / "table.csv", rows)
        write_atomic(folder.path / "curves.png", report.draw(config, finals, rows, seconds))
        folder.write_result(result)
    report.show(result)
    return result


def _screen(config: StudyConfig) -> list[Trained]:
    """Every variant at every learning rate, on the first seed; empty if there is nothing to choose."""
    variants, seed = config.study.variants, config.study.seeds[0]
    if not _screens(config):
        return []
    scratch = {name: variant for name, variant in variants.items() if variant.start is None}
    screened = _train(
        config, [(name, trial_of(config, SCREEN, name, lr, seed)) for name in scratch for lr in scratch[name].lr]
    )
    best, started = best_of(screened), []
    for name, variant in variants.items():
        if variant.start and variant.start not in best:
            raise TrainingFailedError(f"{name} starts from {variant.start}, which diverged; lower its learning rates.")
        if variant.start:
            start = best[variant.start].trial
            started += [(name, trial_of(config, SCREEN, name, lr, seed, start)) for lr in variant.lr]
    return screened + _train(config, started)


def _screens(config: StudyConfig) -> bool:
    variants = config.study.variants
    everyone = config.study.finalists in (0, len(variants) - 1)
    return not everyone or any(len(variant.lr) > 1 for variant in variants.values())


def _train(config: StudyConfig, named: list[tuple[str, Trial]]) -> list[Trained]:
    """Train (variant, run) pairs. Raises `TrainingFailedError` for a run that fails without diverging."""
    if not named:
        return []
    plan = plan_trials(config, [trial for _, trial in named])
    train_trials(plan)
    trained = []
    for variant, trial in named:
        folder = plan.run_folder(trial.name)
        outcome, run = read_outcome(folder), plan.config_of(trial)
        assert isinstance(run, PretrainConfig)
        if outcome["status"] == "diverged" or outcome.get("kind") == ImplausibleError.__name__:
            log.info(f"{trial.name} diverged; the study goes on without it")
            trained.append(Trained(variant, trial, run))
        elif outcome["status"] != "finished":
            raise TrainingFailedError(f"{trial.name} failed: {outcome['error']}")
        else:
            records, _ = read(folder / WORKER_FILE)
            curve = {step: float(r["val_loss"]) for step, r in sorted(latest(records, "eval").items())}
            losses = {step: float(r["train_loss"]) for step, r in sorted(latest(records, "train").items())}
            trained.append(Trained(variant, trial, run, outcome, curve, losses))
    return trained


def finalists(config: StudyConfig, screened: list[Trained]) -> dict[str, float]:
    """Variant -> its best learning rate: the reference and the best of the others; all without a screening."""
    variants, reference = config.study.variants, config.study.reference
    if not screened:
        return {name: variant.lr[0] for name, variant in variants.items()}
    best = best_of(screened)
    if reference not in best:
        raise TrainingFailedError(
            f"every learning rate of {reference} diverged: {variants[reference].lr}; give lower ones."
        )
    others = sorted((name for name in best if name != reference), key=lambda name: best[name].loss)
    others = others[: config.study.finalists or None]
    needed = {str(variants[name].start) for name in others if variants[name].start}
    names = dict.fromkeys([reference, *sorted(needed & set(best)), *others])
    return {name: best[name].lr for name in names}


def best_of(trained: list[Trained]) -> dict[str, Trained]:
    """Variant -> its run with the lowest final validation loss; diverged runs are left out."""
    best: dict[str, Trained] = {}
    for one in trained:
        if one.curve and (one.variant not in best or one.loss < best[one.variant].loss):
            best[one.variant] = one
    return best


def _measured_runs(finals: list[Trained]) -> dict[str, PretrainConfig]:
    """Name -> a run whose step is measured: each finalist, and method 3 also without its dense weights W."""
    runs = {trained.variant: trained.config for trained in reversed(finals)}
    for name, run in list(runs.items()):
        if run.method.kind == BLEND:
            method = run.method.model_copy(update={"kind": SVD})
            runs[name + report.WITHOUT_W] = run.model_copy(update={"method": method})
    return runs


def _dry_run(config: StudyConfig, estimates: dict[str, Estimate]) -> dict[str, Any]:
    """Show and return the variants with their sizes and the tokens of their screening."""
    per_step = config.parallel.samples_per_step * config.data.seq_len
    rows: list[dict[str, Any]] = []
    for name, variant in config.study.variants.items():
        tokens = len(variant.lr) * config.study.screen_steps * per_step if _screens(config) else 0
        rows.append(
            {"variant": name, "params_total": estimates[name].params, "lr": variant.lr, "screening_tokens": tokens}
        )
    rows_table(f"study {config.run.name}, not started", rows)
    final_tokens = config.train.steps * per_step
    log.info(f"finals: {final_tokens:,} tokens per run, seeds {config.study.seeds}")
    after_training = dict.fromkeys(("screening", "finals", "step_s", "ratios", "folder", "wall_s"))
    return {
        "status": "dry_run",
        "study": config.run.name,
        "reference": config.study.reference,
        "variants": rows,
        "final_tokens": final_tokens,
        **after_training,
    }
