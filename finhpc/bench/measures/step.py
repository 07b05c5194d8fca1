"""`finhpc bench step`: what one training step asks of a GPU, counted without one, compared with a plain loop.

The engine of every run takes a whole step (forward, backward, clipping, optimizer) on a pretended GPU, see
`finhpc.bench.pretend_gpu`; so does the plain loop over the same model with transformers, and with peft for a
finetuning. The second step is counted, in which the optimizer's state exists. Nothing is computed or timed, so a model
of any size takes seconds and no memory.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from finhpc.bench.compiled_counts import Kernels, Key, as_graphs, count_kernels
from finhpc.bench.counts import INPUTS, CountingMode, Counts, counting
from finhpc.bench.measures.train import one_process_group
from finhpc.bench.plain.finetune import padded, plain_step, random_base, with_adapters
from finhpc.bench.plain.pretrain import model_step
from finhpc.bench.pretend_gpu import CUDA, pretended_gpu
from finhpc.bench.profile import KINDS, REST
from finhpc.bench.report import Row, publish
from finhpc.bench.settings import FinetuneStepBench, StepBench
from finhpc.commands.estimate.finetuning import planned_base
from finhpc.data.examples.batches import Batches
from finhpc.data.examples.examples import Arrays
from finhpc.errors import ConfigError, collect
from finhpc.models.families.registry import with_blocks
from finhpc.models.lora.model import LoraModel, Matrix
from finhpc.planning.fake_packs import EmptyLoraModel, Shapes
from finhpc.planning.model import hf_config_of_settings
from finhpc.planning.plan import check_registered
from finhpc.quantization.frozen import FrozenLinear
from finhpc.training.compiler import check_compiler, missing_compiler
from finhpc.training.engine import Engine
from finhpc.training.metrics import Metrics

log = logging.getLogger(__name__)

OURS, PLAIN, COMPILED = "finhpc", "plain loop", "finhpc, compiled"
SHORT = "ours", "plain"
LR = 1e-4
C = TypeVar("C", StepBench, FinetuneStepBench)


def bench_step(settings: StepBench) -> dict[str, Any]:
    """Count a step of a pretraining and publish; `ratios`: `launches_over_plain`, `kept_over_plain`,
    `moved_over_plain`.

    `kinds` has launches and bytes by kind of operation, `waits` each place where the host waits for the device.
    Raises `ConfigError` for settings that cannot work.
    """
    began = time.perf_counter()
    config, hf_config = _checked(settings, hf_config_of_settings)
    parallel, length = config.parallel, config.data.seq_len
    tokens = [torch.zeros(parallel.micro_batch_size, length, dtype=torch.int64)] * parallel.micro_batches
    with pretended() as mode:
        engine = Engine(config, hf_config, CUDA, fill=lambda module, name: None)
        ours = second(mode, _steps(engine, lambda: iter(tokens)), engine.layers)
        model, step = model_step(config, hf_config, CUDA)
        theirs = second(mode, lambda: step(torch.cat(tokens), LR), [model])
    conditions = {
        "model": config.model.preset or str(config.model.path),
        "method": config.method.kind,
        "batch": f"{parallel.micro_batches} x {parallel.micro_batch_size} x {length} tokens",
        "precision": config.train.precision,
        "plain": "transformers' own forward pass over the same modules; fused AdamW",
    }
    return _publish(config.bench.out, conditions, {OURS: ours, PLAIN: theirs}, began)


def bench_step_finetune(settings: FinetuneStepBench) -> dict[str, Any]:
    """Count a step of a finetuning and publish, see `bench_step`; only the base's config is read."""
    began = time.perf_counter()
    config, base = _checked(settings, lambda config: planned_base(config.model))
    train = config.train
    model_of = Shapes(base.config), config.lora, config.quantization, train.precision == "bf16", train.recompute
    lora_model = _OnDevice(*model_of)
    arrays = counted_arrays(config)
    feed = Batches(config.parallel, config.train.seed, not config.lora.dropout)
    steps = [feed.step(arrays, step, 0) for step in range(2)]

    def made_packs() -> Iterator[Tensor]:
        return iter([torch.from_numpy(batch["pack"]) for batches in steps for batch in batches])

    packs = made_packs()
    rows = iter([[padded([arrays.example(int(i)) for i in b["sample"]], 0) for b in batches] for batches in steps])
    kernels = _kernels(settings, base.config, steps[0][0]["pack"]) if _counts_compiled(settings) else {}
    with pretended() as mode:
        engine = Engine(config, base.config, CUDA, lora_model=lora_model)
        ways = {OURS: second(mode, _steps(engine, lambda: packs), engine.layers)}
        model = with_adapters(random_base(base.config, config.quantization.bits, CUDA), config.lora.rank)
        plain = plain_step(model, LR)
        ways[PLAIN] = second(mode, lambda: plain(next(rows)), [model])
        if kernels:
            packs, lora_model = made_packs(), _OnDevice(*model_of)
            with as_graphs(mode, kernels):
                engine = Engine(config, base.config, CUDA, lora_model=lora_model)
            ways[COMPILED] = second(mode, _steps(engine, lambda: packs), engine.layers)
    work = config.bench
    conditions = {
        "model": config.model.preset or str(config.model.path),
        "adapters": f"rank {config.lora.rank}",
        "base": f"{config.quantization.bits} bits",
        "examples": f"{config.parallel.samples_per_step} of {-(-work.tokens // 2)} to {work.tokens} tokens, "
        f"{work.shared} of them shared, {work.answer} of the answer",
        "precision": config.train.precision,
        "plain": "transformers and peft, padded batches, bfloat16, AdamW without clipping",
    }
    return _publish(work.out, conditions, ways, began)


