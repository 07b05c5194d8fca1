"""Conversations in the shapes that files hold them."""

from __future__ import annotations

from itertools import compress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finhpc.config import Instructions
from finhpc.data.instructions import read_examples
from finhpc.data.tokenise import tokenised
from finhpc.errors import ConfigError
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
    tok = tokenizer()
    tok.chat_template = template
    (found,) = read_examples([str(path)], Instructions())
    rows = tokenised(found.examples, tok, 4096, True).rows
    return [(tok.decode(row.tokens), tok.decode(list(compress(row.tokens, row.answer)))) for row in rows]


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
        {"messages": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in PLAIN]},
        {"messages": [{"role": m["role"], "content": [m["content"][:2], m["content"][2:]]} for m in PLAIN]},
        {"messages": [{**m, "tool_calls": None, "weight": 1} for m in PLAIN], "tools": None},
    ],
)
def test_every_shape_gives_what_role_and_content_give(tmp_path, record):
    plain = read(jsonl(tmp_path / "plain.jsonl", [{"messages": PLAIN}]))
    assert read(jsonl(tmp_path / "a.jsonl", [record])) == plain
    pq.write_table(pa.Table.from_pylist([record, record]), tmp_path / "a.parquet")
    if not any(isinstance(m.get("content"), list) for m in record.get("messages", [])):
        assert read(tmp_path / "a.parquet") == plain * 2


def test_tool_calls_are_learned_if_the_template_renders_them(tmp_path):
    turns = [
        *PLAIN[:2],
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "5", "tool_call_id": "1"},
        {"role": "assistant", "content": "it is 5"},
    ]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    ((_, answer),) = read(path, TOOLS)
    assert answer == '<call>price {"of": "ABC"}<|im_end|>it is 5<|im_end|>'
    assert f"{path} line 1: message 3 calls a tool (price), which the chat template does not write" in refusal(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"content": None}, "message 3 holds null, not text"),
        ({"content": 5}, "message 3 holds the number 5, not text"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "message 3 holds a part of type image_url"),
        ({"content": "a", "function_call": {"name": "f"}}, "message 3 holds function_call, which is not read"),
        ({"content": "a", "weight": 0}, "message 3 holds weight=0, but every answer is learned"),
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


@pytest.mark.parametrize("column", ["tools", "functions", "images"])
def test_columns_beside_a_conversation_that_are_not_read_are_refused(tmp_path, column):
    path = jsonl(tmp_path / "a.jsonl", [{"messages": PLAIN, column: [{"name": "price"}]}])
    told = (
        "the record has tools, which the chat template does not write"
        if column == "tools"
        else f"{column} are not read"
    )
    assert f"line 1: {told}" in refusal(path)
