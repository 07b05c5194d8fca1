"""Preference pairs from files: what both sides answer to, the chosen answer and the rejected one."""

from __future__ import annotations

from typing import Any, NamedTuple

from finhpc.data.examples.messages import ONLY_READ, messages_of
from finhpc.data.examples.values import is_missing, text_of
from finhpc.errors import ConfigError

SIDES = ("chosen", "rejected")
Turns = list[dict[str, Any]]


class Sides(NamedTuple):
    """Texts, or conversations of which only the last answer is learned; `prompt` is a text or its messages."""

    prompt: str | Turns
    chosen: str | Turns
    rejected: str | Turns


def sides_of(values: dict[str, Any], columns: dict[str, str], where: str) -> Sides:
    """Return the sides of a record in TRL's preference formats.

    Texts have a `prompt`. Conversations are lists of messages: the prompt's and one answer, or whole ones that differ
    in their last answer. Raises `ConfigError` with the record's place for a side that is missing or of another kind,
    for sides that are equal, and for conversations that differ before their last answer.
    """
    kinds = {name: _is_messages(values.get(column)) for name, column in columns.items()}
    if kinds["chosen"] != kinds["rejected"]:
        raise ConfigError(f"{where}: chosen and rejected are not both texts or both lists of messages; correct them.")
    sides = _conversations(values, columns, where) if kinds["chosen"] else _texts(values, columns, where)
    if sides.chosen == sides.rejected:
        raise ConfigError(f"{where}: chosen and rejected are equal, so nothing is preferred; remove the record.")
    return sides


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith('[{"'))


def _texts(values: dict[str, Any], columns: dict[str, str], where: str) -> Sides:
    if "prompt" not in columns:
        raise ConfigError(f"{where}: texts have no prompt; name its column with --data.columns prompt=COLUMN.")
    found = {name: text_of(values.get(column), column, where).strip() for name, column in columns.items()}
    if empty := [name for name, text in found.items() if not text]:
        raise ConfigError(f"{where}: {' and '.join(empty)} is empty; write it or remove the record.")
    return Sides(found["prompt"], found["chosen"], found["rejected"])


def _conversations(values: dict[str, Any], columns: dict[str, str], where: str) -> Sides:
    before: Turns = []
    if "prompt" in columns and not is_missing(given := values.get(columns["prompt"])):
        if _is_messages(given):
            before = messages_of(values, columns["prompt"], where)
        elif isinstance(given, str) and given.strip():
            before = [{"role": "user", "content": given}]
    turns = {name: messages_of(values, columns[name], where) for name in SIDES}
    if all(len(each) > 1 for each in turns.values()):  # whole conversations, which may repeat the prompt
        before = []
    whole = {name: [*before, *each] for name, each in turns.items()}
    prompt = whole["chosen"][:-1]
    if any(each[-1]["role"] != "assistant" for each in whole.values()) or not prompt:
        raise ConfigError(f"{where}: chosen and rejected do not both end with an answer to a prompt; correct them.")
    if whole["rejected"][:-1] != prompt:
        raise ConfigError(
            f"{where}: chosen and rejected differ before their last answer, and one prompt has two answers; correct "
            "them or remove the record."
        )
    read = [message | {ONLY_READ: True} if message["role"] == "assistant" else message for message in prompt]
    return Sides(prompt, *([*read, each[-1]] for each in whole.values()))
