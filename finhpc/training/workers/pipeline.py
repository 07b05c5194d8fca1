"""DeepSpeed's pipelines with our borders between stages, exchanges that do not wait, and times of passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import comm as deepspeed_comm
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from torch import Tensor

from finhpc.settings.training import Parallel

Instruction = Callable[..., None]


class CutPipeline(PipelineModule):  # type: ignore[misc]
    """A PipelineModule with given borders between stages, in place of DeepSpeed's parameter counts."""

    def __init__(self, layers: list[LayerSpec], borders: list[int], workers: int, dynamic_shape: bool = False) -> None:
        self.parts = borders  # DeepSpeed's name: it also looks there for the stage of a tied layer
        super().__init__(layers=layers, num_stages=workers, dynamic_shape=dynamic_shape)

    def _partition_layers(self, method: str = "") -> None:
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


class CutDualPipeV(DualPipeVModule, CutPipeline):  # type: ignore[misc]
    """The same with two stages per worker, the first and the last on worker 0."""


def make_pipeline(layers: list[LayerSpec], borders: list[int], parallel: Parallel, dynamic_shape: bool) -> Any:
    """This worker's part of the pipeline of `parallel.schedule`."""
    kind = CutDualPipeV if parallel.schedule == "dualpipev" else CutPipeline
    return kind(layers, borders, parallel.stages, dynamic_shape)


@dataclass
class PassTimes:
    """Times the forward and backward passes of training steps without waiting for the device.

    `passes` counts those that began, in evaluations too.
    """

    device: torch.device
    passes: int = 0
    _busy_s: float = 0.0
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def timed(self, instruction: Instruction) -> Instruction:
        """Return an instruction of a schedule that is timed."""

        def run(pipe: Any, *args: Any, **kwargs: Any) -> None:
            self.passes += 1
            with self._timing() if torch.is_grad_enabled() else nullcontext():
                instruction(pipe, *args, **kwargs)

        return run

    @contextmanager
    def _timing(self) -> Iterator[None]:
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            return
        start = time.perf_counter()
        yield
        self._busy_s += time.perf_counter() - start

    def take(self) -> float:
        """Return the seconds in passes since the last call; on a GPU this waits for the last of them."""
        if self._events:
            self._events[-1][1].synchronize()
        seconds: float = self._busy_s + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        self._busy_s = 0.0
        self._events.clear()
        return seconds


class Exchange:
    """dualpipev's exchanges over gloo: a pass sends its result at once, and waits only for what it needs itself.

    DeepSpeed collects sends and receives into groups, and each group waits for all of them before the next pass. That
    order is kept for NCCL, which may only run such a group in one piece.
    """

    def __init__(self, pipe: Any) -> None:
        self._posted: list[Any] = []  # by the instruction that runs
        self._receives: dict[tuple[str, int], list[Any]] = {}  # of which kind, for which buffer
        self._sends: list[Any] = []
        self._older_sends: list[Any] = []  # whose tensors must exist no longer than until the second next commit
        self._tag = 0
        pipe._queue_p2p = partial(self._post, pipe)

    def _post(self, pipe: Any, way: Callable[..., Any], tensors: Sequence[Tensor], stage: int) -> None:
        begin = dist.isend if way is deepspeed_comm.isend else dist.irecv
        peer = pipe.grid.stage_to_global(stage)
        self._posted += [begin(tensor, peer, tag=self._tag) for tensor in tensors]

    def patches(self, engine: Any, forward: Instruction, backward: Instruction) -> dict[type, Instruction]:
        """The instructions of an engine of class `engine`. `forward`, `backward`: its passes."""
        ends = {"inputs": (1, 0), "grads": (0, 1)}  # the phase in which the first and the last worker send nothing

        def post(instruction: Instruction, kind: str, pipe: Any, buffer_id: int, phase: int) -> list[Any]:
            # Messages of one kind and phase keep their order; others may overtake them.
            self._tag = 1 + 2 * phase + (kind == "grads")
            instruction(pipe, buffer_id, phase)
            posted, self._posted = self._posted, []
            return posted

        def receive(instruction: Instruction, kind: str) -> Instruction:
            def run(pipe: Any, buffer_id: int, phase: int) -> None:
                self._receives[kind, buffer_id] = post(instruction, kind, pipe, buffer_id, phase)

            return run

        def compute(instruction: Instruction, kind: str, send: Instruction) -> Instruction:
            def run(pipe: Any, buffer_id: int, phase: int) -> None:
                for work in self._receives.pop((kind, buffer_id), ()):
                    work.wait()
                instruction(pipe, buffer_id, phase)
                first, last = ends[kind]
                if (pipe.is_first_stage() and phase == first) or (pipe._is_last_rank() and phase == last):
                    return
                self._sends += post(send, kind, pipe, buffer_id, phase)

            return run

        def commit(pipe: Any) -> None:
            for work in self._older_sends:
                work.wait()
            self._older_sends, self._sends = self._sends, []

        return {
            schedule.RecvActivation: receive(engine._exec_recv_activations, "inputs"),
            schedule.RecvGrad: receive(engine._exec_recv_grads, "grads"),
            schedule.ForwardPass: compute(forward, "inputs", engine._exec_send_activations),
            schedule.BackwardPass: compute(backward, "grads", engine._exec_send_grads),
            schedule.SendActivation: lambda pipe, buffer_id, phase: None,  # sent by the pass
            schedule.SendGrad: lambda pipe, buffer_id, phase: None,
            schedule.CommitP2P: commit,
        }
