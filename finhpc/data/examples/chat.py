"""Conversations through a tokenizer's own chat template: the text, and which parts of it are answers."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from finhpc.data.examples.messages import ONLY_READ, check_rendered
from finhpc.errors import ConfigError
from finhpc.models.files.tokens import encode

Message = dict[str, Any]
MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")  # templates that mark the answers themselves
PROBE = "A7a"  # an answer to find the place of answers
NEXT = ("The", "no", "a", "I")  # beginnings of answers, to see what follows a prompt
SHOWN = 60


class Conversation(NamedTuple):
    """A rendered conversation: `answers` are the [start, stop) of its text that are learned.

    `marked`: the template marks them itself. `left_out`: roles of messages that it does not write.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    marked: bool = False
    left_out: tuple[str, ...] = ()


def learned(messages: list[Message], where: str) -> list[Message]:
    """Return the messages up to the last answer that is learned; nothing is learned from what follows it.

    Raises `ConfigError` for an empty answer, and for a conversation without an answer.
    """
    last = 0
    for number, message in enumerate(messages, 1):
        if is_learned(message):
            last = number
            if not message["content"].strip() and "tool_calls" not in message:
                raise ConfigError(f"{where}: the answer (message {number}) is empty; write one or remove the record.")
    if not last and any(message["role"] == "assistant" for message in messages):
        raise ConfigError(f"{where}: every answer is only read (weight 0), so nothing to learn; remove the record.")
    if not last:
        raise ConfigError(f"{where}: no message of the role assistant, so nothing to learn; add one or remove it.")
    return messages[:last]


def is_learned(message: Message) -> bool:
    """Return whether a message is an answer that is learned, and not only read."""
    return bool(message["role"] == "assistant" and not message.get(ONLY_READ))


def control_tokens(tokenizer: Any) -> list[str]:
    """Return the tokens that a template writes and a message must not contain."""
    found = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(found | {token for token in tokenizer.all_special_tokens if token})


def rendered(messages: list[Message], tools: Any, where: str, tokenizer: Any, control: list[str]) -> list[Conversation]:
    """Return the conversation as the template writes it, `answers` from the end of prompts to the end of turns.

    A prompt is what the template writes with `add_generation_prompt`, so that inference reads the same. A template
    that rewrites earlier turns (Qwen3 drops their reasoning) gives one conversation per answer, as inference reads
    it when that answer is due. `control`: from `control_tokens`. Raises `ConfigError` for special tokens in a
    message, a conversation that the template refuses, and a template whose prompt for an answer does not begin the
    answer's turn.
    """
    for number, message in enumerate(messages, 1):
        if token := next((token for token in control if token in (message.get("content") or "")), None):
            raise ConfigError(f"{where}: message {number} holds the special token {token}; remove it from the text.")
    places = [i for i, message in enumerate(messages) if is_learned(message)]
    whole = _render(tokenizer, messages, tools, where)
    check_rendered(messages, lambda given: _render(tokenizer, given, tools, where), where)
    if tools and whole == _render(tokenizer, messages, None, where):
        raise ConfigError(
            f"{where}: the record has tools, which the chat template does not write; use a model whose template does, "
            "or remove them."
        )
    left_out = tuple(
        message["role"]
        for message in messages
        if message["role"] != "assistant" and message["content"].strip()[:SHOWN] not in whole
    )
    if MARKS.search(tokenizer.get_chat_template(tools=tools)):
        return [_marked(messages, tools, where, tokenizer)._replace(left_out=left_out)]
    each = [_answer(messages[: i + 1], tools, where, tokenizer) for i in places]
    if all(whole.startswith(text[:stop]) for text, ((_, stop),), *_ in each):
        return [Conversation(whole, tuple(span for chat in each for span in chat.answers), left_out=left_out)]
    return [chat._replace(left_out=left_out) for chat in each]


def prompt_text(messages: list[Message], tokenizer: Any, where: str = "the conversation") -> str:
    """Return the text that is read before an answer."""
    return _render(tokenizer, messages, None, where, add_generation_prompt=True)


def rendered_ids(text: str, tokenizer: Any) -> list[int]:
    """Return the ids of a rendered prompt as they are when an answer follows.

    White space at its end that becomes part of the answer's first token (as after `ASSISTANT: `) is not read: the
    model writes that token itself, as it has learned to.
    """
    (ids,) = encode(tokenizer, [text])
    longer = [text + word for word in NEXT]
    encoded = tokenizer(longer, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for others, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        kept = next((i for i, (_, stop) in enumerate(offsets) if stop > len(text)), len(ids))
        if 0 < kept < len(ids) and not text[offsets[kept - 1][1] :].strip():
            return list(others[:kept])
    return ids


def _answer(messages: list[Message], tools: Any, where: str, tokenizer: Any) -> Conversation:
    """Return the conversation up to its last answer, of which only that answer is learned."""
    before = _before(messages[:-1], tools, where, tokenizer)
    text = _render(tokenizer, messages, tools, where)
    stop = len(text.rstrip())
    if not text.startswith(before) or stop <= len(before):
        raise ConfigError(
            f"{where}: the chat template's prompt for an answer (add_generation_prompt) does not begin the turn that "
            f"it writes with the answer: it ends in {before[-20:]!r}. The model would learn after another text than "
            "it is asked with; mark the answers in the template with {% generation %}, or use another template."
        )
    return Conversation(text, ((len(before), stop),))


def _before(messages: list[Message], tools: Any, where: str, tokenizer: Any) -> str:
    if any(message["role"] != "system" for message in messages):
        return _render(tokenizer, messages, tools, where, add_generation_prompt=True)
    # The assistant speaks first: not every template writes a prompt after nothing.
    text = _render(tokenizer, [*messages, {"role": "assistant", "content": PROBE}], tools, where)
    return text[: text.find(PROBE)] if PROBE in text else text


def _marked(messages: list[Message], tools: Any, where: str, tokenizer: Any) -> Conversation:
    """Return the conversation with what is between {% generation %} and {% endgeneration %} as answers."""
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), (spans,) = render_jinja_template(
        conversations=[_for_template(messages)],
        tools=tools,
        chat_template=tokenizer.get_chat_template(tools=tools),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    answers = tuple((start, stop) for start, stop in spans if stop > start)
    turns = [message for message in messages if message["role"] == "assistant"]
    if not all(map(is_learned, turns)):
        if len(answers) != len(turns):
            raise ConfigError(
                f"{where}: the chat template marks {len(answers)} parts of {len(turns)} answers with {{% generation %}}"
                ", so it is not known which of them has weight 0; remove the weights or the record."
            )
        answers = tuple(span for span, turn in zip(answers, turns, strict=True) if is_learned(turn))
    if not answers:
        raise ConfigError(
            f"{where}: the chat template marks no answer with {{% generation %}} in this conversation; correct the "
            "template or the conversation."
        )
    return Conversation(text, answers, marked=True)


def _for_template(messages: list[Message]) -> list[Message]:
    """Return the messages as chat templates expect them: without our own mark and without empty values."""
    return [
        {key: value for key, value in message.items() if key != ONLY_READ and value is not None} for message in messages
    ]


def _render(
    tokenizer: Any, messages: list[Message], tools: Any, where: str, add_generation_prompt: bool = False
) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            _for_template(messages), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # whatever the template's author raises, such as for roles out of turn
        raise ConfigError(f"{where}: the chat template refuses it ({error}); correct the conversation.") from None
    return text
