"""Model and adapter folders as other tools write them, and every reader of ours applied to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from finhpc.commands.export import export
from finhpc.commands.finetune import open_base
from finhpc.errors import FinhpcError
from finhpc.evaluation.models import load_for_evaluation, subjects
from finhpc.generation.generator import Generator
from finhpc.models.loading import load_model
from finhpc.settings.base import build
from finhpc.settings.export import ExportConfig
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.generate import GenerateConfig

TOKENS = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(1))


def peft_adapter(base: Path, folder: Path, embeddings: Any = "auto", **settings: Any) -> Path:
    """An adapter that peft writes for `base`, of numbers that change the logits."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{"r": 4, **settings}))
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    model.save_pretrained(folder, save_embedding_layers=embeddings)
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


def by_peft(base: Path, adapter: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval())


def generator(base: Path, adapter: Path | None = None) -> Generator:
    tree = {"model": str(base), "prompt": "a", "dtype": "float32", "sampling": {"max_new_tokens": 4}}
    return Generator(build(GenerateConfig, tree | {"adapters": [str(adapter)] if adapter else []}))


def generated(base: Path, adapter: Path | None = None) -> Tensor:
    made = generator(base, adapter)
    made.adapters.select([adapter.name if adapter else None])
    return logits(made.model)


def scored(base: Path, adapter: Path | None = None) -> Tensor:
    (subject,) = subjects([str(base)], [str(adapter)] if adapter else [])
    return logits(load_for_evaluation(subject.path, subject.adapter, "float32")[0])


def exported(model: Path, out: Path) -> Tensor:
    export(ExportConfig(model=str(model), format="merged", out=str(out), dtype="float32"))
    return logits(AutoModelForCausalLM.from_pretrained(out))


def adapter_ways(base: Path, adapter: Path, out: Path) -> dict[str, Callable[[], Tensor]]:
    """Every command's way to the logits of a base with an adapter."""
    return {
        "load_model": lambda: logits(load_model(adapter)),
        "generate": lambda: generated(base, adapter),
        "evaluate": lambda: scored(base, adapter),
        "evaluate the adapter": lambda: scored(adapter),
        "export": lambda: exported(adapter, out),
    }


def model_ways(model: Path, out: Path) -> dict[str, Callable[[], Any]]:
    """Every command's way to the logits of a model; finetune's opens it alone."""
    return {
        "load_model": lambda: logits(load_model(model)),
        "generate": lambda: generated(model),
        "evaluate": lambda: scored(model),
        "export": lambda: exported(model, out),
        "finetune": lambda: open_base(build(FinetuneConfig, {"model": {"path": str(model)}})),
    }


def assert_all_give(ways: dict[str, Callable[[], Any]], wanted: Tensor, tolerance: float = 2e-5) -> None:
    for name, way in ways.items():
        given = way()
        if isinstance(given, Tensor):
            apart = (given - wanted).abs().max().item()
            assert apart <= tolerance * wanted.abs().max().item(), f"{name} is {apart} away"


def assert_all_refuse(ways: dict[str, Callable[[], Any]], *words: str) -> None:
    for name, way in ways.items():
        with pytest.raises(FinhpcError) as caught:
            way()
        for word in words:
            assert word in str(caught.value), f"{name}: {caught.value}"
