"""Tiny models of every family, on disk in every way that a base comes in.

Each is a `Base`: where it lies, and the very weights it stands for in transformers' own architecture, so that the
reference needs nothing of ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D

from finhpc.commands.export import export
from finhpc.models.families.described import FUSED
from finhpc.models.families.registry import FAMILIES, as_low_rank
from finhpc.quantization.fake import TRAINED
from finhpc.quantization.minmax import QuantizedMatrix, TiedHead
from finhpc.settings.base import build
from finhpc.settings.export import ExportConfig
from finhpc.settings.pretrain import Qkv
from tests.models.dense import settled
from tests.models.families import ROWS, tiny
from tests.models.gguf_file import write_gguf
from tests.parity.tokenizer_kinds import VOCAB, Kind, tokenizer_of

State = dict[str, Tensor]
CONTEXT = 128
RANK = 32  # of the low-rank base: factors that NF4 can quantize


def _gpt2(**more: Any) -> nn.Module:
    config = GPT2Config(vocab_size=VOCAB, n_positions=1024, n_embd=64, n_layer=2, n_head=4, **more)
    return settled(GPT2LMHeadModel(config))


def _llama_like(config_class: Any, model_class: Any, **more: Any) -> nn.Module:
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
    }
    return settled(model_class(config_class(**shape | more)))


def _described(row: str) -> nn.Module:
    return tiny(row, vocab_size=VOCAB, hidden_size=64, intermediate_size=96, max_position_embeddings=CONTEXT)


LABELS = {family.label for family in FAMILIES.values() if family.whole_layers}  # a row each
SCALED = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0}
SCALED |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
# Name of a row -> its family, as the registry has it, and a model.
FAMILY_ROWS: dict[str, tuple[str, Callable[[], Any]]] = {
    "gpt2": ("gpt2", _gpt2),
    "gpt2, head of its own": ("gpt2", lambda: _gpt2(tie_word_embeddings=False)),
    "gpt2, scaled by layer": ("gpt2", lambda: _gpt2(scale_attn_by_inverse_layer_idx=True, n_inner=96)),
    "llama": ("llama", lambda: _llama_like(LlamaConfig, LlamaForCausalLM)),
    "llama, tied": ("llama", lambda: _llama_like(LlamaConfig, LlamaForCausalLM, tie_word_embeddings=True)),
    "llama, biases, scaled positions": (
        "llama",
        lambda: _llama_like(LlamaConfig, LlamaForCausalLM, attention_bias=True, mlp_bias=True, rope_parameters=SCALED),
    ),
    "mistral": ("mistral", lambda: _llama_like(MistralConfig, MistralForCausalLM, head_dim=24, sliding_window=96)),
    "qwen2": ("qwen2", lambda: _llama_like(Qwen2Config, Qwen2ForCausalLM, tie_word_embeddings=True)),
    **{row.lower(): (ROWS[row][0], partial(_described, row)) for row in ROWS if row in LABELS},
}


@dataclass(frozen=True)
class Base:
    """A base on disk. `state`: the weights it stands for, in float32; `factors`: those of low-rank layers as A, B."""

    path: Path
    config: Any
    state: State
    factors: dict[str, tuple[Tensor, Tensor]]

    def plain(self, state: State | None = None) -> Any:
        """transformers' own model with the base's weights, or with others."""
        model = AutoModelForCausalLM.from_config(deepcopy(self.config), dtype=torch.float32)
        model.load_state_dict(self.state if state is None else state)
        return model.eval()

    def quantized(self, state: State, scheme: str, bits: int, linear: bool = False, factors: bool = True) -> State:
        """The state with every matrix as a scheme leaves it; `factors`: those of low-rank layers each for itself.

        `linear`: linear layers of the blocks alone, as in finetuning.
        """
        of = self.plain()
        made = quantized_state(of, state, scheme, bits, linear)
        for name, pair in self.factors.items() if factors else ():
            a, b = (REFERENCES[scheme][0](factor, bits) for factor in pair)
            made[f"{name}.weight"] = _turned(of.get_submodule(name), _product(a, b))
        return made


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix (out, in) of its factors, by blocks of B's rows if A has the rows of several pairs."""
    blocks = len(a) // b.shape[1]
    return torch.cat([part @ of for part, of in zip(b.chunk(blocks), a.chunk(blocks), strict=True)])


