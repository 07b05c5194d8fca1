"""bitsandbytes' int8 and NF4, in the tensors that its layers save and transformers opens.

They quantize only linear layers: bitsandbytes has no embedding that can be saved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finhpc.errors import ConfigError


def int8_tensors(matrix: Tensor, bits: int, name: str) -> dict[str, Tensor]:
    """Return what `Linear8bitLt` saves of a weight (out, in): codes, each row's largest absolute value, layout number.

    Symmetric, by rows (LLM.int8). bitsandbytes quantizes from float16: raises `ConfigError` naming `name` if a weight
    does not fit that.
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


def nf4_tensors(matrix: Tensor, bits: int, name: str) -> dict[str, Tensor]:
    """Return what `Linear4bit` saves of a weight (out, in): NF4 codes in blocks of 64 (or 32), 8-bit scales (QLoRA).

    No block crosses the end of a row, see `nf4_fits`.
    """
    from bitsandbytes.functional import quantize_4bit

    block = 64 if matrix.shape[1] % 64 == 0 else 32
    packed, state = quantize_4bit(
        matrix.float().contiguous(), blocksize=block, compress_statistics=True, quant_type="nf4"
    )
    return {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}


def nf4_fits(rows: int, columns: int) -> bool:
    """Return whether bitsandbytes can use it on every device: CPUs with bfloat16 need whole blocks of 32 x 32."""
    return rows % 32 == 0 and columns % 32 == 0


def int8_config(bits: int, keep: list[str]) -> dict[str, object]:
    """Return the `quantization_config` of config.json; `keep`: modules that stay in float."""
    return {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": keep}


def nf4_config(bits: int, keep: list[str]) -> dict[str, object]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float32",
        "llm_int8_skip_modules": keep,
    }
