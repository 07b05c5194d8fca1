"""The memory of each pipeline stage: parameters, gradients, optimizer, intermediate variables.

There are two schemes, both with 16 bytes per parameter by default:

- `finhpc`: its own engine, with float32 weights, gradients and AdamW's two moments (in 8 bits if the run sets that),
  and method 3's W while they exist. The peak follows the engine's passes in order (one forward, one backward: stage
  s of N has min(M, N - s) micro-batches in flight). DeepSpeed adds its buffers. Replicas may divide the moments. What
  they send together is copied: gradients on CPUs, small weights if moments are divided.
- `paper`: Table III's mixed precision, with 16-bit weights and gradients, and an optimizer of 12 bytes (a float32
  copy of the weights and two moments), divided by ZeRO over the replicas. The total is the sum of the four, as in
  the paper.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from finhpc.lowrank.registry import BLEND
from finhpc.models.attention import LONGEST
from finhpc.models.families.registry import with_blocks
from finhpc.planning import paper
from finhpc.planning.fake_passes import PartBytes, count_parts
from finhpc.planning.outline import Outline, Stages
from finhpc.settings.estimate import EstimateConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.training import Precision, TrainingConfig
from finhpc.training.workers.replicas import BUCKET_BYTES

IN_FLIGHT = 2  # buckets that are sent at a time, of `finhpc.training.workers.replicas`


@dataclass(frozen=True)
class Scheme:
    """The precision of each kind of number. `zero_stage` 1 divides the optimizer, 2 also gradients, 3 also weights."""

    name: Literal["finhpc", "paper"] = "finhpc"
    precision: Precision = "fp32"
    training_bits: int = 16  # finhpc's: of weights that are rounded in training
    cuda: bool = False
    weight_bits: int = 16  # of the paper's stored weights; its optimizer has them in float32
    zero_stage: int = 0
    blend: Literal["frozen", "trainable"] | None = None  # finhpc's: method 3's W exist next to the factors
    eight_bit_moments: bool = False  # finhpc's: the optimizer is bitsandbytes'

    @staticmethod
    def of(config: PretrainConfig, cuda: bool) -> Scheme:
        """The scheme of a run; the paper's has neither method 3's W nor 8-bit moments."""
        precision, method = config.train.precision, config.method
        if isinstance(config, EstimateConfig) and config.estimate.scheme == "paper":
            return Scheme("paper", precision, 16, cuda, config.estimate.weight_bits, config.estimate.zero_stage)
        blend = method.blend_weight if method.kind == BLEND else None
        eight_bit_moments = config.optimizer.name == "adamw8bit"
        bits = config.quantization.training_bits
        return Scheme("finhpc", precision, bits, cuda, blend=blend, eight_bit_moments=eight_bit_moments)

    def fused(self, seq_len: int) -> bool:
        """Whether attention is torch's fused kernel, which never stores all scores: on GPUs and for long samples."""
        return self.name == "finhpc" and (self.cuda or seq_len > LONGEST)


