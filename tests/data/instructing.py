"""A tiny tokeniser and instruction files, made in a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(eos: bool = True, bos: bool = False) -> Any:
    """A byte-level BPE that knows the prompts' words."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(
        ["Instruction: What is the sentiment of this news? negative neutral positive"] * 9, trainer
    )
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>" if eos else None)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = CHAT
    return made


def phrases(path: Path, lines: list[str], encoding: str = "latin-1") -> str:
    path.write_bytes("\n".join(lines).encode(encoding))
    return str(path)


def jsonl(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def sentences(n: int) -> list[str]:
    """Sentences with labels, no two alike."""
    labels = ("negative", "neutral", "positive")
    return [f"Profit of company {i} rose by {i % 7} % in {i * 31 % 100} .@{labels[i % 3]}" for i in range(n)]