def _turned(module: nn.Module, rows: Tensor) -> Tensor:
    """A matrix (out, in) as the module stores it."""
    return rows.T.contiguous() if isinstance(module, Conv1D) else rows


def state_of(model: nn.Module, plain: nn.Module) -> State:
    """The numbers of an opened model's weights by the names of `plain`, whatever they are stored as."""
    found = {}
    for name, module in plain.named_modules():
        opened = model.get_submodule(name)
        for key, _ in module.named_parameters(recurse=False):
            matrix = key == "weight" and isinstance(module, nn.Linear | nn.Embedding | Conv1D)
            last = opened if hasattr(opened, key) else getattr(opened, "B", opened)  # of two factors
            found[f"{name}.{key}"] = _turned(module, _rows(opened)) if matrix else getattr(last, key).float()
    return found


def _rows(module: Any) -> Tensor:
    """The matrix (out, in) of an opened layer, or of a factor."""
    if isinstance(module, Tensor):
        return module
    if isinstance(module, TiedHead):
        (module,) = module.embedding
    if isinstance(module, QuantizedMatrix):
        return module.dequantized()
    if hasattr(module, "A") and hasattr(module, "B"):
        return _product(_rows(module.A), _rows(module.B))
    kind = type(module).__name__
    if kind in ("Linear8bitLt", "Linear4bit"):
        made: Tensor = dequantize_bnb_weight(module.weight, module.weight if kind == "Linear8bitLt" else None)
        return made.float()
    weight: Tensor = module.weight.float()
    return weight.T if isinstance(module, Conv1D) else weight


def _dense(model: Any, path: Path) -> Base:
    state = {name: tensor.float().clone() for name, tensor in model.state_dict().items()}
    return Base(path, model.config, state, {})


def _saved(model: Any, folder: Path, **how: Any) -> Base:
    model.save_pretrained(folder, **how)
    return _dense(model, folder)


def _renamed(model: Any, folder: Path, prefix: str, new: str) -> Base:
    base = _saved(model, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {new + name.removeprefix(prefix): tensor for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return base


def _gguf(model: Any, folder: Path) -> Base:
    path = folder / "base of mine.gguf"
    folder.mkdir(parents=True)
    write_gguf(model, path, tokenizer_of(Kind("byte level")))
    return _dense(model, path)


JOINT = "low-rank, q, k and v in one"  # of families whose pairs may be apart
# A GGUF file of GPT-2 has no word for the first; those of the others are refused.
NOT_IN_GGUF = ("gpt2, scaled by layer", *(name for name, (kind, _) in FAMILY_ROWS.items() if not FAMILIES[kind].gguf))


def _low_rank(model: Any, folder: Path, qkv: Qkv = "separate") -> Base:
    """Attention and MLP as B A, q, k and v each by itself if they can be, all else as in the model."""
    base = _dense(model, folder)
    ranks: dict[str, int | None] = {"attention": RANK, "mlp": RANK, "head": None, "embedding": None}
    fused = any(name.endswith(FUSED) for name, _ in model.named_modules())
    config = as_low_rank(model.config, ranks, qkv="joint" if fused else qkv)
    made = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(3)
    state, factors = dict(base.state), {}
    for name, module in made.named_modules():
        if hasattr(module, "A") and hasattr(module, "B"):
            a, b = (torch.randn(x.shape, generator=generator) * 0.15 for x in (module.A.weight, module.B.weight))
            factors[name] = a, b
            state[f"{name}.weight"] = _turned(model.get_submodule(name), _product(a, b))
    held = {name: tensor for name, tensor in state.items() if name.removesuffix(".weight") not in factors}
    for name, (a, b) in factors.items():
        held |= {f"{name}.A.weight": a, f"{name}.B.weight": b}
        if (bias := held.pop(f"{name}.bias", None)) is not None:
            held[f"{name}.B.bias"] = bias
    made.load_state_dict(held)
    made.save_pretrained(folder)
    return Base(folder, base.config, state, factors)


def _trained_rounded(model: Any, folder: Path) -> Base:
    """As pretraining with 8-bit weights leaves a model: float weights that are rounded when they are used."""
    base = _saved(model, folder)
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {TRAINED: {"bits": 8, "scheme": "minmax"}}))
    return Base(folder, base.config, quantized_state(model, base.state, "minmax", 8, trained=True), {})


