"""`finhpc estimate`: what a pretraining or a finetuning needs, before it starts."""

from __future__ import annotations

from typing import Any

from finhpc.settings.estimate import EstimateConfig, FinetuneEstimateConfig


def estimate(config: EstimateConfig | FinetuneEstimateConfig, dry_run: bool = False) -> dict[str, Any]:
    """Plan the run of `config` on the hardware of its `estimate` section; print tables, return the result.

    Nothing is trained or written. `dry_run` refuses to measure this machine. Raises `ConfigError` with every problem.
    """
    if isinstance(config, FinetuneEstimateConfig):
        from finhpc.commands.estimate.finetuning import estimate_finetune

        return estimate_finetune(config)
    from finhpc.commands.estimate.pretraining import estimate_pretrain

    return estimate_pretrain(config, dry_run)
