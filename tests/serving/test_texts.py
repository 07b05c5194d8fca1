"""The text of an answer piece by piece: the same as the whole, and never a part of a stop string."""

from __future__ import annotations

import random
from typing import Any

import pytest

from finhpc.models.files.tokenizer import open_tokenizer
from finhpc.models.files.tokens import decoded
from finhpc.serving.texts import Answer, TokenTexts
from tests.tiny import tiny_shards

TEXT = "the bank rate rises — naïve 株価 🏦🏦 markets\n\n  wait"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return open_tokenizer(tiny_shards(tmp_path_factory.mktemp("texts") / "shards", blocks=8) / "tokenizer")


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer with a space at the beginning of words, which decoding drops from a text, and bytes for the rest."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["the", "▁the", "▁bank", "▁rate", "▁", "s", "▁rises", "▁wait"]
    vocab = {"<s>": 0, "</s>": 1} | {f"<0x{i:02X}>": i + 2 for i in range(256)}
    vocab |= {word: 258 + i for i, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocab, [("▁", "the")], byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def whole(answer: Answer, ids: list[int], finish: str = "length") -> tuple[str, list[str]]:
    """The text, and the parts that were given out after each id."""
    parts = []
    for i, token in enumerate(ids):
        answer.add(token, finish if i == len(ids) - 1 else None, ends=False)
        parts.append(answer.take()[0])
    return "".join(parts), parts


def test_the_parts_are_the_whole(tokenizer: Any, metaspace: Any) -> None:
    draw = random.Random(0)
    for one, ids_of in ((tokenizer, tokenizer(TEXT).input_ids), (metaspace, list(range(258, 266)))):
        for _ in range(60):
            prompt = draw.choices(ids_of, k=draw.randint(1, 40))
            ids = draw.choices(ids_of, k=draw.randint(1, 60))
            text, _ = whole(Answer(one, prompt), ids)
            assert text == decoded(one, prompt, ids)


def test_a_character_is_given_out_when_it_is_complete(tokenizer: Any) -> None:
    ids = tokenizer("rate 🏦").input_ids
    text, parts = whole(Answer(tokenizer, tokenizer("the").input_ids), ids)
    assert text == "rate 🏦"
    assert "\N{REPLACEMENT CHARACTER}" not in text
    assert len(parts) > 3
    assert [part for part in parts[-4:] if part] == ["🏦"]
    cut = Answer(tokenizer, [5])
    assert whole(cut, ids[:-1])[0].endswith("\N{REPLACEMENT CHARACTER}")  # it is all there is


@pytest.mark.parametrize("stop", ["rises", "e ri", " ", "t", "🏦", "株", "\n\n", "the bank rate rises — n"])
def test_a_stop_string_is_never_given_out(tokenizer: Any, stop: str) -> None:
    ids = tokenizer(TEXT).input_ids
    answer = Answer(tokenizer, [5], [stop, "never there"])
    text, parts = whole(answer, ids)
    assert text == TEXT[: TEXT.index(stop)] == answer.text
    assert answer.finish == "stop"
    assert answer.stopped
    so_far = ""
    for part in parts:
        so_far += part
        assert TEXT.startswith(so_far)
        assert stop not in so_far
    assert len(answer.ids) < len(ids), "ids after the stop string do not count"


def test_text_that_only_begins_like_a_stop_string_is_given_out_later(tokenizer: Any) -> None:
    ids = tokenizer("abcabd").input_ids
    assert len(ids) == 6
    text, parts = whole(Answer(tokenizer, [5], ["abd"]), ids)
    assert (text, parts[:3]) == ("abc", ["", "", "abc"])
    text, parts = whole(Answer(tokenizer, [5], ["abdx"]), ids)
    assert text == "abcabd"


def test_the_stop_string_that_is_complete_first_counts(tokenizer: Any) -> None:
    """However the characters are spread over tokens."""
    for ids in (tokenizer("xabcdy").input_ids, None):
        answer = Answer(tokenizer, [5], ["bcd", "c"])
        if ids is None:
            answer.text = "xabcdy"
            assert answer._cut(0)
        else:
            whole(answer, ids)
        assert answer.text == "xab"


def test_ids_are_given_out_with_the_text_that_they_begin(tokenizer: Any) -> None:
    ids = tokenizer("rate 🏦 xabd").input_ids
    answer = Answer(tokenizer, [5], ["abd"])
    given: list[int] = []
    for token in ids:
        answer.add(token, None, ends=False, logprob=-1.0, top=[(token, -1.0)])
        given += [scored.id for scored in answer.take()[1]]
    assert given == ids[:-3]
    ended = Answer(tokenizer, [5])
    ended.add(ids[0], None, ends=False)
    ended.add(0, "stop", ends=True)
    text, scored = ended.take()
    assert "<" not in text
    assert [each.id for each in scored] == [ids[0], 0]


def test_texts_of_single_tokens(tokenizer: Any, metaspace: Any) -> None:
    texts = TokenTexts(tokenizer)
    assert texts(0) == "<|endoftext|>"
    (space,) = tokenizer(" ").input_ids[:1]
    assert texts(space) == " "
    part = tokenizer("🏦").input_ids[0]
    assert texts(part) == f"token_id:{part}"
    assert TokenTexts(metaspace)(259) == " the"
