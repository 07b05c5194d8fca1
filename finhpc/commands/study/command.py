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
from finhpc.commands.study.compare import WITHOUT_W, Costs, compared, final_rows
from finhpc.commands.study.notes import edge_notes, final_notes, reference_notes
from finhpc.commands.study.screening import finalists, screen, screens, tuning_rows
from finhpc.commands.study.step_times import step_costs
from finhpc.commands.study.trained import Trained, train
from finhpc.commands.study.variants import check, epoch_tokens, final_trials, shortened
from finhpc.commands.sweep.estimate import Estimate
from finhpc.errors import TrainingFailedError
from finhpc.files import write_atomic, write_csv
from finhpc.interrupts import terminable
from finhpc.lowrank.registry import BLEND, SVD, trained_kind
from finhpc.runs.folder import RunFolder
from finhpc.screen import rows_table
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.sweep import StudyConfig
from finhpc.tracking.store import check_store

log = logging.getLogger(__name__)


def study(config: StudyConfig, dry_run: bool = False) -> dict[str, Any]:
    """Screen, train the finalists, measure their step times; returns the content of `result.json`.

    Also writes a page (`report.html`), the table (`table.csv`) and the loss curves (`curves.png`) into
    run.storage/run.name. With `dry_run` everything is checked and the variants are listed. Raises `ConfigError` with
    the problems of every variant, `TrainingFailedError` if a run fails; a run that diverges in the screening only
    drops out.
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
            screened = screen(config)
            finals = _train_finals(config, finalists(config, screened))
            log.info("measuring the step times of the finalists, in turn")
            costs = step_costs(_measured_runs(finals), config.study.pace_steps, config.study.pace_rounds)
        result = _result(config, screened, finals, costs)
        result |= {"folder": str(folder.path), "wall_s": time.perf_counter() - begin}
        write_csv(folder.path / "table.csv", result["finals"])
        drawn = report.figure(config, compared(finals, costs))
        write_atomic(folder.path / "curves.png", drawn.png)
        write_atomic(folder.path / "report.html", report.page(result, drawn))
        folder.write_result(result)
    report.show(result)
    return result


def _train_finals(config: StudyConfig, lr_of: dict[str, float]) -> list[Trained]:
    """Train the finalists, seed after seed, so that a study cut short is still balanced."""
    finals: list[Trained] = []
    for seed in config.study.seeds:
        finals += train(config, list(final_trials(config, lr_of, seed).items()))
        if diverged := [one for one in finals if not one.curve]:
            raise TrainingFailedError(
                f"{diverged[0].variant} at lr {diverged[0].lr:g} diverged in its final run of seed {seed}; "
                "lower its learning rates."
            )
    return finals


def _measured_runs(finals: list[Trained]) -> dict[str, PretrainConfig]:
    """Name -> a run whose step is measured: each finalist, and a blend also without its dense weights W."""
    runs = {trained.variant: trained.config for trained in reversed(finals)}
    for name, run in list(runs.items()):
        if run.method.kind == BLEND:
            kind = trained_kind(BLEND) if run.model.path is None else SVD
            runs[name + WITHOUT_W] = run.model_copy(update={"method": run.method.model_copy(update={"kind": kind})})
    return runs


def _result(config: StudyConfig, screened: list[Trained], finals: list[Trained], costs: Costs) -> dict[str, Any]:
    tuning = tuning_rows(config, screened)
    spent = {row["variant"]: {f"tuning_{key}": row[key] for key in ("runs", "tokens", "lr_edge")} for row in tuning}
    rows = [row | spent[row["variant"]] for row in final_rows(config, finals, costs, epoch_tokens(config))]
    reference = compared(finals, costs)[config.study.reference]
    screening = [
        {
            "variant": one.variant,
            "params_total": one.result.get("params_total"),
            "lr": one.lr,
            "val_loss": one.loss if one.curve else None,  # null if it diverged
        }
        for one in screened
    ]
    return {
        "status": "finished",
        "study": config.run.name,
        "reference": config.study.reference,
        "screening": screening,
        "tuning": tuning,
        "finals": rows,
        "step_s": {name: list(values) for name, values in costs.seconds.items()},
        "ratios": {f"time_to_reference_loss_{row['variant']}": row["time_to_reference_loss"] for row in rows},
        "notes": edge_notes(tuning) + reference_notes(screened, reference) + final_notes(config, rows),
    }


def _dry_run(config: StudyConfig, estimates: dict[str, Estimate]) -> dict[str, Any]:
    """Show and return the variants with their sizes and the tokens of their screening."""
    study, variants = config.study, config.study.variants
    per_step = config.parallel.samples_per_step * config.data.seq_len
    rows: list[dict[str, Any]] = []
    for name, variant in variants.items():
        runs = len(variant.lr) if screens(config) else 0
        most = runs + (study.widen if runs > 1 else 0)
        each = study.screen_steps * per_step
        rows.append(
            {
                "variant": name,
                "params_total": estimates[name].params,
                "lr": variant.lr,
                "screening_tokens": runs * each,
                "screening_tokens_most": most * each,
            }
        )
    rows_table(f"study {config.run.name}, not started", rows)
    final_tokens = config.train.steps * per_step
    epochs = final_tokens / epoch_tokens(config)
    log.info(f"finals: {final_tokens:,} tokens per run, {epochs:.2f} epochs of the training text, seeds {study.seeds}")
    if single := [name for name, variant in variants.items() if len(variant.lr) == 1]:
        log.info(
            f"{', '.join(single)}: one learning rate, which will be reported as an edge; give two or more to compare, "
            "and the grid widens by itself if the best is the lowest or the highest."
        )
    after_training = dict.fromkeys(("screening", "tuning", "finals", "step_s", "ratios", "notes", "folder", "wall_s"))
    return {
        "status": "dry_run",
        "study": config.run.name,
        "reference": study.reference,
        "variants": rows,
        "final_tokens": final_tokens,
        "epochs": epochs,
        **after_training,
    }
