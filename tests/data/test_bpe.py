import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from finhpc.data.text import bpe
from finhpc.data.text.tokenizer import Encoder, save
from finhpc.errors import DataError
from tests.data.corpus import make_texts

# What the cut into words turns on: letters, digits, other signs, apostrophes, every kind of space, and characters
# that are longer in bytes, combine, or look like a space or a letter and are none.
PIECES = ["a", "é", "日", "ك", "I", "1", "٣", "Ⅷ", "½", "!", "—", "'", "'s", "'LL", "'ve", " ", "  ", "\n", "\r\n"]
PIECES += ["\t", "\u00a0", "\u2003", "\u3000", "\u0085", "\x1c", "\u200b", "\ufeff", "\u0301", "👩\u200d👧"]
PIECES += ["\U0001e900", "<|endoftext|>"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("tokenisers")
    save("gpt2", base / "gpt2", lambda: iter(()))
    save("train:320", base / "trained", lambda: iter(make_texts(200)))
    return {"gpt2": base / "gpt2", "trained": base / "trained"}


def same(encoder: Encoder, texts: list[str]) -> bool:
    fast, slow = encoder.encode(texts), encoder._encode_slowly(texts)
    return all(map(np.array_equal, fast, slow))


def why_not(folder: Path, change) -> str | None:
    """What speaks against a tokeniser after `change` of its tokenizer.json."""
    from tokenizers import Tokenizer

    tree = json.loads((folder / "tokenizer.json").read_bytes())
    change(tree)
    return bpe.why_not(tree, Tokenizer.from_str(json.dumps(tree)))


def test_the_regex_engines_class_every_code_point_alike():
    assert bpe.unlike_code_points() == []
    assert (version("tokenizers"), version("tiktoken")) in bpe.COMPARED, "newer versions: if they agree, add them"


@pytest.mark.parametrize("name", ["gpt2", "trained"])
def test_random_texts_get_the_hugging_face_ids(name, folders):
    encoder = Encoder(folders[name])
    assert encoder.slow_because is None
    rng = np.random.default_rng(0)
    assert same(encoder, ["".join(rng.choice(PIECES, rng.integers(0, 60))) for _ in range(3000)])
    points = rng.permutation([point for point in range(0x30000) if not 0xD800 <= point < 0xE000])
    assert same(encoder, ["".join(map(chr, part)) for part in np.array_split(points[:40_000], 100)])
    letters = [chr(97 + i) for i in range(6)]  # few letters in long words: merges compete
    assert same(encoder, ["".join(rng.choice(letters, 3000)) for _ in range(30)])


@pytest.mark.parametrize("space", [" ", "\n", "\u3000"])
@pytest.mark.parametrize("before", [0, 1, bpe.LONG_RUN // 2])
def test_a_long_run_of_spaces_is_noticed_wherever_it_lies(space, before):
    text = "x" * before + space * bpe.LONG_RUN + "y"
    assert bpe.has_long_run(text)
    assert not bpe.has_long_run("x" * before + space * (bpe.LONG_RUN - 1) + "y")
    assert not bpe.has_long_run("x " * bpe.LONG_RUN)


@pytest.mark.parametrize("noticed", [True, False])
def test_spaces_that_tiktoken_cannot_take_get_the_same_ids(noticed, folders, monkeypatch):
    if not noticed:  # tiktoken is asked, and panics
        monkeypatch.setattr(bpe, "has_long_run", lambda text: False)
    encoder = Encoder(folders["gpt2"])
    text = " " * 1_100_000 + "end"
    assert encoder._merged.ranks(text) is None
    assert same(encoder, ["before", text, "after"])


def drop_merge(tree, index=0):
    tree["model"]["merges"].pop(index)


def shadow(tree):
    """A merge of three letters whose last two are merged first, so that it never comes to it."""
    vocab, merges = tree["model"]["vocab"], tree["model"]["merges"]
    for pair in (["X", "Y"], ["Z", "X"], ["ZX", "Y"]):
        merges.append(pair)
        vocab["".join(pair)] = len(vocab)


def second_way(tree):
    vocab, merges = tree["model"]["vocab"], tree["model"]["merges"]
    for pair in (["X", "Y"], ["Y", "Z"], ["X", "YZ"], ["XY", "Z"]):
        merges.append(pair)
        vocab.setdefault("".join(pair), len(vocab))


CHANGES = [
    (lambda tree: tree.update(normalizer={"type": "NFC"}), r"it normalizes text \(NFC\)"),
    (lambda tree: tree["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space=True"),
    (lambda tree: tree["pre_tokenizer"].update(use_regex=False), "use_regex=False"),
    (lambda tree: tree.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer type='Whitespace'"),
    (lambda tree: tree.update(pre_tokenizer=None), "pre_tokenizer type=None"),
    (lambda tree: tree["model"].update(dropout=0.1), "its model has dropout=0.1"),
    (lambda tree: tree["model"].update(ignore_merges=True), "its model has ignore_merges=True"),
    (lambda tree: tree["model"].update(end_of_word_suffix="</w>"), "its model has end_of_word_suffix='</w>'"),
    (
        lambda tree: tree["added_tokens"][0].update(special=False),
        r"it finds added tokens in text \('<\|end",
    ),
    (lambda tree: drop_merge(tree), "before both are made"),
    (shadow, "the bytes of 'ZXY' do not merge to it"),
    (second_way, "it makes 'XYZ' by two merges"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES)
def test_what_tiktoken_cannot_do_exactly_is_named(change, reason, folders):
    import re

    assert why_not(folders["trained"], lambda tree: None) is None
    found = why_not(folders["trained"], change)
    assert found is not None
    assert re.search(reason, found), found


def test_entries_that_no_merge_makes_are_no_obstacle_and_never_come_up(folders, tmp_path):
    """tiktoken joins what is an entry: it must not know those that no merge makes."""
    from tokenizers import Tokenizer

    tree = json.loads((folders["trained"] / "tokenizer.json").read_bytes())
    tree["model"]["vocab"] |= {"XQ": len(tree["model"]["vocab"])}
    assert bpe.why_not(tree, Tokenizer.from_str(json.dumps(tree))) is None
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    (tmp_path / "tokenizer_config.json").write_bytes((folders["trained"] / "tokenizer_config.json").read_bytes())
    assert same(Encoder(tmp_path), ["XQ XQXQ"])


def test_ids_that_differ_are_an_error(folders):
    encoder = Encoder(folders["gpt2"])
    encoder.check("Profit rose 5 %.")
    encoder._id_of_rank = np.roll(encoder._id_of_rank, 1)
    with pytest.raises(DataError, match=r"gives other ids .* for the text that begins 'Profit"):
        encoder.check("Profit rose 5 %.")
