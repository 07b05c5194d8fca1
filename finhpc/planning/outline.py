"""An outline of a model for planning: its parts in order, and the parameters of each kind of part.

All blocks of a model are alike, so a single one is built, on the meta device, for any number of layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from finhpc.lowrank.layers import LowRank, is_factor
from finhpc.lowrank.sltrain import SparseLinear
from finhpc.models.families.registry import skeleton, with_blocks
from finhpc.models.pipeline import estimated_cost, is_tied, parts_of
from finhpc.models.schedule import schedule_borders
from finhpc.settings.training import Optimizer, Recompute, Schedule
from finhpc.training.optimizers.registry import OPTIMIZERS
from finhpc.training.optimizers.stage import product_operations, state_bytes

Stages = list[list[str]]  # kinds of the parts of each stage
Matrix = tuple[int, int]  # (vectors, their length): outputs and inputs of a layer, rows of an embedding

PAPER_NAMES = {
    "embed_tokens": "W^E",
    "wte": "W^E",
    "input_layernorm": "RMSNorm",
    "post_attention_layernorm": "RMSNorm",
    "q_proj": "W^Q",
    "k_proj": "W^K",
    "v_proj": "W^V",
    "o_proj": "W^O",
    "up_proj": "W^U",
    "gate_proj": "W^G",
    "down_proj": "W^D",
    "lm_head": "W^H",
    "c_attn": "W^Q, W^K, W^V",
    "attn.c_proj": "W^O",
    "c_fc": "W^U",
    "mlp.c_proj": "W^D",
}


@dataclass(frozen=True)
class Weights:
    """The parameters of one module, which occurs `count` times in a model: a row of Table II."""

    name: str
    kind: str  # of its part
    count: int
    matrices: tuple[Matrix, ...]
    vectors: int  # elements of norms and biases
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # of its parameters, by Hugging Face name with * for the block
    sparse: int = 0  # entries of SLTrain's S

    @property
    def one(self) -> int:
        return sum(a * b for a, b in self.matrices) + self.vectors + self.sparse

    @property
    def multiplied(self) -> tuple[Matrix, ...]:
        """The matrices that a token is multiplied by: of SLTrain the W that is made of A, B and S."""
        return ((self.matrices[1][0], self.matrices[0][1]),) if self.sparse else self.matrices

    @property
    def made(self) -> int:
        """Multiplications of B A in SLTrain's W."""
        return self.replaced * self.matrices[1][1] if self.sparse else 0

    @property
    def total(self) -> int:
        return self.count * self.one

    @property
    def replaced(self) -> int:
        """Parameters of the dense matrix that a low-rank pair replaces (A's inputs by B's outputs); 0 if it is none."""
        if len(self.matrices) != 2:
            return 0
        a, b = self.matrices
        return (a[0] if self.kind == "embedding" else a[1]) * b[0]

    @property
    def paper_name(self) -> str | None:
        ends = (ending for ending in PAPER_NAMES if self.name == ending or self.name.endswith("." + ending))
        return next((PAPER_NAMES[ending] for ending in ends), None)

    def moments_bytes(self, optimizer: Optimizer, dense_too: bool = False) -> int:
        """Bytes of the optimizer's state for one module; `dense_too`: also of the dense matrix that a pair replaces."""
        shapes = list(self.shapes)
        if dense_too and self.replaced:
            shapes.append((f"{self.name}.W", (self.matrices[1][0], self.replaced // self.matrices[1][0])))
        return state_bytes(shapes, optimizer)

    def stored_bytes(self, bits: int) -> int:
        """Bytes of one module at 16, 8 or 4 bits, in section V.B's per-vector scheme.

        Every vector has a float32 scale and zero point; norms and biases have 16 bits. At 4 bits a byte has two
        weights. SLTrain's layers are stored as W.
        """
        if bits == 16:
            return 2 * self.one
        return 2 * self.vectors + sum(rows * (-(-length * bits // 8) + 8) for rows, length in self.multiplied)


@dataclass(frozen=True)
class Outline:
    """A model's parts, their parameters and costs. `kinds`: the kind of every part, in the order data flows."""

    hf_config: Any
    seq_len: int
    recompute: Recompute
    kinds: list[str]
    weights: list[Weights]  # a tied head has none
    operations: dict[str, float]  # kind -> multiplications per token, which balance the stages
    row: list[Any]  # the parts themselves
    tied: bool
    fused: bool = False  # attention never stores all its scores, so there is nothing to recompute

    @property
    def params(self) -> int:
        return sum(weights.total for weights in self.weights)

    @property
    def replaced(self) -> int:
        """Parameters of the dense matrices that low-rank pairs replace."""
        return sum(weights.count * weights.replaced for weights in self.weights)

    def stored_bytes(self, bits: int) -> int:
        """Bytes of the whole model at 16, 8 or 4 bits."""
        return sum(weights.count * weights.stored_bytes(bits) for weights in self.weights)

    def part_params(self, kind: str) -> int:
        """Parameters of one part of that kind; a tied head counts the embedding's matrix, which its stage copies."""
        return sum(weights.one for weights in self._of_part(kind))

    def part_replaced(self, kind: str) -> int:
        """Parameters of the dense matrices that the pairs of one part of that kind replace."""
        return sum(weights.replaced for weights in self.weights if weights.kind == kind)

    def taken(self, optimizer: Optimizer) -> int:
        """Parameters for which the optimizer has a rule; AdamW updates the others."""
        takes = OPTIMIZERS[optimizer.name].takes
        return sum(w.count * prod(shape) for w in self.weights for name, shape in w.shapes if takes(name, shape))

    def moments_bytes(self, optimizer: Optimizer) -> int:
        """Bytes of the optimizer's state for the whole model."""
        return sum(weights.count * weights.moments_bytes(optimizer) for weights in self.weights)

    def part_moments_bytes(self, kind: str, optimizer: Optimizer, dense_too: bool) -> int:
        """Bytes of the optimizer's state for one part of that kind."""
        return sum(weights.moments_bytes(optimizer, dense_too) for weights in self._of_part(kind))

    def part_optimizer_operations(self, kind: str, optimizer: Optimizer) -> float:
        """Operations of the matrix products in a step of the optimizer for one part of that kind."""
        return product_operations((dict(weights.shapes) for weights in self._of_part(kind)), optimizer)

    def part_bytes(self, kind: str, bits: int) -> int:
        """Bytes of one part of that kind at 16, 8 or 4 bits."""
        return sum(weights.stored_bytes(bits) for weights in self._of_part(kind))

    def _of_part(self, kind: str) -> list[Weights]:
        owner = "embedding" if kind == "head" and self.tied else kind
        return [weights for weights in self.weights if weights.kind == owner]

    def stages(
        self,
        workers: int,
        costs: Mapping[str, float] | None = None,
        schedule: Schedule = "1f1b",
        micro_batches: int = 1,
    ) -> Stages:
        """The kinds of each stage's parts, balanced by the `costs` of each kind, by default counted operations."""
        costs = costs or self.operations
        borders = schedule_borders(self.row, [costs[kind] for kind in self.kinds], schedule, workers, micro_batches)
        return [self.kinds[a:b] for a, b in pairwise(borders)]


def outline_of(hf_config: Any, seq_len: int, recompute: Recompute = "none", fused: bool = False) -> Outline:
    """The outline of a model; raises `ConfigError` naming every layer that its rank does not fit."""
    single = with_blocks(hf_config, 1)
    model, row = skeleton(single, recompute), parts_of(hf_config, recompute)
    weights: list[Weights] = []
    costs: dict[str, float] = {}
    tied = is_tied(hf_config)
    for part in parts_of(single, recompute):
        costs[part.kind] = estimated_cost(part, model, seq_len)
        if tied and part.kind == "head":
            continue
        for name, module in zip(part.names, part.modules(model), strict=True):
            count = hf_config.num_hidden_layers if part.in_block else 1
            weights += _weights_of(name, module, part.kind, count)
    return Outline(hf_config, seq_len, recompute, [part.kind for part in row], weights, costs, row, tied, fused)


def _weights_of(name: str, module: nn.Module, kind: str, count: int) -> list[Weights]:
    rows = []
    for sub_name, sub in module.named_modules():
        if is_factor(module, sub_name):
            continue  # counted with its low-rank layer
        named = dict(sub.named_parameters(recurse=isinstance(sub, LowRank)))
        if own := list(named.values()):
            transposed = isinstance(sub, Conv1D)  # stored (in, out)
            shapes = [tuple(p.shape) for p in own if p.dim() == 2]
            matrices = tuple((b, a) if transposed else (a, b) for a, b in shapes)
            sparse = sub.S.numel() if isinstance(sub, SparseLinear) else 0
            vectors = sum(p.numel() for p in own if p.dim() != 2) - sparse
            full = re.sub(r"\.\d+\.", ".*.", f"{name}.{sub_name}" if sub_name else name)
            parameters = tuple((f"{full}.{key}", tuple(p.shape)) for key, p in named.items())
            rows.append(Weights(full, kind, count, matrices, vectors, parameters, sparse))
    return rows
