"""A tiny Llama as a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor
from transformers import PreTrainedModel


def permuted(weight: Tensor, heads: int) -> Tensor:
    """As llama.cpp stores queries and keys: the two halves of each head's rotary pairs interleaved."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    model: PreTrainedModel, path: Path, tokenizer: Path | None = None, more: dict[str, Any] | None = None
) -> Path:
    """A tiny Llama as llama.cpp would write it, matrices of the MLP at 8 bits.

    `tokenizer`: a folder whose byte-level BPE goes into the file. `more`: settings and tensors that are added.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    for name, value in (more or {}).items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(name, value)
        elif isinstance(value, bool | str):
            (writer.add_bool if isinstance(value, bool) else writer.add_string)(name, value)  # type: ignore[operator]
        else:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(name, value)  # type: ignore[operator]
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.named_parameters():
        stem, _, suffix = name.rpartition(".")
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(stem.split(".")[-1])
        array = (permuted(tensor.detach(), heads) if heads else tensor.detach()).contiguous().numpy()
        gguf_name = f"{names.get_name(stem)}.{suffix}"
        if ".mlp." in name and array.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any, folder: Path) -> None:
    tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in tree["added_tokens"]} | tree["model"]["vocab"]
    special = {token["content"] for token in tree["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tree["model"]["merges"]])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id):
        add(ids["<|endoftext|>"])
