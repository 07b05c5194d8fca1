"""`finhpc bench gpu`: what one GPU reaches, in a few minutes: training, finetuning, generation, and predicted memory.

Cases run one after the other in this process, without Ray, and the table is written after each, so that a time limit
loses nothing. A case that fails, for example because the GPU has no room, has its error in place of figures. Weights
are random: nothing is read or downloaded.
"""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finhpc.bench.measures.generate import bench_generate
from finhpc.bench.measures.step import RandomBase, counted_arrays
from finhpc.bench.measures.train import one_process_group, operations
from finhpc.bench.plain.finetune import padded, plain_step, random_base, with_adapters
from finhpc.bench.plain.pretrain import model_step
from finhpc.bench.report import Row, machine, new_folder, show
from finhpc.bench.settings import FinetuneStepBench, GenerateBench, GpuBench
from finhpc.bench.timing import device_of
from finhpc.commands.estimate.finetuning import planned_base
from finhpc.commands.estimate.pretraining import pretraining_costs
from finhpc.data.examples.batches import Batches
from finhpc.errors import FinhpcError
from finhpc.models.initialize import random_fill
from finhpc.models.lora.model import LoraModel
from finhpc.models.packing.layout import segments_of
from finhpc.planning.devices import gpu_here
from finhpc.planning.fake_packs import PackSize
from finhpc.planning.finetuning import LoraCosts
from finhpc.planning.memory import Topology
from finhpc.planning.model import hf_config_of_settings
from finhpc.settings.base import build
from finhpc.settings.estimate import EstimateConfig
from finhpc.training.engine import Engine

log = logging.getLogger(__name__)

PLANNED = "h200-141gb"  # the estimate's device: only that it is a GPU matters for memory
LR = 1e-4
SHOWN = ("part", "model", "way", "tokens_per_s", "mfu", "peak_bytes", "predicted_bytes", "error")


