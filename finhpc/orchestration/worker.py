"""What a Ray Train worker runs: the training room's worker, with its data read by Ray Data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finhpc.config import PretrainConfig
from finhpc.errors import FinhpcError, NonFiniteError
from finhpc.training.checkpoint import write_json

FATAL = "fatal.json"  # a failure that a restart would only repeat; written by a worker, read by the driver


def train_worker(arguments: dict[str, Any]) -> None:
    """One worker's whole life. `arguments`: config (a dict), folder, cuda.

    A failure of the user's making is written to `fatal.json`; a worker that finds one ends at once,
    so that Ray Train does not repeat it.
    """
    config = PretrainConfig.model_validate(arguments["config"])
    folder = Path(arguments["folder"])
    if (folder / FATAL).exists():
        return
    try:
        _train(config, folder, arguments["cuda"])
    except NonFiniteError as error:  # raised by all workers alike: all end, none hangs
        _fatal(folder, error)
    except FinhpcError as error:  # perhaps by one worker alone: Ray Train must end the others
        _fatal(folder, error)
        raise


def _train(config: PretrainConfig, folder: Path, cuda: bool) -> None:
    os.environ["DS_ACCELERATOR"] = "cuda" if cuda else "cpu"
    import ray.train.torch
    import torch

    from finhpc.data.reading import ReplicaStream
    from finhpc.data.shards import Shards
    from finhpc.data.stream import ray_dataset, worker_batches
    from finhpc.orchestration.plan import hf_config_of
    from finhpc.training.journal import WORKER_FILE
    from finhpc.training.loop import Worker

    device = ray.train.torch.get_device() if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(config.resources.threads)
    torch.set_float32_matmul_precision("highest")
    shards = Shards.open(str(config.data.shards))

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
        return worker_batches(ray_dataset(stream).iterator(), config.parallel.micro_batch_size)

    Worker(
        config=config,
        hf_config=hf_config_of(config, shards),
        device=device,
        folder=folder,
        journal_path=folder / WORKER_FILE,
        open_stream=open_stream,
        held_out=shards.eval_samples(config.data.eval_samples, config.data.seq_len),
        labels={"tokenizer_sha256": shards.manifest.tokenizer_sha256, "dataset": shards.manifest.fingerprint},
    ).run()


def _fatal(folder: Path, error: FinhpcError) -> None:
    write_json(folder / FATAL, {"error": type(error).__name__, "message": str(error)})
