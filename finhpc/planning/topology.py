"""Which topologies fit a cluster, the fastest first."""

from __future__ import annotations

from dataclasses import dataclass

from finhpc.planning.devices import Cluster
from finhpc.planning.memory import Memory, StageMemory, Topology
from finhpc.planning.outline import Stages
from finhpc.planning.step_time import Pace, paced


@dataclass(frozen=True)
class Option:
    """One topology, its fullest stage and its pace."""

    topology: Topology
    fullest: StageMemory
    pace: Pace
    tokens_per_s: float
    fits: bool


def options(memory: Memory, cluster: Cluster, samples_per_step: int, micro_batch_sizes: list[int]) -> list[Option]:
    """Every topology considered: those that fit by tokens/s, then the others by how much too full they are.

    Stages: powers of two and divisors of the number of blocks. Replicas: as many as the devices and the
    step's samples allow. The samples of a step stay what they are, so that tokens/s compare.
    """
    layers = int(memory.outline.hf_config.num_hidden_layers)
    found = []
    for stages in range(1, min(layers, cluster.devices) + 1):
        if stages & (stages - 1) and layers % stages:
            continue
        cut = memory.outline.stages(stages)
        for size in micro_batch_sizes:
            replicas = _replicas(cluster.devices // stages, samples_per_step, size)
            if replicas:
                topology = Topology(stages, replicas, size, samples_per_step // (replicas * size))
                found.append(option(memory, cluster, topology, cut))
    return sorted(found, key=lambda o: (not o.fits, -o.tokens_per_s if o.fits else o.fullest.peak_bytes))


def option(memory: Memory, cluster: Cluster, topology: Topology, cut: Stages) -> Option:
    """One topology of a cluster, whether it fits or not."""
    fullest = max(memory.stages(topology, cut), key=lambda stage: stage.peak_bytes)
    pace = paced(memory.outline, topology, cut, cluster)
    tokens = topology.samples_per_step * memory.outline.seq_len
    return Option(topology, fullest, pace, tokens / pace.step_s, fullest.peak_bytes <= cluster.usable)


def _replicas(at_most: int, samples: int, size: int) -> int:
    """The most replicas that share a step's samples evenly in micro-batches of that size; 0: none."""
    return next((r for r in range(at_most, 0, -1) if samples % (r * size) == 0), 0)
