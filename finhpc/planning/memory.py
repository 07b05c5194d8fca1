"""The memory of each pipeline stage: parameters, gradients, optimiser, intermediate variables.

Two schemes, both of 16 bytes a parameter by default:

- `finhpc`: what its engine holds, float32 weights, gradients and AdamW's two moments (in 8 bits where the run
  asks for that), and method 3's W while they are there. Its peak follows
  the engine's passes in order (one forward, one backward: stage s of N holds min(M, N - s)
  micro-batches). DeepSpeed adds its buffers and, where gradients are averaged over replicas, a flat
  copy of them.
- `paper`: Table III's mixed precision, 16-bit weights and gradients, and an optimiser of 12 bytes (a
  float32 copy of the weights and two moments), shared out by ZeRO over the replicas. Its total is
  the sum of the four, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from finhpc.models.attention import LONGEST
from finhpc.planning import paper_memory as paper
from finhpc.planning.fake_passes import PartBytes, counted
from finhpc.planning.outline import Outline, Stages, one_block

BUCKET = 500_000_000  # gradients that DeepSpeed averages at a time


@dataclass(frozen=True)
class Scheme:
    """How numbers are held. `zero_stage` 1 shares out the optimiser, 2 gradients as well, 3 also the weights."""

    name: Literal["finhpc", "paper"] = "finhpc"
    bf16: bool = False
    cuda: bool = False
    weight_bits: int = 16  # of the paper's stored weights; its optimiser keeps them in float32
    zero_stage: int = 0
    blend: Literal["frozen", "trainable"] | None = None  # finhpc's: method 3's W stand beside the factors
    eight_bit_moments: bool = False  # finhpc's: the optimiser is bitsandbytes'

    def fused(self, seq_len: int) -> bool:
        """Whether attention is a kernel that never holds all its scores: torch's own, on GPUs and for long samples."""
        return self.name == "finhpc" and (self.cuda or seq_len > LONGEST)


