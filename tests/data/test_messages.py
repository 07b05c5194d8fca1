"""Conversations in the shapes that files hold them."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finhpc.data.examples.chat import control_tokens, rendered
from finhpc.data.examples.examples import make_examples
from finhpc.data.examples.instructions import read_examples
from finhpc.errors import ConfigError
from finhpc.settings.finetune import Instructions
from tests.data.instructing import CHAT, jsonl, tokenizer

TOOLS = CHAT.replace(
    "{{ m['content'] }}",
    "{{ m['content'] }}{% for c in m.tool_calls %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}"
    "{% endfor %}",
)
PLAIN = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "good day"},
]
CALL = {"type": "function", "id": "1", "function": {"name": "price", "arguments": '{"of": "ABC"}'}}


def share(roles, messages):
    return [{"from": role, "value": message["content"]} for role, message in zip(roles, messages, strict=True)]


def read(path, template=CHAT):
    """Texts of the conversations, and their answers."""
    tok = tokenizer()
    tok.chat_template = template
    (found,) = read_examples([str(path)], Instructions())
    chats = [
        chat
        for example in found.examples
        for chat in rendered(example.messages, example.tools, example.where, tok, control_tokens(tok))
    ]
    return [(chat.text, [chat.text[start:stop] for start, stop in chat.answers]) for chat in chats]


def refusal(path, template=CHAT):
    with pytest.raises(ConfigError) as error:
        read(path, template)
    return str(error.value)


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": share(("system", "human", "gpt"), PLAIN)},
        {"conversations": share(("human", "gpt"), PLAIN[1:]), "system": "be brief"},
        {"messages": share(("system", "user", "assistant"), PLAIN)},
        {"conversations": PLAIN},
        {"conversations": [{"from": m["role"], "content": m["content"]} for m in PLAIN]},
        {"messages": [{"role": m["role"], "value": m["content"]} for m in PLAIN]},
        {"messages": json.dumps(PLAIN)},
        {"messages": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in PLAIN]},
        {"messages": [{"role": m["role"], "content": [m["content"][:2], m["content"][2:]]} for m in PLAIN]},
        {"messages": [{**m, "tool_calls": None, "weight": 1} for m in PLAIN], "tools": None},
    ],
)
def test_every_shape_gives_what_role_and_content_give(tmp_path, record):
    plain = read(jsonl(tmp_path / "plain.jsonl", [{"messages": PLAIN}]))
    assert read(jsonl(tmp_path / "a.jsonl", [record])) == plain
    pq.write_table(pa.Table.from_pylist([record, record]), tmp_path / "a.parquet")
    if not any(isinstance(m.get("content"), list) for m in record.get("messages", []) if isinstance(m, dict)):
        assert read(tmp_path / "a.parquet") == plain * 2


def test_what_goes_with_a_conversation_is_reported_as_used(tmp_path):
    record = {"id": 1, "conversations": share(("human", "gpt"), PLAIN[1:]), "system": "be brief"}
    path = jsonl(tmp_path / "a.jsonl", [record])
    (found,) = read_examples([path], Instructions())
    assert found.notes == [f"{path}: read as chat (columns conversations, system; not used: id)"]


def test_tool_calls_are_learned_if_the_template_renders_them(tmp_path):
    turns = [
        *PLAIN[:2],
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "5", "tool_call_id": "1"},
        {"role": "assistant", "content": "it is 5"},
    ]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    ((_, answers),) = read(path, TOOLS)
    assert answers == ['<call>price {"of": "ABC"}<|im_end|>', "it is 5<|im_end|>"]
    assert f"{path} line 1: message 3 holds tool_calls, which the tokenizer's chat template does not render" in refusal(
        path
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"content": None}, "message 3 holds null, not text"),
        ({"content": 5}, "message 3 holds the number 5, not text"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "message 3 holds a part of type image_url"),
        ({"content": "a", "function_call": {"name": "f"}}, "message 3 holds function_call, which is not read"),
        ({"content": "a", "weight": 0.5}, "message 3 holds weight=0.5; an answer is learned (1 or true) or only read"),
        ({"content": "a", "weight": 0}, "line 1: every answer is only read (weight 0), so nothing to learn"),
        ({"content": "a", "reasoning_content": "hm"}, "message 3 holds reasoning_content, which the tokenizer's"),
        ({"content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "arguments of f are broken"),
        ({"role": "narrator"}, "message 3 has the role 'narrator'; roles are system"),
        ({"role": None}, "message 3 has the role None"),
    ],
)
def test_what_cannot_be_rendered_is_refused_by_name(tmp_path, changed, message):
    path = jsonl(tmp_path / "a.jsonl", [{"messages": [*PLAIN[:2], PLAIN[2] | changed]}])
    assert message in refusal(path, TOOLS)
    assert f"{path} line 1" in refusal(path, TOOLS)


@pytest.mark.parametrize(("role", "number"), [("user", 3), ("assistant", 4)])
def test_turns_that_do_not_alternate_are_refused(tmp_path, role, number):
    turns = [*PLAIN[: number - 1], {"role": role, "content": "more"}, *PLAIN[number - 1 :]]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    said = f"line 1: messages {number - 1} and {number} both have the role {role}, and turns alternate"
    assert said in refusal(path)


@pytest.mark.parametrize("column", ["functions", "images"])
def test_columns_beside_a_conversation_that_are_not_read_are_refused(tmp_path, column):
    path = jsonl(tmp_path / "a.jsonl", [{"messages": PLAIN, column: [{"name": "price"}]}])
    assert f"line 1: {column} are not read" in refusal(path)


@pytest.mark.parametrize("tools", [[{"name": "price"}], '[{"name": "price"}]'])
def test_tools_that_the_template_does_not_render_are_refused(tmp_path, tools):
    path = jsonl(tmp_path / "a.jsonl", [{"messages": PLAIN, "tools": tools}])
    assert "line 1: the record has tools, which the chat template does not write" in refusal(path)
    ((text, _),) = read(path, "{{ tools | tojson if tools }}" + CHAT)
    assert text.startswith('[{"name": "price"}]')
    assert "tools holds an object" in refusal(jsonl(tmp_path / "b.jsonl", [{"messages": PLAIN, "tools": {"a": 1}}]))


def test_a_part_that_is_not_rendered_is_told_once_for_all_records(tmp_path):
    turns = [*PLAIN[:2], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": turns}] * 40)
    with pytest.raises(ConfigError) as error:
        make_examples(Instructions(source=[str(path)]), tokenizer(), 0)
    assert len(error.value.problems) == 1
    assert "The same applies to 39 more." in error.value.problems[0]
