"""One worker of a run in this process, by Ray Train's local mode: what the trials of a sweep do.

Starting processes and importing torch and DeepSpeed in them takes Ray Train ten seconds and more; a process
that has trained one trial has all that behind it.
"""

from __future__ import annotations

import os
from typing import Any

from finhpc.runs.folder import RunFolder
from finhpc.runs.job import Job
from finhpc.runs.launch import raise_fatal, torch_timeout_s, worker_arguments
from finhpc.runs.worker import OnEval, train_worker


def fit_here(job: Job, folder: RunFolder, cuda: bool, on_eval: OnEval) -> None:
    """Train a run of one worker until the last step; what `on_eval` raises ends it.

    Raises `TrainingFailedError` for a user's mistake.
    """
    try:
        train_here(worker_arguments(job, folder, cuda), on_eval)
    except Exception:
        raise_fatal(job, folder)
        raise
    raise_fatal(job, folder)


def train_here(
    arguments: dict[str, Any], on_eval: OnEval | None = None, rank: int = 0, size: int = 1, store: Any = None
) -> None:
    """The life of the worker `rank` of `size`, which meet in `store`, a `torch.distributed.Store`."""
    cuda = arguments["cuda"]
    os.environ["DS_ACCELERATOR"] = "cuda" if cuda else "cpu"  # read when DeepSpeed is imported
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    from finhpc.training.engine import process_group

    def work(arguments: dict[str, Any]) -> None:
        train_worker(arguments, on_eval)

    trainer = TorchTrainer(work, train_loop_config=arguments, scaling_config=ScalingConfig(num_workers=0, use_gpu=cuda))
    timeout_s = torch_timeout_s(arguments["config"]["train"]["hang_timeout_s"])
    with process_group("nccl" if cuda else "gloo", rank, size, store, timeout_s):
        trainer.fit()
