"""Builds an ONNX graph node by node, and writes its weights a tensor at a time to a second file."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DATA = "model.onnx.data"  # a file of its own, because a protobuf message holds at most 2 GB
ALIGNMENT = 64
SMALL = 1024  # bytes of a tensor that stays in the graph, where shapes are computed from it
MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators
BLOCKS = {8: (128, 64, 32), 4: (32,)}  # numbers that share a scale: the largest that divides a row
FLOAT = 1  # onnx.TensorProto.FLOAT
TYPES = {torch.float32: 1, torch.uint8: 2, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}


def quantized(rows: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Return a matrix (out, in) in blocks as MatMulNBits takes them: uint8 (out, blocks, bytes), float16 (out, blocks).

    A number is scale (q - 2^(bits - 1)). In 4 bits the scale makes the entry of largest magnitude -8, as llama.cpp's
    Q4_0 does; in 8 bits it makes that 127, as Q8_0 does. The last block of a row is filled up by zeros.
    """
    padded = F.pad(rows.float(), (0, -rows.shape[1] % block)).unflatten(1, (-1, block))
    largest = padded.gather(2, padded.abs().argmax(2, keepdim=True))
    middle, steps = 1 << (bits - 1), -8.0 if bits == 4 else 127.0
    scales = (largest / steps).half()
    exact = torch.where(scales == 0, torch.ones_like(scales), scales).float()
    q = (padded / exact).round().add(middle).clamp(0, 2 * middle - 1).to(torch.uint8)
    if bits == 4:
        q = q[..., ::2] | (q[..., 1::2] << 4)
    return q, scales.squeeze(2)


class Graph:
    """Nodes, and weights that go into the file `DATA` of `folder` when they are added; a context manager.

    Values are named by strings. Everything is computed in float32, the type that ONNX Runtime's kernels for the CPU
    compute fastest; weights stored in fewer bits are widened when the model is opened, unless an operator takes them.
    """

    def __init__(self, folder: Path) -> None:
        import onnx

        self.onnx, self.folder = onnx, folder
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.kinds: dict[str, torch.dtype] = {}  # of stored weights
        self._widened: dict[str, str] = {}

    def __enter__(self) -> Graph:
        self._data = open(self.folder / DATA, "wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._data.close()

    # -- values -----------------------------------------------------------------------------

    def input(self, name: str, kind: int, shape: list[Any]) -> str:
        self.inputs.append(self.onnx.helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, shape: list[Any]) -> str:
        self.outputs.append(self.onnx.helper.make_tensor_value_info(name, FLOAT, shape))
        return name

    def weight(self, name: str, tensor: Tensor) -> str:
        """Store a tensor in its own type."""
        tensor = tensor.detach().contiguous()
        raw = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        content = raw.numpy().data.cast("B") if tensor.numel() else memoryview(b"")
        proto = self.onnx.TensorProto(name=name, data_type=TYPES[tensor.dtype], dims=tensor.shape)
        if len(content) <= SMALL:
            proto.raw_data = bytes(content)
        else:
            self._data.write(bytes(-self._data.tell() % ALIGNMENT))
            proto.data_location = self.onnx.TensorProto.EXTERNAL
            for key, value in (("location", DATA), ("offset", self._data.tell()), ("length", len(content))):
                proto.external_data.add(key=key, value=str(value))
            self._data.write(content)
        self.weights.append(proto)
        self.kinds[name] = tensor.dtype
        return name

    def numbers(self, name: str, values: list[int]) -> str:
        """Return a constant of int64, stored once."""
        return name if name in self.kinds else self.weight(name, torch.tensor(values))

    def widened(self, name: str) -> str:
        """Return a stored weight in float32; ONNX Runtime widens it once, when it opens the model."""
        if self.kinds[name] == torch.float32:
            return name
        if name not in self._widened:
            self._widened[name] = self.node("Cast", name, to=FLOAT, out=f"{name}.float")
        return self._widened[name]

    # -- nodes ------------------------------------------------------------------------------

    def node(self, kind: str, *inputs: str, out: str = "", domain: str = "", **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        return self.several(kind, *inputs, outs=[out or f"{kind}.{len(self.nodes)}"], domain=domain, **attributes)[0]

    def several(self, kind: str, *inputs: str, outs: list[str], domain: str = "", **attributes: Any) -> list[str]:
        """Add a node with several outputs."""
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), outs, name=name, domain=domain, **attributes))
        return outs

    def split(self, x: str, parts: int) -> list[str]:
        """Cut the last dimension into equal parts."""
        outs = [f"{x}.{i}" for i in range(parts)]
        return self.several("Split", x, outs=outs, axis=-1, num_outputs=parts)

    def silu(self, x: str) -> str:
        return self.node("Mul", x, self.node("Sigmoid", x))

    def save(self, name: str) -> Path:
        """Write the graph; return the path of model.onnx."""
        helper = self.onnx.helper
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.weights)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, producer_name="finhpc", opset_imports=opsets, ir_version=10)
        path = self.folder / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return path
