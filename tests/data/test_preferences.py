"""Pairs of answers in the shapes that files hold them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finhpc.data.examples.choices.preferences import Preferences, check_loss, pair_of
from finhpc.data.examples.examples import Examples, make_examples
from finhpc.errors import ConfigError, DataError
from finhpc.settings.finetune import Instructions
from tests.data.instructing import jsonl, tokenizer

USER, GOOD, BAD = "What moved rates?", "Inflation did.", "No idea."
ASKED = [{"role": "user", "content": USER}]


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def made(folder: Path, record: dict[str, Any], **more: Any) -> Examples:
    settings = Instructions(source=[jsonl(folder / "pairs.jsonl", [record])], eval_fraction=0, **more)
    return make_examples(settings, tokenizer(), 0)


def texts(examples: Examples) -> list[str]:
    return [tokenizer().decode(ids) for ids in pair_of(examples.train, 0)]


def test_a_pair_of_texts_shares_its_prompt_and_each_answer_ends(tmp_path: Path) -> None:
    examples = made(tmp_path, {"prompt": USER, "chosen": GOOD, "rejected": BAD})
    assert texts(examples) == [USER, f" {GOOD}<|im_end|>", f" {BAD}<|im_end|>"]
    (source,) = examples.counts["by_source"]
    assert source["format"] == "preference"


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": ASKED, "chosen": [answer(GOOD)], "rejected": [answer(BAD)]},
        {"prompt": USER, "chosen": [answer(GOOD)], "rejected": [answer(BAD)]},
        {"chosen": [*ASKED, answer(GOOD)], "rejected": [*ASKED, answer(BAD)]},
        {"prompt": USER, "chosen": [*ASKED, answer(GOOD)], "rejected": [*ASKED, answer(BAD)]},
    ],
)
def test_conversations_are_written_by_the_chat_template(record: dict[str, Any], tmp_path: Path) -> None:
    asked = f"<|im_start|>user\n{USER}<|im_end|>\n<|im_start|>assistant\n"
    assert texts(made(tmp_path, record)) == [asked, f"{GOOD}<|im_end|>", f"{BAD}<|im_end|>"]


def test_only_the_last_answer_of_a_conversation_counts(tmp_path: Path) -> None:
    before = [*ASKED, answer("Prices."), {"role": "user", "content": "Why?"}]
    prompt, chosen, rejected = texts(
        made(tmp_path, {"chosen": [*before, answer(GOOD)], "rejected": [*before, answer(BAD)]})
    )
    assert "Prices." in prompt
    assert "Why?" in prompt
    assert (chosen, rejected) == (f"{GOOD}<|im_end|>", f"{BAD}<|im_end|>")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": USER, "chosen": GOOD, "rejected": f" {GOOD} "}, "are equal, so nothing is preferred"),
        ({"prompt": USER, "chosen": GOOD, "rejected": ""}, "rejected is empty"),
        ({"chosen": GOOD, "rejected": BAD}, "texts have no prompt"),
        ({"prompt": USER, "chosen": GOOD, "rejected": [answer(BAD)]}, "not both texts or both lists of messages"),
        (
            {"chosen": [*ASKED, answer(GOOD)], "rejected": [answer("x"), *ASKED, answer(BAD)]},
            "differ before their last",
        ),
        ({"chosen": [*ASKED, answer(GOOD)], "rejected": [*ASKED]}, "do not both end with an answer"),
        ({"chosen": [*ASKED, answer(GOOD)], "rejected": []}, "do not both end with an answer"),
        ({"chosen": [], "rejected": []}, "do not both end with an answer"),
    ],
)
def test_pairs_that_prefer_nothing_or_do_not_belong_together_are_refused(
    record: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        made(tmp_path, record)


def test_a_pair_that_is_too_long_is_dropped_and_not_cut(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl",
        [
            {"prompt": USER, "chosen": GOOD, "rejected": BAD},
            {"prompt": USER, "chosen": GOOD, "rejected": BAD * 40},
        ],
    )
    settings = Instructions(source=[path], eval_fraction=0, max_len=64, max_dropped=0.5)
    examples = make_examples(settings, tokenizer(), 0)
    assert (len(examples.train), examples.counts["dropped"], examples.counts["cut"]) == (1, 1, 0)


def test_pairs_and_their_loss_need_each_other(tmp_path: Path) -> None:
    pairs = made(tmp_path, {"prompt": USER, "chosen": GOOD, "rejected": BAD})
    with pytest.raises(ConfigError, match=r"with pairs of chosen and rejected; use data\.loss=preferences"):
        check_loss(Instructions(loss="answers"), pairs)
    check_loss(Instructions(loss="preferences"), pairs)
    answers = made(tmp_path, {"prompt": USER, "completion": GOOD})
    with pytest.raises(ConfigError, match=r"data\.loss=preferences does not fit .* records without pairs"):
        check_loss(Instructions(loss="preferences"), answers)


def test_a_choice_scales_and_shifts_the_scores_by_the_reference(tmp_path: Path) -> None:
    pairs = made(tmp_path, {"prompt": USER, "chosen": GOOD, "rejected": BAD})
    preferences = Preferences(0.5, 0.1)
    plain = preferences.choice(pairs.train, 0)
    assert (plain.scale, plain.offsets, plain.shares) == (1.0, None, [0.9, 0.1])
    assert preferences.choice(pairs.train, 0, learned=False).shares == [1.0, 0.0]
    preferences.reference = {"train": np.array([[-3.0, -4.0]]), "held_out": np.array([[-5.0, -7.0]])}
    choice = preferences.choice(pairs.train, 0)
    assert (choice.scale, choice.offsets) == (0.5, [-1.5, -2.0])
    assert preferences.choice(pairs.train, 0, learned=False).offsets == [-2.5, -3.5]
    preferences.save(tmp_path)
    again = Preferences(0.5)
    again.load(tmp_path)
    assert again.choice(pairs.train, 0).offsets == [-1.5, -2.0]
    (tmp_path / "reference.safetensors").write_bytes(b"cut")
    with pytest.raises(DataError, match="begin another run"):
        again.load(tmp_path)
