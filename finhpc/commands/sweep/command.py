"""`finhpc sweep`: a grid or a search over any settings of pretrain or finetune, as one command on Ray Tune.

    SWEEP/            in run.storage; config.yaml, result.json, trials.csv
    SWEEP/trials/     a run folder per trial, with everything that resuming needs
    SWEEP/shared/     what several trials use: the dense reference, its factors at each rank, quantized bases

Tune places and schedules the trials; everything known of them is in their run folders and in MLflow. So the same
command resumes a sweep, however it ended.
"""

from __future__ import annotations

import time
from typing import Any

from finhpc.cluster.connect import ray_cluster
from finhpc.cluster.ready import check_ray
from finhpc.commands.sweep.grid import AnySweep
from finhpc.commands.sweep.plan import plan_sweep, show_plan
from finhpc.commands.sweep.report import FIGURES, flat, ranked, show
from finhpc.commands.sweep.tracking import Parent, send_missed
from finhpc.commands.sweep.tuning import train_trials
from finhpc.errors import TrainingFailedError
from finhpc.files import write_csv
from finhpc.interrupts import terminable
from finhpc.runs.folder import RunFolder


def sweep(config: AnySweep, dry_run: bool = False) -> dict[str, Any]:
    """Train and score every trial of the grid, rank them, register the best; returns the content of `result.json`.

    The same `run.name` and `run.storage` resume: finished trials stay as they are, others go on from their
    checkpoints. With `dry_run` everything is checked and the plan shown. Raises `ConfigError` with every
    problem of every trial, `RunBusyError` if another process works on the sweep, `TrainingFailedError` if no
    trial ended well.
    """
    begin = time.perf_counter()
    folder = RunFolder(config.run.storage, config.run.name)
    folder.check_resume(config)
    plan = plan_sweep(config, folder.path)
    show_plan(plan)
    counted = plan.result()
    if dry_run:
        return counted | {"status": "dry_run"}
    check_ray()
    with folder.lock(), terminable():
        folder.write_settings(config)
        with Parent(plan, folder) as parent:
            with ray_cluster():
                train_trials(plan, parent.id)
            send_missed(plan, parent.id)
            rows = ranked(plan)
            best = next((row for row in rows if row["place"] == 1), None)
            result = counted | {
                "status": "finished" if best else "failed",
                "trials": rows,
                "best": best,
                "model": best and best["model"],
                "steps_trained": sum(row["steps"] or 0 for row in rows if not row["scored_only"]),
                "wall_s": time.perf_counter() - begin,
            }
            figures = {key: best[key] for key in FIGURES} if best else {}
            parent.end(result, figures, config.sweep.register_as or config.run.name)
        write_csv(folder.path / "trials.csv", flat(rows))
        folder.write_result(result)
    show(config, result)
    if best is None:
        error = next((str(row["error"]) for row in rows if row["error"]), "none was reported")
        raise TrainingFailedError(f"no trial of sweep {config.run.name} ended well; the first error: {error}")
    return result
