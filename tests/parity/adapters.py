"""Adapters of every kind: those that finetuning writes, and what peft users have.

Each is a folder in peft's format. What a kind changes is in its config or its tensors; every command applies all of
it, or refuses the adapter by the word that stands beside the kind here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from finhpc.models.files.manifest import weights_fingerprint
from finhpc.models.files.source import copy_tokenizer, open_weights
from finhpc.models.lora.model import LoraModel, LoraPipelineLayer
from finhpc.models.lora.peft_format import CONFIG, save_adapter
from finhpc.models.lora.targets import OF_BASE
from finhpc.settings.finetune import FinetuneQuantization, Lora
from tests.parity.bases import Base

RANK = 4


@dataclass(frozen=True)
class Kind:
    """`word`: what a refusal names; empty: all commands apply it.

    `lora`: settings of a finetuning that writes it. `peft`: settings of peft's `config`.
    """

    word: str = ""
    lora: dict[str, Any] | None = None
    peft: Callable[[Names], dict[str, Any]] | None = None
    config: type[Any] = LoraConfig
    quantization: dict[str, Any] = field(default_factory=dict)
    edit: dict[str, Any] = field(default_factory=dict)  # keys that are written into adapter_config.json

    @property
    def ours(self) -> bool:
        return self.lora is not None


@dataclass(frozen=True)
class Names:
    """What a family calls the layers that adapters go on."""

    attention: list[str]
    mlp: list[str]
    embedding: str
    norm: str
    parameter: str  # a bare parameter, for target_parameters
    blocks: str

    @property
    def all(self) -> list[str]:
        return [*self.attention, *self.mlp]


GPT2 = Names(["c_attn"], ["c_fc"], "wte", "ln_f", "h.0.attn.c_attn.weight", "h")
LLAMA = Names(["q_proj", "v_proj"], ["up_proj", "down_proj"], "embed_tokens", "norm", "q_proj.weight", "layers")
PHI3 = Names(["qkv_proj"], ["gate_up_proj", "down_proj"], "embed_tokens", "norm", "qkv_proj.weight", "layers")
STARCODER2 = Names(["q_proj", "v_proj"], ["c_fc", "c_proj"], "embed_tokens", "norm", "q_proj.weight", "layers")
GPT_NEOX = Names(
    ["query_key_value"], ["dense_h_to_4h"], "embed_in", "final_layer_norm", "query_key_value.weight", "layers"
)


def names_of(model: nn.Module) -> Names:
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return next(names for names in (GPT2, PHI3, STARCODER2, GPT_NEOX, LLAMA) if {*names.all} <= modules)


def _peft(word: str, **more: Any) -> Kind:
    """LoRA on attention with further settings of peft."""
    return Kind(word, peft=lambda names: {"target_modules": names.attention} | more)


STARTS = get_args(Lora.model_fields["init"].annotation)
OURS = {
    f"ours, {init}": Kind("lora.init" if init in OF_BASE else "", lora={"init": init})
    for init in STARTS
    if init != "loftq"
}
OURS |= {
    "ours, loftq": Kind("lora.init", lora={"init": "loftq"}, quantization={"bits": 4, "scheme": "minmax"}),
    "ours, rslora": Kind(lora={"rslora": True}),
    "ours, dora": Kind("dora", lora={"dora": True}),
    "ours, dora of olora": Kind("lora.", lora={"dora": True, "rslora": True, "init": "olora"}),
    "ours, dora on nf4": Kind("dora", lora={"dora": True}, quantization={"bits": 4, "scheme": "nf4"}),
    "ours, attention and a pattern": Kind(
        lora={
            "targets": [
                r".*\.1\..*(c_attn|q_proj|qkv_proj|query_key_value)",
                r".*\.0\.mlp\.(c_fc|up_proj|gate_up_proj|dense_h_to_4h)",
            ]
        }
    ),
    "ours, other alpha, dropout": Kind(lora={"lora_alpha": 3.0, "dropout": 0.1}),
    "ours, with the head": Kind("lm_head", lora={"targets": ["all-linear", "lm_head"]}),
    "ours, beside int8": Kind(lora={}, quantization={"bits": 8, "scheme": "int8"}),
    "ours, beside nf4": Kind(lora={}, quantization={"bits": 4, "scheme": "nf4"}),
    "ours, beside minmax 8": Kind(lora={}, quantization={"bits": 8, "scheme": "minmax"}),
    "ours, beside minmax 4": Kind(lora={}, quantization={"bits": 4, "scheme": "minmax"}),
}
PEFT = {
    "attention": _peft(""),
    "all-linear": Kind(peft=lambda names: {"target_modules": "all-linear"}),
    "alpha": _peft("", lora_alpha=3),
    "rslora": _peft("", use_rslora=True),
    "rank_pattern": Kind(peft=lambda names: {
        "target_modules": names.all, "rank_pattern": {names.mlp[0]: 2}}),
    "alpha_pattern": Kind(peft=lambda names: {
        "target_modules": names.all, "alpha_pattern": {names.mlp[0]: 32}}),
    "head": Kind("lm_head", peft=lambda names: {"target_modules": [*names.attention, "lm_head"]}),
    "embedding": Kind("embed", peft=lambda names: {"target_modules": [*names.attention, names.embedding]}),
    "bias all": _peft("bias", bias="all"),
    "bias lora_only": _peft("bias", bias="lora_only"),
    "lora_bias": _peft("lora_bias", lora_bias=True),
    "modules_to_save": Kind("modules_to_save", peft=lambda names: {
        "target_modules": names.attention, "modules_to_save": [names.norm]}),
    "dora": _peft("dora", use_dora=True),
    "layers_to_transform": Kind(peft=lambda names: {
        "target_modules": names.attention, "layers_to_transform": [1], "layers_pattern": names.blocks}),
    "exclude_modules": Kind(peft=lambda names: {
        "target_modules": names.all, "exclude_modules": [names.mlp[0]]}),
    "trainable_token_indices": _peft("trainable_token_indices", trainable_token_indices=[5, 17]),
    "target_parameters": Kind("target_parameters", peft=lambda names: {
        "target_modules": [], "target_parameters": [names.parameter]}),
    "layer_replication": _peft("layer_replication", layer_replication=[[0, 2], [1, 2]]),
    "alora": _peft("alora", alora_invocation_tokens=[9, 3]),
    "pissa": _peft("init_lora_weights", init_lora_weights="pissa"),
    "olora": _peft("init_lora_weights", init_lora_weights="olora"),
    "gaussian": _peft("", init_lora_weights="gaussian"),
    "IA3": Kind("IA3", config=IA3Config, peft=lambda names: {
        "target_modules": [names.attention[-1]], "feedforward_modules": []}),
    "LoHa": Kind("LOHA", config=LoHaConfig, peft=lambda names: {"target_modules": names.mlp}),
    "prompt tuning": Kind("PROMPT_TUNING", config=PromptTuningConfig, peft=lambda names: {"num_virtual_tokens": 4}),
    "of a later peft": Kind("use_something_new", edit={"use_something_new": True}, peft=lambda names: {
        "target_modules": names.attention}),
}  # fmt: skip
NONE = "none"
ADAPTERS: dict[str, Kind | None] = {NONE: None, **OURS, **{f"peft, {name}": kind for name, kind in PEFT.items()}}

# Settings of peft's LoRA that no kind above sets, and why none has to.
UNUSED = {
    "task_type": "which class of peft's wraps the model",
    "peft_type": "the kind of adapter",
    "auto_mapping": "which class of peft's wraps the model",
    "peft_version": "a note",
    "base_model_name_or_path": "the base",
    "revision": "of the base on the hub",
    "inference_mode": "whether it is trained on",
    "r": "the rank",
    "lora_dropout": "of training",
    "fan_in_fan_out": "peft corrects it by the layer's class",
    "megatron_config": "of another framework's layers",
    "megatron_core": "of another framework's layers",
    "loftq_config": "of the start",
    "eva_config": "of the start",
    "corda_config": "of the start",
    "lora_ga_config": "of the start",
    "runtime_config": "not written to disk",
    "velora_config": "of training",
    "use_qalora": "of GPTQ bases, which are refused",
    "qalora_group_size": "of GPTQ bases, which are refused",
    "monteclora_config": "of training",
    "use_bdlora": "needs a config of its own",
    "arrow_config": "of several adapters together",
    "kasa_config": "of the start",
    "ensure_weight_tying": "of training",
}


def make_ours(kind: Kind, base: Base, folder: Path) -> list[LoraPipelineLayer]:
    """Write an adapter as finetuning does, of weights that change the model; the layers as they were trained."""
    assert kind.lora is not None
    weights = open_weights(base.path, low_rank=True)
    lora, quantization = Lora(rank=RANK, **kind.lora), FinetuneQuantization(**kind.quantization)
    lora_model = LoraModel(weights, lora, quantization)
    layers = [LoraPipelineLayer(part, lora_model, torch.device("cpu")).eval() for part in lora_model.parts()]
    trained = {name: parameter for layer in layers for name, parameter in layer.parameters_by_name()}
    _shake(trained)
    values = {name: parameter.detach() for name, parameter in trained.items()}
    fingerprint = weights_fingerprint(base.path) if base.path.is_dir() else None
    save_adapter(folder, lora, values, weights, quantization, fingerprint)
    copy_tokenizer(base.path, folder)
    return layers


def make_peft(kind: Kind, base: Base, folder: Path) -> None:
    """Write an adapter as a peft user does, with nothing beside it."""
    assert kind.peft is not None
    model = base.plain()
    lora = {"r": RANK, "lora_alpha": 2 * RANK} if kind.config is LoraConfig else {}
    config = kind.config(**lora | kind.peft(names_of(model)), task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    _shake({name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad})
    model.peft_config["default"].base_model_name_or_path = str(base.path)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    if kind.edit:
        tree = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(tree | kind.edit))


def _shake(parameters: dict[str, Any]) -> None:
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
