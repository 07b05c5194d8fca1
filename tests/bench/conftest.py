"""Benches make a process group of this process, which tests of other files must not find."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def no_process_group_is_left() -> Iterator[None]:
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        if "deepspeed" in sys.modules:
            sys.modules["deepspeed"].comm.comm.cdb = None
