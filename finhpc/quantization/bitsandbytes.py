"""bitsandbytes' int8 and NF4, in the tensors that its layers save and transformers opens.

Frozen layers give the results of bitsandbytes' own: int8 also rounds a layer's input, and computes columns with values
of 6 and more in float (LLM.int8). Only linear layers are quantized: bitsandbytes has no embedding that can be saved.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from finhpc.errors import ConfigError
from finhpc.quantization.frozen import FrozenLinear, Scheme, Tensors

OUTLIER = 6.0  # bitsandbytes' default threshold in transformers


class FrozenInt8(FrozenLinear):
    """bitsandbytes' `Linear8bitLt`: codes, and each row's largest absolute value."""

    codes: Tensor
    largest: Tensor

    def __init__(self, tensors: Tensors, shape: tuple[int, int], bias: Tensor | None) -> None:
        super().__init__(shape, bias)
        self.register_buffer("codes", tensors["weight"].contiguous(), persistent=False)
        self.register_buffer("largest", tensors["SCB"].contiguous(), persistent=False)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return self.codes.to(dtype, copy=True).mul_(self.largest.unsqueeze(1).mul(1.0 / 127.0))

    def product(self, x: Tensor) -> Tensor:
        if self.training and x.device.type in ("cpu", "xpu"):  # as bitsandbytes' matmul chooses
            return super().product(x)
        from bitsandbytes.functional import int8_vectorwise_quant

        codes, largest, outliers = int8_vectorwise_quant(x.to(torch.float16), threshold=OUTLIER)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product = torch.ops.bitsandbytes.int8_mixed_scaled_mm
        out: Tensor = product(x, codes, self.codes, largest, self.largest, outliers, bias)[0]
        return out


class Int8(Scheme):
    """Symmetric, by rows (LLM.int8)."""

    bits = (8,)

    def tensors(self, matrix: Tensor, bits: int, name: str) -> Tensors:
        """Return what `Linear8bitLt` saves: codes, each row's largest absolute value, the number of the layout.

        bitsandbytes quantizes from float16: raises `ConfigError` if a weight does not fit that.
        """
        from bitsandbytes.functional import int8_vectorwise_quant

        half = matrix.to(torch.float16)
        if not torch.isfinite(half).all():
            raise ConfigError(
                f"{name} has weights beyond float16's 65504, which quantization.scheme=int8 cannot represent; "
                "use quantization.scheme=minmax."
            )
        codes, largest, _ = int8_vectorwise_quant(half)
        return {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}

    def config(self, bits: int, keep: list[str]) -> dict[str, object]:
        return {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": keep}

    def frozen(self, tensors: Tensors, shape: tuple[int, int], bias: Tensor | None, bits: int) -> FrozenLinear:
        return FrozenInt8(tensors, shape, bias)

    def empty(self, shape: tuple[int, int], bias: Tensor | None, bits: int) -> FrozenLinear:
        return FrozenInt8({"weight": torch.empty(shape, dtype=torch.int8), "SCB": torch.empty(shape[0])}, shape, bias)


class FrozenFloat4(FrozenLinear):
    """bitsandbytes' `Linear4bit`: codes in blocks of 64 (or 32) with a scale each.

    The scales, stored in 8 bits, are float32 in memory (0.06 bytes per weight), because every product needs them.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, state: Any, shape: tuple[int, int], bias: Tensor | None) -> None:
        from bitsandbytes.functional import dequantize_blockwise

        super().__init__(shape, bias)
        self.block_size, self.quant_type, self.shape = state.blocksize, state.quant_type, state.shape
        scales = (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
        self.register_buffer("codes", codes.contiguous(), persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        matrix: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            self.codes, self.scales, self.block_size, self.quant_type, self.shape, dtype
        )
        return matrix


class Nf4(Scheme):
    """NF4 codes in blocks of 64 (or 32) with 8-bit scales (QLoRA). No block crosses the end of a row."""

    bits = (4,)
    needs = "matrices whose sides are multiples of 32"
    quant_type: ClassVar[str] = "nf4"

    def fits(self, rows: int, columns: int) -> bool:
        """Return whether bitsandbytes can use it on every device: CPUs with bfloat16 need whole blocks of 32 x 32."""
        return rows % 32 == 0 and columns % 32 == 0

    def tensors(self, matrix: Tensor, bits: int, name: str) -> Tensors:
        """Return what `Linear4bit` saves."""
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(
            matrix.float().contiguous(),
            blocksize=_block(matrix.shape[1]),
            compress_statistics=True,
            quant_type=self.quant_type,
        )
        return {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}

    def config(self, bits: int, keep: list[str]) -> dict[str, object]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "float32",
            "llm_int8_skip_modules": keep,
        }

    def frozen(self, tensors: Tensors, shape: tuple[int, int], bias: Tensor | None, bits: int) -> FrozenLinear:
        from bitsandbytes.functional import QuantState

        state = {key.removeprefix("weight."): value for key, value in tensors.items() if key != "weight"}
        return FrozenFloat4(tensors["weight"], QuantState.from_dict(state, tensors["weight"].device), shape, bias)

    def empty(self, shape: tuple[int, int], bias: Tensor | None, bits: int) -> FrozenLinear:
        from bitsandbytes.functional import QuantState

        out, into = shape
        count = out * into // _block(into)
        absmax = torch.empty(-(-count // 256))
        second = QuantState(absmax=absmax, code=torch.empty(256), blocksize=256, dtype=torch.float32)
        state = QuantState(
            absmax=torch.empty(count, dtype=torch.uint8), shape=torch.Size(shape), code=torch.empty(16),
            blocksize=_block(into), quant_type=self.quant_type, dtype=torch.float32, offset=torch.empty(()),
            state2=second,
        )  # fmt: skip
        return FrozenFloat4(torch.empty(out * into // 2, 1, dtype=torch.uint8), state, shape, bias)


def _block(columns: int) -> int:
    return 64 if columns % 64 == 0 else 32
