"""Model folders of milliseconds, written as training writes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from finhpc.generation.decoder import Decoder
from finhpc.generation.paged import Span
from finhpc.models.families.presets import Shape
from finhpc.models.families.registry import config_of_method, make_config, skeleton
from finhpc.models.folder import save_model
from finhpc.models.initialize import initial_model
from finhpc.settings.pretrain import LINEAR_KINDS, Method, Qkv
from tests.tiny import tiny_shards

SHAPES = {
    "gpt2": Shape("gpt2", 2, 64, 4, 128, 300, True),
    "llama": Shape("llama", 2, 64, 4, 128, 300, False, kv_heads=2, mlp_width=96),
}


def tiny_model(family: str, kind: str = "dense", rank: int = 32, seed: int = 0, qkv: Qkv = "joint") -> Any:
    """A whole model whose logits are far enough apart that rounding chooses no other token."""
    model = initial_model(config_of_method(SHAPES[family], Method(kind=kind, rank=rank, qkv=qkv)), seed, None).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def tiny_folder(folder: Path, family: str, kind: str = "dense", tokenizer: bool = True) -> Path:
    model = tiny_model(family, kind)
    shards = tiny_shards(folder.with_name(f"{folder.name}-shards"), vocab=300)
    state = {name: value.clone() for name, value in model.state_dict().items() if name in keep(model)}
    save_model(folder, model.config, state.items(), shards / "tokenizer" if tokenizer else None)
    return folder


def folder_of_kind(
    folder: Path, tokenizer: Any, rows: int | None = None, likely: tuple[int, int] | None = None
) -> Path:
    """A llama with that tokenizer; `rows`: of its embedding. `likely`: ids whose rows in the head are exchanged."""
    shape = replace(SHAPES["llama"], vocab_size=rows or len(tokenizer))
    model = initial_model(make_config(shape, dict.fromkeys(LINEAR_KINDS)), 0, None).eval()
    state = {name: value.clone() for name, value in model.state_dict().items() if name in keep(model)}
    if likely is not None:
        head = state["lm_head.weight"]
        head[list(likely)] = head[list(reversed(likely))]
    tokenizer.save_pretrained(folder.with_name(f"{folder.name}-tokenizer"))
    save_model(folder, model.config, state.items(), folder.with_name(f"{folder.name}-tokenizer"))
    return folder


def keep(model: Any) -> set[str]:
    """Names of the parameters, a tied one once."""
    return {name for name, _ in skeleton(model.config).named_parameters()}


def tiny_adapter(folder: Path, model: Any, names: list[str], rank: int, seed: int, base: Path | None = None) -> Path:
    """A LoRA adapter in peft's own format, of weights large enough to change what is generated; it names `base`."""
    from peft import LoraConfig

    from finhpc.models.lora.targets import linear_shape

    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in names:
        shape = linear_shape(model.get_submodule(name))
        assert shape is not None
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, shape[1], generator=draw) * 0.3
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(shape[0], rank, generator=draw) * 0.3
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, task_type="CAUSAL_LM")
    config.base_model_name_or_path = None if base is None else str(base)
    config.save_pretrained(str(folder))
    return folder


class Passes:
    """Logits of a decoder after each part of some rows; their blocks of 8 tokens are mixed."""

    def __init__(self, decoder: Decoder, rows: int, length: int) -> None:
        count = -(-length // 8)
        self.decoder, self.past = decoder, [0] * rows
        self.cache = decoder.make_cache(rows * count, 8)
        self.tables = [list(range(i, rows * count, rows)) for i in range(rows)]

    def __call__(self, parts: list[list[int]]) -> Tensor:
        """Return the logits (rows, vocab) after one more part of each row, all of one length."""
        spans = [Span(*of) for of in zip(self.tables, self.past, map(len, parts), strict=True)]
        self.cache.begin(spans)
        hidden = self.decoder(torch.tensor([token for part in parts for token in part]), self.cache)
        self.past = [past + len(part) for past, part in zip(self.past, parts, strict=True)]
        ends = torch.tensor([len(part) for part in parts]).cumsum(0) - 1
        return self.decoder.predict(hidden[ends])
