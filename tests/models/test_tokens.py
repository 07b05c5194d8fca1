"""Prompts, continuations, ends and numbers of ids, for every kind of tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config

from finhpc.errors import CheckpointError, ConfigError
from finhpc.models.files.tokens import (
    begin_ids,
    check_rows,
    continuation_ids,
    decoded,
    encode,
    end_of_turn,
    largest_id,
    prompt_ids,
    stop_ids,
    write_stops,
)
from tests.data.kinds import KINDS, TEMPLATES, tokenizer

CUTS = [("Answer:", " yes it"), ("bread", "\nyes it"), ("no:", "yes"), ("What do", "es Alder"), ("[INST]", " no ")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_has_a_beginning_and_no_end(kind: str) -> None:
    bare = tokenizer(kind)
    (inner,) = encode(bare, ["Alder Foods"])
    for begin in (False, True):
        for end in (False, True):
            tok = tokenizer(kind, begin=begin, end=end)
            first = [tok.bos_token_id] if begin else []
            assert begin_ids(tok) == first
            assert prompt_ids(tok, "Alder Foods") == first + inner
            assert prompt_ids(tok, "") == [tok.bos_token_id], "where a document starts"
    (written,) = encode(bare, ["<s>Alder Foods"])
    assert prompt_ids(tokenizer(kind, begin=True), "<s>Alder Foods") == written, "not twice"


def test_an_empty_prompt_needs_a_token_to_start_from() -> None:
    tok = tokenizer("byte level")
    tok.bos_token = None
    assert prompt_ids(tok, "") == [tok.eos_token_id]
    tok.eos_token = None
    with pytest.raises(ConfigError, match="neither a begin token nor an end token"):
        prompt_ids(tok, "")


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_and_its_prompt_join(kind: str) -> None:
    tok = tokenizer(kind)
    for prompt, answer in CUTS:
        (before,) = encode(tok, [prompt])
        (whole,) = encode(tok, [prompt + answer])
        ids = continuation_ids(tok, prompt, answer)
        if whole[: len(before)] == before:
            assert before + ids == whole
        plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        assert tok.decode(before, **plain) + decoded(tok, before, ids) == tok.decode([*before, *ids], **plain)
        if kind != "word piece":  # which does not keep white space
            assert decoded(tok, before, ids) == answer, "no space comes or goes"


def test_a_token_that_only_pads_needs_no_row() -> None:
    tok = tokenizer("byte level")
    size = len(tok)
    assert largest_id(tok) == size - 1
    check_rows(tok, size, "model=x")
    check_rows(tok, size + 28, "model=x")  # many embeddings are padded
    with pytest.raises(ConfigError, match=rf"model=x has an embedding of {size - 1:,} rows.* ids up to {size - 1:,}"):
        check_rows(tok, size - 1, "model=x")
    tok.add_special_tokens({"pad_token": "[PAD]"})
    check_rows(tok, size, "model=x")
    tok.add_tokens(["<|tool|>"])
    with pytest.raises(ConfigError, match=f"{size + 2:,} ids"):
        check_rows(tok, size, "model=x")
    tok = tokenizer("byte level")
    tok.pad_token = tok.eos_token
    tok.eos_token = "<|im_end|>"
    assert largest_id(tok) == size - 1


@pytest.mark.parametrize("kind", ["byte level", "metaspace first", "prepend"])
def test_the_end_of_a_turn_is_the_templates(kind: str) -> None:
    ends = {name: tokenizer(kind).decode([end_of_turn(tokenizer(kind, name))]) for name in TEMPLATES}
    assert ends == {
        "chatml": "<|im_end|>", "marked": "<|im_end|>", "llama2": "</s>", "zephyr": "</s>", "vicuna": "</s>",
    }  # fmt: skip
    tok = tokenizer(kind, "chatml")
    im_end, eos = tok.convert_tokens_to_ids("<|im_end|>"), tok.eos_token_id
    assert stop_ids(tok, GPT2Config(eos_token_id=7), {"eos_token_id": [7, 9]}) == [7, 9, eos, im_end]
    tok.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert end_of_turn(tok) is None
    tok.chat_template = "{{ raise_exception('tools alone') }}"
    assert end_of_turn(tok) is None
    assert stop_ids(tok) == [eos]


def test_stops_are_added_to_those_there_are(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    write_stops(tmp_path, [5], GPT2Config(eos_token_id=5))
    assert not file.exists(), "the model's config says it"
    write_stops(tmp_path, [5, 6], GPT2Config(eos_token_id=5))
    assert json.loads(file.read_text()) == {"eos_token_id": [5, 6]}
    file.write_text(json.dumps({"eos_token_id": 4, "top_k": 3}))
    write_stops(tmp_path, [6], GPT2Config(eos_token_id=5))
    assert json.loads(file.read_text()) == {"eos_token_id": [4, 6], "top_k": 3}
    file.write_text("[1")
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        write_stops(tmp_path, [6], GPT2Config())


def test_an_end_that_is_no_id_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"eos_token_id='</s>' in generation_config.json or config.json is not"):
        stop_ids(tokenizer("byte level"), {"eos_token_id": "</s>"})


def test_a_text_goes_on_as_evaluation_reads_it() -> None:
    """lm-eval's own pair, but for an end token and for prompts whose ids an answer would change."""
    from lm_eval.api.model import TemplateLM

    from finhpc.evaluation.language_model import LanguageModel

    def model(tok: Any) -> Any:
        made = object.__new__(LanguageModel)
        made.tokenizer = tok
        made.__dict__.update(backend="causal", add_bos_token=None, custom_prefix_token_id=None)
        return made

    for kind in KINDS:
        ours = model(tokenizer(kind, begin=True))
        for prompt, answer in CUTS[:1]:
            assert ours._encode_pair(prompt + " ", answer.strip()) == ours._encode_pair(prompt, answer)
            assert ours._encode_pair(prompt, answer) == TemplateLM._encode_pair(ours, prompt, answer)
        ended = model(tokenizer(kind, begin=True, end=True))
        assert ended._encode_pair("Answer:", " yes") == ours._encode_pair("Answer:", " yes")
        assert ended.tok_encode("yes", add_special_tokens=False) == encode(ended.tokenizer, ["yes"])[0]
        for prompt, answer in CUTS:
            context, continuation = ours._encode_pair(prompt, answer)
            assert context == prompt_ids(ours.tokenizer, prompt)
            assert continuation == continuation_ids(ours.tokenizer, prompt, answer)
