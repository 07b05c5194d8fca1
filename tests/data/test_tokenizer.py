import json
from pathlib import Path

import numpy as np
import pytest

from finhpc.data.text.tokenizer import END_OF_TEXT, Encoder, save
from finhpc.errors import ConfigError, DataError
from tests.data.corpus import make_texts

TEXTS = [
    "Profit rose 12.5 % to €3,4 bn.",
    f"A document that says {END_OF_TEXT} cannot end itself.{END_OF_TEXT}",
    "  two  spaces\n\n\ttabs\r\n and 日本語, emoji 👩‍👩‍👧 and don't we'll",
    "x" * 3000,
    "",
]


def none():
    raise AssertionError("only train:N reads a sample")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2") / "tokenizer"
    save("gpt2", folder, none)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "tokenizer"
    save("train:300", folder, lambda: iter(make_texts(200)))
    return folder


@pytest.mark.parametrize("name", ["gpt2", "trained"])
def test_ids_are_the_hugging_face_tokenisers_with_special_tokens_as_text(name, request):
    from transformers import AutoTokenizer

    folder = request.getfixturevalue(name)
    encoder, reference = Encoder(folder), AutoTokenizer.from_pretrained(folder)
    assert encoder.eot_id == reference.eos_token_id
    assert encoder.vocab_size == len(reference)
    ids, lengths = encoder.encode(TEXTS)
    ends = np.cumsum(lengths)
    for text, end, length in zip(TEXTS, ends, lengths, strict=True):
        expected = reference(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids[end - length : end].tolist() == [*expected, encoder.eot_id]
        assert reference.decode(expected) == text
    assert (ids == encoder.eot_id).sum() == len(TEXTS)  # no text holds one of its own


def test_gpt2_is_gpt2(gpt2):
    encoder = Encoder(gpt2)
    assert (encoder.vocab_size, encoder.eot_id, encoder.dtype) == (50257, 50256, np.uint16)
    # Ids as OpenAI's own code gives them.
    assert encoder.encode(["Hello world"])[0].tolist() == [15496, 995, 50256]
    assert encoder.encode([" don't stop<|endoftext|>"])[0][:3].tolist() == [836, 470, 2245]


def test_training_gives_exactly_the_size_and_always_the_same(trained, tmp_path):
    assert Encoder(trained).vocab_size == 300
    save("train:300", tmp_path / "again", lambda: iter(make_texts(200)))
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()


def test_too_little_text_says_the_size_it_would_give(tmp_path):
    with pytest.raises(
        ConfigError, match=r"train:8192 asks for more entries than this text gives \(\d+\); use train:\d+"
    ):
        save("train:8192", tmp_path / "t", lambda: iter(make_texts(20)))


@pytest.mark.parametrize("spec", ["train:", "train:many", "train:256", "train:-1"])
def test_a_useless_size_is_refused(spec, tmp_path):
    with pytest.raises(ConfigError, match=f"tokenizer={spec} needs a vocabulary of at least 257"):
        save(spec, tmp_path / "t", none)


def test_any_folder_of_a_fast_tokeniser_will_do(trained, tmp_path):
    save(str(trained), tmp_path / "copy", none)
    assert (Encoder(tmp_path / "copy").encode(TEXTS)[0] == Encoder(trained).encode(TEXTS)[0]).all()


def test_a_folder_without_end_of_text_is_refused(trained, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "tokenizer.json").write_bytes((trained / "tokenizer.json").read_bytes())
    (bad / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ConfigError, match="has no eos_token to end a document with"):
        save(str(bad), tmp_path / "t", none)
    with pytest.raises(DataError, match="names no end-of-text token"):
        Encoder(bad)


def test_what_is_no_tokeniser_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"tokenizer=/no/such/folder is not a folder; give a folder with tokenizer.json"
    ):
        save("/no/such/folder", tmp_path / "t", none)
    with pytest.raises(ConfigError, match="cannot be opened"):
        save(str(tmp_path), tmp_path / "u", none)


def test_wide_ids_for_a_wide_vocabulary(trained, tmp_path):
    tree = json.loads((trained / "tokenizer.json").read_bytes())
    size = len(tree["model"]["vocab"])
    tree["model"]["vocab"] |= {f"filler{i}": size + i for i in range(66000)}
    wide = tmp_path / "wide"
    wide.mkdir()
    (wide / "tokenizer.json").write_text(json.dumps(tree))
    (wide / "tokenizer_config.json").write_bytes((trained / "tokenizer_config.json").read_bytes())
    assert Encoder(wide).dtype == np.uint32
    assert Encoder(wide).encode(["bank"])[0].dtype == np.uint32
