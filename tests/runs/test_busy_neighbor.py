"""A worker's threads next to a busy process of another program on the same cores."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from finhpc.runs.launch import worker_environment

PROGRAM = """
import sys, time
import torch

torch.set_num_threads(2)
layer = torch.nn.TransformerEncoderLayer(384, 6, 1536, batch_first=True)
inputs = torch.randn(4, 128, 384)
for line in sys.stdin:
    end, steps = time.perf_counter() + float(line), 0
    while time.perf_counter() < end:
        layer(inputs).square().mean().backward()
        steps += 1
    print(steps, flush=True)
"""


@pytest.mark.slow  # needs an idle machine
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_threads_next_to_a_busy_process_are_at_most_2_5_times_slower() -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | worker_environment(cuda=False),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdin
    assert worker.stdout

    def steps(seconds: float = 5.0) -> int:
        print(seconds, file=worker.stdin, flush=True)
        return int(worker.stdout.readline())  # type: ignore[union-attr]

    # One busy thread for each pair of cores, so that the worker's two threads have half of the machine at least.
    busy: list[subprocess.Popen[bytes]] = []
    try:
        steps(1.0)
        alone = steps()
        for _ in range((os.cpu_count() or 1) // 2):
            busy.append(subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]))
        assert alone < 2.5 * steps()
    finally:
        for process in (*busy, worker):
            process.kill()
            process.wait()
