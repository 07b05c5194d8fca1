"""What a pretraining costs in memory and time, on one topology and on every topology of a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from finhpc.models.schedule import stages_of
from finhpc.planning.devices import Cluster
from finhpc.planning.memory import Memory, Scheme, StageMemory, Topology
from finhpc.planning.outline import Outline, Stages
from finhpc.planning.step_time import (
    Pace,
    averaging_s,
    launches,
    making_operations,
    optimizer_s,
    part_operations,
    step_operations,
)


@dataclass(frozen=True)
class PretrainCosts:
    """The costs of a pretraining; `LoraCosts` are those of a finetuning. Bytes, operations and seconds are estimates.

    `part_s`: measured seconds per micro-batch of each kind of part. Stages are balanced by them if there are any, else
    by operations.
    """

    memory: Memory
    topology: Topology
    part_s: Mapping[str, float] | None = None

    @staticmethod
    def of(outline: Outline, scheme: Scheme, topology: Topology) -> PretrainCosts:
        fused = replace(outline, fused=scheme.fused(outline.seq_len))
        return PretrainCosts(Memory(fused, scheme), topology)

    @property
    def outline(self) -> Outline:
        return self.memory.outline

    @property
    def kinds(self) -> list[str]:
        """The kinds of the model's parts, in order."""
        return self.outline.kinds

    @cached_property
    def cut(self) -> Stages:
        topology = self.topology
        return self.outline.stages(topology.stages, self.part_s, topology.schedule, topology.micro_batches)

    def stages(self) -> list[StageMemory]:
        """The memory of each worker of a pipeline."""
        return self.memory.stages(self.topology, self.cut)

    @property
    def fullest(self) -> StageMemory:
        return max(self.stages(), key=lambda stage: stage.peak_bytes)

    def operations_per_step(self) -> float:
        """Operations of one step, over all replicas."""
        topology = self.topology
        return step_operations(self.outline, topology.samples_per_step, topology.micro_batches * topology.replicas)

    def _operations(self, kind: str) -> float:
        """Operations of one part for one micro-batch."""
        tokens = self.topology.micro_batch_size * self.outline.seq_len
        return tokens * part_operations(self.outline, kind) + making_operations(self.outline, kind)

    def pace(self, cluster: Cluster) -> Pace:
        """Seconds of one step: from measured parts if there are any, else from the cluster's rates."""
        outline, topology, device = self.outline, self.topology, cluster.device
        owned = stages_of(topology.schedule, topology.stages)
        params = [sum(outline.part_params(kind) for kind in kinds) for kinds in self.cut]
        largest = max(sum(params[stage] for stage in stages) for stages in owned)
        shard, per_node = topology.shard_optimizer, cluster.devices_per_node
        exchange_s = averaging_s(largest, topology.replicas, device, per_node, shard)
        if (part_s := self.part_s) is not None:  # with their share of the optimizer
            measured = [sum(part_s[kind] for kind in kinds) for kinds in self.cut]
            return Pace(measured, exchange_s, 0.0, topology.micro_batches, topology.schedule)
        rate = device.rate(cluster.precision) * cluster.reached
        link = cluster.link(topology.workers)
        hidden_bytes = 4 * topology.micro_batch_size * outline.seq_len * int(outline.hf_config.hidden_size)
        seconds = []
        for i, kinds in enumerate(self.cut):
            least = {kind: launches(kind) * device.launch_s for kind in kinds}
            compute = sum(max(self._operations(kind) / rate, least[kind]) for kind in kinds)
            turns = len(self.cut) > topology.stages and i in (topology.stages - 1, topology.stages)  # on one worker
            neighbors = (i > 0) + (i < len(self.cut) - 1) - turns
            seconds.append(compute + neighbors * 2 * hidden_bytes / link)  # hidden states there, gradients back
        return Pace(seconds, exchange_s, self._optimizer_s(cluster), topology.micro_batches, topology.schedule)

    def _optimizer_s(self, cluster: Cluster) -> float:
        """Seconds of the optimizer's step on the slowest worker."""
        outline, topology, optimizer = self.outline, self.topology, self.memory.scheme.optimizer
        times = []
        for stages in stages_of(topology.schedule, topology.stages):
            kinds = [kind for stage in stages for kind in self.cut[stage]]
            params = sum(outline.part_params(kind) for kind in kinds)
            operations = sum(outline.part_optimizer_operations(kind, optimizer) for kind in kinds)
            times.append(optimizer_s(params, operations, optimizer, cluster.device, cluster.reached))
        return max(times) / topology.optimizer_shares

    def reached(self, rate: float) -> float:
        """The share of a matrix rate that the measured parts reach."""
        assert self.part_s is not None
        operations = sum(self._operations(kind) for kind in self.kinds)
        return operations / (sum(self.part_s[kind] for kind in self.kinds) * rate)


def topologies(
    memory: Memory, cluster: Cluster, samples_per_step: int, micro_batch_sizes: list[int], shard_optimizer: bool = False
) -> list[dict[str, Any]]:
    """Every topology considered, with its fullest stage and its pace; `shard_optimizer` wherever there are replicas.

    Those that fit come first, the fastest first, then the others, the smallest first. Stages are powers of two and
    divisors of the number of blocks; replicas are as many as the devices and the step's samples allow. All topologies
    have the same samples per step, so that their tokens/s compare.
    """
    layers = int(memory.outline.hf_config.num_hidden_layers)
    rows: list[dict[str, Any]] = []
    for stages in range(1, min(layers, cluster.devices) + 1):
        if stages & (stages - 1) and layers % stages:
            continue
        for size in micro_batch_sizes:
            most = range(cluster.devices // stages, 0, -1)
            replicas = next((r for r in most if samples_per_step % (r * size) == 0), None)
            if replicas is None:
                continue
            number, shard = samples_per_step // (replicas * size), shard_optimizer and replicas > 1
            topology = Topology(stages, replicas, size, number, shard_optimizer=shard)
            costs = PretrainCosts(memory, topology)
            peak, step_s = costs.fullest.peak_bytes, costs.pace(cluster).step_s
            rows.append(
                {
                    **asdict(topology),
                    "workers": topology.workers,
                    "peak_bytes": peak,
                    "fits": peak <= cluster.usable,
                    "step_s": step_s,
                    "tokens_per_s": samples_per_step * memory.outline.seq_len / step_s,
                    "pipeline_bubble": 1 - topology.utilization,
                }
            )
    return sorted(rows, key=lambda row: (not row["fits"], -row["tokens_per_s"] if row["fits"] else row["peak_bytes"]))
