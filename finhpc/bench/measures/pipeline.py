"""`finhpc bench pipeline`: a pipeline of stages compared with one process that does the same work.

For each number of micro-batches M, whole training steps of one process with one stage and of the pipeline are measured
in turn, with the same threads per process. Utilization is the one-stage time divided by stages x the pipeline's time;
without any overhead it is M/(N+M-1). No Ray. Processes that are not measured wait for a message.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from finhpc.bench.report import Row, publish
from finhpc.bench.settings import PipelineBench
from finhpc.bench.timing import in_turn, median_ratio, spread
from finhpc.errors import ConfigError, TrainingFailedError
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig

log = logging.getLogger(__name__)

LR = 1e-4


def bench_pipeline(settings: PipelineBench) -> dict[str, Any]:
    """Measure and publish; `ratios`: `utilization_over_ideal` at M=8, or at the largest M measured below it.

    Raises `ConfigError` if the model cannot be cut or there are too few GPUs, `TrainingFailedError` if a process
    dies.
    """
    began = time.perf_counter()
    stages, cuda = settings.stages, _cuda(settings)
    with ExitStack() as stack:
        log.info(f"starting one process, and {stages} for the pipeline; then {settings.bench.repeats} pairs for each M")
        one = stack.enter_context(group(1, settings.resources.threads, cuda))
        pipeline = stack.enter_context(group(stages, settings.resources.threads, cuda))
        ask(one, ("build", run_config(settings, 1), None))
        cut, counted = ask(pipeline, ("build", run_config(settings, stages), "measured"))[0]
        log.info(f"stages cut by measured cost: {cut}")
        rows, loads = [], {}
        for m in settings.micro_batches:
            rows.append(_row(settings, "measured cost", m, one, pipeline))
            loads[m] = rows[-1]
        shown = max((m for m in settings.micro_batches if m <= 8), default=min(settings.micro_batches))
        if settings.counted and cut.borders != counted:
            ask(pipeline, ("build", run_config(settings, stages), counted))
            rows.append(_row(settings, "counted operations", shown, one, pipeline))
    conditions = {
        "model": settings.model.preset,
        "method": settings.method.kind,
        "stages": stages,
        "cut": str(cut),
        "precision": f"{settings.precision}, float32 weights, gradients and AdamW moments",
        "micro_batch": f"{settings.micro_batch_size} x {settings.seq_len} tokens, no padding",
        "threads_a_process": settings.resources.threads,
        "exchange": "nccl" if cuda else "gloo",
        "ray": False,
        "step": "forward, backward, clipping, fused AdamW",
        "ratio_at_micro_batches": shown,
    }
    ratios = {"utilization_over_ideal": loads[shown]["over_ideal"]}
    result = publish("pipeline", settings.bench.out, conditions, rows, ratios, began)
    _picture(rows, stages, Path(result["folder"]) / "pipeline.png")
    return result


def run_config(settings: PipelineBench, stages: int) -> PretrainConfig:
    """The run that is measured, in so many stages."""
    return build(
        PretrainConfig,
        {
            "model": settings.model.model_dump() | {"vocab_size": settings.model.vocab_size or 50_257},
            "method": settings.method.model_dump(),
            "data": {"seq_len": settings.seq_len},
            "optimizer": {"lr": LR, "warmup_steps": 0, "min_lr_ratio": 1.0},
            "parallel": {"stages": stages, "micro_batch_size": settings.micro_batch_size, "micro_batches": 8},
            "train": {"precision": settings.precision},
            "resources": settings.resources.model_dump(),
        },
    )


def _row(settings: PipelineBench, name: str, m: int, one: Group, pipeline: Group) -> Row:
    stages, busy = settings.stages, []

    def pipelined() -> float:
        answers = ask(pipeline, ("step", m, None))
        busy.append([seconds for _, seconds in answers])
        return float(answers[0][0])

    for processes in (one, pipeline):
        ask(processes, ("step", min(m, 2), None))  # warms up
    walls = in_turn(
        {"one": lambda: float(ask(one, ("step", m, None))[0][0]), "pipe": pipelined}, settings.bench.repeats
    )
    utilization, ideal = median_ratio(walls["one"], walls["pipe"]) / stages, m / (stages + m - 1)
    busiest = [statistics.median(pair[i] for pair in busy) for i in range(stages)]
    log.info(f"{name}, M={m}: utilization {utilization:.3f} of ideal {ideal:.3f}")
    return {
        "cut": name,
        "micro_batches": m,
        "one_stage_s": statistics.median(walls["one"]),
        "pipeline_s": statistics.median(walls["pipe"]),
        "utilization": utilization,
        "ideal": ideal,
        "over_ideal": utilization / ideal,
        "busy_s": " ".join(f"{seconds:.2f}" for seconds in busiest),
        "spread": spread(walls["pipe"]),
    }


# -- processes ------------------------------------------------------------------------------

Group = list[tuple[Any, Connection]]  # (process, its pipe) by rank


@contextmanager
def group(size: int, threads: int, cuda: bool) -> Iterator[Group]:
    """Processes that form a torch process group and do what `ask` tells them."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    members: Group = []
    try:
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, port, threads, cuda), daemon=True)
            process.start()
            theirs.close()
            members.append((process, ours))
        yield members
    finally:
        for process, pipe in members:
            pipe.close()
            process.kill()
            process.join()


