"""LoRA adapters: what they add to a base's weights, and how finetuning writes them in peft's format.

For a base of transformers, `peft.PeftModel.from_pretrained(base, FOLDER)` opens the result. peft does not know the
layers of finhpc's low-rank models: only finhpc opens their adapters. `finhpc.models.lora.adapter_file` reads the
folder and describes its files.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finhpc.errors import ConfigError
from finhpc.lowrank.layers import LowRankLinear
from finhpc.models.files.config import ADAPTER
from finhpc.models.files.weights import Weights
from finhpc.models.lora.targets import ALL, CHANGES_BASE, factors_from_base, is_pattern, linear_layers, scheme_of
from finhpc.quantization.schemes import freeze

if TYPE_CHECKING:
    from finhpc.settings.finetune import FinetuneQuantization, Lora

CONFIG, TENSORS = ADAPTER, "adapter_model.safetensors"
PREFIX = "base_model.model."
MAGNITUDE = ".lora_magnitude_vector"  # after a layer's name
QUANTIZED = "base_quantization.json"
FINGERPRINT = "base_fingerprint.json"


@dataclass(frozen=True)
class Adapter:
    """`pairs`: name of a layer -> A (rank, in), B (out, rank); `scales`: the factor of each B A.

    `bits`, `scheme`: how the linear layers of the base were quantized in training. `magnitudes`: DoRA's, by the names
    of all its layers: the length (out,) of each row of W + scale B A.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    scales: dict[str, float]
    bits: int = 16
    scheme: str = ""
    magnitudes: dict[str, Tensor] = field(default_factory=dict)

    def rounded(self, name: str, rows: Tensor) -> Tensor:
        """Return a matrix (out, in) of the base as it was in training; `name`: of its layer or factor (`LAYER.A`).

        If the base was quantized, it is quantized and dequantized: the adapter has learned to correct its rounding.
        The head never was.
        """
        return rows if name.partition(".")[0] == "lm_head" else rounded(rows, self.bits, self.scheme, name)

    def merged(self, name: str, rows: Tensor) -> Tensor:
        """Return a matrix (out, in) with the layer's adapter, if it has one, in float32."""
        if name not in self.pairs:
            return rows
        a, b = (factor.float() for factor in self.pairs[name])
        total = rows.float() + (self.scales[name] * b @ a).to(rows.device)
        if name in self.magnitudes:
            total *= (self.magnitudes[name].to(rows.device, torch.float32) / total.norm(dim=1))[:, None]
        return total


def rounded(rows: Tensor, bits: int, scheme: str, name: str) -> Tensor:
    """Quantize and dequantize a matrix (out, in), in float32; unchanged at 16 bits."""
    if bits == 16:
        return rows
    return freeze(rows.float(), None, bits, scheme, torch.float32, name).matrix(torch.float32)


def save_adapter(
    folder: Path,
    settings: Lora,
    trained: dict[str, Tensor],
    weights: Weights,
    quantization: FinetuneQuantization | None = None,
    fingerprint: str | None = None,
) -> None:
    """Write an adapter from `trained`: name of an adapted layer + .A, .B or .magnitude -> tensor, as in the engine.

    pissa and olora train with a changed base: the written adapter is the difference to the base on disk, of twice the
    rank; DoRA's magnitudes fit it as they are, because they are about the sum. `fingerprint`: of the base's folder
    (`finhpc.models.files.manifest`), for `check_base`.
    """
    names = sorted({name.rpartition(".")[0] for name in trained})
    tensors, rank, alpha = {}, settings.rank, settings.lora_alpha
    for name in names:
        a, b = trained[f"{name}.A"].float().cpu(), trained[f"{name}.B"].float().cpu()
        if settings.init in CHANGES_BASE:
            first_a, first_b = factors_from_base(_base_rows(weights, name), settings)
            a, b = torch.cat((a, first_a)), torch.cat((b, -first_b), 1)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.contiguous()
        if settings.dora:
            tensors[f"{PREFIX}{name}{MAGNITUDE}"] = trained[f"{name}.magnitude"].float().cpu().contiguous()
    if settings.init in CHANGES_BASE:
        rank, alpha = 2 * rank, alpha * (math.sqrt(2) if settings.rslora else 2)  # the same scale
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    _peft_config(settings, weights, names, rank, alpha).save_pretrained(str(folder))
    if quantization is not None and quantization.bits < 16:
        how = {"bits": quantization.bits, "scheme": scheme_of(quantization)}
        (folder / QUANTIZED).write_text(json.dumps(how) + "\n", encoding="utf-8")
    if fingerprint is not None:
        which = {"path": str(weights.path), "sha256": fingerprint}
        (folder / FINGERPRINT).write_text(json.dumps(which) + "\n", encoding="utf-8")


def _peft_config(settings: Lora, weights: Weights, names: list[str], rank: int, alpha: float) -> Any:
    from peft import LoraConfig

    transposed = any(isinstance(weights.skeleton.get_submodule(name), Conv1D) for name in names)
    targets: Any = settings.targets
    if len(targets) == 1 and (targets == [ALL] or is_pattern(targets[0])):
        (targets,) = targets
    elif any(target == ALL or is_pattern(target) for target in targets):  # peft takes these only alone
        targets = names
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=targets,
        lora_dropout=settings.dropout,
        fan_in_fan_out=transposed,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(weights.path),
        inference_mode=True,
    )


def _base_rows(weights: Weights, name: str) -> Tensor:
    weight = weights.read(f"{name}.weight")
    return weight.T if isinstance(weights.skeleton.get_submodule(name), Conv1D) else weight


@torch.no_grad()
def round_base(model: nn.Module, bits: int, scheme: str) -> None:
    """Round the linear layers of a model in place, as training rounds a base of these bits."""
    for name, layer in linear_layers(model).items():
        if name == "lm_head" or bits == 16:
            continue
        modules: dict[str, Any] = {name: layer}
        if isinstance(layer, LowRankLinear):
            modules = {f"{name}.A": layer.A, f"{name}.B": layer.B}
        for full, module in modules.items():
            rows = _rows(module)
            rows.copy_(rounded(rows, bits, scheme, full))


@torch.no_grad()
def merge_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Add the adapter to the weights of a dense model in place; exact in float32.

    Raises `ConfigError` if an adapted layer is low-rank: the sum would exceed its rank.
    """
    pairs = [name for name in adapter.pairs if isinstance(model.get_submodule(name), LowRankLinear)]
    if pairs:
        raise ConfigError(
            f"the adapter's base is low-rank ({pairs[0]} and {len(pairs) - 1} more layers), which cannot absorb it in "
            "memory; use `finhpc export --format merged`."
        )
    round_base(model, adapter.bits, adapter.scheme)
    for name in adapter.pairs:
        rows = _rows(model.get_submodule(name))
        rows.copy_(adapter.merged(name, rows))


def _rows(module: Any) -> Tensor:
    """Return a layer's weight as (out, in): itself, or a view of it."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight  # type: ignore[no-any-return]
