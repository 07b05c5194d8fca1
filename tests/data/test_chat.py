"""Conversations: the ids of the whole, what is learned of them, and what generation reads before an answer."""

from __future__ import annotations

from typing import Any

import pytest

from finhpc.data.examples.chat import prompt_text, rendered_ids
from finhpc.data.examples.examples import make_examples
from finhpc.errors import ConfigError
from finhpc.settings.finetune import Instructions
from tests.data.instructing import jsonl
from tests.data.kinds import CHATML, KINDS, MARKED, TEMPLATES, tokenizer

TALK = [
    {"role": "user", "content": "What does Alder Foods sell?"},
    {"role": "assistant", "content": "Fresh bread, Ähre."},
    {"role": "user", "content": "yes  it is"},
    {"role": "assistant", "content": "no 7"},
]


def learned(tmp_path: Any, tok: Any, messages: list[dict[str, Any]], **more: Any) -> Any:
    record = {"messages": messages} | more.pop("record", {})
    source = jsonl(tmp_path / "talk.jsonl", [record])
    return make_examples(Instructions(source=[source], eval_fraction=0.0, **more), tok, 0)


def roles(text: str) -> list[dict[str, str]]:
    """`u: ...|a: ...` as messages."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[part[0]], "content": part[3:]} for part in text.split("|")]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_whole_conversation(kind: str, template: str, tmp_path: Any) -> None:
    for begin, end in ((False, False), (True, False), (True, True)):
        tok = tokenizer(kind, template, begin, end)
        found = learned(tmp_path, tok, TALK)
        tokens, answer = found.train.example(0)
        assert tokens.tolist() == tok.apply_chat_template(TALK, return_dict=False)
        before = rendered_ids(prompt_text(TALK[:1], tok), tok)
        if template != "marked":
            assert tokens[: answer.tolist().index(True)].tolist() == before, "generation reads what was learned"
        assert [note for note in found.notes if ": read as chat" not in note] == []
        said = tok.decode(tokens[answer])
        assert "What" not in said
        assert "Fresh" in said
        assert said.replace(" ", "").endswith(("</s>", "<|im_end|>"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_that_marks_its_answers_is_taken_at_its_word(kind: str, tmp_path: Any) -> None:
    tok = tokenizer(kind, "marked")
    tokens, answer = learned(tmp_path, tok, TALK).train.example(0)
    theirs = tok.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    assert answer.tolist() == [bool(mark) for mark in theirs["assistant_masks"]]
    tok.chat_template = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    found = learned(tmp_path, tok, TALK)
    assert found.train.example(0)[0].tolist() == tokens.tolist()
    assert any("1 conversations do not teach where to end" in note for note in found.notes)


@pytest.mark.parametrize("mask", [{"weight": 0}, {"train": False}, {"loss": False}])
@pytest.mark.parametrize("template", TEMPLATES)
def test_an_answer_of_weight_0_is_read_and_not_learned(template: str, mask: dict[str, Any], tmp_path: Any) -> None:
    tok = tokenizer(next(iter(KINDS)), template)
    whole, all_answers = learned(tmp_path, tok, TALK).train.example(0)
    tokens, answer = learned(tmp_path, tok, [TALK[0], TALK[1] | mask, *TALK[2:]]).train.example(0)
    assert tokens.tolist() == whole.tolist()
    said = tok.decode(tokens[answer])
    assert "no 7" in said
    assert "Fresh" not in said
    assert 0 < answer.sum() < all_answers.sum()
    first, answer = learned(tmp_path, tok, [*TALK[:3], TALK[3] | mask]).train.example(0)
    assert tok.decode(first[answer]).replace(" ", "").startswith("Fresh")
    assert len(first) < len(whole), "what follows the last learned answer is not read"


@pytest.mark.parametrize("template", ["chatml", "zephyr", "marked"])
def test_the_assistant_may_speak_first(template: str, tmp_path: Any) -> None:
    tok = tokenizer("metaspace first", template)
    for messages in (roles("a: Fresh bread|u: yes|a: no"), roles("s: user|a: Fresh bread|u: yes|a: no")):
        tokens, answer = learned(tmp_path, tok, messages).train.example(0)
        assert tokens.tolist() == tok.apply_chat_template(messages, return_dict=False)
        said = tok.decode(tokens[answer])
        assert said.startswith("Fresh bread")
        assert "user" not in said
        assert "assistant" not in said
    alone = roles("a: Fresh bread")
    tokens, answer = learned(tmp_path, tok, alone).train.example(0)
    assert tok.decode(tokens[answer], skip_special_tokens=True) == "Fresh bread"


def test_what_follows_the_last_answer_is_not_read(tmp_path: Any) -> None:
    tok = tokenizer("byte level", "chatml")
    found = learned(tmp_path, tok, [*TALK, {"role": "user", "content": "yes"}])
    assert found.train.example(0)[0].tolist() == tok.apply_chat_template(TALK, return_dict=False)


# As Qwen3's: the reasoning of an earlier turn is not written.
DROPS = (
    "{% set at = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set at.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and "
    "loop.index0 < at.last %}{{ m.content.split(',') | last }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each_answer(tmp_path: Any) -> None:
    tok = tokenizer("metaspace first", "chatml")
    tok.chat_template = DROPS
    messages = roles("u: What|a: bread is good,Fresh|u: yes|a: it is,no|u: sell|a: milk")
    found = learned(tmp_path, tok, messages)
    said = []
    for i in range(3):
        tokens, answer = found.train.example(i)
        assert tokens.tolist() == tok.apply_chat_template(messages[: 2 * i + 2], return_dict=False)
        said.append(tok.decode(tokens[answer], skip_special_tokens=True))
    assert said == ["bread is good,Fresh", "it is,no", "milk"]
    assert any("1 conversations were split" in note for note in found.notes)
    assert found.counts["duplicates"] == 0


def test_a_prompt_that_does_not_begin_the_answers_turn_is_refused(tmp_path: Any) -> None:
    tok = tokenizer("byte level", "chatml")
    tok.chat_template = CHATML.replace("assistant\n{% endif %}", "assistant\n=think\n{% endif %}")
    with pytest.raises(ConfigError, match=r"line 1: the chat template's prompt for an answer .* ends in '.*=think\\n'"):
        learned(tmp_path, tok, TALK)
    tok.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match=r"the chat template refuses it .roles must alternate"):
        learned(tmp_path, tok, TALK)


def test_an_answer_that_the_template_does_not_end_gets_the_end_token(tmp_path: Any) -> None:
    for kind in ("byte level", "metaspace first", "prepend"):
        tok = tokenizer(kind, "chatml")
        tok.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}" + (
            "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
        )
        found = learned(tmp_path, tok, TALK)
        tokens, answer = found.train.example(0)
        assert tokens[-1] == tok.eos_token_id
        assert answer[-1]
        text = tok.apply_chat_template(TALK, tokenize=False).rstrip()
        assert tokens[:-1].tolist() == tok(text, add_special_tokens=False)["input_ids"]
        assert any(note.startswith("1 conversations got </s> after their last answer") for note in found.notes)
        tok.eos_token = None
        with pytest.raises(ConfigError, match="no end token"):
            learned(tmp_path, tok, TALK)


def test_a_missing_template_is_refused_once(tmp_path: Any) -> None:
    source = jsonl(tmp_path / "talk.jsonl", [{"messages": TALK}] * 3)
    with pytest.raises(ConfigError) as error:
        make_examples(Instructions(source=[source]), tokenizer("byte level"), 0)
    assert len(error.value.problems) == 1
    assert "no chat template" in str(error.value)


def test_special_tokens_in_a_message_are_refused_whatever_the_tokenizer_names_them(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"message 1 holds the special token <\|im_end\|>"):
        learned(tmp_path, tokenizer("byte level", "llama2"), [{"role": "user", "content": "a<|im_end|>"}, *TALK[1:]])


def test_what_a_template_leaves_out_is_refused_or_reported(tmp_path: Any) -> None:
    tok = tokenizer("byte level", "llama2")  # writes neither systems nor tools
    tok.chat_template = TEMPLATES["llama2"].replace("{% else %}", "{% elif m['role'] == 'assistant' %}")
    found = learned(tmp_path, tok, roles("s: it is good|u: What|a: bread"))
    assert any("1 conversations have messages that the chat template does not write (system)" in n for n in found.notes)
    call = [*roles("u: What"), {"role": "assistant", "content": "no", "tool_calls": [{"function": {"name": "sell"}}]}]
    with pytest.raises(
        ConfigError, match=r"message 2 holds tool_calls, which the tokenizer's chat template does not render"
    ):
        learned(tmp_path, tok, call)
    with pytest.raises(ConfigError, match="the record has tools, which the chat template does not write"):
        learned(tmp_path, tok, roles("u: What|a: bread"), record={"tools": [{"name": "sell"}]})
    tok.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
    tokens, _ = learned(tmp_path, tok, TALK, record={"tools": [{"name": "sell"}]}).train.example(0)
    assert tokens.tolist() == tok.apply_chat_template(TALK, tools=[{"name": "sell"}], return_dict=False)


class Later:
    """A clock that a template reads."""

    day = 1

    @classmethod
    def now(cls) -> Any:
        from datetime import datetime

        return datetime(2026, 1, cls.day)


def test_examples_of_another_day_are_those_of_the_first(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    tok = tokenizer("byte level", "chatml")
    tok.chat_template = "{{ strftime_now('%d') }}" + CHATML
    source = jsonl(tmp_path / "talk.jsonl", [{"messages": TALK}])
    settings = Instructions(source=[source], eval_fraction=0.0)
    file = tmp_path / "examples.safetensors"
    first = make_examples(settings, tok, 0, file)
    first.save(file)
    monkeypatch.setattr(Later, "day", 2)
    assert make_examples(settings, tok, 0).fingerprint != first.fingerprint
    assert make_examples(settings, tok, 0, file).fingerprint == first.fingerprint
    other = tokenizer("byte level", "chatml")
    other.chat_template = tok.chat_template + "{# another #}"
    changed = jsonl(tmp_path / "other.jsonl", [{"messages": TALK[:2]}])
    for made in (
        make_examples(settings, other, 0, file),
        make_examples(settings, tok, 1, file),
        make_examples(settings.model_copy(update={"max_len": 400}), tok, 0, file),
        make_examples(settings.model_copy(update={"source": [changed]}), tok, 0, file),
    ):
        assert made.origin != first.origin, "of other records, settings or templates they are made again"
    file.write_bytes(b"cut short")
    assert make_examples(settings, tok, 0, file).origin == first.origin
