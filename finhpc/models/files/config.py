"""Read a model's config from its folder, and refuse settings that finhpc does not compute.

transformers ignores settings that its classes do not have. A model that was trained with them would load and compute
wrong numbers, so every such setting is an error here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

from transformers import AutoConfig
from transformers.activations import ACT2FN
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from finhpc.errors import CheckpointError, ConfigError
from finhpc.models.families.family import Family
from finhpc.models.families.registry import FAMILIES, check_plugins
from finhpc.settings.pretrain import Qkv

ADAPTER = "adapter_config.json"  # a folder with this file is an adapter, whatever else it contains
OWN_CODE = "Python code of its own (auto_map), which finhpc never runs; use a model that transformers knows"
LAYOUTS = get_args(Qkv)
ABSENT: tuple[Any, ...] = (None, False, 0, "", "none", [], {})
# Setting -> values at which it changes nothing; without values, only its absence changes nothing. A family computes
# those that its own config class has, with the exception of `NEVER`.
CHANGES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), (1, 1.0)),
    **dict.fromkeys(("scale_emb", "embedding_scale", "partial_rotary_factor", "rotary_pct"), (1, 1.0)),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "scale_depth", "dim_model_base"), ()),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "clip_qkv", "rope_interleaved"), ()),
    **dict.fromkeys(("qk_norm", "use_qk_norm", "use_parallel_residual", "parallel_attn", "alibi"), ()),
    **dict.fromkeys(("add_cross_attention", "is_encoder_decoder", "use_bidirectional_attention"), ()),
    **dict.fromkeys(("num_experts", "num_local_experts", "no_rope_layers", "attn_temperature_tuning"), ()),
    **dict.fromkeys(("compression_config", "num_nextn_predict_layers", "use_mrope"), ()),
}
NEVER = ("add_cross_attention", "is_encoder_decoder", "use_bidirectional_attention", "num_experts")
TYPES: dict[str, type] = {
    **dict.fromkeys(("rope_scaling", "rope_parameters", "quantization_config", "auto_map", "low_rank"), dict),
    **dict.fromkeys(("low_rank_layers",), dict),
    "layer_types": list,
}


def read_config(folder: Path, any_family: bool = False) -> Any:
    """Return transformers' config of a model folder, dense or low-rank, quantized or not.

    With `any_family` the model may be of a family that only transformers opens, with any settings.
    Raises `CheckpointError` if there is no readable config, `ConfigError` if it is an adapter's folder or of a family
    or kind that is not supported.
    """
    _check_folder(folder)
    try:
        tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = str(tree["model_type"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{folder}/config.json is not a model's config (it has no model_type); correct it."
        ) from None
    odd = [f"{key}={tree[key]!r}" for key, wanted in TYPES.items() if not isinstance(tree.get(key) or wanted(), wanted)]
    if odd:
        raise CheckpointError(f"{folder}/config.json is not a model's config: it has {', '.join(odd)}; correct it.")
    if (qkv := tree.get("low_rank_qkv", LAYOUTS[0])) not in LAYOUTS:
        raise CheckpointError(
            f"{folder}/config.json has low_rank_qkv={qkv!r}, which is unknown; it must be {' or '.join(LAYOUTS)}."
        )
    check_plugins(folder)
    if "AutoConfig" in (tree.get("auto_map") or {}):
        raise ConfigError(f"model={folder} has a config with {OWN_CODE}.")
    known = kind.removeprefix("lowrank_") in FAMILIES
    if not known and not any_family:
        raise ConfigError(
            f"model_type={kind} is not supported; supported: {', '.join(FAMILIES)} (it is in {folder}/config.json)."
        )
    if known:
        check_computation(tree, str(folder))
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers does not check the file: a wrong value can raise any error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = " ".join(line.strip() for line in lines[:2]).rstrip(".")
        raise CheckpointError(f"{folder}/config.json is not a model's config: {reason}; correct it.") from None


def quantizer_of(config: Any) -> str | None:
    """Return the `quant_method` of a quantized model's config, None for a model in floats."""
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return None
    tree = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = tree.get("quant_method") or (
        "bitsandbytes" if tree.get("load_in_8bit") or tree.get("load_in_4bit") else ""
    )
    return str(getattr(method, "value", method) or "unknown")