@dataclass
class Report:
    """The rows so far, and where they are written after each."""

    folder: Path
    conditions: Row
    began: float
    until: float  # `time.perf_counter()` after which nothing more begins
    rows: list[Row] = field(default_factory=list)

    def case(self, part: str, model: str, way: str, work: Callable[[], Row]) -> None:
        """Measure one row and write the table, unless the time is up."""
        row: Row = {"part": part, "model": model, "way": way}
        row |= dict.fromkeys(("tokens_per_s", "step_s", "mfu", "peak_bytes", "predicted_bytes", "error"))
        if time.perf_counter() > self.until:
            row["error"] = "no time left"
        else:
            log.info(f"{part}: {model}, {way}")
            try:
                row |= work()
            except (FinhpcError, RuntimeError, ValueError) as error:  # one case must not end the others
                row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                log.warning(f"{part}: {model}, {way}: {row['error']}")
        self.rows.append(row)
        self.write("running")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def write(self, status: str) -> dict[str, Any]:
        result: dict[str, Any] = {
            "status": status,
            "bench": "gpu",
            "conditions": self.conditions | machine(),
            "rows": self.rows,
            "ratios": ratios(self.rows),
            "folder": str(self.folder),
            "wall_s": time.perf_counter() - self.began,
        }
        (self.folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return result


def bench_gpu(settings: GpuBench) -> dict[str, Any]:
    """Measure and write; `ratios`: of tokens/s, low-rank over dense and finhpc over the plain loop, by model and way.

    Raises `ConfigError` if `resources.device=cuda` finds no GPU.
    """
    began = time.perf_counter()
    device = device_of(settings.resources)
    one_process_group(device)
    conditions = {
        "device": device.type,
        "pretraining": f"{settings.batch} x {settings.seq_len} tokens per step, bf16 autocast over float32 weights",
        "finetuning": f"{settings.examples} examples of up to {settings.tokens} tokens, rank 8, bfloat16 activations",
        "steps": f"{settings.steps} after {settings.warm_up}",
        "weights": "random",
        "mfu": "operations of the model's matrices and attention over the data sheet's bf16 rate",
    }
    until = began + settings.budget_s
    report = Report(new_folder("gpu", settings.bench.out), conditions, began, until)
    for entry in settings.pretrain:
        _pretrain(report, settings, entry, device)
    for preset in settings.finetune:
        for bits in settings.bits:
            _finetune(report, settings, preset, bits, device)
    for entry in settings.generate:
        _generate(report, settings, entry)
    result = report.write("finished")
    show(result, SHOWN)
    return result


def ratios(rows: list[Row]) -> dict[str, float]:
    """Of tokens/s in training: each of finhpc's ways over the plain loop of the same model."""
    plain = {(row["part"], row["model"]): row["tokens_per_s"] for row in rows if row["way"].startswith("plain")}
    found = {}
    for row in rows:
        base = plain.get((row["part"], row["model"]))
        if base and row["tokens_per_s"] and not row["way"].startswith("plain"):
            found[f"{row['part']} {row['model']}, {row['way']} over plain"] = row["tokens_per_s"] / base
    return found


# -- pretraining ----------------------------------------------------------------------------


def _pretrain(report: Report, settings: GpuBench, entry: str, device: torch.device) -> None:
    """A model PRESET or PRESET:RANK: the plain loop, then finhpc eager and compiled."""
    preset, _, rank = entry.partition(":")
    tree: dict[str, Any] = {
        "model": {"preset": preset},
        "method": {"kind": "low_rank", "rank": int(rank)} if rank else {"kind": "dense"},
        "data": {"seq_len": settings.seq_len},
        "parallel": {"micro_batch_size": settings.batch},
        "train": {"precision": "bf16", "steps": 1000},
        "estimate": {"device": PLANNED},
    }

    def measured(way: str) -> Row:
        config = build(
            EstimateConfig, tree | {"train": tree["train"] | {"compile": "on" if way == "compiled" else "off"}}
        )
        hf_config = hf_config_of_settings(config)
        tokens = torch.randint(0, hf_config.vocab_size, (settings.batch, settings.seq_len))
        if way == "plain":
            model, step = model_step(config, hf_config, device)
            _random_weights(model)
            return _figures(settings, lambda: step(tokens, LR), tokens.numel(), device, hf_config)
        engine = Engine(config, hf_config, device, fill=random_fill(hf_config, 0, "normal"))
        row = _figures(settings, lambda: engine.train_step(iter([tokens]), LR), tokens.numel(), device, hf_config)
        return row | {"predicted_bytes": pretraining_costs(config).stages()[0].peak_bytes}

    for way in settings.ways:
        report.case("pretrain", entry, way, lambda way=way: measured(way))  # type: ignore[misc]


def _random_weights(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)


# -- finetuning -----------------------------------------------------------------------------


def _finetune(report: Report, settings: GpuBench, preset: str, bits: int, device: torch.device) -> None:
    """LoRA over a base of random weights: transformers and peft, then finhpc eager and compiled."""
    tree: dict[str, Any] = {
        "model": {"preset": preset},
        "parallel": {"micro_batch_size": settings.examples},
        "train": {"precision": "bf16", "steps": 1000},
        "quantization": {"bits": bits},
        "bench": {"tokens": settings.tokens},
    }
    count = settings.warm_up + settings.steps

    def measured(way: str) -> Row:
        compiled = {"compile": "on" if way.startswith("compiled") else "off"}
        config = build(FinetuneStepBench, tree | {"train": tree["train"] | compiled})
        hf_config = planned_base(config.model).config
        arrays = counted_arrays(config, count)
        feed = Batches(config.parallel, 0)
        steps = [feed.step(arrays, i, 0)[0] for i in range(count)]
        tokens = len(arrays.tokens) / count
        if way.startswith("plain"):
            model = with_adapters(random_base(hf_config, bits, device), config.lora.rank)
            rows = iter([[padded([arrays.example(int(i)) for i in step["sample"]], 0)] for step in steps])
            plain = plain_step(model, LR)
            return _figures(settings, lambda: plain(next(rows)), tokens, device)
        packs = iter([torch.from_numpy(step["pack"]) for step in steps])
        lora_model = LoraModel.of(config, RandomBase(hf_config, device))
        engine = Engine(config, hf_config, device, lora_model=lora_model)
        row = _figures(settings, lambda: engine.train_step(packs, LR), tokens, device)
        largest = max((torch.from_numpy(step["pack"]) for step in steps), key=lambda pack: pack.shape[2])
        size = PackSize(largest.shape[2], segments_of(largest[0]))
        costs = LoraCosts(lora_model, size, Topology.of(config), cuda=True)
        return row | {"predicted_bytes": costs.stages()[0].peak_bytes}

    for way in settings.ways:
        report.case(f"lora {bits} bits", preset, way, lambda way=way: measured(way))  # type: ignore[misc]


# -- generation -----------------------------------------------------------------------------


def _generate(report: Report, settings: GpuBench, entry: str) -> None:
    """`finhpc bench generate` with one model, whose rows become rows here."""

    def measured() -> Row:
        tree = {
            "models": [entry],
            "batches": [1, 16],
            "schemes": ["minmax", "nf4"],
            "new": settings.new,
            "bench": {"repeats": 1, "out": str(report.folder)},
            "adapters_model": settings.finetune[0] if settings.finetune else "smollm2-135m",
            "resources": settings.resources.model_dump(),
        }
        result = bench_generate(build(GenerateBench, tree))
        for row in result["rows"]:
            way = f"{row['way']}, batch {row['batch']}"
            report.rows.append(
                {"part": "generate", "model": row["model"], "way": way, "tokens_per_s": row["tokens_per_s"]}
                | dict.fromkeys(("step_s", "mfu", "peak_bytes", "predicted_bytes", "error"))
            )
        return {"tokens_per_s": None}

    report.case("generate", entry, "all", measured)


# -- figures --------------------------------------------------------------------------------


def _figures(
    settings: GpuBench, step: Callable[[], object], tokens: float, device: torch.device, hf_config: Any = None
) -> Row:
    """Seconds, tokens/s, the share of the GPU's rate, and the peak memory of steps after a warm-up."""
    cuda = device.type == "cuda"
    for _ in range(settings.warm_up):
        step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(settings.steps):
        step()
    if cuda:
        torch.cuda.synchronize()
    step_s = (time.perf_counter() - start) / settings.steps
    row: Row = {"step_s": step_s, "tokens_per_s": tokens / step_s}
    if cuda:
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
        if hf_config is not None and (gpu := gpu_here()) is not None:
            row["mfu"] = 6 * operations(hf_config, settings.seq_len) * tokens / step_s / gpu.rate("bf16")
    return row
