"""`finhpc bench generate`: decoding of dense and low-rank models compared with transformers' `generate`.

Weights are random, as the speed of greedy decoding does not depend on them. Everything runs in one process.
"""

from __future__ import annotations

import logging
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finhpc.bench.measures.batching import against_transformers, batching, draw_layouts, layouts
from finhpc.bench.report import Row, publish
from finhpc.bench.settings import GenerateBench
from finhpc.bench.timing import device_of, in_turn, median_ratio, spread
from finhpc.commands.export import export
from finhpc.errors import ConfigError
from finhpc.generation.decode import decode
from finhpc.generation.decoder import Decoder
from finhpc.generation.fast_layers import use_fast_layers
from finhpc.generation.generator import tensor_bytes
from finhpc.models.families.presets import PRESETS
from finhpc.models.families.registry import make_config, skeleton
from finhpc.models.loading import load_model
from finhpc.models.lora.multi_lora import Adapters
from finhpc.models.lora.peft_format import Adapter
from finhpc.models.lora.targets import linear_shapes
from finhpc.quantization.minmax import QuantizedMatrix, replace
from finhpc.quantization.schemes import SCHEMES
from finhpc.settings.base import build, nearest
from finhpc.settings.export import ExportConfig
from finhpc.settings.generate import Sampling
from finhpc.settings.pretrain import LINEAR_KINDS

log = logging.getLogger(__name__)

BANDWIDTH_BYTES = 800_000_000
THEIRS, DENSE = "HF dense", "dense, or merged"  # ways; the second is also B A multiplied out
SHOWN = ("model", "batch", "way", "first_token_s", "tokens_per_s", "over_dense", "model_bytes")


def bench_generate(settings: GenerateBench) -> dict[str, Any]:
    """Measure and publish; `ratios`: SHAPE_rRANK_over_dense of each model, cache_speedup, mixed_adapters_over_single,
    batched_over_one_at_a_time, over_hf_padded, over_hf_continuous. cache-layouts.png shows `cache_layouts`.

    The ratios are tokens/s at the first of `batches`. Raises `ConfigError` for a model that is not PRESET:RANK.
    """
    began = time.perf_counter()
    shapes = [_parse(entry) for entry in settings.models]
    device = device_of(settings.resources)
    bandwidth = read_bandwidth(device)
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for preset, rank in shapes:
        of_shape, ratio = _shape(settings, preset, rank, device, bandwidth)
        rows += of_shape
        ratios[f"{re.sub('[^a-z0-9]', '_', preset)}_r{rank}_over_dense"] = ratio
    ratios["cache_speedup"], cache = _cache(settings, *shapes[0], device)
    decoder, adapters = adapted(settings, device)
    ratios["mixed_adapters_over_single"], one_base = _adapters(settings, decoder, adapters)
    ratios["batched_over_one_at_a_time"], batched = batching(settings, decoder, adapters)
    over, beside = against_transformers(settings, decoder, adapters)
    ratios |= over
    conditions = {
        "precision": settings.precision,
        "tokens": f"{settings.prompt} + {settings.new}, greedy, no end of text",
        "threads": settings.resources.threads,
        "device": device.type,
        "weights": "random",
        "memory_read_gb_per_s": bandwidth / 1e9,
        "hf_dense": "transformers' generate on the dense model, with its own cache",
    }
    more = {
        "cache_tokens": cache,
        "one_base": one_base,
        "batching": batched,
        "against_transformers": beside,
        "cache_layouts": layouts(settings, decoder),
    }
    result = publish("generate", settings.bench.out, conditions, rows, ratios, began, SHOWN, **more)
    draw_layouts(more["cache_layouts"], Path(result["folder"]) / "cache-layouts.png")
    return result


def _parse(entry: str) -> tuple[str, int]:
    preset, _, rank = entry.partition(":")
    if preset not in PRESETS:
        raise ConfigError(f"models={entry}: {preset} is not a preset; {nearest(preset, list(PRESETS))}")
    if not rank.isdecimal() or not int(rank):
        raise ConfigError(f"models={entry} names no rank; give PRESET:RANK, such as gpt2-127m:192.")
    return preset, int(rank)


