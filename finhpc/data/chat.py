"""Conversations through a tokeniser's own chat template, cut into what is read and what is to be said."""

from __future__ import annotations

from typing import Any

from finhpc.data.messages import check_rendered
from finhpc.errors import ConfigError


def conversation(messages: list[dict[str, Any]], where: str, tokenizer: Any) -> tuple[list[tuple[str, str]], str]:
    """(prompt, answer) of each assistant turn, all in a row the rendered text, and the first user message.

    An answer ends where the template ends the turn, with its end-of-turn token; what follows belongs
    to the next prompt. A prompt is what the template gives with `add_generation_prompt`, so that
    inference reads the same. Raises `ConfigError` for a tokeniser without a template, a conversation
    without an answer, or a template that does not write a conversation turn by turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "the tokeniser has no chat template, which records of `messages` need; use an instruction-tuned model's, "
            "or write the records as context and target."
        )
    checked = _checked(messages, where, tokenizer)
    turns: list[tuple[str, str]] = []
    done = ""
    for index, message in enumerate(checked):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, checked[:index], where, add_generation_prompt=True)
        after = _render(tokenizer, checked[: index + 1], where, add_generation_prompt=False)
        if not before.startswith(done) or not after.startswith(before):
            raise ConfigError(
                f"{where}: the tokeniser's chat template rewrites earlier turns, so that no turn's answer can be told "
                "apart; train on one turn a record."
            )
        done = after[: len(after.rstrip())]
        turns.append((before[sum(len(p) + len(a) for p, a in turns) :], done[len(before) :]))
    if not turns:
        raise ConfigError(f"{where}: no message of the role assistant, so nothing to learn; add one or remove it.")
    first = next((message["content"] for message in checked if message["role"] == "user"), "")
    return turns, first.strip()


def _checked(messages: list[dict[str, Any]], where: str, tokenizer: Any) -> list[dict[str, Any]]:
    special = [token for token in tokenizer.all_special_tokens if token]
    for number, message in enumerate(messages, 1):
        role, content = message["role"], message["content"]
        if role == "assistant" and not content.strip() and "tool_calls" not in message:
            raise ConfigError(f"{where}: the answer (message {number}) is empty; write one or remove the record.")
        if token := next((token for token in special if token in content), None):
            raise ConfigError(f"{where}: message {number} holds the special token {token}; remove it from the text.")
    check_rendered(messages, lambda given: _render(tokenizer, given, where, add_generation_prompt=False), where)
    return messages


def _render(tokenizer: Any, messages: list[dict[str, Any]], where: str, add_generation_prompt: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # whatever the template's author raises, such as for roles out of turn
        raise ConfigError(f"{where}: the chat template refuses it ({error}); correct the conversation.") from None
    return text
