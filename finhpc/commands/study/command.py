"""`finhpc study`: variants of one run, screened on few steps, the best trained for long over several seeds.

Every run is a `pretrain` of its own in one storage and one MLflow experiment, named
STUDY-screen-VARIANT-lrLR-sSEED or STUDY-final-.... The same command goes on where a killed study
stopped: finished runs are found finished.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from finhpc.cluster.connect import ray_cluster
from finhpc.commands.pretrain import Pretrain
from finhpc.commands.study import report as report
from finhpc.commands.study.report import Trained
from finhpc.commands.study.runs import best_of, check, finalists, in_order, kinds_of_steps, run_config, shortened
from finhpc.commands.study.step_times import step_times
from finhpc.errors import ImplausibleError, NonFiniteError, TrainingFailedError
from finhpc.files import write_atomic
from finhpc.planning.plan import make_plan
from finhpc.runs.folder import RunFolder
from finhpc.runs.run import checked, tracking_uri_of
from finhpc.runs.run import run as run_job
from finhpc.runs.worker import FATAL
from finhpc.screen import rows_table
from finhpc.settings.base import to_yaml
from finhpc.settings.study import StudyConfig
from finhpc.tracking.shown import model_name
from finhpc.tracking.store import check_store
from finhpc.tracking.tracker import absolute_tracking_uri

log = logging.getLogger(__name__)

Row = dict[str, Any]


def study(config: StudyConfig, dry_run: bool = False) -> dict[str, Any]:
    """Screen, train the finalists, measure their step times; returns the content of `result.json`.

    Writes it with the table (`table.csv`) and the loss curves (`curves.png`) into run.storage/run.name.
    With `dry_run` everything is checked and the runs are listed. Raises `ConfigError` with every
    variant that cannot work, `TrainingFailedError` where a run fails; one whose loss is not finite is
    counted as diverged.
    """
    begin = time.perf_counter()
    folder = RunFolder(config.run.storage, config.run.name)
    check(config)
    check_store(absolute_tracking_uri(tracking_uri_of(config.run)), config.run.experiment)
    for note in shortened(config):
        log.info(note)
    if dry_run:
        return _dry_run(config)
    with folder.lock():
        write_atomic(folder.path / "config.yaml", to_yaml(config))
        with ray_cluster():
            screened = _screen(config)
            chosen = finalists(config, screened)
            finals = _train_finals(config, chosen)
        log.info("measuring step times, the finalists in turn")
        seconds = step_times(kinds_of_steps(finals), config.study.pace_steps, config.study.pace_rounds)
        rows = report.final_rows(config, finals, seconds)
        result: dict[str, Any] = {
            "status": "finished",
            "study": config.run.name,
            "reference": config.study.reference,
            "screening": report.screening_rows(screened),
            "finals": rows,
            "step_s": seconds,
            "ratios": report.ratios(rows),
            "folder": str(folder.path),
            "wall_s": time.perf_counter() - begin,
        }
        report.write_csv(rows, folder.path / "table.csv")
        report.draw(config, finals, rows, seconds, folder.path / "curves.png")
        folder.write_result(result)
    report.show(result)
    return result


def _screen(config: StudyConfig) -> list[Trained]:
    """Every variant at every learning rate, on the first seed; nothing where there is nothing to choose."""
    variants, seed = config.study.variants, config.study.seeds[0]
    if not _screens(config):
        return []
    done: list[Trained] = []
    for name in in_order(variants):
        for lr in variants[name].lr:
            begin = best_of(done).get(str(variants[name].start))
            if variants[name].start and begin is None:
                raise TrainingFailedError(f"{name} starts from {variants[name].start}, which diverged; lower its lr.")
            done.append(_run(config, "screen", name, lr, seed, begin))
    return done


def _screens(config: StudyConfig) -> bool:
    variants = config.study.variants
    everyone = config.study.finalists in (0, len(variants) - 1)
    return not everyone or any(len(variant.lr) > 1 for variant in variants.values())


def _train_finals(config: StudyConfig, chosen: dict[str, float]) -> list[Trained]:
    """The finalists on every seed, seed after seed, so that a study cut short is still balanced."""
    done: list[Trained] = []
    variants = {name: config.study.variants[name] for name in chosen}
    for seed in config.study.seeds:
        of_seed: dict[str, Trained] = {}
        for name in in_order(variants):
            of_seed[name] = _run(config, "final", name, chosen[name], seed, of_seed.get(str(variants[name].start)))
            if not of_seed[name].curve:
                raise TrainingFailedError(
                    f"{name} at lr {chosen[name]:g} diverged in its final run of seed {seed}; lower its learning rates."
                )
        done += of_seed.values()
    return done


def _run(config: StudyConfig, phase: str, name: str, lr: float, seed: int, begin: Trained | None) -> Trained:
    run = run_config(config, phase, name, lr, seed, str(begin.model) if begin else None)
    folder = RunFolder(run.run.storage, run.run.name).path
    log.info(f"study {config.run.name}: {run.run.name}")
    try:
        job = checked(Pretrain(run))
        job.varied = {"model": model_name(config)}  # not the run that it starts from, another one for every seed
        result = run_job(job)
    except (TrainingFailedError, ImplausibleError) as error:
        if not isinstance(error, ImplausibleError) and not _diverged(folder):
            raise
        log.info(f"{run.run.name} diverged; the study goes on without it")
        return Trained(name, lr, seed, run)
    return Trained.of(name, lr, seed, run, folder, result)


def _diverged(folder: Path) -> bool:
    fatal = folder / FATAL
    return fatal.exists() and json.loads(fatal.read_text())["error"] == NonFiniteError.__name__


def _dry_run(config: StudyConfig) -> dict[str, Any]:
    """Variants with their sizes and the tokens of their screening."""
    per_step = config.parallel.samples_per_step * config.data.seq_len
    rows: list[Row] = []
    for name, variant in config.study.variants.items():
        run = run_config(config, "final", name, variant.lr[0], config.study.seeds[0])
        params = None if variant.start else make_plan(run).params_total
        screened = len(variant.lr) * config.study.screen_steps * per_step if _screens(config) else 0
        rows.append({"variant": name, "params_total": params, "lr": variant.lr, "screening_tokens": screened})
    rows_table(f"study {config.run.name}, not started", rows)
    final_tokens = config.train.steps * per_step
    log.info(f"finals: {final_tokens:,} tokens a run, seeds {config.study.seeds}")
    return {"status": "dry_run", "study": config.run.name, "variants": rows, "final_tokens": final_tokens}