@dataclass(frozen=True)
class Topology:
    """Where the parts run: micro-batches are per step and replica."""

    stages: int
    replicas: int
    micro_batch_size: int
    micro_batches: int

    @property
    def workers(self) -> int:
        return self.stages * self.replicas

    @property
    def samples_per_step(self) -> int:
        return self.micro_batch_size * self.micro_batches * self.replicas

    @property
    def utilization(self) -> float:
        """M/(N+M-1), the paper's section IV.B."""
        return self.micro_batches / (self.stages + self.micro_batches - 1)


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each worker of one stage; `peak_bytes` is not their sum where they do not peak at once."""

    stage: int
    parts: list[str]
    params: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    intermediates_bytes: int
    exchange_bytes: int
    peak_bytes: int


@dataclass
class Memory:
    """Memory of a model under a scheme; what was counted for one micro-batch size is kept."""

    outline: Outline
    scheme: Scheme
    _counted: dict[int, dict[str, PartBytes]] = field(default_factory=dict)

    def parts(self, micro_batch_size: int) -> dict[str, PartBytes]:
        if micro_batch_size not in self._counted:
            self._counted[micro_batch_size] = self._count(micro_batch_size)
        return self._counted[micro_batch_size]

    def _count(self, micro_batch_size: int) -> dict[str, PartBytes]:
        outline, scheme = self.outline, self.scheme
        if scheme.name == "paper":
            return paper.part_bytes(outline, micro_batch_size, outline.recompute)
        single = one_block(outline.hf_config)
        return counted(
            single, micro_batch_size, outline.seq_len, scheme.bf16, outline.recompute, scheme.cuda, scheme.blend
        )

    def stages(self, topology: Topology, cut: Stages | None = None) -> list[StageMemory]:
        cut = cut or self.outline.stages(topology.stages)
        of_stage = self._paper_stage if self.scheme.name == "paper" else self._finhpc_stage
        return [of_stage(i, kinds, topology) for i, kinds in enumerate(cut)]

    # -- the paper's ------------------------------------------------------------------------

    def _paper_stage(self, stage: int, kinds: list[str], topology: Topology) -> StageMemory:
        own, zero, replicas = _own(kinds, self.outline.tied), self.scheme.zero_stage, topology.replicas
        params = sum(self.outline.part_params(kind) for kind in own)
        weights = sum(self.outline.part_bytes(kind, self.scheme.weight_bits) for kind in own)
        weights = -(-weights // replicas) if zero >= 3 else weights
        gradients = -(-2 * params // replicas) if zero >= 2 else 2 * params
        optimizer = -(-12 * params // replicas) if zero >= 1 else 12 * params
        parts = self.parts(topology.micro_batch_size)
        in_flight = min(topology.micro_batches, topology.stages - stage)
        intermediates = in_flight * sum(parts[kind].kept for kind in kinds) + max(parts[k].backward for k in kinds)
        total = weights + gradients + optimizer + intermediates
        return StageMemory(stage, kinds, params, weights, gradients, optimizer, intermediates, 0, total)

    # -- finhpc's ---------------------------------------------------------------------------

    def _finhpc_stage(self, stage: int, kinds: list[str], topology: Topology) -> StageMemory:
        outline, scheme, stages = self.outline, self.scheme, topology.stages
        shared = outline.tied and stages == 1  # one matrix, at both ends of the stage
        params = [0 if shared and kind == "embedding" else outline.part_params(kind) for kind in kinds]
        total = sum(params)
        dense = [outline.part_replaced(kind) if scheme.blend else 0 for kind in kinds]
        trains_dense = scheme.blend == "trainable"
        trained = [own + (beside if trains_dense else 0) for own, beside in zip(params, dense, strict=True)]
        optimizer = sum(
            outline.part_moments_bytes(kind, scheme.eight_bit_moments, trains_dense)
            for kind, own in zip(kinds, params, strict=True)
            if own
        )
        weights, gradients = 4 * (total + sum(dense)), 4 * sum(trained)
        tokens = topology.micro_batch_size * outline.seq_len
        sent = tokens * 4 * int(outline.hf_config.hidden_size)  # hidden states travel in float32
        ids = tokens * 8
        buffers = (sent + ids) if stages > 1 else 0  # what is received lands there first
        steps = Steps(
            parts=[self.parts(topology.micro_batch_size)[kind] for kind in kinds],
            gradients=[4 * count for count in trained],
            shared=shared,
            first=stage == 0,
            last=stage == stages - 1,
            hidden=[sent] * (len(kinds) + 1),
            ids=ids,
        )
        intermediates, with_gradients = steps.peak(stage, stages, topology.micro_batches)
        flat = min(gradients, 4 * BUCKET) if topology.replicas > 1 else 0
        peak = weights + optimizer + buffers + max(with_gradients, gradients + flat)
        return StageMemory(stage, kinds, total, weights, gradients, optimizer, intermediates, buffers + flat, peak)


@dataclass(frozen=True)
class Steps:
    """The passes through one stage's parts, in bytes.

    `gradients`: of each part's trained weights. `hidden`: the states before each part, and after the last. `ids`: what
    travels beside them.
    """

    parts: list[PartBytes]
    gradients: list[int]
    shared: bool  # the first part's weights are the last one's: their gradient is there when its backward comes
    first: bool
    last: bool
    hidden: list[int]
    ids: int

    def peak(self, stage: int, stages: int, micro_batches: int) -> tuple[int, int]:
        """The most that activations take, and that activations and gradients take together."""
        activations = both = 0
        for forward, in_flight, done in set(_passes(stage, stages, micro_batches)):
            for taken, made in self._levels(forward, in_flight, done):
                activations, both = max(activations, taken), max(both, taken + made)
        return activations, both

    def _levels(self, forward: bool, in_flight: int, done: int) -> Iterator[tuple[int, int]]:
        """(activations, gradients) at the most, in each part of a pass of the newest of `in_flight` micro-batches.

        `done`: micro-batches that went through before, 2 for more. With one, the gradients of all weights
        are there.
        """
        ready = done > 0
        kept = sum(part.kept for part in self.parts)
        received, sent = 0 if self.first else self.hidden[0], 0 if self.last else self.hidden[-1]
        # Between its passes a micro-batch's inputs and outputs stay in DeepSpeed's hands, the inputs twice.
        held = 2 * self.ids + received + sent
        level = in_flight * held + (in_flight - 1) * kept
        if self.last and not self.first:
            # DeepSpeed holds the losses of the two newest before, and so their inputs and those' gradients.
            level += 2 * received * (done if forward else min(done, 1))
        if forward:
            level -= sent  # its output is still to come
            for i, part in enumerate(self.parts):
                given = 0 if self.first and i == 0 else self.hidden[i]
                yield level + given + part.forward, sum(self.gradients) if ready else 0
                level += part.kept
            return
        level += kept
        made = 0
        for i in reversed(range(len(self.parts))):
            part = self.parts[i]
            there = ready or (self.shared and i == 0)
            # The last part's output is the loss, or its gradient lies where it was received.
            given = 0 if i == len(self.parts) - 1 else self.hidden[i + 1]
            yield (
                level + given + (part.backward if there else part.first_backward),
                (sum(self.gradients) if ready else made),
            )
            level -= part.kept
            made += self.gradients[i]


def _passes(stage: int, stages: int, micro_batches: int) -> Iterator[tuple[bool, int, int]]:
    """(forward or backward, micro-batches in flight with this one, those done before or 2 for more), in order."""
    begun = min(micro_batches, stages - stage)
    for i in range(begun):
        yield True, i + 1, 0
    for done in range(micro_batches):
        yield False, begun - done, min(done, 2)
        if begun < micro_batches:
            begun += 1
            yield True, begun - done - 1, min(done + 1, 2)


def _own(kinds: list[str], tied: bool) -> list[str]:
    """The kinds whose parameters a stage holds: a tied head where its embedding is elsewhere."""
    return [kind for kind in kinds if not (tied and kind == "head" and "embedding" in kinds)]