def read_bandwidth(device: torch.device) -> float:
    """Bytes/s at which a large tensor is summed, which about limits the reading of weights."""
    data = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        float(data.sum())
        seconds.append(time.perf_counter() - begin)
    return BANDWIDTH_BYTES / min(seconds)


def random_model(preset: str, rank: int | None, bits: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of random weights; a low-rank one of 8 or 4 `bits` is packed per vector and has random codes."""
    ranks = {kind: None if kind == "embedding" else rank for kind in LINEAR_KINDS}
    config = make_config(PRESETS[preset], ranks)
    model: Any = skeleton(config)
    if bits < 16:
        replace(model, bits)
    model = model.to(dtype).to_empty(device=device)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(False)
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
            else:
                parameter.fill_(0.0 if name == "bias" else 1.0)
        if isinstance(module, QuantizedMatrix):
            module.weight.random_(0, 256)
            module.scale.fill_(0.1 / 2**bits)
            module.zero.fill_(-0.05)
    if bits == 16:
        model.tie_weights()
    if hasattr(model, "model") and hasattr(model.model, "rotary_emb"):  # a buffer, not a weight
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    return model.eval()


def exported(preset: str, rank: int, bits: int, scheme: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The low-rank model of random weights in bitsandbytes' layers: saved, exported and loaded as a user would."""
    with tempfile.TemporaryDirectory() as folder:
        random_model(preset, rank, 16, dtype, device).save_pretrained(f"{folder}/model")
        quantization = {"bits": bits, "scheme": scheme}
        tree = {"model": f"{folder}/model", "out": f"{folder}/out", "quantization": quantization}
        export(build(ExportConfig, tree))
        return load_model(f"{folder}/out", dtype, device)


Way = Callable[[int], float]  # new tokens -> seconds


def theirs(model: Any, tokens: Tensor) -> Way:
    """transformers' `generate`."""
    model.set_attn_implementation("sdpa")

    def run(new: int) -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        assert out.shape[1] == tokens.shape[1] + new
        return time.perf_counter() - begin

    return run


def ours(decoder: Decoder, tokens: Tensor, cache: bool = True, **adapted: Any) -> Way:
    """Our decoder; `adapted`: `adapters` and their `names`, one a row."""
    prompts = tokens.tolist()

    def run(new: int) -> float:
        begin = time.perf_counter()
        for _ in decode(decoder, prompts, Sampling(max_new_tokens=new), cache=cache, **adapted):
            pass
        return time.perf_counter() - begin

    return run


def _shape(
    settings: GenerateBench, preset: str, rank: int, device: torch.device, bandwidth: float
) -> tuple[list[Row], float]:
    """Rows of one shape, and the low-rank model's speed over transformers' on the dense one at the first batch."""
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    models: dict[str, tuple[Any, int]] = {
        way: (random_model(preset, None, 16, dtype, device), 16) for way in (THEIRS, DENSE)
    }
    for bits in settings.bits:
        if bits == 16 or "minmax" in settings.schemes:
            models[f"rank {rank}, {bits} bits"] = (random_model(preset, rank, bits, dtype, device), bits)
        for scheme in settings.schemes:
            if scheme != "minmax" and bits in SCHEMES[scheme].bits:
                models[f"rank {rank}, {scheme}"] = (exported(preset, rank, bits, scheme, dtype, device), bits)
    for name, (model, _) in models.items():
        if name != THEIRS:
            use_fast_layers(model)
    rows, ratio = [], 0.0
    for batch in settings.batches:
        tokens = torch.randint(0, PRESETS[preset].vocab_size, (batch, settings.prompt), device=device)
        ways = {
            name: theirs(model, tokens) if name == THEIRS else ours(Decoder(model), tokens)
            for name, (model, _) in models.items()
        }
        log.info(f"{preset}, batch {batch}: {settings.bench.repeats} rounds of {len(ways)} ways")
        for way in ways.values():
            way(2)  # warms up
        first = in_turn({name: partial(way, 1) for name, way in ways.items()}, settings.bench.repeats)
        whole = in_turn({name: partial(way, settings.new) for name, way in ways.items()}, settings.bench.repeats)
        reference = whole[THEIRS]
        for name, (model, width) in models.items():
            seconds = statistics.median(whole[name])
            decoding = max(seconds - statistics.median(first[name]), 1e-9)
            moved = (tensor_bytes(model) - _embedding_bytes(model)) * (settings.new - 1)
            rows.append(
                {
                    "model": preset,
                    "way": name,
                    "batch": batch,
                    "bits": width,
                    "first_token_s": statistics.median(first[name]),
                    "tokens_per_s": batch * settings.new / seconds,
                    "over_dense": median_ratio(reference, whole[name]),
                    "model_bytes": tensor_bytes(model),
                    "gb_per_s": moved / decoding / 1e9,
                    "over_bandwidth": moved / decoding / bandwidth,
                    "spread": spread(whole[name]),
                }
            )
        if batch == settings.batches[0]:
            low_rank = next(name for name in models if name.startswith("rank"))
            ratio = median_ratio(reference, whole[low_rank])
    return rows, ratio


def _embedding_bytes(model: Any) -> int:
    """Bytes of embeddings of which decoding reads only a row; a tied one is also the head, and read completely."""
    shared = getattr(model.lm_head, "weight", None)
    return sum(
        tensor_bytes(module)
        for module in model.modules()
        if "Embedding" in type(module).__name__
        and "Rotary" not in type(module).__name__
        and (shared is None or getattr(module, "weight", None) is not shared)
    )


def _cache(settings: GenerateBench, preset: str, rank: int, device: torch.device) -> tuple[float, list[Row]]:
    """Speed of the low-rank model with the cache over that without; computed tokens are counted."""
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    decoder = Decoder(random_model(preset, rank, 16, dtype, device))
    use_fast_layers(decoder.model)
    tokens = torch.randint(0, PRESETS[preset].vocab_size, (1, settings.prompt), device=device)
    log.info("with and without the cache")
    rows, seconds = [], {}
    for cache in (True, False):
        decoder.computed_tokens = 0
        seconds[cache] = ours(decoder, tokens, cache)(settings.new)
        counted = decoder.computed_tokens
        rows.append(
            {"cache": cache, "computed_tokens": counted, "wall_s": seconds[cache], "cache_bytes": decoder.cache_bytes}
        )
    return seconds[False] / seconds[True], rows


def adapted(settings: GenerateBench, device: torch.device) -> tuple[Decoder, Adapters]:
    """Return a dense model with random adapters."""
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    model = random_model(settings.adapters_model, None, 16, dtype, device)
    made = {str(i): random_adapter(model, settings.adapter_rank) for i in range(settings.adapters)}
    use_fast_layers(model)
    adapters = Adapters(model, made)
    return Decoder(model), adapters


def _adapters(settings: GenerateBench, decoder: Decoder, adapters: Adapters) -> tuple[float, list[Row]]:
    """Speed with one adapter per row over that with a single adapter; memory compared with that of N models."""
    base_bytes = tensor_bytes(decoder.model) - adapters.bytes
    tokens = torch.randint(0, decoder.config.vocab_size, (settings.adapters, settings.prompt), device=decoder.device)
    names: dict[str, list[str | None]] = {
        "base alone": [None] * settings.adapters,
        "one adapter": ["0"] * settings.adapters,
        f"{settings.adapters} adapters": [*adapters.names],
    }

    def measure(way: str) -> float:
        return ours(decoder, tokens, adapters=adapters, names=names[way])(settings.new)

    log.info(f"{settings.adapters} adapters over one {settings.adapters_model}")
    measure("base alone")
    seconds = in_turn({way: partial(measure, way) for way in names}, settings.bench.repeats)
    rows: list[Row] = [
        {
            "batch": way,
            "tokens_per_s": settings.adapters * settings.new / statistics.median(seconds[way]),
            "over_one_adapter": median_ratio(seconds["one adapter"], seconds[way]),
            "base_bytes": base_bytes,
            "adapter_bytes": adapters.bytes,
            "models_bytes": settings.adapters * base_bytes,
            "spread": spread(seconds[way]),
        }
        for way in names
    ]
    return float(rows[-1]["over_one_adapter"]), rows


def random_adapter(model: nn.Module, rank: int) -> Adapter:
    """LoRA on every linear layer except the head."""
    pairs = {}
    for name, shape in linear_shapes(model).items():
        if name != "lm_head":
            pairs[name] = torch.randn(rank, shape[1]) * 0.02, torch.randn(shape[0], rank) * 0.02
    return Adapter(pairs, dict.fromkeys(pairs, 2.0))
