"""Registers the per-vector scheme with transformers, so `from_pretrained` opens quantized exports.

transformers reads `quantization_config` in config.json, has the quantizer of that name replace layers of the model, and
loads the tensors into them.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from finhpc.quantization.minmax import MINMAX, TiedHead, replace


@register_quantization_config(MINMAX)
class MinMaxConfig(QuantizationConfigMixin):
    """`bits`: 8 or 4."""

    def __init__(self, bits: int = 8, **unknown: Any) -> None:
        self.quant_method = MINMAX
        self.bits = bits


@register_quantizer(MINMAX)
class MinMaxQuantizer(HfQuantizer):
    """Opens models that `finhpc export` has quantized."""

    requires_calibration = True  # in transformers this means: only models that are quantized on disk

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        replace(model, self.quantization_config.bits)
        for head, embedding in model.all_tied_weights_keys.items():
            tied = TiedHead(model.get_submodule(embedding.removesuffix(".weight")))
            model.set_submodule(head.removesuffix(".weight"), tied)
        model.all_tied_weights_keys = {}  # nothing is left for transformers to tie: it ties only parameters

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
