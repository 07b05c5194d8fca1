"""The per-vector scheme as transformers knows quantisers: `from_pretrained` opens what `finhpc export` packed.

transformers reads `quantization_config` in config.json, asks the quantiser of that name to put its
layers into the model, and loads the tensors into them.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from finhpc.quantization.layers import TiedHead, replace
from finhpc.quantization.schemes import MINMAX


@register_quantization_config(MINMAX)
class MinMaxConfig(QuantizationConfigMixin):
    """`bits`: 8 or 4."""

    def __init__(self, bits: int = 8, **unknown: Any) -> None:
        self.quant_method = MINMAX
        self.bits = bits


@register_quantizer(MINMAX)
class MinMaxQuantizer(HfQuantizer):
    """Opens models that are packed already; `finhpc export` packs them."""

    requires_calibration = True  # transformers' word for: only models that are quantised on disk

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        replace(model, self.quantization_config.bits)
        for head, embedding in model.all_tied_weights_keys.items():
            tied = TiedHead(model.get_submodule(embedding.removesuffix(".weight")))
            model.set_submodule(head.removesuffix(".weight"), tied)
        model.all_tied_weights_keys = {}  # nothing is left for transformers to tie: it ties parameters

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
