"""`finhpc bench pipeline`: pipelines of stages compared with one process that does the same work.

For each number of micro-batches M, whole training steps of one process with one stage and of a pipeline per schedule
are measured in turn, with the same threads per process. Utilization is the one-stage time divided by stages x the
pipeline's time; it is compared with the paper's M/(N+M-1), which 1f1b would reach without any overhead. No Ray.
Processes that are not measured wait for a message.
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
from functools import partial
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
LEAST = {"1f1b": 0, "dualpipev": 2}  # micro-batches per stage that a schedule needs
RATIOS = {"1f1b": "utilization_over_ideal", "dualpipev": "dualpipev_over_ideal"}


def bench_pipeline(settings: PipelineBench) -> dict[str, Any]:
    """Measure and publish; `ratios`: `utilization_over_ideal` of each schedule at M=8, or the largest M below it.

    That of dualpipev is called `dualpipev_over_ideal`. Raises `ConfigError` if the model cannot be cut or there are too
    few GPUs or micro-batches, `TrainingFailedError` if a process dies.
    """
    began = time.perf_counter()
    stages, cuda = settings.stages, _cuda(settings)
    with ExitStack() as stack:
        threads, schedules = settings.resources.threads, list(dict.fromkeys(settings.schedules))
        log.info(f"starting one process, and {stages} for each schedule; then {settings.bench.repeats} rounds per M")
        one = stack.enter_context(group(1, threads, cuda))
        ask(one, ("build", run_config(settings, 1), None))
        pipelines: dict[str, Group] = {
            schedule: stack.enter_context(group(stages, threads, cuda)) for schedule in schedules
        }
        cuts = {}
        for schedule, members in pipelines.items():
            cuts[schedule], counted = ask(members, ("build", run_config(settings, stages, schedule), "measured"))[0]
            log.info(f"{schedule}: stages cut by measured cost: {cuts[schedule]}")
        rows: list[Row] = []
        for m in settings.micro_batches:
            possible = {name: members for name, members in pipelines.items() if m >= LEAST[name] * stages}
            rows += _rows(settings, "measured cost", m, one, possible)
        shown = {name: _shown(settings, name) for name in pipelines}
        if settings.counted and "1f1b" in cuts and cuts["1f1b"].borders != counted:
            ask(pipelines["1f1b"], ("build", run_config(settings, stages), counted))
            rows += _rows(settings, "counted operations", shown["1f1b"], one, {"1f1b": pipelines["1f1b"]})
    conditions = {
        "model": settings.model.preset,
        "method": settings.method.kind,
        "stages": stages,
        "cut": " / ".join(f"{schedule}: {cut}" for schedule, cut in cuts.items()),
        "precision": f"{settings.precision}, float32 weights, gradients and AdamW moments",
        "micro_batch": f"{settings.micro_batch_size} x {settings.seq_len} tokens, no padding",
        "threads_a_process": settings.resources.threads,
        "exchange": "nccl" if cuda else "gloo",
        "ray": False,
        "step": "forward, backward, clipping, fused AdamW",
        "ratio_at_micro_batches": shown,
    }
    ratios = {
        RATIOS[row["schedule"]]: row["over_ideal"]
        for row in rows
        if (row["cut"], row["micro_batches"]) == ("measured cost", shown[row["schedule"]])
    }
    columns = "schedule", "cut", "micro_batches", "pipeline_s", "utilization", "over_ideal"
    result = publish("pipeline", settings.bench.out, conditions, rows, ratios, began, columns)
    _picture(rows, stages, Path(result["folder"]) / "pipeline.png")
    return result


def _shown(settings: PipelineBench, schedule: str) -> int:
    """The number of micro-batches whose ratio is reported."""
    possible = [m for m in settings.micro_batches if m >= LEAST[schedule] * settings.stages]
    return max((m for m in possible if m <= 8), default=min(possible))


def run_config(settings: PipelineBench, stages: int, schedule: str = "1f1b") -> PretrainConfig:
    """The run that is measured, in so many stages."""
    return build(
        PretrainConfig,
        {
            "model": settings.model.model_dump() | {"vocab_size": settings.model.vocab_size or 50_257},
            "method": settings.method.model_dump(),
            "data": {"seq_len": settings.seq_len},
            "optimizer": {"lr": LR, "warmup_steps": 0, "min_lr_ratio": 1.0},
            "parallel": {
                "stages": stages,
                "micro_batch_size": settings.micro_batch_size,
                "micro_batches": _shown(settings, schedule),
                "schedule": schedule,
            },
            "train": {"precision": settings.precision},
            "resources": settings.resources.model_dump(),
        },
    )


def _rows(settings: PipelineBench, name: str, m: int, one: Group, pipelines: dict[str, Group]) -> list[Row]:
    """A row for each schedule, measured in turn with one stage."""
    stages = settings.stages
    busy: dict[str, list[list[float]]] = {schedule: [] for schedule in pipelines}

    def pipelined(schedule: str) -> float:
        answers = ask(pipelines[schedule], ("step", m, None))
        busy[schedule].append([seconds for _, seconds in answers])
        return float(answers[0][0])

    for schedule, processes in {"one": one, **pipelines}.items():
        ask(processes, ("step", max(LEAST.get(schedule, 0) * stages, min(m, 2)), None))  # warms up
    ways = {schedule: partial(pipelined, schedule) for schedule in pipelines}
    walls = in_turn({"one": lambda: float(ask(one, ("step", m, None))[0][0]), **ways}, settings.bench.repeats)
    rows, ideal = [], m / (stages + m - 1)
    for schedule in pipelines:
        utilization = median_ratio(walls["one"], walls[schedule]) / stages
        busiest = [statistics.median(pair[i] for pair in busy[schedule]) for i in range(stages)]
        log.info(f"{schedule}, {name}, M={m}: utilization {utilization:.3f} of ideal {ideal:.3f}")
        rows.append(
            {
                "schedule": schedule,
                "cut": name,
                "micro_batches": m,
                "one_stage_s": statistics.median(walls["one"]),
                "pipeline_s": statistics.median(walls[schedule]),
                "utilization": utilization,
                "ideal": ideal,
                "over_ideal": utilization / ideal,
                "busy_s": " ".join(f"{seconds:.2f}" for seconds in busiest),
                "spread": spread(walls[schedule]),
            }
        )
    return rows


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
    counted = stage_borders(row, costs, config.parallel.stages)  # for 1f1b
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
    most = max(settings.micro_batches)
    if "dualpipev" in settings.schedules and most < 2 * settings.stages:
        raise ConfigError(
            f"schedules=dualpipev needs 2 x stages = {2 * settings.stages} micro-batches or more, but the largest of "
            f"micro_batches is {most}; add a larger one, or use schedules=1f1b."
        )
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
    for way in dict.fromkeys((row["schedule"], row["cut"]) for row in rows):
        mine = [row for row in rows if (row["schedule"], row["cut"]) == way]
        points = sorted((row["micro_batches"], row["utilization"]) for row in mine)
        axes.plot([m for m, _ in points], [u for _, u in points], "o-", label=f"{way[0]}, cut by {way[1]}")
    axes.set(xlabel="micro-batches M", ylabel="utilization", ylim=(0, 1.05), title=f"{stages} stages")
    axes.legend()
    figure.savefig(file, dpi=150)
