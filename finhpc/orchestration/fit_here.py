"""The one worker of a run in this process, by Ray Train's local mode: what a trial that is a single worker does.

Starting processes and importing torch and DeepSpeed in them takes Ray Train ten seconds and more; a process
that has trained one trial has all that behind it.
"""

from __future__ import annotations

import os
from typing import Any

from finhpc.orchestration.fit import raise_fatal, worker_arguments
from finhpc.orchestration.job import Job, Say
from finhpc.orchestration.runfolder import RunFolder
from finhpc.orchestration.worker import OnEval, train_worker


def fit_here(job: Job, folder: RunFolder, cuda: bool, say: Say, on_eval: OnEval) -> None:
    """Train until the last step; what `on_eval` raises ends it. Raises `TrainingFailedError` for a user's mistake."""
    os.environ["DS_ACCELERATOR"] = "cuda" if cuda else "cpu"  # read when DeepSpeed is imported
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    from finhpc.training.engine import group_of_one

    def work(arguments: dict[str, Any]) -> None:
        train_worker(arguments, on_eval)

    trainer = TorchTrainer(
        work,
        train_loop_config=worker_arguments(job, folder, cuda),
        scaling_config=ScalingConfig(num_workers=0, use_gpu=cuda),
    )
    try:
        with group_of_one("nccl" if cuda else "gloo"):
            trainer.fit()
    except Exception:
        raise_fatal(job, folder)
        raise
    raise_fatal(job, folder)
