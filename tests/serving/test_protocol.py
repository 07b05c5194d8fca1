"""What a request may hold: each mistake is named, and what changes nothing is accepted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finhpc.serving.protocol import ApiError, Chat, Completion, parse

PROMPT = {"model": "m", "prompt": "a"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "a"}]}


def refused(cls: Any, tree: Any) -> ApiError:
    body = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    with pytest.raises(ApiError) as caught:
        parse(cls, body)
    return caught.value


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"max_tokens": "5"}, "max_tokens", "must be a whole number"),
        ({"max_tokens": 1.5}, "max_tokens", "must be a whole number"),
        ({"max_tokens": True}, "max_tokens", "must be a whole number"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "must be a number"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"seed": 1 << 70}, "seed", "less than"),
        ({"stop": 5}, "stop", "text or a list of texts"),
        ({"stop": ["a", 5]}, "stop", "text or a list of texts"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": 1}}, "stream_options", "stream_options.include_usage must be true or"),
        ({"prompt": 5}, "prompt", "a list of texts, a list of ids"),
        ({"prompt": ["a", 5]}, "prompt", "a list of texts, a list of ids"),
        ({"prompt": [[1], "a"]}, "prompt", "a list of texts, a list of ids"),
        ({"prompt": {"text": "a"}}, "prompt", "a list of texts, a list of ids"),
        ({"model": None}, "model", "is missing"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"suffix": "b"}, "suffix", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"temprature": 1}, "temprature", "temprature is not a parameter"),
        ({"messages": []}, "messages", "not a parameter"),
    ],
)
def test_a_mistake_is_named(more: dict[str, Any], param: str, words: str) -> None:
    error = refused(Completion, PROMPT | more)
    assert (error.status, error.param) == (400, param)
    assert words in error.message
    assert error.message.endswith(".")
    assert error.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages"),
        ("hello", "messages must be a list"),
        ([{"content": "a"}], "messages.0.role is missing"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "messages"),
        ([{"role": "user", "content": 5}], "messages"),
    ],
)
def test_a_conversation_that_cannot_be_read(messages: Any, words: str) -> None:
    error = refused(Chat, CHAT | {"messages": messages})
    assert error.param == "messages"
    assert words in error.message


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"5", b'{"a": 1, "a": 2}', b"\xff", b"[" * 100_000, b'{"model": NaN}']
)
def test_what_is_not_a_json_object(body: bytes) -> None:
    assert refused(Completion, body).status == 400


def test_what_changes_nothing_is_accepted() -> None:
    same = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "best_of": 1, "suffix": None}
    hints = {"user": "somebody", "service_tier": "flex", "safety_identifier": "x"}
    asked = parse(Completion, json.dumps(PROMPT | same | hints).encode())
    assert asked == parse(Completion, json.dumps(PROMPT).encode())
    chat = {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "modalities": ["text"]}
    assert parse(Chat, json.dumps(CHAT | chat).encode()).messages[0].plain == {"role": "user", "content": "a"}


def test_a_seed_may_be_negative_and_without_one_it_is_random() -> None:
    seeds = [parse(Completion, json.dumps(PROMPT | {"seed": seed}).encode()).first_seed() for seed in (-1, 0, 7)]
    assert seeds[1:] == [0, 7]
    assert seeds[0] >= 0
    asked = parse(Completion, json.dumps(PROMPT).encode())
    assert asked.first_seed() != asked.first_seed()
