"""What a Ray Train worker runs: the training room's worker, with its data read by Ray Data."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finhpc.config import FinetuneConfig, PretrainConfig
from finhpc.errors import CheckpointError, FinhpcError, NonFiniteError, OutOfMemoryError
from finhpc.training.checkpoint import write_json

if TYPE_CHECKING:
    import torch

    from finhpc.training.loop import Worker

FATAL = "fatal.json"  # a failure that a restart would only repeat; written by a worker, read by the driver
ROOM = ".room"  # a reserve on the disk, given up to write that file when the disk is full
ROOM_BYTES = 256 * 1024
MEMORY = "out-of-memory.json"  # the step at which memory ran out in an earlier start
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


OnEval = Callable[[dict[str, Any]], None]


def train_worker(arguments: dict[str, Any], on_eval: OnEval | None = None) -> None:
    """One worker's whole life. `arguments`: verb, config (a dict), folder, cuda, fingerprint (of the run's data),
    driver (`finhpc.package.Driver`).

    `on_eval` is told of each evaluation but the last, and may end the training by raising. A failure of the
    user's making is written to `fatal.json`; a worker that finds one ends at once, so that Ray Train does not
    repeat it.
    """
    folder = Path(arguments["folder"])
    if (folder / FATAL).exists():
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
        if error.errno not in NO_ROOM:
            raise
        full = CheckpointError(
            f"{error.filename or folder} could not be written ({error.strerror}); make room on that disk and run the "
            "same command again. What was complete is untouched."
        )
        _fatal(folder, full)
        raise full from error


def _train(arguments: dict[str, Any], folder: Path, on_eval: OnEval | None) -> None:
    cuda, fingerprint = arguments["cuda"], arguments["fingerprint"]
    os.environ["DS_ACCELERATOR"] = "cuda" if cuda else "cpu"
    import ray.train.torch
    import torch

    from finhpc.training.memory import is_out_of_memory

    device = ray.train.torch.get_device() if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("highest")
    make = {"pretrain": _pretrainer, "finetune": _finetuner}[arguments["verb"]]
    worker = make(arguments["config"], folder, device, fingerprint)
    worker.on_eval = on_eval
    torch.set_num_threads(worker.config.resources.threads)
    try:
        worker.run()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        ran_out = OutOfMemoryError(f"memory ran out on worker {worker.rank} in step {worker.step + 1}: {_line(error)}")
        if _repeats(folder, worker):
            raise ran_out from error  # fatal
        raise RuntimeError(str(ran_out)) from error  # perhaps something else filled the machine: once more


def _pretrainer(settings: dict[str, Any], folder: Path, device: torch.device, fingerprint: str) -> Worker:
    from finhpc.data.reading import ReplicaStream
    from finhpc.data.shards import Shards
    from finhpc.data.stream import ray_stream
    from finhpc.orchestration.plan import hf_config_of
    from finhpc.orchestration.start import fill_of
    from finhpc.training.feed import Blocks
    from finhpc.training.journal import WORKER_FILE
    from finhpc.training.loop import Worker

    config = PretrainConfig.model_validate(settings)
    shards = Shards.open(str(config.data.shards))
    shards.check_same(fingerprint)  # a restarted worker may find another folder than the run began with

    def open_stream(first_step: int, replica: int) -> Iterator[dict[str, Any]]:
        # Made here, not handed to the trainer: only now is it known at which step the run goes on.
        stream = ReplicaStream(
            shards=shards,
            seq_len=config.data.seq_len,
            seed=config.train.seed,
            start_step=first_step,
            stop_step=config.train.steps,
            samples_per_step=config.parallel.samples_per_step,
            micro_batch_size=config.parallel.micro_batch_size,
            replica=replica,
            replicas=config.parallel.replicas,
        )
        return ray_stream(stream)

    hf_config = hf_config_of(config, shards)
    return Worker(
        config=config,
        hf_config=hf_config,
        fill=fill_of(config, hf_config, folder),
        device=device,
        folder=folder,
        journal_path=folder / WORKER_FILE,
        feed=Blocks(config.parallel, open_stream, shards.eval_samples(config.data.eval_samples, config.data.seq_len)),
        labels={"tokenizer_sha256": shards.manifest.tokenizer_sha256, "dataset": shards.manifest.fingerprint},
    )


def _finetuner(settings: dict[str, Any], folder: Path, device: torch.device, fingerprint: str) -> Worker:
    from finhpc.models.adapted import Adaptation
    from finhpc.orchestration.finetune import QUANTIZED, batches_of, open_base, open_examples
    from finhpc.training.feed import Packs
    from finhpc.training.journal import WORKER_FILE
    from finhpc.training.loop import Worker

    config = FinetuneConfig.model_validate(settings)
    weights = open_base(config)
    quantized = folder / QUANTIZED
    return Worker(
        config=config,
        hf_config=weights.config,
        fill=None,
        device=device,
        folder=folder,
        journal_path=folder / WORKER_FILE,
        feed=Packs(open_examples(folder, fingerprint), batches_of(config), config.data.eval_limit),
        adapt=Adaptation.of(config, weights, quantized if quantized.is_dir() else None),
        labels={"dataset": fingerprint},
    )


def _repeats(folder: Path, worker: Worker) -> bool:
    """Whether a new start would only run out of memory again.

    So it is in the first step after a start, and in a step at which an earlier start ended already.
    """
    if worker.step <= worker.resumed_from:
        return True
    try:
        before = json.loads((folder / MEMORY).read_text())
    except (OSError, ValueError):
        before = {}
    if before and before["attempt"] != worker.attempt and before["step"] == worker.step:
        return True
    write_json(folder / MEMORY, {"step": worker.step, "attempt": worker.attempt})
    return False


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _fatal(folder: Path, error: FinhpcError) -> None:
    (folder / ROOM).unlink(missing_ok=True)
    write_json(folder / FATAL, {"error": type(error).__name__, "message": str(error)})