@dataclass(frozen=True)
class Topology:
    """Pipeline stages and replicas; `micro_batches` are per step and replica.

    `shard_optimizer`: the replicas divide the optimizer's state.
    """

    stages: int
    replicas: int
    micro_batch_size: int
    micro_batches: int
    shard_optimizer: bool = False

    @staticmethod
    def of(config: TrainingConfig) -> Topology:
        parallel = config.parallel
        size, number = parallel.micro_batch_size, parallel.micro_batches
        return Topology(parallel.stages, parallel.replicas, size, number, parallel.shard_optimizer)

    @property
    def workers(self) -> int:
        return self.stages * self.replicas

    @property
    def samples_per_step(self) -> int:
        return self.micro_batch_size * self.micro_batches * self.replicas

    @property
    def optimizer_shares(self) -> int:
        """The replicas among which the optimizer's state is divided."""
        return self.replicas if self.shard_optimizer else 1

    @property
    def utilization(self) -> float:
        """M/(N+M-1), the paper's section IV.B."""
        return self.micro_batches / (self.stages + self.micro_batches - 1)


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each worker of one stage; `peak_bytes` is less than their sum if they do not peak at the same time."""

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
    """The memory of a model under a scheme; counts are cached by micro-batch size."""

    outline: Outline
    scheme: Scheme
    _counted: dict[int, dict[str, PartBytes]] = field(default_factory=dict)

    def parts(self, micro_batch_size: int) -> dict[str, PartBytes]:
        """Kind of part -> its bytes for a micro-batch of that size."""
        outline, scheme, size = self.outline, self.scheme, micro_batch_size
        if size not in self._counted:
            if scheme.name == "paper":
                self._counted[size] = paper.part_bytes(outline, size, outline.recompute)
            else:
                single, seq_len = with_blocks(outline.hf_config, 1), outline.seq_len
                self._counted[size] = count_parts(
                    single,
                    size,
                    seq_len,
                    scheme.precision,
                    scheme.training_bits,
                    outline.recompute,
                    scheme.cuda,
                    scheme.blend,
                )
        return self._counted[size]

    def stages(self, topology: Topology, cut: Stages | None = None) -> list[StageMemory]:
        """The memory of every stage, cut as in `cut` or else by counted operations."""
        cut = cut or self.outline.stages(topology.stages)
        of_stage = self._paper_stage if self.scheme.name == "paper" else self._finhpc_stage
        return [of_stage(i, kinds, topology) for i, kinds in enumerate(cut)]

    def _paper_stage(self, stage: int, kinds: list[str], topology: Topology) -> StageMemory:
        shared = self.outline.tied and "embedding" in kinds and "head" in kinds  # one matrix at both ends
        own = [kind for kind in kinds if not (shared and kind == "head")]
        zero, replicas = self.scheme.zero_stage, topology.replicas
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

    def _finhpc_stage(self, stage: int, kinds: list[str], topology: Topology) -> StageMemory:
        outline, scheme, stages = self.outline, self.scheme, topology.stages
        shared = outline.tied and stages == 1  # one matrix, at both ends of the stage
        params = [0 if shared and kind == "embedding" else outline.part_params(kind) for kind in kinds]
        total = sum(params)
        dense = [outline.part_replaced(kind) if scheme.blend else 0 for kind in kinds]
        trains_dense = scheme.blend == "trainable"
        trained = [own + (replaced if trains_dense else 0) for own, replaced in zip(params, dense, strict=True)]
        optimizer = sum(
            outline.part_moments_bytes(kind, scheme.eight_bit_moments, trains_dense)
            for kind, own in zip(kinds, params, strict=True)
            if own
        )
        tokens = topology.micro_batch_size * outline.seq_len
        width = int(outline.hf_config.hidden_size)
        sent = tokens * width * (2 if scheme.precision == "bf16-weights" else 4)
        ids = tokens * 8
        buffers = (sent + ids) if stages > 1 else 0  # received tensors land there first
        steps = Steps(
            parts=[self.parts(topology.micro_batch_size)[kind] for kind in kinds],
            gradients=[4 * count for count in trained],
            hidden=[sent] * (len(kinds) + 1),
            ids=ids,
            cuda=scheme.cuda,
            shared=shared,
        )
        weights = 4 * (total + sum(dense))
        derived = sum(part.derived for part in steps.parts)
        return steps.memory(stage, topology, kinds, total, weights, optimizer, buffers, derived)


@dataclass(frozen=True)
class Steps:
    """The passes through one stage's parts, in bytes.

    `gradients`: of each part's trained weights. `hidden`: the states before each part, and after the last. `ids`: the
    tokens that travel with them.
    """

    parts: list[PartBytes]
    gradients: list[int]
    hidden: list[int]
    ids: int
    cuda: bool
    shared: bool = False  # the first part's weights are the last's, so their gradient exists before its backward pass

    def memory(
        self,
        stage: int,
        topology: Topology,
        kinds: list[str],
        params: int,
        weights: int,
        optimizer: int,
        buffers: int,
        other: int = 0,
    ) -> StageMemory:
        """The memory of the stage. `buffers`: where received tensors land; `other`: what exists all the time."""
        first, last = stage == 0, stage == topology.stages - 1
        activations = both = 0  # the peak of activations, and of activations and gradients together
        for forward, in_flight, done in set(_passes(stage, topology.stages, topology.micro_batches)):
            for level, present in self._levels(first, last, forward, in_flight, done):
                activations, both = max(activations, level), max(both, level + present)
        gradients = sum(self.gradients)
        optimizer = -(-optimizer // topology.optimizer_shares)
        flat = 0  # copies of what replicas send together
        if topology.replicas > 1 and not self.cuda:
            flat = gradients  # gloo copies gradients as soon as they are there
        elif topology.optimizer_shares > 1:
            flat = min(gradients, IN_FLIGHT * BUCKET_BYTES)
        peak = weights + optimizer + buffers + other + max(both, gradients + flat)
        return StageMemory(stage, kinds, params, weights, gradients, optimizer, activations, buffers + flat, peak)

    def _levels(self, first: bool, last: bool, forward: bool, in_flight: int, done: int) -> Iterator[tuple[int, int]]:
        """The peak of (activations, gradients) in each part, during a pass of the newest of `in_flight` micro-batches.

        `first`, `last`: whether it is that stage. `done`: micro-batches that finished before, where 2 stands for more.
        After one, all gradients exist.
        """
        ready = done > 0
        kept = sum(part.kept for part in self.parts)
        received, sent = 0 if first else self.hidden[0], 0 if last else self.hidden[-1]
        # Between the passes of a micro-batch DeepSpeed stores its inputs, twice, and its outputs.
        stored = 2 * self.ids + received + sent
        level = in_flight * stored + (in_flight - 1) * kept
        if last and not first:
            # DeepSpeed stores the losses of the two micro-batches before, and with them inputs and their gradients.
            level += 2 * received * (done if forward else min(done, 1))
        if forward:
            level -= sent  # its output is still to come
            for i, part in enumerate(self.parts):
                inputs = 0 if first and i == 0 else self.hidden[i]
                yield level + inputs + part.forward, sum(self.gradients) if ready else 0
                level += part.kept
            return
        level += kept
        gradients = 0
        for i in reversed(range(len(self.parts))):
            part = self.parts[i]
            exists = ready or (self.shared and i == 0)
            # The last part's output is the loss, or its gradient is in the buffer that received it.
            output = 0 if i == len(self.parts) - 1 else self.hidden[i + 1]
            peak = level + output + (part.backward if exists else part.first_backward)
            yield peak, sum(self.gradients) if ready else gradients
            level -= part.kept
            gradients += self.gradients[i]


def _passes(stage: int, stages: int, micro_batches: int) -> Iterator[tuple[bool, int, int]]:
    """(is forward, micro-batches in flight with this one, those done before, at most 2) of each pass, in order."""
    begun = min(micro_batches, stages - stage)
    for i in range(begun):
        yield True, i + 1, 0
    for done in range(micro_batches):
        yield False, begun - done, min(done, 2)
        if begun < micro_batches:
            begun += 1
            yield True, begun - done - 1, min(done + 1, 2)
