"""`finhpc bench finetune`: LoRA steps of finhpc compared with transformers and peft, with and without the Trainer.

One process, no Ray; the engine is that of every run, with one stage. All train the same base from the same adapters on
the same batches: examples sorted by length, so that padding costs the baselines little, then batches in random order.
Passes are measured in turn; the first step of a pass warms up and is not timed.
"""

from __future__ import annotations

import gc
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finhpc.bench.measures.train import one_process_group
from finhpc.bench.plain.finetune import Pass, Passes, adapters, peft_model, plain_passes, trainer_passes
from finhpc.bench.report import Row, publish
from finhpc.bench.settings import FinetuneBench
from finhpc.bench.timing import device_of, in_turn, median_ratio, spread
from finhpc.data.examples.batches import Batches
from finhpc.data.examples.examples import Arrays, make_examples
from finhpc.errors import ConfigError
from finhpc.models.files.source import locate, open_weights
from finhpc.models.lora.model import LoraModel
from finhpc.settings.base import build
from finhpc.settings.finetune import FinetuneConfig, Instructions
from finhpc.settings.training import Recompute
from finhpc.training.compiler import missing_compiler
from finhpc.training.engine import Engine
from finhpc.training.memory import counted_peak, live_tensor_bytes

log = logging.getLogger(__name__)

NAMES = {16: "bf16", 8: "int8", 4: "nf4"}
OURS, PLAIN, TRAINER = "finhpc", "peft's loop", "HF Trainer"  # both with transformers and peft
Batch = Sequence[int]


class InOrder(Batches):
    """The examples in their given order, epoch after epoch."""

    def order(self, examples: int, epoch: int) -> Any:
        return np.arange(examples)


