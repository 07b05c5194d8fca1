"""The memory of each pipeline stage: parameters, gradients, optimizer, intermediate variables.

There are two schemes, both with 16 bytes per parameter by default:

- `finhpc`: its own engine, with float32 weights and gradients, what the optimizer keeps (AdamW: two moments),
  and method 3's W while they exist. The peak follows the engine's passes in their order (with 1f1b stage s of N has
  min(M, N - s) micro-batches in flight). DeepSpeed adds its buffers. Replicas may divide the moments. What they send
  together is copied: gradients on CPUs, small weights if moments are divided.
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
from finhpc.models.schedule import ideal_utilization, passes, stages_of
from finhpc.planning import paper
from finhpc.planning.fake_passes import PartBytes, count_parts
from finhpc.planning.outline import Outline, Stages
from finhpc.settings.estimate import EstimateConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.training import Optimizer, Precision, Schedule, TrainingConfig
from finhpc.training.workers.replicas import BUCKET_BYTES

IN_FLIGHT = 2  # buckets that are sent at a time, of `finhpc.training.workers.replicas`
AHEAD = 3  # micro-batches of the last stage at whose peak the next inputs may have arrived, if there are more
EXCHANGED = 2  # hidden states of dualpipev that are on their way to or from a worker


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
    optimizer: Optimizer = field(default_factory=Optimizer)  # finhpc's

    @staticmethod
    def of(config: PretrainConfig, cuda: bool) -> Scheme:
        """The scheme of a run; the paper's has neither method 3's W nor another optimizer than AdamW."""
        precision, method = config.train.precision, config.method
        if isinstance(config, EstimateConfig) and config.estimate.scheme == "paper":
            return Scheme("paper", precision, 16, cuda, config.estimate.weight_bits, config.estimate.zero_stage)
        blend = method.blend_weight if method.kind == BLEND else None
        bits = config.quantization.training_bits
        return Scheme("finhpc", precision, bits, cuda, blend=blend, optimizer=config.optimizer)

    def fused(self, seq_len: int) -> bool:
        """Whether attention is torch's fused kernel, which never stores all scores: on GPUs and for long samples."""
        return self.name == "finhpc" and (self.cuda or seq_len > LONGEST)


