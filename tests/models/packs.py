"""Examples with a common prefix, as packs and as plain padded batches; peft models with given adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from finhpc.models.packing.layout import (
    FIELDS,
    IGNORED,
    PACKS,
    POSITION,
    PREFIX,
    SEGMENT,
    TARGET,
    TARGETS,
    TOKEN,
)

Example = tuple[list[int], int]  # tokens, the last of which are the answer; tokens of the answer


def examples(count: int, prefix: int = 6, vocab: int = 300, seed: int = 0, longest: int = 14) -> list[Example]:
    """Examples that begin with the same `prefix` tokens."""
    draw = torch.Generator().manual_seed(seed)
    begin = torch.randint(0, vocab, (prefix,), generator=draw).tolist()
    made = []
    for i in range(count):
        rest = torch.randint(0, vocab, (4 + i * 5 % (longest - 3),), generator=draw).tolist()
        made.append((begin + rest, 1 + i % 3))
    return made


def pack(some: list[Example], shared: int, targets: int, packs: int, padding: int = 0) -> Tensor:
    """One pack (1, FIELDS, T) of examples; their first `shared` tokens are a segment of their own, if any."""
    rows: list[list[int]] = []
    if shared:
        rows += [[token, i, 1, 0, IGNORED, targets, packs] for i, token in enumerate(some[0][0][:shared])]
    for number, (tokens, answer) in enumerate(some, 2):
        for i in range(shared, len(tokens)):
            following = i + 1 < len(tokens) and i + 1 >= len(tokens) - answer
            target = tokens[i + 1] if following else IGNORED
            rows.append([tokens[i], i, number, 1 if shared else 0, target, targets, packs])
    rows += [[0, 0, 0, 0, IGNORED, targets, packs]] * padding
    made = torch.tensor(rows).T[None].contiguous()
    order = {TOKEN: 0, POSITION: 1, SEGMENT: 2, PREFIX: 3, TARGET: 4, TARGETS: 5, PACKS: 6}
    assert order == {i: i for i in range(FIELDS)}
    return made


def packs_of(some: list[Example], each: int, shared: int, padding: int = 0) -> list[Tensor]:
    """Packs of `each` examples."""
    total, count = sum(answer for _, answer in some), len(some) // each
    return [pack(some[i * each : (i + 1) * each], shared, total, count, padding) for i in range(count)]


def plain_loss(model: Any, some: list[Example]) -> Tensor:
    """Mean loss over all answer tokens, of a padded batch."""
    longest = max(len(tokens) for tokens, _ in some)
    ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in some])
    mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in some])
    labels = torch.full_like(ids, -100)
    for i, (tokens, answer) in enumerate(some):
        labels[i, len(tokens) - answer : len(tokens)] = ids[i, len(tokens) - answer : len(tokens)]
    ids, mask, labels = (x.to(model.device) for x in (ids, mask, labels))
    loss: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    return loss


def peft_model(
    folder: Path, adapters: dict[str, Tensor], alpha: float = 16.0, lora: dict[str, Any] | None = None, **how: Any
) -> Any:
    """The base of a folder with peft's LoRA on the layers of `adapters` (name + .A, .B or .magnitude -> value).

    `lora`: more settings of peft's; `how`: of transformers'.
    """
    base = AutoModelForCausalLM.from_pretrained(folder, **how).eval()
    rank = next(value.shape[0] for name, value in adapters.items() if name.endswith(".A"))
    targets = sorted({name.rpartition(".")[0] for name in adapters})
    settings = {"lora_alpha": alpha, "target_modules": targets, "task_type": "CAUSAL_LM"} | (lora or {})
    model = get_peft_model(base, LoraConfig(r=rank, **settings))
    with torch.no_grad():
        for name, parameter in peft_parameters(model).items():
            parameter.copy_(adapters[name])
    return model.eval()


def peft_parameters(model: Any) -> dict[str, Any]:
    """Our name -> peft's parameter."""
    return {
        name.removeprefix("base_model.model.")
        .replace(".lora_A.default.weight", ".A")
        .replace(".lora_B.default.weight", ".B")
        .replace(".lora_magnitude_vector.default.weight", ".magnitude"): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
