"""DeepSpeed's pipelines with our borders between stages, exchanges that do not wait, and times of passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from torch import Tensor

from finhpc.settings.training import Parallel

Instruction = Callable[..., None]
Way = tuple[str, int]  # INPUTS or GRADS, and dualpipev's phase
Messages = list[tuple[dist.Work, Tensor]]
INPUTS, GRADS = "inputs", "grads"


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
    """Exchanges between stages over gloo in which only a pass waits, and only for what it needs itself.

    A result is sent as soon as it exists. gloo moves nothing before its receiver has posted a receive, so each receive
    is posted while the message before it is still being used. The shapes of tensors must not change. DeepSpeed's own
    exchanges wait for every message; they are kept for packs and for NCCL, which needs their order.
    """

    def __init__(self) -> None:
        self._shapes: dict[Way, list[tuple[torch.Size, torch.dtype]]] = {}
        self._left: dict[Way, int] = {}  # receives of this step that are not posted
        self._posted: dict[Way, Messages] = {}  # the next ones
        self._needed: dict[tuple[Way, int], Messages] = {}  # by the pass with a buffer
        self._sent: Messages = []  # since the last pass began
        self._told: set[Way] = set()  # whose shapes the receiver knows

    def patches(self, forward: Instruction, backward: Instruction) -> dict[type, Instruction]:
        """The instructions of an engine whose passes are `forward` and `backward`."""

        def nothing(pipe: Any, *_: Any, **__: Any) -> None:
            """The passes send their results."""

        return {
            schedule.RecvActivation: self._receive_inputs,
            schedule.RecvGrad: self._receive_grads,
            schedule.ForwardPass: self._computing(forward, INPUTS, self._send_outputs),
            schedule.BackwardPass: self._computing(backward, GRADS, self._send_grads),
            **dict.fromkeys((schedule.SendActivation, schedule.SendGrad, schedule.CommitP2P), nothing),
        }

    def _computing(self, instruction: Instruction, kind: str, send: Instruction) -> Instruction:
        def run(pipe: Any, buffer_id: int, **phase: int) -> None:
            for work, _ in self._needed.pop(((kind, phase.get("phase", 0)), buffer_id), ()):
                work.wait()
            self.finish()  # their receivers have places for them already
            instruction(pipe, buffer_id, **phase)
            send(pipe, buffer_id, **phase)

        return run

    def _receive_inputs(self, pipe: Any, buffer_id: int, phase: int = 0) -> None:
        way, peer = (INPUTS, phase), _peer(pipe, phase, onward=False)
        if way not in self._shapes:
            self._shapes[way] = [(x.shape, x.dtype) for x in pipe._recv_tensor_meta(peer)]
            pipe._grad_layer_buf.clear()  # DeepSpeed's places for what arrives
        tensors = self._receive(pipe, way, peer, buffer_id)
        pipe.pipe_buffers["inputs"][buffer_id] = tuple(x.requires_grad_(x.is_floating_point()) for x in tensors)

    def _receive_grads(self, pipe: Any, buffer_id: int, phase: int = 0) -> None:
        way, outputs = (GRADS, phase), pipe.pipe_buffers["outputs"][buffer_id]
        self._shapes[way] = [(x.shape, x.dtype) for x in outputs if x.is_floating_point()]
        pipe.grad_layer = None  # before there are more
        pipe.grad_layer = self._receive(pipe, way, _peer(pipe, phase, onward=True), buffer_id)
        if "grads" in pipe.pipe_buffers:  # where dualpipev looks for them
            pipe.pipe_buffers["grads"][buffer_id] = pipe.grad_layer

    def _receive(self, pipe: Any, way: Way, peer: Any, buffer_id: int) -> list[Tensor]:
        """Tensors that are filled when the messages in `_needed` have arrived; the next ones are posted too."""

        def post() -> Messages:
            self._left[way] -= 1
            tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in self._shapes[way]]
            return [(dist.irecv(x, pipe.grid.stage_to_global(peer), tag=_tag(way)), x) for x in tensors]  # type: ignore[misc]

        if not self._left.get(way) and way not in self._posted:
            self._left[way] = pipe.micro_batches
        messages = self._posted.pop(way, None) or post()
        if self._left[way]:
            self._posted[way] = post()
        self._needed[way, buffer_id] = messages
        return [x for _, x in messages]

    def _send_outputs(self, pipe: Any, buffer_id: int, phase: int = 0) -> None:
        way, peer = (INPUTS, phase), _peer(pipe, phase, onward=True)
        if peer is None:
            return
        outputs = pipe.pipe_buffers["outputs"][buffer_id]
        if way not in self._told:
            pipe._send_tensor_meta(outputs, peer)
            self._told.add(way)
        self._send(pipe, way, peer, outputs)
        if not torch.is_grad_enabled():
            pipe.pipe_buffers["outputs"][buffer_id] = None

    def _send_grads(self, pipe: Any, buffer_id: int, phase: int = 0) -> None:
        peer = _peer(pipe, phase, onward=False)
        if peer is not None:
            inputs = pipe.pipe_buffers["inputs"][buffer_id]
            self._send(pipe, (GRADS, phase), peer, [x.grad for x in inputs if x.is_floating_point()])
            pipe.pipe_buffers["inputs"][buffer_id] = None

    def _send(self, pipe: Any, way: Way, peer: int, tensors: Sequence[Tensor]) -> None:
        to = pipe.grid.stage_to_global(peer)
        self._sent += [(dist.isend(x, to, tag=_tag(way)), x) for x in (y.detach() for y in tensors)]  # type: ignore[misc]

    def finish(self) -> None:
        """Wait until all that was sent is received, and let go of it."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()


def _tag(way: Way) -> int:
    """Messages of one way keep their order; those of others may overtake them."""
    kind, phase = way
    return 1 + 2 * phase + (kind == GRADS)


def _peer(pipe: Any, phase: int, onward: bool) -> int | None:
    """The worker that takes the outputs of this one's stage (`onward`), or that its inputs come from; None at the ends.

    In the second phase, which only dualpipev has, data flows from the last worker to the first.
    """
    stage: int = pipe.stage_id + (1 if onward == (phase == 0) else -1)
    return stage if 0 <= stage < pipe.num_stages else None
