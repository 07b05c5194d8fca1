"""`--format gguf`: one file for llama.cpp, with merged weights, and a file per adapter.

    FOLDER/model.gguf    settings, tokenizer, chat template, weights
    FOLDER/NAME.gguf     a LoRA adapter, `llama-cli --lora NAME.gguf`

The names of settings and tensors are those of the `gguf` package; what this file adds (permuted rows,
rotary factors) follows llama.cpp's converter, `convert_hf_to_gguf.py` and `convert_lora_to_gguf.py`, and
llama.cpp's readers, `src/llama-model.cpp` and `src/llama-adapter.cpp`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finhpc.errors import ConfigError
from finhpc.lowrank.replace import dense_shape
from finhpc.models.export.gguf_tokenizer import add_tokenizer, tokenizer_of_llama_cpp
from finhpc.models.export.runtime import Layers, Runtime, Source
from finhpc.models.families.registry import context_of, family_of
from finhpc.models.lora.peft_format import Adapter

FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}  # `general.file_type` of llama.cpp
MODEL = "model.gguf"


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp computes a family.

    `name`: its `general.architecture`. `activations`: those it computes. `permuted`: rotary positions turn pairs of
    neighbors, so that rows of queries and keys change their places. `head_sizes`: heads may be of another size than
    width / heads. `norms_from_zero`: the model adds 1 to the weights of norms, llama.cpp does not. `windows`: every so
    many layers one sees all tokens, the others those of a window.
    """

    name: str
    activations: tuple[str, ...]
    permuted: bool = False
    head_sizes: bool = False
    norms_from_zero: bool = False
    windows: int = 0


TANH = ("gelu_pytorch_tanh", "gelu_new")


def _gemma(name: str, windows: int = 0) -> Architecture:
    return Architecture(name, TANH[:1], head_sizes=True, norms_from_zero=True, windows=windows)


ARCHITECTURES = {
    "gpt2": Architecture("gpt2", TANH),
    "llama": Architecture("llama", ("silu",), permuted=True, head_sizes=True),
    "mistral": Architecture("llama", ("silu",), permuted=True, head_sizes=True),
    "qwen2": Architecture("qwen2", ("silu",)),
    "qwen3": Architecture("qwen3", ("silu",), head_sizes=True),
    "gemma": _gemma("gemma"),
    "gemma2": _gemma("gemma2", windows=2),
    "gemma3_text": _gemma("gemma3", windows=6),
}


class Gguf(Runtime):
    merged, schemes, opens = True, {8: "Q8_0", 4: "Q4_0"}, "llama.cpp (llama-cli -m FILE)"

    def check(self, model: Layers, source: Source) -> list[str]:
        config = model.target_config
        if config.model_type not in ARCHITECTURES:
            raise ConfigError(
                f"format=gguf does not fit model_type={config.model_type}, which finhpc does not write for llama.cpp; "
                f"it writes {', '.join(ARCHITECTURES)}; use --format merged."
            )
        tokenizer_of_llama_cpp(source.tokenizer)
        problems = _misfits(model)
        for name, adapter in source.adapters.items():
            problems += _adapter_problems(name, adapter, model)
        if problems:
            raise ConfigError([f"format=gguf does not fit {problem}" for problem in problems])
        shapes = model.target.state_dict()
        kinds = {name: _kind(name, shapes[f"{name}.weight"], model, source.bits) for name in _matrices(model)}
        return [name for name, kind in kinds.items() if kind not in ("Q8_0", "Q4_0") and source.bits < 16]

    def write(self, model: Layers, source: Source, folder: Path) -> int:
        import gguf

        writer = gguf.GGUFWriter(folder / MODEL, _arch(model).name)
        writer.add_type("model")
        # transformers takes a Llama file that is called exactly "mistral" for one of another architecture.
        writer.add_name("Mistral" if source.name == "mistral" else source.name)
        writer.add_file_type({8: 7, 4: 2}.get(source.bits, FILE_TYPES[model.stored_dtype]))
        if source.bits < 16:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, model.target_config, _arch(model))
        add_tokenizer(writer, source.tokenizer, source.stops, model.target_config.vocab_size)
        factors = _rope_factors(model.target_config)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        names = _names(model)
        order = _announce(writer, names, model, source.bits)
        _open(writer)
        if factors is not None:
            writer.write_tensor_data(factors)
        waiting: dict[str, Tensor] = {}
        for tensors in model.layers():
            waiting |= tensors
            while order and order[0] in waiting:
                name = order.pop(0)
                rows = _stored(name, waiting.pop(name), model)
                writer.write_tensor_data(_packed(rows, _kind(name, rows, model, source.bits)))
        writer.close()
        for name, adapter in source.adapters.items():
            _write_adapter(folder / f"{name}.gguf", name, adapter, model, names)
        return (folder / MODEL).stat().st_size


