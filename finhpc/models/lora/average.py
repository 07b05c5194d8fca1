"""The mean of several adapters of one base, and adapters of a lower rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from finhpc.errors import ConfigError, collect
from finhpc.models.files.weights import Weights
from finhpc.models.lora.adapter_file import check_base, load_adapter
from finhpc.models.lora.peft_format import TENSORS, Adapter, save_adapter
from finhpc.settings.finetune import FinetuneQuantization, Lora


def read_mean(folders: Sequence[Path], base: Path, model: nn.Module) -> Adapter:
    """Read the adapters of a base and return `mean` of them; `model`: the base's, perhaps on the meta device.

    Raises one `ConfigError` with everything in which they do not fit the base or each other.
    """
    problems: list[str] = []
    adapters = []
    for folder in folders:
        with collect(problems):
            adapters.append(load_adapter(folder, model))
            check_base(folder, base)
    if twice := sorted({str(folder) for folder in folders if list(folders).count(folder) > 1}):
        problems.append(f"average: {', '.join(twice)} is given twice; give each adapter once.")
    if len(folders) > 1 and not problems:
        for folder, adapter in zip(folders, adapters, strict=True):
            if adapter.magnitudes:
                problems.append(
                    f"average: {folder} has use_dora=true, and the mean of DoRA adapters is not an adapter; "
                    "leave it out, or average the merged models."
                )
            if (adapter.bits, adapter.scheme) != (adapters[0].bits, adapters[0].scheme):
                problems.append(
                    f"average: {folder} was trained on a base of {adapter.bits} bits {adapter.scheme}, and "
                    f"{folders[0]} of {adapters[0].bits} {adapters[0].scheme}; average adapters of one kind of base."
                )
    if problems:
        raise ConfigError(problems)
    return adapters[0] if len(adapters) == 1 else mean(adapters)


def mean(adapters: Sequence[Adapter]) -> Adapter:
    """Return the adapter that adds the mean of what `adapters` add, exactly: its rank is the sum of theirs.

    An adapter without a layer adds zeros there. The mean of B A is not the product of means: factors are put side by
    side, as peft's `add_weighted_adapter` does with combination_type=cat.
    """
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name in sorted({name for adapter in adapters for name in adapter.pairs}):
        own = [(*adapter.pairs[name], adapter.scales[name]) for adapter in adapters if name in adapter.pairs]
        a = torch.cat([a.float() for a, _, _ in own])
        pairs[name] = a, torch.cat([b.float() * (scale / len(adapters)) for _, b, scale in own], 1)
    return Adapter(pairs, dict.fromkeys(pairs, 1.0), adapters[0].bits, adapters[0].scheme)


@torch.no_grad()
def lower_rank(adapter: Adapter, rank: int) -> Adapter:
    """Return the adapter of that rank whose B A come closest to those of `adapter`; layers of lower ranks stay.

    Raises `ConfigError` for DoRA, whose magnitudes are about the sum with the base's weights.
    """
    if adapter.magnitudes:
        raise ConfigError(
            f"rank={rank} does not fit an adapter with use_dora=true, because its magnitudes belong to its own rank; "
            "leave rank out, or merge the adapter with --format merged."
        )
    pairs = {}
    for name, (a, b) in adapter.pairs.items():
        scaled = adapter.scales[name] * b.float()
        (q_a, r_a), (q_b, r_b) = torch.linalg.qr(a.float().T), torch.linalg.qr(scaled)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T)
        kept = min(rank, len(s))
        roots = s[:kept].sqrt()
        pairs[name] = roots[:, None] * (vh[:kept] @ q_a.T), q_b @ u[:, :kept] * roots
    return Adapter(pairs, dict.fromkeys(pairs, 1.0), adapter.bits, adapter.scheme)


def write_adapter(folder: Path, adapter: Adapter, weights: Weights, fingerprint: str) -> int:
    """Write an adapter without magnitudes in peft's format; returns the bytes of its tensors' file.

    Ranks below the largest are filled up by zeros. `fingerprint`: of the base, for `check_base`.
    """
    rank = max(len(a) for a, _ in adapter.pairs.values())
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in adapter.pairs.items():
        more = rank - len(a)
        tensors[f"{name}.A"] = torch.cat((a.float(), a.new_zeros(more, a.shape[1], dtype=torch.float32)))
        tensors[f"{name}.B"] = torch.cat((adapter.scales[name] * b.float(), torch.zeros(len(b), more)), 1)
    lora = Lora(rank=rank, lora_alpha=float(rank), targets=sorted(adapter.pairs))
    quantization = FinetuneQuantization.model_validate({"bits": adapter.bits, "scheme": adapter.scheme or "auto"})
    save_adapter(folder, lora, tensors, weights, quantization, fingerprint)
    return (folder / TENSORS).stat().st_size