def _counts_compiled(config: FinetuneStepBench) -> bool:
    """Return whether compiled graphs are counted too; logs why not."""
    check_compiler(config.train.compile, "cpu")
    missing = missing_compiler("cpu")
    why = missing and f"{missing} is missing"
    if config.quantization.bits < 16:
        why = "a base below 16 bits runs other operations on a CPU than on a GPU"
    if config.train.compile != "off" and why:
        log.info(f"compiled steps are not counted: {why}.")
    return config.train.compile != "off" and why is None


def _kernels(config: FinetuneStepBench, hf_config: Any, pack: Any) -> dict[Key, Kernels]:
    """The kernels of the compiled graphs, from a step of two blocks of the model on the CPU."""
    log.info("compiling two blocks for the CPU, to count the kernels of their graphs")
    config, cpu, small = alone(config), torch.device("cpu"), with_blocks(hf_config, 2)
    config.parallel = config.parallel.model_copy(update={"micro_batches": 1})
    config.train = config.train.model_copy(update={"compile": "on"})
    one_process_group(cpu)

    def step() -> None:
        engine = Engine(config, small, cpu, lora_model=LoraModel.of(config, RandomBase(small, cpu)))
        engine.train_step(iter([torch.from_numpy(pack)]), LR)

    return count_kernels(step)


def _checked(settings: C, model_of: Callable[[C], Any]) -> tuple[C, Any]:
    """Return the run on one GPU, and its model; raises `ConfigError` with all that is wrong in them."""
    config = alone(settings)
    problems, model = config.problems(), None
    with collect(problems):
        check_registered(config)
    with collect(problems):
        model = model_of(config)
    if problems:
        raise ConfigError(problems)
    return config, model


def alone(config: C) -> C:
    """The same run on one GPU, with as many micro-batches, not compiled."""
    config = config.model_copy(deep=True)
    config.parallel = config.parallel.model_copy(update={"stages": 1, "replicas": 1, "global_batch_size": None})
    config.train = config.train.model_copy(update={"compile": "off"})
    return config


class _OnDevice(EmptyLoraModel):
    """A LoRA model without content, on the device that it is built for."""

    def _frozen(self, matrix: Matrix, bias: Tensor | None, device: torch.device) -> FrozenLinear:
        with device:
            return super()._frozen(matrix, bias, device)


class RandomBase(Shapes):
    """A base of random weights, made on the device when they are read."""

    def __init__(self, hf_config: Any, device: torch.device) -> None:
        super().__init__(hf_config)
        self.device = device

    def read(self, name: str) -> Tensor:
        values = torch.empty(self.shapes[name], device=self.device)
        return values.fill_(1.0) if len(self.shapes[name]) < 2 else values.normal_(0, 0.02)