@dataclass(frozen=True)
class Topology:
    """Pipeline stages and replicas; `micro_batches` are per step and replica. dualpipev has 2 x stages stages.

    `shard_optimizer`: the replicas divide the optimizer's state.
    """

    stages: int
    replicas: int
    micro_batch_size: int
    micro_batches: int
    schedule: Schedule = "1f1b"
    shard_optimizer: bool = False

    @staticmethod
    def of(config: TrainingConfig) -> Topology:
        given = config.parallel
        sizes = given.stages, given.replicas, given.micro_batch_size, given.micro_batches
        return Topology(*sizes, given.schedule, given.shard_optimizer)

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
        """The ideal one: M/(N+M-1) for 1f1b, the paper's section IV.B."""
        return ideal_utilization(self.schedule, self.stages, self.micro_batches)


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each worker of one stage (dualpipev: of two).

    `peak_bytes` is less than their sum if they do not peak at the same time.
    """

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
        """The memory of every worker of a pipeline, cut as in `cut` or else by counted operations."""
        cut = cut or self.outline.stages(topology.stages, None, topology.schedule, topology.micro_batches)
        if self.scheme.name == "paper":
            return [self._paper_stage(i, kinds, topology) for i, kinds in enumerate(cut)]
        workers = enumerate(stages_of(topology.schedule, topology.stages))
        return [self._finhpc_worker(i, [cut[stage] for stage in stages], topology) for i, stages in workers]

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

    def _finhpc_worker(self, worker: int, stages: Stages, topology: Topology) -> StageMemory:
        outline, scheme = self.outline, self.scheme
        kinds = [kind for stage in stages for kind in stage]
        shared = outline.tied and {"embedding", "head"} <= set(kinds)  # one matrix, at both ends
        params = {kind: 0 if shared and kind == "embedding" else outline.part_params(kind) for kind in set(kinds)}
        dense = {kind: outline.part_replaced(kind) if scheme.blend else 0 for kind in set(kinds)}
        trains_dense = scheme.blend == "trainable"
        trained = {kind: params[kind] + (dense[kind] if trains_dense else 0) for kind in set(kinds)}
        optimizer = sum(
            outline.part_moments_bytes(kind, scheme.optimizer, trains_dense) for kind in kinds if params[kind]
        )
        tokens = topology.micro_batch_size * outline.seq_len
        width = int(outline.hf_config.hidden_size)
        sent = tokens * width * (2 if scheme.precision == "bf16-weights" else 4)
        ids = tokens * 8
        buffers = (sent + ids) if topology.stages > 1 else 0  # received tensors land there first
        if topology.stages > 1 and topology.schedule == "1f1b" and not scheme.cuda:
            if worker < topology.stages - 1:
                buffers += 2 * sent  # places for the next gradients
            elif topology.micro_batches <= AHEAD:
                buffers = 0  # nothing more arrives at the peak
        steps = [
            Steps(
                parts=[self.parts(topology.micro_batch_size)[kind] for kind in stage],
                gradients=[4 * trained[kind] for kind in stage],
                hidden=[sent] * (len(stage) + 1),
                ids=ids,
                cuda=scheme.cuda,
                shared=shared and stage[0] == "embedding",
            )
            for stage in stages
        ]
        total = sum(params[kind] for kind in kinds)
        weights = 4 * (total + sum(dense[kind] for kind in kinds))
        derived = sum(part.derived for stage in steps for part in stage.parts)
        return worker_memory(steps, worker, topology, kinds, total, weights, optimizer, buffers, derived)


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

    def stored(self, first: bool, last: bool) -> int:
        """Bytes between the passes of a micro-batch: what its backward pass needs, its inputs, twice, and outputs."""
        hidden = (0 if first else self.hidden[0]) + (0 if last else self.hidden[-1])
        return 2 * self.ids + hidden + sum(part.kept for part in self.parts)

    def levels(self, first: bool, last: bool, forward: bool, in_flight: int, done: int) -> Iterator[tuple[int, int]]:
        """The peak of (activations, gradients) in each part, during a pass of the newest of `in_flight` micro-batches.

        `first`, `last`: whether it is that stage. `done`: micro-batches that finished before, where 2 stands for more.
        After one, all gradients exist.
        """
        ready = done > 0
        kept = sum(part.kept for part in self.parts)
        received, sent = 0 if first else self.hidden[0], 0 if last else self.hidden[-1]
        level = in_flight * self.stored(first, last) - kept
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


def worker_memory(
    steps: list[Steps],
    worker: int,
    topology: Topology,
    kinds: list[str],
    params: int,
    weights: int,
    optimizer: int,
    buffers: int,
    other: int = 0,
) -> StageMemory:
    """The memory of a worker with the stages `steps`.

    `buffers`: where received tensors land; `other`: what exists all the time.
    """
    numbers = stages_of(topology.schedule, topology.stages)[worker]
    last = len(numbers) * topology.stages - 1
    activations = both = 0  # the peak of activations, and of activations and gradients together
    for this, forward, in_flight, done in set(_states(worker, topology)):
        others = [i for i in range(len(steps)) if i != this]
        stored = sum(in_flight[i] * steps[i].stored(numbers[i] == 0, numbers[i] == last) for i in others)
        present = sum(sum(steps[i].gradients) for i in others if done[i])
        if others:
            stored += EXCHANGED * steps[this].hidden[0]
        ends = numbers[this] == 0, numbers[this] == last
        for level, own in steps[this].levels(*ends, forward, in_flight[this], done[this]):
            activations, both = max(activations, stored + level), max(both, stored + level + present + own)
    gradients = sum(sum(stage.gradients) for stage in steps)
    optimizer = -(-optimizer // topology.optimizer_shares)
    flat = 0  # copies of what replicas send together
    if topology.replicas > 1 and not steps[0].cuda:
        flat = gradients  # gloo copies gradients as soon as they are there
    elif topology.optimizer_shares > 1:
        flat = min(gradients, IN_FLIGHT * BUCKET_BYTES)
    peak = weights + optimizer + buffers + other + max(both, gradients + flat)
    return StageMemory(worker, kinds, params, weights, gradients, optimizer, activations, buffers + flat, peak)


def _states(worker: int, topology: Topology) -> Iterator[tuple[int, bool, tuple[int, ...], tuple[int, ...]]]:
    """(which of the worker's stages, is forward, in flight, done before) of each pass, in order.

    Micro-batches in flight, with this one, and those done before (at most 2; of dualpipev, which drops each loss after
    its backward pass, 1) are counted for each stage.
    """
    stages = stages_of(topology.schedule, topology.stages)[worker]
    in_flight, done = [0] * len(stages), [0] * len(stages)
    for stage, forward in passes(topology.schedule, topology.stages, worker, topology.micro_batches):
        this = stages.index(stage)
        in_flight[this] += forward
        yield this, forward, tuple(in_flight), tuple(min(count, 3 - len(stages)) for count in done)
        if not forward:
            in_flight[this] -= 1
            done[this] += 1
