"""Open a model to serve it: weights, adapters, batcher, metrics."""

from __future__ import annotations

from pathlib import Path

from finhpc.generation.batching import Batcher
from finhpc.generation.generator import open_model
from finhpc.models.files.source import locate
from finhpc.serving.engine import Engine
from finhpc.serving.metrics import Metrics
from finhpc.serving.plan import blocks_of, generate_config
from finhpc.serving.served import Served
from finhpc.serving.shared import Shared
from finhpc.settings.serve import ServeConfig


def open_served(config: ServeConfig, replica: str) -> tuple[Served, Metrics]:
    """Open the model of a checked config, whose `state` exists; `replica`: its name in the metrics."""
    shared = Shared(Path(str(config.state)))
    how = generate_config(config)
    opened = open_model(how.model_copy(update={"resources": how.resources.model_copy(update={"threads": 1})}))
    batcher = Batcher(
        opened.decoder,
        opened.adapters,
        blocks=blocks_of(config, opened.model.config, opened.model.device.type),
        block_size=config.cache.block_size,
        max_batch=config.limits.max_running,
        prefill_tokens=config.cache.prefill_tokens,
    )
    metrics = Metrics(replica, shared, batcher.stats)
    engine = Engine(batcher, config.limits, metrics.first, metrics.between, config.resources.threads)
    return Served(config, locate(config.model), opened, engine, shared), metrics
