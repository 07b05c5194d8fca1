"""`finhpc estimate`: the memory and time that a pretraining or a finetuning needs, before it starts."""

from __future__ import annotations

import logging
from typing import Any

from finhpc.settings.estimate import EstimateConfig, FinetuneEstimateConfig

log = logging.getLogger(__name__)


def estimate(config: EstimateConfig | FinetuneEstimateConfig, dry_run: bool = False) -> dict[str, Any]:
    """Plan the run of `config` on the hardware of its `estimate` section; print tables and return the result.

    Nothing is trained or written. With `estimate.device this-machine` the parts of the model of a pretraining are
    measured here; `dry_run` refuses that. Raises `ConfigError` with every problem.
    """
    if isinstance(config, FinetuneEstimateConfig):
        from finhpc.commands.estimate.finetuning import estimate_finetune

        result = estimate_finetune(config)
        names = ["lora.rank", "quantization.bits", "estimate.tokens"]
    else:
        from finhpc.commands.estimate.pretraining import estimate_pretrain

        result = estimate_pretrain(config, dry_run)
        names = ["method.kind", "method.rank", "data.seq_len"]
    assumed = []
    for name in [*names, "train.precision", "parallel.micro_batch_size"]:
        section, _, key = name.partition(".")
        values = getattr(config, section)
        if key not in values.model_fields_set:
            assumed.append(f"{name}={getattr(values, key)}")
    if assumed:
        log.info(f"assumed, because they are not set: {', '.join(assumed)}; set what your run has.")
    result["estimate"]["assumed"] = assumed
    return result
