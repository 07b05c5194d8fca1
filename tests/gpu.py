"""Where the tests marked `gpu` run: on the first CUDA device, else they are skipped.

FINHPC_GPU_TESTS_ON=cpu runs their bodies on the CPU, to try them where there is no GPU.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

from finhpc.training.memory import counted_peak, live_tensor_bytes

ON = os.environ.get("FINHPC_GPU_TESTS_ON", "cuda")
DEVICE = torch.device(ON)
CUDA = DEVICE.type == "cuda"

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA and not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@contextmanager
def alone() -> Iterator[None]:
    """This process as the only one of a group that trains on `DEVICE`, in full float32."""
    with patch.dict(os.environ, DS_ACCELERATOR=ON):  # read when DeepSpeed is imported
        from finhpc.training.engine import process_group

        torch.set_float32_matmul_precision("highest")
        with process_group("nccl" if CUDA else "gloo"):
            yield


def held_bytes() -> int:
    """Bytes of the tensors on `DEVICE`."""
    gc.collect()
    return torch.cuda.memory_allocated() if CUDA else live_tensor_bytes()


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes of tensors on `DEVICE` at once while `work` runs."""
    if not CUDA:
        return counted_peak(work)[1]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
