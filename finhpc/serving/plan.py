"""A server before it starts: its checks, and the memory that it will take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from finhpc.errors import ConfigError, collect
from finhpc.generation.adapters import parse_adapter, resolve_adapter_model
from finhpc.generation.generator import Inputs, open_inputs
from finhpc.generation.paged import block_bytes
from finhpc.models.families.registry import context_of
from finhpc.serving.served import NAME, check_rank, model_name
from finhpc.settings.generate import GenerateConfig, Sampling
from finhpc.settings.serve import ServeConfig

FREE_SHARE = 0.25  # of free memory for the cache, by default


@dataclass(frozen=True)
class Memory:
    """Bytes of one replica. `tokens`: how many the cache holds."""

    weights: int
    cache: int
    blocks: int
    tokens: int


def generate_config(config: ServeConfig) -> GenerateConfig:
    """Return what opening the model takes."""
    return GenerateConfig(
        model=config.model,
        adapters=config.adapters,
        dtype=config.dtype,
        sampling=Sampling(max_new_tokens=1),
        resources=config.resources,
        plugins=config.plugins,
    )


def resolved(config: ServeConfig) -> ServeConfig:
    """If `model` is an adapter's folder, serve its base, and the adapter too. Raises `ConfigError` without the base."""
    if not config.model:
        raise ConfigError("model is not set; give --model with a model folder.")
    opened = resolve_adapter_model(generate_config(config))
    return config.model_copy(update={"model": opened.model, "adapters": opened.adapters})


def listed(config: ServeConfig) -> dict[str, str]:
    """Return name -> folder of the adapters of the start."""
    return {name: str(folder) for name, folder in map(parse_adapter, config.adapters)}


def check(config: ServeConfig) -> Inputs:
    """Check model, adapters and names, without reading weights. Raises `ConfigError` with every problem."""
    problems: list[str] = []
    names = [parse_adapter(entry)[0] for entry in config.adapters]
    for name in [model_name(config), *names]:
        if not NAME.fullmatch(name):
            which = "name" if name not in names else "adapters"
            problems.append(
                f"{which}={name} is not a name of letters, digits, '.', '_' and '-' in the API; give another "
                f"({'--name NAME' if which == 'name' else 'NAME=FOLDER'})."
            )
    if len(names) > config.limits.max_adapters:
        problems.append(
            f"adapters: {len(names)} are more than limits.max_adapters={config.limits.max_adapters}; raise the limit, "
            "or load fewer."
        )
    problems += [
        f"adapter_root={root} is not a folder; give one that exists."
        for root in config.adapter_root
        if not Path(root).is_dir()
    ]
    inputs = None
    with collect(problems):
        inputs = open_inputs(generate_config(config))
        for name, adapter in inputs.adapters.items():
            with collect(problems):
                check_rank(name, adapter, config.limits)
        blocks_of(config, inputs.config)
    if problems or inputs is None:
        raise ConfigError(problems)
    return inputs


def blocks_of(config: ServeConfig, model_config: Any, device: str = "cpu") -> int:
    """Return how many blocks the cache of a replica has. Raises `ConfigError` if it cannot hold a request."""
    each = block_bytes(model_config, config.cache.block_size, device)
    size, context = config.cache.block_size, context_of(model_config)
    if config.cache.bytes is not None:
        blocks = config.cache.bytes // each
    else:
        free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
        most = int(free * FREE_SHARE / config.replicas) // each
        blocks = min(config.limits.max_running * -(-context // size), most)
    if blocks < 1:
        raise ConfigError(
            f"cache.bytes={config.cache.bytes or 'a quarter of the free memory'} is too small for a block of "
            f"{size} tokens, which takes {each:,} bytes; give more, or smaller blocks (--cache.block_size)."
        )
    return int(blocks)


def memory_of(config: ServeConfig, inputs: Inputs) -> Memory:
    """Return the memory of a replica, from the sizes of files and the shape of the model."""
    files = [inputs.path] if inputs.path.is_file() else sorted(inputs.path.glob("*.safetensors"))
    blocks, size = blocks_of(config, inputs.config), config.cache.block_size
    each = block_bytes(inputs.config, size, "cpu")
    return Memory(sum(file.stat().st_size for file in files), blocks * each, blocks, blocks * size)