def counted_arrays(config: FinetuneStepBench, steps: int = 2) -> Arrays:
    """Examples for some steps, from half of `bench.tokens` long to all, of which the first `bench.shared` are equal."""
    work, count = config.bench, steps * config.parallel.samples_per_step
    lengths = np.linspace((work.tokens + 1) // 2, work.tokens, count).astype(np.int64)
    draw = np.random.default_rng(0)
    tokens, answers = [], []
    for length in lengths.tolist():
        own = draw.integers(1, 100, length, dtype=np.int32)
        own[: work.shared] = 1
        tokens.append(own)
        answers.append(np.arange(length) >= length - work.answer)
    return Arrays(np.concatenate(tokens), np.cumsum([0, *lengths]), np.concatenate(answers), np.zeros(count, np.int32))


@contextmanager
def pretended() -> Iterator[CountingMode]:
    """A pretended GPU, which DeepSpeed takes for its own too."""
    one_process_group(torch.device("cpu"))
    from deepspeed.accelerator import get_accelerator

    accelerator = patch.object(get_accelerator(), "device_name", lambda *_: str(CUDA))
    with pretended_gpu(), accelerator, counting() as mode:
        yield mode


def _steps(engine: Engine, inputs: Callable[[], Iterator[Tensor]]) -> Callable[[], None]:
    """Steps as a run takes them: the metrics of one are read after the next was launched."""
    unread: list[Metrics] = []

    def step() -> None:
        unread.append(engine.start_step(inputs(), LR))
        if len(unread) > 1:
            unread.pop(0).read()

    return step


def second(mode: CountingMode, step: Callable[[], object], modules: Sequence[nn.Module]) -> Counts:
    """The counts of the second of two steps of `modules`."""
    step()
    return mode.count(step, [x for module in modules for x in (*module.parameters(), *module.buffers())])


def _publish(out: str, conditions: Row, ways: dict[str, Counts], began: float) -> dict[str, Any]:
    compiled = ways.pop(COMPILED, None)
    ours, plain = ways[OURS], ways[PLAIN]
    rows: list[Row] = [{"way": name} | counts.row() for name, counts in ways.items()]
    if compiled is not None:  # what a graph keeps and moves is not known
        counted = {key: value for key, value in compiled.row().items() if key in ("launches", "synchronizations")}
        rows.append({key: counted.get(key) for key in rows[0]} | {"way": COMPILED})
    ratios = {
        "launches_over_plain": ours.launches.total() / plain.launches.total(),
        "kept_over_plain": ours.kept.total() / plain.kept.total(),
        "moved_over_plain": ours.moved.total() / plain.moved.total(),
    }
    if compiled is not None:
        ratios["compiled_launches_over_plain"] = compiled.launches.total() / plain.launches.total()
    kinds = [
        kind for kind in (*KINDS, REST, INPUTS) if any(kind in c.launches or kind in c.kept for c in ways.values())
    ]
    by_kind = [
        {"kind": kind}
        | {f"launches_{short}": counts.launches[kind] for short, counts in zip(SHORT, ways.values(), strict=True)}
        | {f"moved_{short}_bytes": counts.moved[kind] for short, counts in zip(SHORT, ways.values(), strict=True)}
        | {f"kept_{short}_bytes": counts.kept[kind] for short, counts in zip(SHORT, ways.values(), strict=True)}
        for kind in kinds
    ]
    waits = [
        {"way": name, "waits for": what, "times": times}
        for name, counts in ways.items()
        for what, times in counts.waits.most_common()
    ]
    if compiled is not None:
        ways |= {COMPILED: compiled}
    operations = {name: dict(counts.operations.most_common()) for name, counts in ways.items()}
    conditions |= {"device": "a pretended GPU", "step": "forward, backward, clipping, optimizer; the second of a run"}
    return publish(
        "step",
        out,
        conditions,
        rows,
        ratios,
        began,
        kinds=by_kind,
        waits=waits or [{"way": "-"}],
        operations=operations,
    )