def is_adapter(folder: Path) -> bool:
    """Return whether a folder has an adapter in peft's format."""
    return (folder / ADAPTER).is_file()


def check_computation(tree: dict[str, Any], where: str) -> None:
    """Raise one `ConfigError` with every setting of a config that would change the computation and is not applied."""
    family = FAMILIES[str(tree.get("model_type")).removeprefix("lowrank_")]
    own = family.own_settings() - {*NEVER}
    odd = [f"{key}={tree[key]}" for key, same in CHANGES.items() if key not in own and _differs(tree.get(key), same)]
    if tree.get("is_causal") is False:
        odd.append("is_causal=False")
    odd += _odd_layers(tree, family) + _odd_rope(tree, family)
    act = next((tree[key] for key in ("hidden_act", "activation_function", "hidden_activation") if key in tree), None)
    if act is not None and act not in ACT2FN:
        odd.append(f"activation {act}")
    if "AutoModelForCausalLM" in (tree.get("auto_map") or {}):
        odd.append(f"auto_map={tree['auto_map']['AutoModelForCausalLM']} (code of its own, which is never run)")
    method = (tree.get("quantization_config") or {}).get("quant_method", "bitsandbytes")
    if not _is_opened(str(method)):
        odd.append(f"quantization_config.quant_method={method}")
    if odd:
        kind = str(tree.get("model_type")).removeprefix("lowrank_")
        raise ConfigError(
            f"model={where} has {', '.join(odd)} in its config, which finhpc does not compute; give a plain {kind} "
            "model in 16 or 32 bits."
        )


def _is_opened(quant_method: str) -> bool:
    """Return whether finhpc opens models of a quantizer: bitsandbytes, its own, and those of plugins."""
    quantizer = AUTO_QUANTIZER_MAPPING.get(quant_method)
    registered = quantizer is not None and not quantizer.__module__.startswith("transformers.")
    return registered or quant_method == "bitsandbytes"


def _differs(value: Any, same: tuple[Any, ...]) -> bool:
    if isinstance(value, list):  # one value per layer
        return any(_differs(each, same) for each in value)
    return value not in ABSENT and value not in same


def _odd_layers(tree: dict[str, Any], family: Family) -> list[str]:
    """Describe attention layers that the family's class does not compute."""
    odd = set(tree.get("layer_types") or []) - family.layer_types(tree)
    return [f"layer_types with {', '.join(sorted(map(str, odd)))}"] if odd else []


def _odd_rope(tree: dict[str, Any], family: Family) -> list[str]:
    """Describe rotary positions that the family's class does not compute."""
    problems = []
    for key in ("rope_scaling", "rope_parameters"):
        rope = tree.get(key) or {}
        several = [value for value in rope.values() if isinstance(value, dict)]
        kinds = [str(each.get("rope_type", each.get("type", "default"))) for each in several or [rope]]
        odd = sorted({kind for kind in kinds if kind not in family.ropes})
        if several and not family.ropes_by_layer:
            problems.append(f"{key} of several kinds of layers")
        elif odd:
            problems.append(f"{key} of type {', '.join(odd)}")
        elif not family.partial_rotary and _differs(rope.get("partial_rotary_factor"), (1, 1.0)):
            problems.append(f"{key}.partial_rotary_factor={rope['partial_rotary_factor']}")
    return problems


def _check_folder(folder: Path) -> None:
    if is_adapter(folder):
        raise ConfigError(
            f"model={folder} is an adapter's folder ({ADAPTER}), and here the model itself is needed; give the base, "
            "or a merged export of the adapter."
        )
    if (folder / "config.json").is_file():
        return
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if files:
        raise ConfigError(
            f"model={folder} is a folder of GGUF files ({', '.join(files[:5])}); give one of the files itself."
        )
    model = folder / "model"  # of a run's folder
    is_run = is_adapter(model) or (model / "config.json").is_file()
    remedy = f"its model is {model}" if is_run else "give a model folder in Hugging Face's layout"
    raise CheckpointError(f"{folder} has no config.json; {remedy}.")
