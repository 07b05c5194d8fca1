"""`finhpc pretrain --dry_run` and `finhpc finetune --dry_run`: everything is checked and counted, nothing starts."""

from __future__ import annotations

import logging
from typing import Any

from finhpc.cluster.connect import use_cuda
from finhpc.commands.estimate.finetuning import of_examples
from finhpc.commands.estimate.pretraining import of_plan
from finhpc.commands.estimate.tables import plan_summary, show_stages
from finhpc.commands.finetune import Finetune, batches_of
from finhpc.commands.pretrain import Pretrain
from finhpc.runs.folder import RunFolder
from finhpc.runs.result import empty_result
from finhpc.runs.run import check_run, mlflow_checked
from finhpc.screen import summary_table
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.training.finetuning.batches import PackedBatches

log = logging.getLogger(__name__)


def dry_run(config: PretrainConfig | FinetuneConfig) -> dict[str, Any]:
    """Check and estimate a training; returns the keys of `result.json`, with `estimate`."""
    job = mlflow_checked(Pretrain(config) if isinstance(config, PretrainConfig) else Finetune(config))
    config, parallel = job.config, job.config.parallel
    total = check_run(job, RunFolder(config.run.storage, config.run.name))
    cuda = use_cuda(config.resources, total) if total else config.resources.device == "cuda"
    here, steps = total is not None, config.train.steps
    if isinstance(job, Pretrain):
        tokens = steps * parallel.samples_per_step * job.config.data.seq_len
        estimate = of_plan(job.plan, cuda, here)
    else:
        for note in job.examples.notes:
            log.info(note)
        batches = batches_of(job.config, job.examples)
        tokens = PackedBatches(job.examples, batches).tokens(steps)
        estimate = of_examples(job.config, job.lora_model, job.examples, batches, cuda, here)
    rows = [
        *job.summary(),
        ("workers", str(parallel.workers)),
        ("samples per step", str(parallel.samples_per_step)),
        *([("tokens", f"{tokens:,}")] if isinstance(job, Finetune) else []),
        *plan_summary(estimate, steps),
    ]
    summary_table(f"dry run of {config.run.name}", rows)
    show_stages(estimate["stages"])
    return empty_result(job) | {"status": "dry_run", "steps": steps, "tokens": tokens, "estimate": estimate}