def _arch(model: Layers) -> Architecture:
    return ARCHITECTURES[model.target_config.model_type]


def _matrices(model: Layers) -> list[str]:
    head = family_of(model.target_config).head
    return [
        name
        for name, module in model.target.named_modules()
        if dense_shape(module) is not None and not (model.tied and name == head)
    ]


def _misfits(model: Layers) -> list[str]:
    """Describe the settings of a config that llama.cpp does not compute for its family."""
    config, arch = model.target_config, _arch(model)
    keys = ("hidden_activation", "hidden_act", "activation_function")
    act = next(value for key in keys if (value := getattr(config, key, None)))
    problems = [] if act in arch.activations else [f"the activation {act}"]
    for key in ("scale_attn_by_inverse_layer_idx", "mlp_bias", "use_sliding_window", "use_bidirectional_attention"):
        if getattr(config, key, False):
            problems.append(f"{key}=true")
    if getattr(config, "scale_attn_weights", True) is False:
        problems.append("scale_attn_weights=false")
    width, heads, size = config.hidden_size, config.num_attention_heads, _head_size(config)
    if not arch.head_sizes and size != width // heads:
        problems.append(f"head_dim={config.head_dim} with {heads} heads and a width of {width}")
    scale = getattr(config, "query_pre_attn_scalar", size)
    if scale != size:
        problems.append(f"query_pre_attn_scalar={scale} with heads of {size}")
    if arch.windows and config.layer_types != [_window(i, arch) for i in range(config.num_hidden_layers)]:
        problems.append(f"layer_types in which not one layer in {arch.windows} sees all tokens")
    kind = _rope(config).get("rope_type", "default")
    fits = ("default", "linear", "llama3") if arch.permuted else ("default", "linear")
    if kind not in fits:
        problems.append(f"rotary positions of type {kind}; {arch.name} may have {', '.join(fits)}")
    return [f"{problem}; use --format merged." for problem in problems]


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _window(layer: int, arch: Architecture) -> str:
    return "sliding_attention" if (layer + 1) % arch.windows else "full_attention"


def _rope(config: Any, layers: str = "full_attention") -> dict[str, Any]:
    """Return the rotary positions of the layers of a type; most models have the same in all."""
    rope = getattr(config, "rope_parameters", None) or {}
    return dict(rope.get(layers, rope))