def _exported(bits: int, scheme: str, model: Any, folder: Path) -> Base:
    """As `finhpc export` quantizes it."""
    source = folder.with_name(f"{folder.name}-source")
    base = _saved(model, source)
    tree = {"bits": bits, "scheme": scheme}
    export(build(ExportConfig, {"model": str(source), "out": str(folder), "format": "merged", "quantization": tree}))
    return Base(folder, base.config, quantized_state(model, base.state, scheme, bits), {})


def _prefix(model: Any) -> str:
    return f"{model.base_model_prefix}."


BASES: dict[str, Callable[[Any, Path], Base]] = {
    "float32": _saved,
    "bfloat16": lambda model, folder: _saved(model.to(torch.bfloat16), folder),
    "float16": lambda model, folder: _saved(model.to(torch.float16), folder),
    "several files": lambda model, folder: _saved(model, folder, max_shard_size="80KB"),
    "names without prefix": lambda model, folder: _renamed(model, folder, _prefix(model), ""),
    "names of a compiled model": lambda model, folder: _renamed(model, folder, "", "_orig_mod."),
    "GGUF": _gguf,
    "low-rank": _low_rank,
    JOINT: lambda model, folder: _low_rank(model, folder, "joint"),
    "trained in 8 bits": _trained_rounded,
    "minmax, 8 bits": lambda model, folder: _exported(8, "minmax", model, folder),
    "minmax, 4 bits": lambda model, folder: _exported(4, "minmax", model, folder),
    "int8": lambda model, folder: _exported(8, "int8", model, folder),
    "nf4": lambda model, folder: _exported(4, "nf4", model, folder),
}


# -- what a scheme makes of a matrix, from the schemes' own definitions -------------------------


def _minmax(rows: Tensor, bits: int) -> Tensor:
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    return ((rows - low) / torch.where(scale == 0, 1.0, scale)).round() * scale + low


def _int8(rows: Tensor, bits: int) -> Tensor:
    half = rows.half().float()
    largest = half.abs().amax(1, keepdim=True)
    return (half * (127 / largest)).round() * (largest * (1 / 127))


def _nf4(rows: Tensor, bits: int) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    if rows.shape[0] % 32 or rows.shape[1] % 32:
        return rows
    block = 64 if rows.shape[1] % 64 == 0 else 32
    packed, state = quantize_4bit(rows.contiguous(), blocksize=block, compress_statistics=True, quant_type="nf4")
    made: Tensor = dequantize_4bit(packed, state)
    return made


# Scheme, as the registry has it -> what becomes of a matrix (out, in), and whether embeddings are quantized, too.
REFERENCES: dict[str, tuple[Callable[[Tensor, int], Tensor], bool]] = {
    "minmax": (_minmax, True),
    "int8": (_int8, False),
    "nf4": (_nf4, False),
}


def quantized_state(
    model: nn.Module, state: State, scheme: str, bits: int, linear: bool = False, trained: bool = False
) -> State:
    """The state with every matrix as the scheme leaves it; `linear`: linear layers of the blocks alone, as in
    finetuning. `trained`: with embeddings that also scale, which an export leaves as they are.
    """
    of, embeddings = REFERENCES[scheme]
    made = dict(state)
    tied = getattr(model.config, "tie_word_embeddings", False)
    for name, module in model.named_modules():
        key = f"{name}.weight"
        looks_up = isinstance(module, nn.Embedding) and embeddings and (trained or type(module) is nn.Embedding)
        if isinstance(module, Conv1D):
            made[key] = of(state[key].T, bits).T.contiguous()
        elif (isinstance(module, nn.Linear) and name != "lm_head") or (
            (looks_up or (name == "lm_head" and not tied)) and not linear
        ):
            made[key] = of(state[key], bits)
    if tied:
        embedding = model.get_input_embeddings()
        (source,) = [name for name, module in model.named_modules() if module is embedding]
        made["lm_head.weight"] = made[f"{source}.weight"]
    return made
