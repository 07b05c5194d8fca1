"""A model of transformers as a GGUF file, as llama.cpp's converter writes it, with a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor

from tests.parity.tokenizer_kinds import BEGIN, END, UNKNOWN, VOCAB, Kind, tokenizer_of


def write_gguf(model: Any, path: Path) -> None:
    """Write a GPT-2, Llama, Mistral or Qwen2 model with float32 weights."""
    config, name = model.config, model.config.model_type
    # llama.cpp writes a Mistral as a Llama.
    arch = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}.get(name, gguf.MODEL_ARCH.LLAMA)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(VOCAB)
    if name == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        if name != "qwen2":
            writer.add_rope_dimension_count(
                getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            )
    _add_tokenizer(writer)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and tied:
            continue
        made = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert made is not None, f"gguf has no name for {key}"
        writer.add_tensor(made, np.ascontiguousarray(_stored(key, tensor, config).float().numpy()))
    if (scaling := getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") != "default":
        writer.add_tensor("rope_freqs.weight", np.full(config.head_dim // 2, scaling["factor"], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _stored(key: str, tensor: Tensor, config: Any) -> Tensor:
    """GPT-2's matrices are turned, Llama's queries and keys permuted for interleaved rotary positions."""
    if config.model_type == "gpt2" and key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return tensor.T
    if config.model_type in ("llama", "mistral") and key.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
        return tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
    return tensor


def _add_tokenizer(writer: Any) -> None:
    made = tokenizer_of(Kind("byte level"))
    tree = json.loads(made.backend_tokenizer.to_str())
    vocab: dict[str, int] = made.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    tokens += [f"[PAD{i}]" for i in range(len(tokens), VOCAB)]
    special = set(made.all_special_tokens)
    kinds = [
        gguf.TokenType.CONTROL if token in special else
        gguf.TokenType.NORMAL if token in vocab else gguf.TokenType.UNUSED
        for token in tokens
    ]  # fmt: skip
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in tree["model"]["merges"]])
    writer.add_bos_token_id(vocab[BEGIN])
    writer.add_eos_token_id(vocab[END])
    writer.add_unk_token_id(vocab[UNKNOWN])
    writer.add_add_bos_token(False)
    writer.add_chat_template(made.chat_template)
