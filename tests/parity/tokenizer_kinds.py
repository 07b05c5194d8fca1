"""The tokenizers of the harness: every kind that published models come with, and the chat templates that go with them.

A tokenizer is one of `KINDS`, with what one of `ENDS` puts around every text, and one of `TEMPLATES`. All have the
same special tokens, so that every template fits every tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.data import kinds
from tests.data.kinds import CHATML, KINDS, MARKED, ZEPHYR
from tests.parity.pairwise import pairwise

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
MARKERS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
VOCAB = 448  # rows of every model's embedding; no tokenizer has more entries

ENDS = {"nothing": (False, False), "begin": (True, False), "end": (False, True), "begin, end": (True, True)}

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
    "ChatML, generation": MARKED,
    "ChatML, default system": DEFAULT_SYSTEM,
    "Llama 2": LLAMA_2,
    "Llama 3": LLAMA_3,
    "Zephyr": ZEPHYR,
    "without an end": WITHOUT_END,
}
# Template -> the token with which it ends an answer; one that is missing ends answers with text alone.
END_OF_TURN = dict.fromkeys([name for name in TEMPLATES if name.startswith("ChatML")], "<|im_end|>")
END_OF_TURN |= {"Llama 2": END, "Llama 3": "<|eot_id|>", "Zephyr": END}


@dataclass(frozen=True)
class Kind:
    """A tokenizer: its algorithm, what it puts around a text, its chat template; each a key of the tables above."""

    kind: str
    ends: str = "nothing"
    template: str = "ChatML"

    def __str__(self) -> str:
        return f"{self.kind} | {self.ends} | {self.template}"


def tokenizer_pairs() -> list[Kind]:
    """Tokenizers in which every pair of values of the tables above occurs."""
    axes = {"kind": list(KINDS), "ends": list(ENDS), "template": list(TEMPLATES)}
    return [Kind(**chosen) for chosen in pairwise(axes, lambda chosen: True)]


@cache
def tokenizer_of(of: Kind) -> Any:
    """The tokenizer as transformers has it."""
    begin, end = ENDS[of.ends]
    made = kinds.tokenizer(of.kind, begin=begin, end=end)
    made.add_special_tokens({"additional_special_tokens": list(MARKERS)})
    made.chat_template = TEMPLATES[of.template]
    assert len(made) <= VOCAB
    return made
