"""Tiny tokenizers of every kind that published models come with, and the chat templates that go with them.

A tokenizer is one of `KINDS`, with what one of `ENDS` puts around every text, and one of `TEMPLATES`. All have the
same special tokens, so that every template fits every tokenizer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
MARKERS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
SPECIAL = [UNKNOWN, BEGIN, END, *MARKERS]
VOCAB = 448  # rows of every model's embedding; no tokenizer has more entries
TRAINED = 420  # entries that a tokenizer learns at most
LINES = [
    "Instruction: What is the sentiment of this news? Please choose an answer: negative, neutral or positive.",
    "Profit of Alder Foods rose by 7 % in 2023; revenue fell to EUR 31.4 mn. The bank's rate did not move.",
    "user assistant system You are a helpful assistant. Hello, how are you? I am fine. [INST] [/INST] <<SYS>>",
]


def _byte_level(prefix: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    return _trained(made, trainers.BpeTrainer, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))


def _metaspace(scheme: str) -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _trained(made, trainers.BpeTrainer, initial_alphabet=["\n"])


def _prepend() -> Tokenizer:
    """As Llama 2 and Mistral have it: spaces are letters, one stands before every text, bytes for what is unknown."""
    learner = _metaspace("first")
    vocab, merges = learner.get_vocab(), _merges(learner)
    room = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = {token for token in vocab if len(token) == 1}
    kept = [pair for pair in merges if vocab[pair[0] + pair[1]] < VOCAB]
    tokens = [*SPECIAL, *room, *sorted(letters)]
    for left, right in kept:
        if len(tokens) < TRAINED and left in tokens and right in tokens:
            tokens.append(left + right)
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    kept = [(left, right) for left, right in kept if {left, right, left + right} <= set(ids)]
    made = Tokenizer(models.BPE(ids, kept, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def _unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    return _trained(made, trainers.UnigramTrainer, unk_token=UNKNOWN, initial_alphabet=["\n"])


def _word_piece() -> Tokenizer:
    """It drops line ends and the number of spaces."""
    made = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    made.normalizer = normalizers.BertNormalizer(lowercase=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return _trained(made, trainers.WordPieceTrainer)


def _trained(made: Tokenizer, trainer: Callable[..., Any], **how: Any) -> Tokenizer:
    learn = trainer(vocab_size=TRAINED, special_tokens=SPECIAL, show_progress=False, **how)
    made.train_from_iterator(LINES * 9, learn)
    return made


def _merges(made: Tokenizer) -> list[tuple[str, str]]:
    import json

    return [tuple(pair) for pair in json.loads(made.to_str())["model"]["merges"]]


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": _byte_level,
    "byte-level, prefix space": lambda: _byte_level(prefix=True),
    "Metaspace first": lambda: _metaspace("first"),
    "Metaspace always": lambda: _metaspace("always"),
    "Metaspace never": lambda: _metaspace("never"),
    "Prepend, byte fallback": _prepend,
    "Unigram": _unigram,
    "WordPiece": _word_piece,
}
ENDS = {
    "none": ((), ()),
    "begin": ((BEGIN,), ()),
    "end": ((), (END,)),
    "begin, end": ((BEGIN,), (END,)),
}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
    "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set first = '<<SYS>>\n' + "
    "messages[0]['content'] + '\n<</SYS>>\n\n' %}{% else %}{% set rest = messages %}{% set first = '' %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (first if loop.first else '') + m['content'].strip() + "
    "' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
WITHOUT_END = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    + CHATML
)
TEMPLATES = {
    "ChatML": CHATML,
    "ChatML, generation": CHATML_GENERATION,
    "ChatML, default system": DEFAULT_SYSTEM,
    "Llama 2": LLAMA_2,
    "Llama 3": LLAMA_3,
    "Zephyr": ZEPHYR,
    "without an end": WITHOUT_END,
}


@dataclass(frozen=True)
class Kind:
    """A tokenizer: its algorithm, what it puts around a text, its chat template; each a key of the tables above."""

    kind: str
    ends: str = "none"
    template: str = "ChatML"

    def __str__(self) -> str:
        return f"{self.kind} | {self.ends} | {self.template}"


def every_kind() -> list[Kind]:
    """All tokenizers that the tables above make."""
    return [Kind(*chosen) for chosen in itertools.product(KINDS, ENDS, TEMPLATES)]


_cache: dict[str, str] = {}


def tokenizer_of(of: Kind) -> Any:
    """The tokenizer as transformers has it."""
    if of.kind not in _cache:
        _cache[of.kind] = KINDS[of.kind]().to_str()
    inner = Tokenizer.from_str(_cache[of.kind])
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    before, after = ENDS[of.ends]
    if before or after:
        ids = [(token, inner.token_to_id(token)) for token in (*before, *after)]
        inner.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], pair=[*before, "$A", *after, *before, "$B:1", *after], special_tokens=ids
        )
    assert inner.get_vocab_size() <= VOCAB
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=BEGIN, eos_token=END, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
    made.add_special_tokens({"additional_special_tokens": list(MARKERS)})
    made.chat_template = TEMPLATES[of.template]
    return made
