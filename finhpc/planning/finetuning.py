"""The costs of a finetuning: a frozen base, trained adapters, packs of examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from finhpc.models.families.parts import BLOCKS, HALVES, LAYER
from finhpc.models.lora.model import LoraModel
from finhpc.models.packed_parts import packed_parts
from finhpc.models.packing.attention import AT_ONCE
from finhpc.models.packing.layout import CACHED_LAYOUTS
from finhpc.models.pipeline import is_tied
from finhpc.planning.devices import Cluster
from finhpc.planning.fake_packs import LoraPart, PackSize, count_lora_parts
from finhpc.planning.memory import StageMemory, Steps, Topology, worker_memory
from finhpc.planning.step_time import Pace, averaging_s, launches, optimizer_s
from finhpc.settings.training import Optimizer
from finhpc.training.optimizers.stage import product_operations, state_bytes

LORA_LAUNCHES = 3  # kernel launches of a part with adapters over one without; measured, with SmolLM2's shapes


@dataclass(frozen=True)
class LoraCosts:
    """The costs of a finetuning with packs of one size. `layouts`: packs whose layouts are cached, all by default.

    The first stage on a GPU caches none: a layout lives as long as its pack is in flight.
    """

    lora_model: LoraModel
    pack: PackSize
    topology: Topology
    cuda: bool = False
    layouts: int = CACHED_LAYOUTS
    part_s: Mapping[str, float] | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)

    @cached_property
    def parts(self) -> list[LoraPart]:
        return count_lora_parts(self.lora_model, self.pack, self.cuda)

    @property
    def kinds(self) -> list[str]:
        return [part.kind for part in self.parts]

    @cached_property
    def cut(self) -> list[list[LoraPart]]:
        borders = self.lora_model.borders(self.topology.stages)
        return [self.parts[a:b] for a, b in pairwise(borders)]

    @property
    def trained(self) -> int:
        """The number of trained parameters."""
        return sum(part.trained for part in self.parts)

    @property
    def weights_bytes(self) -> int:
        """Bytes of the whole base on a single stage."""
        return sum(part.weights_bytes for part in self.parts)

    # -- memory -----------------------------------------------------------------------------

    def stages(self) -> list[StageMemory]:
        return [self._stage(i, parts) for i, parts in enumerate(self.cut)]

    def _stage(self, stage: int, parts: list[LoraPart]) -> StageMemory:
        topology = self.topology
        first, last = stage == 0, stage == topology.stages - 1
        trained = sum(part.trained for part in parts)
        weights = sum(part.weights_bytes for part in parts)
        if last and not first and is_tied(self.lora_model.hf_config):
            weights += self.parts[0].weights_bytes  # a stage without the embedding reads the matrix for its head
        ids = 8 * self.pack.fields * self.pack.tokens
        hidden = [part.input_bytes for part in parts] + [parts[-1].output_bytes]
        steps = Steps(
            parts=[part.passes for part in parts],
            gradients=[4 * part.trained for part in parts],
            hidden=hidden,
            ids=ids,
            cuda=self.cuda,
        )
        # Received tensors land in a buffer first: states and their pack going up, gradients coming down.
        received = (0 if first else hidden[0] + ids) + (0 if last else hidden[-1])
        kept = self.layouts if not (self.cuda and first) else min(self.layouts, topology.stages, topology.micro_batches)
        layouts = kept * self._layout_bytes() if any(part.kind in BLOCKS for part in parts) else 0
        kinds = [part.kind for part in parts]
        weights += 4 * trained
        moments = sum(state_bytes(part.adapters, self.optimizer) for part in parts)
        return worker_memory([steps], stage, topology, kinds, trained, weights, moments, received, layouts)

    def _layout_bytes(self) -> int:
        """Bytes of one pack's cached layout: rotary positions, rows, and on a GPU the mask of a short pack."""
        config, tokens = self.lora_model.hf_config, self.pack.tokens
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rotary = 2 * size * self.lora_model.dtype.itemsize if hasattr(config, "rope_parameters") else 0
        mask = self.lora_model.dtype.itemsize * tokens if self.cuda and tokens <= AT_ONCE else 0
        return tokens * (rotary + mask + 8 + 8 + 1)

    # -- time -------------------------------------------------------------------------------

    def operations_per_step(self) -> float:
        return self.operations() * self.topology.micro_batches * self.topology.replicas

    def operations(self, parts: Sequence[LoraPart] | None = None) -> float:
        """Operations (two per multiplication) of one pack's forward and backward pass through `parts`, default all.

        A frozen matrix is multiplied once each way, an adapter once forward and twice back, attention's products
        twice as often back as forward. `recompute` repeats the forward pass of blocks, or q k^T.
        """
        recompute, width = self.lora_model.recompute, int(self.lora_model.hf_config.hidden_size)
        row_bytes = width * self.lora_model.dtype.itemsize
        total = 0.0
        for part in self.parts if parts is None else parts:
            before, after = part.input_bytes / row_bytes, part.output_bytes / row_bytes
            frozen, adapters = 2.0 * self._frozen(part, (before, after)), 2.0 * before * part.trained
            attends = part.kind in ("attention", "block", LAYER)
            scores = 2.0 * 2.0 * width * self.pack.pairs if attends else 0.0
            forward = frozen + adapters + scores
            total += 2 * frozen + 3 * adapters + 3 * scores
            total += forward if part.kind == "block" else 0.0
            total += scores / 2 if part.kind in ("attention", LAYER) and recompute == "attention" else 0.0
        return total

    def _frozen(self, part: LoraPart, rows: tuple[float, float] = (1.0, 1.0)) -> float:
        """Multiplications of a part's frozen matrices, for the given rows before and after it.

        The attention of the last block returns fewer rows than it receives, and its second half sees only those.
        """
        blocks = HALVES if HALVES[0] in self._matrix_sizes else (LAYER,)
        halves = blocks if part.kind == "block" else (part.kind,)
        after = {HALVES[1]: rows[1]} if part.kind == "block" else {}
        return sum(after.get(kind, rows[0]) * self._matrix_sizes[kind] for kind in halves)

    @cached_property
    def _matrix_sizes(self) -> dict[str, int]:
        """Kind of part (blocks by their halves) -> weights of its matrices that are multiplied."""
        sizes = {}
        for part in packed_parts(self.lora_model.hf_config):
            if part.kind not in sizes:
                modules = part.modules(self.lora_model.weights.skeleton)
                matrices = sum(p.numel() for m in modules for p in m.parameters() if p.dim() == 2)
                sizes[part.kind] = matrices if part.in_block or part.kind == "head" else 0
        return sizes

    def _dequantizing_bytes(self, parts: Sequence[LoraPart]) -> float:
        """Bytes moved to dequantize matrices: for each product, codes are read, and floats written and read."""
        if self.lora_model.quantization.bits == 16:
            return 0.0
        times = 3 if self.lora_model.recompute == "full" else 2
        floats = self.lora_model.dtype.itemsize
        each = [part.weights_bytes + 2 * floats * self._frozen(part) for part in parts if part.kind in BLOCKS]
        return float(times * sum(each))

    def pace(self, cluster: Cluster) -> Pace:
        device, topology = cluster.device, self.topology
        rate, memory = device.rate(cluster.precision) * cluster.reached, device.memory_gb_per_s * 1e9
        link = cluster.link(topology.workers)
        seconds = []
        for i, parts in enumerate(self.cut):
            sent = (parts[0].input_bytes if i else 0) + (parts[-1].output_bytes if i < topology.stages - 1 else 0)
            least = [LORA_LAUNCHES * launches(part.kind) * device.launch_s for part in parts]
            compute = sum(max(self.operations([p]) / rate, s) for p, s in zip(parts, least, strict=True))
            compute += self._dequantizing_bytes(parts) / memory
            seconds.append(compute + 2 * sent / link)
        if (part_s := self.part_s) is not None:
            seconds = [sum(part_s[part.kind] for part in parts) for parts in self.cut]
        trained = [sum(part.trained for part in parts) for parts in self.cut]
        products = [product_operations([dict(p.adapters) for p in parts], self.optimizer) for parts in self.cut]
        shard, per_node = topology.shard_optimizer, cluster.devices_per_node
        exchange = averaging_s(max(trained), topology.replicas, device, per_node, shard)
        steps = (
            optimizer_s(*own, self.optimizer, device, cluster.reached) for own in zip(trained, products, strict=True)
        )
        return Pace(seconds, exchange, max(steps) / topology.optimizer_shares, topology.micro_batches)
