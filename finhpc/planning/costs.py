"""What a training costs in memory and time: one interface, for pretraining here and for LoRA in finetuning.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from finhpc.planning.devices import Cluster
from finhpc.planning.memory import Memory, Scheme, StageMemory, Topology
from finhpc.planning.outline import Outline, Stages
from finhpc.planning.step_time import Pace, measured, paced, step_operations


class Costs(Protocol):
    """The costs of one training. All bytes, operations and seconds are estimates."""

    @property
    def topology(self) -> Topology: ...

    @property
    def kinds(self) -> list[str]:
        """The kinds of the model's parts, in order."""
        ...

    def stages(self) -> list[StageMemory]:
        """The memory of each stage."""
        ...

    def operations_per_step(self) -> float:
        """Operations of one step, over all replicas."""
        ...

    def pace(self, cluster: Cluster) -> Pace:
        """Seconds of one step: from measured parts if there are any, else from the cluster's rates."""
        ...

    def with_measured(self, part_s: Mapping[str, float]) -> Costs:
        """The same training, given the measured seconds per micro-batch of each kind of part."""
        ...


@dataclass(frozen=True)
class PretrainCosts:
    """The costs of a pretraining. Stages are balanced by measured parts if there are any, else by operations."""

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
        return self.outline.kinds

    @cached_property
    def cut(self) -> Stages:
        return self.outline.stages(self.topology.stages, self.part_s)

    def stages(self) -> list[StageMemory]:
        return self.memory.stages(self.topology, self.cut)

    @property
    def fullest(self) -> StageMemory:
        return max(self.stages(), key=lambda stage: stage.peak_bytes)

    def operations_per_step(self) -> float:
        return step_operations(self.outline, self.topology.samples_per_step)

    def pace(self, cluster: Cluster) -> Pace:
        if self.part_s is None:
            return paced(self.outline, self.topology, self.cut, cluster)
        return measured(self.outline, self.topology, self.cut, cluster, self.part_s)

    def with_measured(self, part_s: Mapping[str, float]) -> PretrainCosts:
        return replace(self, part_s=part_s)


@dataclass(frozen=True)
class Option:
    """One topology on a cluster, with its fullest stage and its pace."""

    topology: Topology
    fullest: StageMemory
    pace: Pace
    tokens_per_s: float
    fits: bool


def options(memory: Memory, cluster: Cluster, samples_per_step: int, micro_batch_sizes: list[int]) -> list[Option]:
    """Every topology considered: first those that fit, the fastest first, then the others, the smallest first.

    Stages are powers of two and divisors of the number of blocks; replicas are as many as the devices and the step's
    samples allow. All topologies have the same samples per step, so that their tokens/s compare.
    """
    layers = int(memory.outline.hf_config.num_hidden_layers)
    considered = []
    for stages in range(1, min(layers, cluster.devices) + 1):
        if stages & (stages - 1) and layers % stages:
            continue
        for size in micro_batch_sizes:
            most = range(cluster.devices // stages, 0, -1)
            replicas = next((r for r in most if samples_per_step % (r * size) == 0), None)
            if replicas:
                topology = Topology(stages, replicas, size, samples_per_step // (replicas * size))
                costs = PretrainCosts(memory, topology)
                fullest, pace = costs.fullest, costs.pace(cluster)
                tokens_per_s = samples_per_step * memory.outline.seq_len / pace.step_s
                considered.append(Option(topology, fullest, pace, tokens_per_s, fullest.peak_bytes <= cluster.usable))
    return sorted(considered, key=lambda o: (not o.fits, -o.tokens_per_s if o.fits else o.fullest.peak_bytes))
