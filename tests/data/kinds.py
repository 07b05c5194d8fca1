"""Tiny tokenizers of every kind that chat models have, and the forms of their templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXT = ["What does Alder Foods sell? Fresh bread and good milk. user assistant system yes it is. [INST] no [/INST]"] * 5
ALPHABET = sorted({letter for text in TEXT for letter in text} | set("abcdefghijklmnopqrstuvwxyz0123456789\n,:"))

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} </s>{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "marked": MARKED, "llama2": LLAMA2, "zephyr": ZEPHYR, "vicuna": VICUNA}


def _byte_level(prefix: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    return _trained(made, trainers.BpeTrainer, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))


def _metaspace(scheme: Any) -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _trained(made, trainers.BpeTrainer, initial_alphabet=[*ALPHABET, "▁"])


def _prepend() -> Tokenizer:
    """As Llama 2's: a normalizer that puts a space first, bytes for what is unknown."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=[*ALPHABET, "▁"],
        show_progress=False,
        max_token_length=6,
    )
    made.train_from_iterator([word for text in TEXT for word in text.split()] + TEXT[:1], trainer)
    tree = json.loads(made.to_str())
    tree["model"]["vocab"] |= {f"<0x{byte:02X}>": len(tree["model"]["vocab"]) + byte for byte in range(256)}
    return Tokenizer.from_str(json.dumps(tree))


def _unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC()])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    return _trained(made, trainers.UnigramTrainer, unk_token="<unk>", initial_alphabet=ALPHABET)


def _word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    return _trained(made, trainers.WordPieceTrainer, initial_alphabet=ALPHABET)


def _trained(made: Tokenizer, trainer: Callable[..., Any], **more: Any) -> Tokenizer:
    made.train_from_iterator(TEXT, trainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False, **more))
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": _byte_level,
    "byte level, prefix": lambda: _byte_level(True),
    "metaspace first": lambda: _metaspace("first"),
    "metaspace always": lambda: _metaspace("always"),
    "metaspace never": lambda: _metaspace("never"),
    "prepend": _prepend,
    "unigram": _unigram,
    "word piece": _word_piece,
}


@cache
def _made(kind: str) -> str:
    """Some trainers make another tokenizer each time."""
    return str(KINDS[kind]().to_str())


def tokenizer(kind: str, template: str | None = None, begin: bool = False, end: bool = False) -> Any:
    """A tokenizer of `kind`; `begin`, `end`: it puts <s> before and </s> after every text."""
    made = Tokenizer.from_str(_made(kind))
    if begin or end:
        single = f"{'<s> ' if begin else ''}$A{' </s>' if end else ''}"
        ids = [(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    found: Any = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    if template:
        found.chat_template = TEMPLATES[template]
    return found
