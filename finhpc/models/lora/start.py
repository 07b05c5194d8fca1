"""The adapter that a finetuning continues from."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from finhpc.errors import ConfigError
from finhpc.models.lora.adapter_file import load_adapter
from finhpc.models.lora.peft_format import FINGERPRINT, Adapter
from finhpc.models.lora.targets import scale_of
from finhpc.settings.finetune import Lora


def read_start(lora: Lora, model: nn.Module, targets: set[str], bits: int, scheme: str) -> Adapter | None:
    """Read the adapter of `lora.path` for a model, which may be on the meta device; None if none is given.

    `targets`: the layers that get adapters; `bits`, `scheme`: of the base. Raises one `ConfigError` with everything in
    which the adapter is not one of these settings, `CheckpointError` if a file is missing or damaged.
    """
    if lora.path is None:
        return None
    adapter = load_adapter(Path(lora.path), model)
    ranks = sorted({len(a) for a, _ in adapter.pairs.values()})
    problems = []
    if set(adapter.pairs) != targets:
        missing, more = sorted(targets - set(adapter.pairs)), sorted(set(adapter.pairs) - targets)
        parts = [f"{words} {names[0]} ({len(names)})" for words, names in (("lacks", missing), ("adds", more)) if names]
        problems.append(f"it {' and '.join(parts)}, so lora.targets has to name its layers")
    if ranks != [lora.rank]:
        problems.append(f"its rank is {' and '.join(map(str, ranks))}, so use lora.rank={ranks[-1]}")
    elif scales := sorted({scale for scale in adapter.scales.values() if abs(scale - scale_of(lora)) > 1e-6 * scale}):
        root = f" or lora.rslora={str(not lora.rslora).lower()}"
        alpha = scales[0] * lora.lora_alpha / scale_of(lora)
        problems.append(
            f"it is scaled by {scales[0]:g}, not {scale_of(lora):g}, so use lora.lora_alpha={alpha:g}{root}"
        )
    if bool(adapter.magnitudes) != lora.dora:
        problems.append(
            f"it has {'no ' if lora.dora else ''}DoRA magnitudes, so use lora.dora={str(not lora.dora).lower()}"
        )
    known = adapter.bits < 16 or (Path(lora.path) / FINGERPRINT).is_file()  # peft does not write a base's bits
    if known and (adapter.bits, adapter.scheme or scheme) != (bits, scheme):
        named = f" and quantization.scheme={adapter.scheme}" if adapter.scheme else ""
        problems.append(f"its base had {adapter.bits} bits, so use quantization.bits={adapter.bits}{named}")
    if lora.init != "default":
        problems.append(f"lora.init={lora.init} is for new adapters, so leave it out")
    if problems:
        raise ConfigError([f"lora.path={lora.path} does not fit the settings: {problem}." for problem in problems])
    return adapter