def bench_finetune(settings: FinetuneBench) -> dict[str, Any]:
    """Measure and publish; `ratios`: `examples_per_s_over_peft_*` and `peak_memory_over_peft_*` for each base.

    The first compares the faster of finhpc's ways, eager and compiled, with the fastest baseline.
    `peak_memory_over_peft` is that of the first of `bits`, in counted tensor bytes, over the plain loop's.

    Raises `ConfigError` for a GPU, which is not measured, and if model, source or examples are missing.
    """
    began = time.perf_counter()
    if device_of(settings.resources).type != "cpu":
        raise ConfigError("bench finetune measures only CPUs; use resources.device=cpu.")
    if settings.model is None or settings.source is None:
        raise ConfigError("bench finetune needs --model FOLDER, the base, and --source FILE, the examples.")
    path = locate(settings.model)
    if not path.is_dir():
        raise ConfigError(f"model={settings.model} is not a Hugging Face folder, which the baselines need; give one.")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    arrays, batches = drawn(settings, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for bits in settings.bits:
        more, ratio = _base(settings, path, bits, arrays, batches, pad)
        rows += more
        ratios |= ratio
    ratios["peak_memory_over_peft"] = ratios[f"peak_memory_over_peft_{NAMES[settings.bits[0]]}"]
    conditions = {
        "model": settings.model,
        "examples": f"{len(arrays)} in batches of {settings.batch}, sorted by length, batches in random order",
        "adapters": f"{'DoRA, ' * settings.dora}rank {settings.rank} on every linear layer except the head, float32",
        "base": "bfloat16 activations; int8, nf4: bitsandbytes'",
        "optimizer": f"AdamW, lr {settings.lr}, no decay, no clipping",
        "threads": settings.resources.threads,
        "ray": False,
    }
    return publish("finetune", settings.bench.out, conditions, rows, ratios, began)


def drawn(settings: FinetuneBench, tokenizer: Any) -> tuple[Arrays, list[range]]:
    """The examples in the order they are trained on, and the batches of them.

    Raises `ConfigError` for fewer than two batches.
    """
    wanted = Instructions(source=[str(settings.source)], eval_fraction=0.0, limit=settings.examples)
    arrays = make_examples(wanted, tokenizer, seed=0).train
    steps = len(arrays) // settings.batch
    if steps < 2:
        raise ConfigError(
            f"examples={settings.examples} gives {len(arrays)} examples, less than two batches of {settings.batch}; "
            "give more, as the first batch warms up."
        )
    order = np.argsort(np.diff(arrays.offsets), kind="stable")[: steps * settings.batch].reshape(steps, -1).tolist()
    random.Random(1).shuffle(order)
    picked = [arrays.example(i) for batch in order for i in batch]
    lengths = [len(tokens) for tokens, _ in picked]
    made = Arrays(
        np.concatenate([tokens for tokens, _ in picked]),
        np.cumsum([0, *lengths], dtype=np.int64),
        np.concatenate([answer for _, answer in picked]),
        np.zeros(len(picked), np.int32),
    )
    return made, [range(i, i + settings.batch) for i in range(0, len(picked), settings.batch)]


def _base(
    settings: FinetuneBench, path: Path, bits: int, arrays: Arrays, batches: list[range], pad: int
) -> tuple[list[Row], dict[str, float]]:
    """Measure all ways on one base."""
    log.info(f"{NAMES[bits]}: loading the models; then {settings.bench.repeats} rounds of a pass each")
    lengths = np.diff(arrays.offsets)
    longest = max(batches, key=lambda batch: int(lengths[batch].max()))
    gc.collect()
    before = live_tensor_bytes()
    model = peft_model(path, bits, settings.rank, seed=0, dora=settings.dora)
    start = {name: p.detach().clone() for name, p in adapters(model).items()}
    plain = _from_start(plain_passes(model, arrays, pad, settings.lr), adapters(model), start)
    peaks = {PLAIN: _peak(plain, [longest, longest]) - before}
    gc.collect()
    before = live_tensor_bytes()
    engine = lora_engine(path, bits, settings.rank, settings.batch, dora=settings.dora)
    ours = _from_start(_engine_passes(engine, arrays, settings.lr), engine.trained_parameters(), start)
    peaks[OURS] = _peak(ours, [longest, longest]) - before
    with tempfile.TemporaryDirectory() as folder:
        trainer = _from_start(trainer_passes(model, arrays, pad, settings.lr, Path(folder)), adapters(model), start)
        ways = {PLAIN: plain, TRAINER: trainer, OURS: ours}
        if settings.compiled and missing_compiler("cpu") is None:
            fast = lora_engine(path, bits, settings.rank, settings.batch, compiled=True, dora=settings.dora)
            ours = _engine_passes(fast, arrays, settings.lr)
            ways[f"{OURS}, compiled"] = _from_start(ours, fast.trained_parameters(), start)
            other = peft_model(path, bits, settings.rank, seed=0, dora=settings.dora)  # the Trainer changes its own
            plain = plain_passes(other, arrays, pad, settings.lr, torch.compile(other, dynamic=True))
            ways[f"{PLAIN}, compiled"] = _from_start(plain, adapters(other), start)
            log.info(f"{NAMES[bits]}: compiling")
            for name in ways:
                if name.endswith("compiled"):
                    ways[name](batches)
        losses: dict[str, list[float]] = {}

        def timed(name: str) -> float:
            made = ways[name](batches)
            losses[name] = made.losses
            log.info(f"{NAMES[bits]}: {name}: {made.seconds:.1f} s")
            return made.seconds

        seconds = in_turn({name: partial(timed, name) for name in ways}, settings.bench.repeats)
    examples = len(arrays) - settings.batch
    tokens = int(lengths[settings.batch :].sum())
    last = max(1, len(batches) // 4)
    rows: list[Row] = [
        {
            "way": name,
            "base": NAMES[bits],
            "examples_per_s": examples / statistics.median(taken),
            "tokens_per_s": tokens / statistics.median(taken),
            "loss_first": losses[name][0],
            "loss_last": statistics.mean(losses[name][-last:]),
            "peak_memory_bytes": peaks.get(name),
            "spread": spread(taken),
        }
        for name, taken in seconds.items()
    ]
    theirs, ours_of = ([name for name in seconds if name.startswith(OURS) == mine] for mine in (False, True))
    fastest, best = (min(names, key=lambda name: statistics.median(seconds[name])) for names in (theirs, ours_of))
    return rows, {
        f"examples_per_s_over_peft_{NAMES[bits]}": median_ratio(seconds[fastest], seconds[best]),
        f"peak_memory_over_peft_{NAMES[bits]}": peaks[OURS] / peaks[PLAIN],
    }


def lora_engine(
    path: Path,
    bits: int,
    rank: int,
    batch: int,
    recompute: Recompute = "none",
    compiled: bool = False,
    dora: bool = False,
) -> Engine:
    """The engine of every finetuning, one stage in this process on a CPU, with adapters on every linear layer."""
    config = build(
        FinetuneConfig,
        {
            "model": {"path": str(path)},
            "lora": {"rank": rank, "lora_alpha": 2.0 * rank, "dora": dora},
            "optimizer": {"betas": (0.9, 0.999), "grad_clip": 0.0, "weight_decay": 0.0},
            "parallel": {"micro_batch_size": batch},
            "train": {"precision": "bf16", "recompute": recompute, "compile": "on" if compiled else "off"},
            "quantization": {"bits": bits},
        },
    )
    device = torch.device("cpu")
    one_process_group(device)
    lora_model = LoraModel.of(config, open_weights(path))
    return Engine(config, lora_model.hf_config, device, lora_model=lora_model)


def _engine_passes(engine: Engine, arrays: Arrays, lr: float) -> Passes:
    feed = InOrder(engine.config.parallel, seed=0)

    def run(batches: Sequence[Batch]) -> Pass:
        engine.optimizer.state.clear()
        losses: list[float] = []
        start = time.perf_counter()
        for batch in batches:
            if len(losses) == 1:
                start = time.perf_counter()
            (made,) = feed.step(arrays, batch[0] // len(batch), 0)
            losses.append(engine.train_step(iter([torch.from_numpy(made["pack"])]), lr))
        return Pass(time.perf_counter() - start, losses)

    return run


def _from_start(passes: Passes, trained: Any, start: dict[str, Tensor]) -> Passes:
    """The same passes, each from the same adapters."""
    assert set(trained) == set(start)

    def run(batches: Sequence[Batch]) -> Pass:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(start[name])
        return passes(batches)

    return run


def _peak(passes: Passes, batches: Sequence[Batch]) -> int:
    """Peak of live tensor bytes of this process in the second of two steps: the first creates the optimizer state."""
    return counted_peak(lambda: passes(batches))[1]
