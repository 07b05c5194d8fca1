"""The function that every worker process of a run executes: `train_worker`."""

from __future__ import annotations

import errno
import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finhpc.errors import CheckpointError, FinhpcError, NonFiniteError, OutOfMemoryError
from finhpc.files import write_json
from finhpc.training.workers import stop

if TYPE_CHECKING:
    from finhpc.training.trainer import Trainer

FATAL = "fatal.json"  # an error that a restart would only repeat; a worker writes it, the driver reads it
RESERVE = ".room"  # space on the disk, freed to write that file when the disk is full
RESERVE_BYTES = 256 * 1024
MEMORY = "out-of-memory.json"  # the step in which memory ran out in an earlier start
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


OnEval = Callable[[dict[str, Any]], None]


def train_worker(arguments: dict[str, Any], on_eval: OnEval | None = None) -> None:
    """Run one worker from its start to its end.

    `arguments`: `job_class`, a subclass of `finhpc.runs.job.Job`; `config`, its settings as a dict; `folder`; `cuda`;
    `fingerprint` of the run's data; `driver` (`finhpc.cluster.package.Driver`). `on_eval` receives the record of
    each evaluation except the last, and may end the training by raising. An error that a restart would only repeat
    is written to `fatal.json`; a worker that finds this file, or a request to stop, returns at once, so that Ray Train
    does not try again.
    """
    folder = Path(arguments["folder"])
    if (folder / FATAL).exists() or stop.is_requested(folder):
        return
    try:
        arguments["driver"].enter()
        _train(arguments, folder, on_eval)
    except NonFiniteError as error:  # raised by all workers alike: all end, none hangs
        _fatal(folder, error)
    except FinhpcError as error:  # perhaps by one worker alone: Ray Train must end the others
        _fatal(folder, error)
        raise
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        full = CheckpointError(
            f"{error.filename or folder} could not be written ({error.strerror}); make room on that disk and run the "
            "same command again. What was complete is untouched."
        )
        _fatal(folder, full)
        raise full from error


def use_model(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return what the job's `use_model` returns; `arguments` are those of `train_worker`."""
    import torch

    gc.collect()  # a trainer refers to itself; if this process had one, its memory is needed now
    if arguments["cuda"]:
        torch.cuda.empty_cache()
    torch.set_num_threads(arguments["config"]["resources"]["threads"])
    device = torch.device("cuda" if arguments["cuda"] else "cpu")
    results: dict[str, Any] = arguments["job_class"].use_model(arguments["config"], Path(arguments["folder"]), device)
    return results


def _train(arguments: dict[str, Any], folder: Path, on_eval: OnEval | None) -> None:
    cuda = arguments["cuda"]
    os.environ["DS_ACCELERATOR"] = "cuda" if cuda else "cpu"
    import ray.train.torch
    import torch

    from finhpc.training.memory import is_out_of_memory

    device = ray.train.torch.get_device() if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("highest")
    trainer = arguments["job_class"].trainer(arguments["config"], folder, device, arguments["fingerprint"])
    trainer.on_eval = on_eval
    torch.set_num_threads(trainer.config.resources.threads)
    try:
        trainer.run()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        ran_out = OutOfMemoryError(
            f"memory ran out on worker {trainer.world_rank} in step {trainer.step + 1}: {_line(error)}"
        )
        if _repeats(folder, trainer):
            raise ran_out from error  # fatal
        raise RuntimeError(str(ran_out)) from error  # perhaps something else filled the machine: once more


def _repeats(folder: Path, trainer: Trainer) -> bool:
    """Whether a new start would only run out of memory again.

    So it is in the first step after a start, and in a step at which an earlier start ended already.
    """
    if trainer.step <= trainer.resumed_from:
        return True
    try:
        before = json.loads((folder / MEMORY).read_text())
    except (OSError, ValueError):
        before = {}
    if before and before["attempt"] != trainer.attempt and before["step"] == trainer.step:
        return True
    write_json(folder / MEMORY, {"step": trainer.step, "attempt": trainer.attempt})
    return False


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _fatal(folder: Path, error: FinhpcError) -> None:
    (folder / RESERVE).unlink(missing_ok=True)
    write_json(folder / FATAL, {"error": type(error).__name__, "message": str(error)})