def ask(members: Group, message: tuple[Any, ...]) -> list[Any]:
    """Every member's answer, in rank order. Raises `TrainingFailedError` if one ends without an answer."""
    try:
        for _, pipe in members:
            pipe.send(message)
        return [pipe.recv() for _, pipe in members]
    except (EOFError, OSError):
        raise TrainingFailedError("a process of the bench died; its error stands above.") from None


def _serve(pipe: Connection, rank: int, size: int, port: int, threads: int, cuda: bool) -> None:
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["DS_ACCELERATOR"] = "cuda" if cuda else "cpu"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=size)
    engine: Any = None
    while True:
        try:
            what, value, borders = pipe.recv()
        except EOFError:
            return
        if what == "build":
            engine = None
            engine, answer = _build(value, borders, device)
            pipe.send(answer)
        else:
            pipe.send(_step(engine, int(value)))


def _build(config: PretrainConfig, borders: Any, device: Any) -> tuple[Any, Any]:
    from finhpc.lowrank.replace import ranks_of
    from finhpc.models.families.registry import make_config, resolve_shape, skeleton
    from finhpc.models.pipeline import estimated_costs, parts_of, stage_borders
    from finhpc.training.engine import Engine
    from finhpc.training.stages import measured_cut

    hf_config = make_config(resolve_shape(config.model, None), ranks_of(config.method), config.method.kind)
    cut = measured_cut(config, hf_config, device) if borders == "measured" else None
    row = parts_of(hf_config, config.train.recompute)
    costs = estimated_costs(row, skeleton(hf_config), config.data.seq_len)
    counted = stage_borders(row, costs, config.parallel.stages)
    return Engine(config, hf_config, device, cut.borders if cut else borders), (cut, counted)


def _step(engine: Any, micro_batches: int) -> tuple[float, float]:
    """(seconds of one train step of all processes, seconds this one spent in passes)."""
    import torch
    import torch.distributed as dist

    size, seq_len = engine.config.parallel.micro_batch_size, engine.config.data.seq_len
    draw = torch.Generator().manual_seed(engine.step)
    vocab = engine.hf_config.vocab_size
    batches = [torch.randint(0, vocab, (size, seq_len), generator=draw) for _ in range(micro_batches)]
    engine.pipe.set_train_batch_size(size * micro_batches)
    engine.take_times()
    dist.barrier()
    start = time.perf_counter()
    engine.train_step(iter(batches), LR)
    dist.barrier()
    return time.perf_counter() - start, engine.take_times()[0]


def _cuda(settings: PipelineBench) -> bool:
    """Whether to measure on GPUs; raises `ConfigError` if there are too few, or too few blocks for the stages."""
    import torch

    from finhpc.models.families.registry import resolve_shape

    asked, gpus = settings.resources.device, torch.cuda.device_count()
    if asked == "cuda" and gpus < settings.stages:
        raise ConfigError(f"stages={settings.stages} needs as many GPUs, {gpus} are there; use resources.device=cpu.")
    layers = int(resolve_shape(run_config(settings, 1).model, None).layers)
    if settings.stages > layers:
        raise ConfigError(f"stages={settings.stages} does not fit {layers} transformer blocks; use 2 to {layers}.")
    return asked != "cpu" and gpus >= settings.stages


def _picture(rows: list[Row], stages: int, file: Path) -> None:
    """Utilization over the number of micro-batches, measured and by the formula."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    most = max(row["micro_batches"] for row in rows)
    ms = list(range(1, most + 1))
    axes.plot(ms, [m / (stages + m - 1) for m in ms], "k--", label=f"M/({stages}+M-1)")
    for name in dict.fromkeys(row["cut"] for row in rows):
        mine = sorted((row["micro_batches"], row["utilization"]) for row in rows if row["cut"] == name)
        axes.plot([m for m, _ in mine], [u for _, u in mine], "o-", label=f"cut by {name}")
    axes.set(xlabel="micro-batches M", ylabel="utilization", ylim=(0, 1.05), title=f"{stages} stages")
    axes.legend()
    figure.savefig(file, dpi=150)
