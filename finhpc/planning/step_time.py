"""The operations of a step, and its time with the pipeline's bubble."""

from __future__ import annotations

from dataclasses import dataclass

from finhpc.models.schedule import passes_seconds
from finhpc.planning.devices import Device
from finhpc.planning.outline import Outline
from finhpc.settings.training import Optimizer, Schedule
from finhpc.training.optimizers.registry import OPTIMIZERS

# Bytes moved per parameter, in float32.
ADAMW_BYTES = 28  # weight, gradient and two moments are read, weight and moments written
CLIPPED_BYTES = 12  # the gradient is read for its norm, then read and written for clipping
AVERAGED_BYTES = 8  # with several replicas gradients are also scaled


@dataclass(frozen=True)
class Pace:
    """Seconds of one step. `stage_s`: forward and backward of one micro-batch on each stage."""

    stage_s: list[float]
    exchange_s: float  # averaging gradients over the replicas
    optimizer_s: float
    micro_batches: int
    schedule: Schedule = "1f1b"

    @property
    def passes_s(self) -> float:
        return passes_seconds(self.schedule, self.stage_s, self.micro_batches)

    @property
    def step_s(self) -> float:
        return self.passes_s + self.exchange_s + self.optimizer_s

    @property
    def utilization(self) -> float:
        """The mean share of the passes in which a worker computes: the paper's M/(N+M-1) if 1f1b's stages are even."""
        workers = len(self.stage_s) // (2 if self.schedule == "dualpipev" else 1)
        return self.micro_batches * sum(self.stage_s) / (workers * self.passes_s)


def forward_operations(outline: Outline, kind: str) -> float:
    """Operations per token (two per multiplication) of one part's forward pass; causality halves attention's."""
    if kind in ("positions", "norm", "dropout"):
        return 0.0
    own = "embedding" if kind == "head" and outline.tied else kind
    matrices = [matrix for weights in outline.weights if weights.kind == own for matrix in weights.multiplied]
    if kind == "embedding":
        matrices = matrices[1:]  # the table is looked up, not multiplied; a low-rank one is multiplied by B
    operations = 2.0 * sum(a * b for a, b in matrices)
    if kind in ("attention", "block"):
        operations += 2.0 * outline.seq_len * int(outline.hf_config.hidden_size)
    return operations


def step_operations(outline: Outline, samples: int, micro_batches: int = 0) -> float:
    """Operations of one step of `samples` samples.

    `micro_batches`: of all replicas; SLTrain makes W for each.
    """
    making = micro_batches * sum(making_operations(outline, kind) for kind in outline.kinds)
    return samples * outline.seq_len * sum(part_operations(outline, kind) for kind in outline.kinds) + making


def making_operations(outline: Outline, kind: str) -> float:
    """Operations per micro-batch of one part for W of SLTrain's layers.

    W is made in the forward pass, which full recomputation repeats, and in the backward pass, where the gradients of
    A and B are made of that of W.
    """
    products = 5 if kind == "block" else 4
    return 2.0 * products * sum(weights.made for weights in outline.weights if weights.kind == kind)


def blended_operations(outline: Outline, trained: bool) -> float:
    """Operations per token of method 3's dense weights W next to its pairs; frozen ones have no gradient."""
    multiplied = sum(weights.count * weights.replaced for weights in outline.weights if weights.kind != "embedding")
    return (6.0 if trained else 4.0) * multiplied


def launches(kind: str) -> float:
    """Kernel launches of one part's passes over those of an attention or MLP part; a block's forward runs twice."""
    return 2 * 4 / 3 if kind == "block" else 1.0


def part_operations(outline: Outline, kind: str) -> float:
    """Operations per token of one part, forward and backward; backward takes two forward passes (section IV.B)."""
    forward = forward_operations(outline, kind)
    again = 0.0
    if kind == "block":
        again = forward
    elif kind == "attention" and outline.recompute == "attention" and not outline.fused:
        again = float(outline.seq_len * int(outline.hf_config.hidden_size))  # q k^T
    return 3 * forward + again


def optimizer_s(params: int, operations: float, optimizer: Optimizer, device: Device, reached: float) -> float:
    """Seconds of a step of the optimizer for parameters whose matrix products take so many operations.

    Every optimizer is taken to read and write as much as AdamW.
    """
    rate = device.rate(OPTIMIZERS[optimizer.name].precision) * reached
    return params * ADAMW_BYTES / (device.memory_gb_per_s * 1e9) + operations / rate


def averaging_s(params: int, replicas: int, device: Device, per_node: int, shard_optimizer: bool = False) -> float:
    """Seconds to average gradients in a ring over a stage's replicas, which are neighbors: the pipe axis is outer.

    It is an upper bound, because most of it goes on while the last backward pass computes. With `shard_optimizer` the
    updated weights travel too, after it.
    """
    memory = device.memory_gb_per_s * 1e9
    if replicas == 1:
        return params * CLIPPED_BYTES / memory
    copies = params * (CLIPPED_BYTES + AVERAGED_BYTES) / memory
    link = device.link_gb_per_s if replicas <= per_node else device.network_gb_per_s
    return copies + (3 if shard_optimizer else 2) * (replicas - 1) / replicas * 4 * params / (link * 1e9)
