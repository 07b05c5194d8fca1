"""Freed memory stays in the process: counted in page faults of real processes."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from finhpc.training.allocator import ENVIRONMENT

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")

PROGRAM = """
import resource, sys, threading
import torch
from finhpc.training.allocator import keep_freed_memory

if "call" in sys.argv:
    assert keep_freed_memory()


def steps(count):
    for _ in range(count):
        torch.ones(16 << 20)  # 64 MB, freed at once


def measure():
    steps(30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    steps(20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


if "thread" in sys.argv:
    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
else:
    measure()
"""


def faults(*words: str, **environment: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_a_call_keeps_memory_of_the_main_thread() -> None:
    assert faults() > 10_000
    assert faults("call") < 1_000


def test_a_process_that_starts_with_the_environment_keeps_that_of_any_thread() -> None:
    assert faults("thread") > 10_000
    assert faults("thread", **ENVIRONMENT) < 1_000
