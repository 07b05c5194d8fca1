"""The one worker of a run in this process, by Ray Train's local mode: what a trial that is a single worker does.

Starting processes and importing torch and DeepSpeed in them takes Ray Train ten seconds and more; a process
that has trained one trial has all that behind it.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

from finhpc.orchestration.fit import raise_fatal, worker_arguments
from finhpc.orchestration.job import Job, Say
from finhpc.orchestration.runfolder import RunFolder
from finhpc.orchestration.worker import OnEval, train_worker


def fit_here(job: Job, folder: RunFolder, cuda: bool, say: Say, on_eval: OnEval) -> None:
    """Train until the last step; what `on_eval` raises ends it. Raises `TrainingFailedError` for a user's mistake."""
    import deepspeed.comm.comm
    import torch.distributed as dist
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    def work(arguments: dict[str, Any]) -> None:
        train_worker(arguments, on_eval)

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # DeepSpeed reads them
    with tempfile.TemporaryDirectory() as meeting:
        address = f"file://{meeting}/group"
        dist.init_process_group("nccl" if cuda else "gloo", init_method=address, rank=0, world_size=1)
        trainer = TorchTrainer(
            work,
            train_loop_config=worker_arguments(job, folder, cuda),
            scaling_config=ScalingConfig(num_workers=0, use_gpu=cuda),
        )
        try:
            trainer.fit()
        except Exception:
            raise_fatal(job, folder)
            raise
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            deepspeed.comm.comm.cdb = None  # it holds the group that is gone
    raise_fatal(job, folder)
