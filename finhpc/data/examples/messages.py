"""Conversations from files, in one form: role and content of each message, and tool calls if there are any.

Also pairs: what both sides answer to, the chosen answer and the rejected one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

from finhpc.data.examples.values import is_missing, shown, text_of
from finhpc.errors import ConfigError
from finhpc.textfile import parse_json

# Roles by the names that ShareGPT's and other files use.
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "tool": "tool",
    "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
# Parts of a message that change what the model reads or learns: they are used or refused, never dropped.
REFUSED = ("function_call", "tools", "functions", "images", "image", "audio", "videos", "refusal")
MASKS = ("weight", "loss", "train")  # whether an answer is learned
ONLY_READ = "only_read"  # key of a message that is read but not learned; chat templates do not get it
RENDERED = ("tool_calls", "reasoning_content", "thinking", "reasoning")
PASSED = ("name", "tool_call_id")
SIDES = ("chosen", "rejected")
Turns = list[dict[str, Any]]


def messages_of(values: dict[str, Any], column: str, where: str) -> list[dict[str, Any]]:
    """Return the messages of a record as `role` and `content`; ShareGPT's `from` and `value` are read as these.

    The list of messages may be JSON text. Content is text, or a list of text parts, which are joined; it is null only
    with tool calls. A `system` column of the record precedes a conversation without a system message. Raises
    `ConfigError`, naming the record and the message, for everything that could not be rendered or learned as written.
    """
    for name in ("functions", "images", "image", "videos", "audios"):
        if name != column and (held := values.get(name)) and not is_missing(held) and held not in ("[]", "{}"):
            raise ConfigError(f"{where}: {name} are not read; remove the column or the record.")
    messages = values.get(column)
    if isinstance(messages, str) and messages.lstrip().startswith("["):  # as tables hold them
        try:
            messages = parse_json(messages)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: {column} is broken JSON ({error}); correct it.") from None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ConfigError(f"{where}: {column} is not a list of objects; write role and content of each.")
    read_messages = [_message(message, f"{where}: message {number}") for number, message in enumerate(messages, 1)]
    _check_turns(read_messages, where)
    system = values.get("system")
    if isinstance(system, str) and system.strip() and not any(message["role"] == "system" for message in read_messages):
        read_messages.insert(0, {"role": "system", "content": system})
    return read_messages


def _check_turns(messages: list[dict[str, Any]], where: str) -> None:
    """Raise `ConfigError` if the user or the assistant speaks twice in a row: a message between them is missing."""
    for number, (before, message) in enumerate(pairwise(messages), 2):
        if message["role"] == before["role"] in ("user", "assistant"):
            raise ConfigError(
                f"{where}: messages {number - 1} and {number} both have the role {message['role']}, and turns "
                "alternate; add what is missing between them, join them, or remove the record."
            )


def tools_of(values: dict[str, Any], where: str) -> list[Any] | None:
    """Return the tools that a record offers, a list of objects or its JSON text; None if there are none."""
    tools = values.get("tools")
    if isinstance(tools, str):
        try:
            tools = parse_json(tools or "[]")
        except ValueError as error:
            raise ConfigError(f"{where}: tools are broken JSON ({error}); correct them.") from None
    if is_missing(tools) or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError(f"{where}: tools holds {shown(tools)}, not a list of objects; correct it.")
    return tools


def check_rendered(messages: list[dict[str, Any]], render: Callable[[list[dict[str, Any]]], str], where: str) -> None:
    """Raise `ConfigError` for a part of a message, such as its tool calls, that does not show in the rendered text."""
    for number, message in enumerate(messages):
        for part in (name for name in RENDERED if name in message):
            rest = {name: value for name, value in message.items() if name != part}
            if render(messages[: number + 1]) == render([*messages[:number], rest]):
                raise ConfigError(
                    f"{where}: message {number + 1} holds {part}, which the tokenizer's chat template does not render; "
                    "use a model whose template does, or remove the record."
                )


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    role = message.get("from" if is_missing(message.get("role")) else "role")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise ConfigError(f"{where} has the role {role!r}; roles are {', '.join(ROLES)}.")
    content = message.get("value" if is_missing(message.get("content")) and "value" in message else "content")
    given = {name: value for name, value in message.items() if not is_missing(value) and value not in ([], {}, "")}
    if unread := next((name for name in REFUSED if name in given), None):
        raise ConfigError(f"{where} holds {unread}, which is not read; remove it or the record.")
    read: dict[str, Any] = {"role": ROLES[role.lower()], "content": _content(content, given, where)}
    for name in MASKS:
        if name in given and given[name] not in (0, 1):  # False and True, too
            raise ConfigError(
                f"{where} holds {name}={given[name]!r}; an answer is learned (1 or true) or only read (0 or false)."
            )
        if name in given and not given[name]:
            read[ONLY_READ] = True
    read |= {name: given[name] for name in (*RENDERED, *PASSED) if name in given}
    if "tool_calls" in read:
        read["tool_calls"] = [_call(call, where) for call in read["tool_calls"]]
    return read


def _content(content: Any, given: dict[str, Any], where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        return "".join(_part(part, where) for part in content)
    if (is_missing(content) or content == []) and "tool_calls" in given:
        return ""
    raise ConfigError(f"{where} holds {shown(content)}, not text; correct it.")


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else shown(part)
    if isinstance(part, dict) and kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return str(part["text"])
    raise ConfigError(f"{where} holds a part of type {kind}, of which only text is read; remove it or the record.")


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call with its arguments as an object, as chat templates expect; OpenAI's files hold them as JSON text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ConfigError(f"{where} holds a tool call without a function name; correct it.")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments or "{}")
        except ValueError as error:
            raise ConfigError(f"{where}: the arguments of {function['name']} are broken JSON ({error}).") from None
    call = {name: value for name, value in call.items() if value is not None}
    filled: dict[str, Any] = function | {"arguments": {} if arguments is None else arguments}
    return {**call, "function": filled} if "function" in call else {**call, **filled}


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
    if not prompt or not all(each and each[-1]["role"] == "assistant" for each in whole.values()):
        raise ConfigError(f"{where}: chosen and rejected do not both end with an answer to a prompt; correct them.")
    if whole["rejected"][:-1] != prompt:
        raise ConfigError(
            f"{where}: chosen and rejected differ before their last answer, and one prompt has two answers; correct "
            "them or remove the record."
        )
    read = [message | {ONLY_READ: True} if message["role"] == "assistant" else message for message in prompt]
    return Sides(prompt, *([*read, each[-1]] for each in whole.values()))
