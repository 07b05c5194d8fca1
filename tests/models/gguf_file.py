"""Models of transformers as GGUF files, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
    more: dict[str, Any] | None = None,
    mlp_bits: int = 32,
) -> Path:
    """Write a GPT-2, Llama, Mistral or Qwen2 model with float32 weights, those of its MLPs with `mlp_bits` (32 or 8).

    `tokenizer`: a byte-level BPE that goes into the file. `more`: settings and tensors that are added.
    """
    config, family = model.config, model.config.model_type
    # llama.cpp writes a Mistral as a Llama.
    arch = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}.get(family, gguf.MODEL_ARCH.LLAMA)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _add_shape(writer, config)
    _add_more(writer, more or {})
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer, config.vocab_size)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for key, tensor in model.named_parameters():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, f"gguf has no name for {key}"
        array = np.ascontiguousarray(_stored(key, tensor.detach(), config).float().numpy())
        if ".mlp." in key and mlp_bits == 8 and array.shape[-1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    if (scaling := getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") != "default":
        writer.add_tensor("rope_freqs.weight", np.full(config.head_dim // 2, scaling["factor"], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_shape(writer: Any, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.model_type != "qwen2":
        heads = config.num_attention_heads
        writer.add_rope_dimension_count(getattr(config, "head_dim", None) or config.hidden_size // heads)


def _add_more(writer: Any, more: dict[str, Any]) -> None:
    adders = {bool: writer.add_bool, str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
    for name, value in more.items():
        add = writer.add_tensor if isinstance(value, np.ndarray) else adders[type(value)]
        add(name, value)


def _stored(key: str, tensor: Tensor, config: Any) -> Tensor:
    """GPT-2's matrices are turned, Llama's queries and keys permuted for interleaved rotary positions."""
    if config.model_type == "gpt2" and key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return tensor.T
    if config.model_type in ("llama", "mistral") and key.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
        return tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
    return tensor


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    ids: dict[str, int] = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    tokens = sorted(ids, key=ids.__getitem__)
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    padding = [f"[PAD{i}]" for i in range(len(tokens), vocab_size)]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + padding)
    writer.add_token_types(kinds + [gguf.TokenType.UNUSED] * len(padding))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_add_bos_token(False)
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
    ):
        if token is not None:
            add(token)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