def _rope_factors(config: Any) -> np.ndarray[Any, Any] | None:
    """Return what llama3's scaling divides each frequency by (head size / 2,); None for other rotary positions."""
    if _rope(config).get("rope_type") != "llama3":
        return None
    scaled = family_of(config).rotary(config).inv_freq
    size = 2 * len(scaled)
    plain = 1.0 / _rope(config)["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    factors: np.ndarray[Any, Any] = (plain / scaled).numpy()
    return factors


def _add_shape(writer: Any, config: Any, arch: Architecture) -> None:
    import gguf

    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_of(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    size = _head_size(config)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(kv_heads or heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta", 10000.0)))
    if _rope(config).get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(_rope(config)["factor"]))
    if arch.windows:
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base_swa(float(_rope(config, "sliding_attention")["rope_theta"]))
    for key, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if getattr(config, key, None):
            add(float(getattr(config, key)))


# -- tensors --------------------------------------------------------------------------------


def _names(model: Layers) -> dict[str, str]:
    """Return Hugging Face name -> GGUF name of every tensor, in the order of the model."""
    import gguf

    config = model.target_config
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == _arch(model).name)
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found = {name: table.get_name(name, (".weight", ".bias")) for name, _ in model.target.named_parameters()}
    if missing := [name for name, known in found.items() if known is None]:
        raise ConfigError(f"format=gguf has no name for {', '.join(missing[:3])}; use --format merged.")
    return found


def _kind(name: str, rows: Any, model: Layers, bits: int) -> str:
    """Return how a tensor is stored: vectors and positions in float32, the head in 8 bits where others have 4.

    llama.cpp's own 4-bit files store the head in more bits, too. Rows that do not divide into blocks of 32 stay
    float16.
    """
    family = family_of(model.target_config)
    layer = name.removesuffix(".weight")
    if len(rows.shape) == 1 or layer == family.positions:
        return "F32"
    if bits == 16:
        return {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[model.stored_dtype]
    columns = rows.shape[0] if layer in model.transposed and isinstance(rows, Tensor) else rows.shape[-1]
    if columns % 32:
        return "F16"
    heads = (family.head, family.embedding) if model.tied else (family.head,)
    return "Q8_0" if bits == 8 or layer in heads else "Q4_0"


def _stored(name: str, tensor: Tensor, model: Layers) -> np.ndarray[Any, Any]:
    """Return a tensor as llama.cpp takes it, in float32."""
    arch, config = _arch(model), model.target_config
    layer = name.rpartition(".")[0]
    tensor = tensor.detach().float()
    if layer in model.transposed and tensor.dim() == 2:
        tensor = tensor.T
    if arch.permuted:
        tensor = _permuted(layer, tensor, config)
    if arch.norms_from_zero and layer.endswith("norm"):
        tensor = tensor + 1
    return np.ascontiguousarray(tensor.numpy())


def _permuted(layer: str, rows: Tensor, config: Any) -> Tensor:
    """Put the two halves of each head of queries and keys between each other: llama.cpp turns neighbors."""
    if not layer.endswith(("q_proj", "k_proj")):
        return rows
    heads = config.num_attention_heads if layer.endswith("q_proj") else config.num_key_value_heads
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _packed(rows: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    import gguf

    packed: np.ndarray[Any, Any] = gguf.quantize(rows, gguf.GGMLQuantizationType[kind])
    return packed


def _announce(writer: Any, names: dict[str, str], model: Layers, bits: int) -> list[str]:
    """List every tensor in the file's header; return the order of their data."""
    import gguf

    shapes = dict(model.target.named_parameters())
    for name, known in names.items():
        kind = _kind(name, shapes[name], model, bits)
        shape = tuple(shapes[name].shape)
        if name.rpartition(".")[0] in model.transposed and len(shape) == 2:
            shape = shape[::-1]
        own = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[own]
        count = int(np.prod(shape)) // block * size
        writer.add_tensor_info(known, shape, np.dtype(np.float32), count, raw_dtype=own)
    return list(names)


def _open(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


# -- adapters -------------------------------------------------------------------------------


def _adapter_problems(name: str, adapter: Adapter, model: Layers) -> list[str]:
    problems = []
    if name == MODEL.partition(".")[0]:
        problems.append(f"an adapter named {name}, as the model's file is; give it another as NAME=FOLDER.")
    if adapter.magnitudes:
        problems.append(f"the adapter {name} with use_dora=true, which llama.cpp has not; merge it into its base.")
    return problems


def _write_adapter(path: Path, name: str, adapter: Adapter, model: Layers, names: dict[str, str]) -> None:
    """Write a LoRA adapter: NAME.lora_a (rank, in), NAME.lora_b (out, rank) in float32.

    llama.cpp multiplies B A by `adapter.lora.alpha` over the rank of the layer.
    """
    import gguf

    writer = gguf.GGUFWriter(path, _arch(model).name)
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string("adapter.type", "lora")
    alpha = max(len(a) for a, _ in adapter.pairs.values())
    writer.add_float32("adapter.lora.alpha", float(alpha))
    for layer, (a, b) in adapter.pairs.items():
        known = names[f"{layer}.weight"]
        scaled = b.float() * (adapter.scales[layer] * len(a) / alpha)
        if _arch(model).permuted:
            scaled = _permuted(layer, scaled, model.target_config)
        writer.add_tensor(f"{known}.lora_a", np.ascontiguousarray(a.float().numpy()))
        writer.add_tensor(f"{known}.lora_b", np.ascontiguousarray(scaled.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
