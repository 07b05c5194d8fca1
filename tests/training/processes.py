"""Run a function in several processes that form a torch process group, and collect what they return."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch", "transformers", "deepspeed", "finhpc.training.engine"])


def _child(function: Callable[..., Any], rank: int, world_size: int, port: int, folder: str, args: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    gc.freeze()  # what the server imported: collecting garbage among it takes a second
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    torch.save(function(*args), Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_processes(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 500) -> list[Any]:
    """Results of `function(*args)` in rank order. `function` must be importable."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with patch.dict(os.environ, DS_ACCELERATOR="cpu"):  # read when DeepSpeed is imported, there
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        children = [
            context.Process(target=_child, args=(function, rank, world_size, port, folder, args))
            for rank in range(world_size)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(timeout_s)
        codes = [child.exitcode for child in children]
        for child in children:
            child.kill()
        assert codes == [0] * world_size, f"exit codes {codes}"
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
