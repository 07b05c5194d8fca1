"""Memory and time of a finetuning: a frozen base, adapters that are trained, packs of examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from finhpc.models.families.family import BLOCKS, HALVES
from finhpc.models.lora.model import LoraModel
from finhpc.models.packing.layout import CACHED_LAYOUTS, FIELDS
from finhpc.models.packing.parts import packed_parts
from finhpc.models.pipeline import is_tied
from finhpc.planning.devices import Cluster
from finhpc.planning.fake_packs import AdaptedPart, PackSize, counted_parts
from finhpc.planning.memory import StageMemory, Steps, Topology
from finhpc.planning.step_time import ADAMW_BYTES, Pace, averaging_s, launches

ADAPTED = 3  # times the launches of a part without adapters; measured as `launch_s` was, SmolLM2's shapes


@dataclass(frozen=True)
class FinetunePlan:
    """A finetuning with packs of one size. `layouts`: packs whose layouts are kept, in a long run all that may be."""

    lora_model: LoraModel
    pack: PackSize
    topology: Topology
    cuda: bool = False
    layouts: int = CACHED_LAYOUTS

    @cached_property
    def parts(self) -> list[AdaptedPart]:
        return counted_parts(self.lora_model, self.pack, self.cuda)

    @cached_property
    def cut(self) -> list[list[AdaptedPart]]:
        borders = self.lora_model.borders(self.topology.stages)
        return [self.parts[a:b] for a, b in pairwise(borders)]

    @property
    def trained(self) -> int:
        return sum(part.trained for part in self.parts)

    @property
    def weights_bytes(self) -> int:
        """Of the whole base, as one stage holds it."""
        return sum(part.weights_bytes for part in self.parts)

    def stages(self) -> list[StageMemory]:
        return [self._stage(i, parts) for i, parts in enumerate(self.cut)]

    def _stage(self, stage: int, parts: list[AdaptedPart]) -> StageMemory:
        topology = self.topology
        first, last = stage == 0, stage == topology.stages - 1
        trained = sum(part.trained for part in parts)
        weights = sum(part.weights_bytes for part in parts)
        if last and not first and is_tied(self.lora_model.hf_config):
            weights += self.parts[0].weights_bytes  # a stage without the embedding reads the matrix for its head
        gradients, optimizer = 4 * trained, 8 * trained
        ids = 8 * FIELDS * self.pack.tokens
        hidden = [part.given for part in parts] + [parts[-1].gives]
        steps = Steps(
            parts=[part.passes for part in parts],
            gradients=[4 * part.trained for part in parts],
            shared=False,
            first=first,
            last=last,
            hidden=hidden,
            ids=ids,
        )
        intermediates, with_gradients = steps.peak(stage, topology.stages, topology.micro_batches)
        # What is received lands in a buffer first: states and their pack going up, gradients coming down.
        received = (0 if first else hidden[0] + ids) + (0 if last else hidden[-1])
        flat = gradients if topology.replicas > 1 else 0
        layouts = self.layouts * self._layout_bytes() if any(part.kind in BLOCKS for part in parts) else 0
        peak = weights + 4 * trained + optimizer + received + layouts + max(with_gradients, gradients + flat)
        kinds = [part.kind for part in parts]
        return StageMemory(
            stage, kinds, trained, weights + 4 * trained, gradients, optimizer, intermediates, received + flat, peak
        )

    def _layout_bytes(self) -> int:
        """Of the layout that is kept of a pack: rotary positions, and rows."""
        config, tokens = self.lora_model.hf_config, self.pack.tokens
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rotary = 2 * size * self.lora_model.dtype.itemsize if hasattr(config, "rope_parameters") else 0
        return tokens * (rotary + 8 + 8 + 1)

    # -- time -------------------------------------------------------------------------------

    def operations(self, parts: Sequence[AdaptedPart] | None = None) -> float:
        """Operations (two a multiplication) of one pack's forward and backward pass through `parts`, all by default.

        A frozen matrix is multiplied once each way, an adapter once forward and twice back; attention's products
        twice as often back as forward. `recompute` runs blocks' forward passes, or q k^T, once more.
        """
        recompute, width = self.lora_model.recompute, int(self.lora_model.hf_config.hidden_size)
        total = 0.0
        for part in self.parts if parts is None else parts:
            before, after = (size / (width * self.lora_model.dtype.itemsize) for size in (part.given, part.gives))
            frozen, adapters = 2.0 * self._frozen(part, (before, after)), 2.0 * before * part.trained
            scores = 2.0 * 2.0 * width * self.pack.pairs if part.kind in ("attention", "block") else 0.0
            forward = frozen + adapters + scores
            total += 2 * frozen + 3 * adapters + 3 * scores
            total += forward if part.kind == "block" else 0.0
            total += scores / 2 if part.kind == "attention" and recompute == "attention" else 0.0
        return total

    def _frozen(self, part: AdaptedPart, rows: tuple[float, float] = (1.0, 1.0)) -> float:
        """Multiplications of a part's frozen matrices for so many rows before and after it.

        The last block's attention gives fewer rows than it is given, and its second half has those alone.
        """
        halves = HALVES if part.kind == "block" else (part.kind,)
        places = {HALVES[1]: rows[1]} if part.kind == "block" else {}
        return sum(places.get(kind, rows[0]) * self._sizes[kind] for kind in halves)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """Kind of part (blocks by their halves) -> weights of its matrices that are multiplied."""
        found = {}
        for part in packed_parts(self.lora_model.hf_config):
            if part.kind not in found:
                modules = part.modules(self.lora_model.weights.skeleton)
                matrices = sum(p.numel() for m in modules for p in m.parameters() if p.dim() == 2)
                found[part.kind] = matrices if part.in_block or part.kind == "head" else 0
        return found

    def _unpacked_bytes(self, parts: Sequence[AdaptedPart]) -> float:
        """Bytes moved to turn quantised matrices into floats: codes read, floats written and read, for each product."""
        if self.lora_model.quantization.bits == 16:
            return 0.0
        times = 3 if self.lora_model.recompute == "full" else 2
        floats = self.lora_model.dtype.itemsize
        each = [part.weights_bytes + 2 * floats * self._frozen(part) for part in parts if part.kind in BLOCKS]
        return float(times * sum(each))

    def pace(self, cluster: Cluster) -> Pace:
        """Seconds of a step on a cluster, of whose matrix rate training reaches a share."""
        device, topology = cluster.device, self.topology
        rate, memory = device.rate(cluster.precision) * cluster.reached, device.memory_gb_per_s * 1e9
        one_node = topology.workers <= cluster.devices_per_node
        link = (device.link_gb_per_s if one_node else device.network_gb_per_s) * 1e9
        seconds = []
        for i, parts in enumerate(self.cut):
            sent = (parts[0].given if i else 0) + (parts[-1].gives if i < topology.stages - 1 else 0)
            least = [ADAPTED * launches(part.kind) * device.launch_s for part in parts]
            compute = sum(max(self.operations([p]) / rate, s) for p, s in zip(parts, least, strict=True))
            compute += self._unpacked_bytes(parts) / memory
            seconds.append(compute + 2 * sent / link)
        largest = max(sum(part.trained for part in parts) for parts in self.cut)
        exchange = averaging_s(largest, topology.replicas, device, cluster.devices_per_node)
        return Pace(seconds, exchange, largest * ADAMW_BYTES / memory, topology.micro_batches)
