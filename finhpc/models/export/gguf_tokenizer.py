"""A tokenizer's tokens, merges, kinds and chat template in a GGUF file, if llama.cpp splits texts as it does.

llama.cpp has two kinds that finhpc writes: `gpt2`, byte-level BPE with one of its own named ways to split a text into
words (`src/llama-vocab.cpp`), and `llama`, SentencePiece's BPE with a score per token. Any other tokenizer would give
other ids there, so it is refused.
"""

from __future__ import annotations

import json
from typing import Any

from finhpc.errors import ConfigError
from finhpc.models.files.tokens import begin_ids, end_of_turn

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How words are split -> llama.cpp's name for it.
SPLITS = {
    "ByteLevel": "gpt-2",
    "Digits ByteLevel": "smollm",
    f"{CONTRACTIONS}\\p{{N}}{{1,3}}{REST} ByteLevel": "llama-bpe",
    f"{CONTRACTIONS}\\p{{N}}{REST} ByteLevel": "qwen2",
}
SPACE = "\u2581"


def tokenizer_of_llama_cpp(tokenizer: Any) -> tuple[str, str]:
    """Return llama.cpp's names of a tokenizer's model and of its way to split words; "none" without a tokenizer.

    Raises `ConfigError` for one that llama.cpp has not.
    """
    if tokenizer is None:
        return "none", ""
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    model, normalizers = tree["model"], _listed(tree.get("normalizer"), "normalizers")
    odd = [] if model["type"] == "BPE" else [f"its model is {model['type']}"]
    if model["type"] == "BPE" and model.get("byte_fallback"):
        if _is_metaspace(tree, normalizers):
            return "llama", "default"
        odd.append("it replaces or splits text in a way of its own")
    splits = " ".join(_split(each) for each in _listed(tree.get("pre_tokenizer"), "pretokenizers"))
    if not odd and splits in SPLITS and all(each["type"] == "NFC" for each in normalizers):
        return "gpt2", SPLITS[splits]
    odd += [] if odd else [f"it splits text by {splits or 'nothing'} after {[each['type'] for each in normalizers]}"]
    raise ConfigError(
        f"format=gguf does not fit the tokenizer, because {'; '.join(odd)}, which llama.cpp does not; it has "
        "byte-level BPE that splits like GPT-2's, SmolLM's, Llama 3's or Qwen 2's, and SentencePiece's BPE; "
        "use --format merged."
    )


def _listed(tree: Any, key: str) -> list[dict[str, Any]]:
    if not tree:
        return []
    return list(tree[key]) if tree["type"] == "Sequence" else [tree]


def _split(step: dict[str, Any]) -> str:
    """Return a step of a pre-tokenizer in a word, with what is unusual about it."""
    kind = str(step["type"])
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return kind
    if kind == "Digits" and step.get("individual_digits"):
        return kind
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex"))
    return json.dumps(step)


def _is_metaspace(tree: dict[str, Any], normalizers: list[dict[str, Any]]) -> bool:
    """Return whether spaces become SentencePiece's mark, and nothing else happens before BPE."""
    spaces = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    # Gemma's tokenizers also split at spaces, after they have replaced them all.
    steps = [
        step for step in _listed(tree.get("pre_tokenizer"), "pretokenizers") if not (normalizers and step == spaces)
    ]
    if steps:
        return not normalizers and [step["type"] for step in steps] == ["Metaspace"] and steps[0].get("split") is False
    kinds = [step["type"] for step in normalizers]
    return kinds in (["Prepend", "Replace"], ["Replace"])


def _adds_space(tree: dict[str, Any]) -> bool:
    steps = _listed(tree.get("pre_tokenizer"), "pretokenizers") + _listed(tree.get("normalizer"), "normalizers")
    return any(step["type"] == "Prepend" or step.get("prepend_scheme") in ("first", "always") for step in steps)


def add_tokenizer(writer: Any, tokenizer: Any, stops: list[int], rows: int) -> None:
    """Add a tokenizer to a GGUF file; `rows`: of the embedding, which may have more than there are tokens."""
    model, split = tokenizer_of_llama_cpp(tokenizer)
    writer.add_tokenizer_model(model)
    if tokenizer is None:
        return
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, kinds = _tokens(tree, rows)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in tree["model"]["merges"]]
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if model == "llama":
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_adds_space(tree))
    else:
        writer.add_token_merges([" ".join(merge) for merge in merges])
    begin, turn = begin_ids(tokenizer), end_of_turn(tokenizer)
    writer.add_add_bos_token(bool(begin))
    writer.add_add_eos_token(False)
    ends = [token for token in (tokenizer.eos_token_id, *stops) if token is not None]
    for add, token in (
        (writer.add_bos_token_id, begin[0] if begin else tokenizer.bos_token_id),
        (writer.add_eos_token_id, ends[0] if ends else None),
        (writer.add_eot_token_id, turn),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None and token < rows:
            add(token)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(tree: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Return the token of each row of the embedding, and llama.cpp's kind of it."""
    import gguf

    kind = gguf.TokenType
    tokens = [f"[PAD{i}]" for i in range(rows)]
    kinds = [int(kind.UNUSED)] * rows
    fallback = tree["model"].get("byte_fallback")
    for token, i in tree["model"]["vocab"].items():
        is_byte = fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[i], kinds[i] = token, int(kind.BYTE if is_byte else kind.NORMAL)
    unknown = tree["model"].get("unk_token")
    for added in tree["added_tokens"]:
        if added["id"] < rows:  # a token that only pads may have no row
            own = kind.UNKNOWN if fallback and added["content"] == unknown else kind.CONTROL
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = int(own if added["special"] else kind.USER_DEFINED)
    return tokens, kinds


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Return a score per token: SentencePiece merges the pair whose result has the highest one, BPE the first pair."""
    rank: dict[str, int] = {}
    for i, pair in enumerate(merges):
        rank.setdefault("".join(pair), i)
    return [-float(rank.get(token, len(merges))) for token in tokens]
