"""The layers of a model in an ONNX graph: weights first, as the export yields them, then the nodes that use them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finhpc.errors import ConfigError
from finhpc.lowrank.cola import ColaLinear
from finhpc.lowrank.layers import LowRankEmbedding, LowRankLinear
from finhpc.models.export.onnx_graph import BLOCKS, MICROSOFT, Graph, quantized
from finhpc.models.export.runtime import Layers
from finhpc.models.families.registry import family_of

KINDS = (LowRankLinear, ColaLinear)  # of low-rank layers
INT8 = 4  # accuracy_level of MatMulNBits: activations are rounded to 8 bits per block, which is its fast kernel


def block_of(columns: int, bits: int) -> int:
    """Return how many numbers of a row share a scale."""
    return next((block for block in BLOCKS[bits] if columns % block == 0), BLOCKS[bits][-1])


class OnnxLayers:
    """Linear layers, embeddings and norms of a model by their Hugging Face names.

    `bits`: of matrices. `adapted`: names of layers that add an adapter's B A x; the factors are inputs of the graph
    with an empty default, so that a run without an adapter computes nothing for them.
    """

    def __init__(self, graph: Graph, model: Layers, bits: int, adapted: Mapping[str, tuple[int, int]]) -> None:
        self.graph, self.model, self.bits, self.adapted = graph, model, bits, adapted
        self.modules = dict(model.target.named_modules())
        self._columns: dict[str, int] = {}  # of quantized matrices
        self._rows: dict[str, int] = {}

    # -- weights ----------------------------------------------------------------------------

    def store(self, tensors: dict[str, Tensor]) -> None:
        """Store the tensors of one layer."""
        for full, tensor in tensors.items():
            name = full.removesuffix(".weight")
            if tensor.dim() < 2 or name == full:
                self._store_vector(full, tensor)
                continue
            rows = tensor.T if name in self.model.transposed else tensor
            if self.is_quantized(name):
                self._store_blocks(name, rows)
            elif self._is_table(name):
                self.graph.weight(full, self._narrow(rows))
            else:
                for i, block in enumerate(self._blocks(name, rows)):
                    self.graph.weight(f"{name}.{i}", self._narrow(block.T))

    def is_quantized(self, name: str) -> bool:
        """Return whether a matrix is stored in few bits: all but positions, and tables without rows of whole blocks."""
        if self.bits == 16 or name == family_of(self.model.target_config).positions:
            return False
        module = self.modules[name]
        return not isinstance(module, nn.Embedding) or module.weight.shape[1] % 32 == 0

    def bits_of(self, name: str) -> int:
        """Return the bits of a matrix: 8 for those of the embedding and the head where others have 4."""
        family = family_of(self.model.target_config)
        at_an_end = any(f"{name}.".startswith(f"{end}.") for end in (family.embedding, family.head))
        return 8 if self.bits == 4 and at_an_end else self.bits

    def _is_table(self, name: str) -> bool:
        return isinstance(self.modules[name], nn.Embedding)

    def _blocks(self, name: str, rows: Tensor) -> tuple[Tensor, ...]:
        """Return the pairs' own rows of the B of a low-rank layer that computes several blocks."""
        parent = self.modules.get(name.rpartition(".")[0])
        several = isinstance(parent, LowRankLinear) and name.endswith(".B")
        return rows.chunk(parent.blocks) if several and isinstance(parent, LowRankLinear) else (rows,)

    def _store_blocks(self, name: str, rows: Tensor) -> None:
        for i, part in enumerate(self._blocks(name, rows)):
            key = name if self._is_table(name) else f"{name}.{i}"
            bits = self.bits_of(name)
            packed, scales = quantized(part, bits, block_of(part.shape[1], bits))
            self._rows[key], self._columns[key] = part.shape
            self.graph.weight(f"{key}.q", packed)
            self.graph.weight(f"{key}.scales", scales)

    def _store_vector(self, name: str, tensor: Tensor) -> None:
        self.graph.weight(name, self._narrow(tensor))

    def _narrow(self, tensor: Tensor) -> Tensor:
        """Return a tensor that is not quantized in 16 bits if the matrices are, unless it exceeds float16."""
        if self.bits == 16:
            return tensor
        half = tensor.half()
        return half if bool(torch.isfinite(half).all()) else tensor

    # -- nodes ------------------------------------------------------------------------------

    def embedding(self, name: str, ids: str) -> str:
        """Return the rows of a table for (batch, seq) ids, in float32."""
        graph, module = self.graph, self.modules[name]
        if isinstance(module, LowRankEmbedding):
            return self._matmul(f"{name}.B.0", self.embedding(f"{name}.A", ids), module.rank)
        if not self.is_quantized(name):
            rows = graph.node("Gather", f"{name}.weight", ids, axis=0)
            return rows if graph.kinds[f"{name}.weight"] == torch.float32 else graph.node("Cast", rows, to=1)
        width, bits = self._columns[name], self.bits_of(name)
        shape = graph.numbers(f"{name}.shape", [self._rows[name], width * bits // 8])
        packed = graph.node("Reshape", f"{name}.q", shape)
        inputs = (packed, ids, graph.widened(f"{name}.scales"))
        how: dict[str, Any] = {
            "gather_axis": 0,
            "quantize_axis": 1,
            "block_size": block_of(width, bits),
            "bits": bits,
        }
        return graph.node("GatherBlockQuantized", *inputs, domain=MICROSOFT, **how)

    def linear(self, name: str, x: str) -> str:
        """Return what a linear layer, dense or low-rank, computes of x (batch, seq, in)."""
        module: Any = self.modules[name]
        if isinstance(module, LowRankLinear):
            y, bias = self._pairs(name, module, x), f"{name}.B.bias"
        else:
            y, bias = self._matmul(f"{name}.0", x, _columns(module)), f"{name}.bias"
        if bias in self.graph.kinds:
            y = self.graph.node("Add", y, self.graph.widened(bias))
        if name in self.adapted:
            narrow = self.graph.node("MatMul", x, f"{name}.lora_A")
            y = self.graph.node("Add", y, self.graph.node("MatMul", narrow, f"{name}.lora_B"))
        return y

    def _pairs(self, name: str, module: LowRankLinear, x: str) -> str:
        narrow = self._matmul(f"{name}.A.0", x, module.in_features)
        pieces = self.graph.split(narrow, module.blocks) if module.blocks > 1 else [narrow]
        if isinstance(module, ColaLinear):
            pieces = [self.graph.silu(piece) for piece in pieces]
        wide = [self._matmul(f"{name}.B.{i}", piece, module.rank) for i, piece in enumerate(pieces)]
        return self.graph.node("Concat", *wide, axis=-1) if len(wide) > 1 else wide[0]

    def tied_head(self, table: str, x: str) -> str:
        """Return x times the transposed embedding."""
        if self.is_quantized(table):
            return self._matmul(table, x, self._columns[table])
        weight = self.graph.widened(f"{table}.weight")
        return self.graph.node("FusedMatMul", x, weight, domain=MICROSOFT, transB=1)

    def _matmul(self, key: str, x: str, columns: int) -> str:
        if key not in self._columns:
            return self.graph.node("MatMul", x, self.graph.widened(key))
        how: dict[str, Any] = {
            "K": columns,
            "N": self._rows[key],
            "bits": self.bits_of(key),
            "block_size": block_of(columns, self.bits_of(key)),
        }
        inputs = (x, f"{key}.q", self.graph.widened(f"{key}.scales"))
        return self.graph.node("MatMulNBits", *inputs, domain=MICROSOFT, accuracy_level=INT8, **how)

    def layer_norm(self, name: str, x: str, epsilon: float) -> str:
        inputs = (x, self.graph.widened(f"{name}.weight"), self.graph.widened(f"{name}.bias"))
        return self.graph.node("LayerNormalization", *inputs, axis=-1, epsilon=epsilon)

    def rms_norm(self, name: str, x: str, epsilon: float) -> str:
        weight = self.graph.widened(f"{name}.weight")
        return self.graph.node("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=epsilon, stash_type=1)

    def activation(self, name: str, x: str) -> str:
        if name == "silu":
            return self.graph.silu(x)
        if name in ACTIVATIONS:
            return self.graph.node(ACTIVATIONS[name][0], x, **ACTIVATIONS[name][1])
        raise ConfigError(
            f"format=onnx does not fit the activation {name}; it has silu, {', '.join(ACTIVATIONS)}; use --format "
            "merged or native."
        )

    def declare_adapters(self) -> None:
        """Add the factors of adapters to the graph's inputs, with empty defaults."""
        for name, (wide, narrow) in self.adapted.items():
            for key, shape in ((f"{name}.lora_A", ["in", "rank"]), (f"{name}.lora_B", ["rank", "out"])):
                sizes: list[Any] = [narrow, "rank"] if shape[0] == "in" else ["rank", wide]
                self.graph.input(key, 1, sizes)
                self.graph.weight(key, torch.zeros([size if isinstance(size, int) else 0 for size in sizes]))


ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "gelu": ("Gelu", {}),
    "relu": ("Relu", {}),
}


def _columns(module: Any) -> int:
    return int(module.weight.shape[0] if isinstance(module, Conv1D) else module.weight.shape[1])
