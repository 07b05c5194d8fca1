"""What a finetuning holds out, as task files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finhpc.data.examples.examples import make_examples
from finhpc.errors import ConfigError
from finhpc.evaluation.documents import documents
from finhpc.evaluation.hold_out import hold_out
from finhpc.settings.evaluate import EvaluateData
from finhpc.settings.finetune import Instructions
from finhpc.settings.reproduce import HoldOutConfig
from tests.data.instructing import jsonl, phrases, sentences, tokenizer


def test_the_task_files_hold_what_a_finetuning_of_the_same_files_never_sees(tmp_path: Path) -> None:
    lines = [*sentences(120), *(line.upper().partition("@")[0] + "@neutral" for line in sentences(9))]  # repeated
    fpb = phrases(tmp_path / "news.txt", lines)
    tweets = tmp_path / "tweets.csv"
    tweets.write_text("text,label\n" + "".join(f"tweet {i} of {i * 7},{i % 3}\n" for i in range(80)))
    alpaca = jsonl(tmp_path / "a.jsonl", [{"instruction": f"say {i}", "input": "", "output": "so"} for i in range(9)])
    sources = [fpb, f"{tweets}:tfns", alpaca]
    result = hold_out(HoldOutConfig(source=sources, eval_fraction=0.3, out=str(tmp_path / "out")))
    assert result["tasks"] == ["fpb", "tfns"], "Alpaca's answers are text"
    words = tokenizer()
    made = make_examples(Instructions(source=sources, eval_fraction=0.3), words, 0)
    learned = [words.decode(made.train.example(i)[0]).lower() for i in range(len(made.train))]
    held = {
        task: [json.loads(line) for line in Path(path).read_text().splitlines()]
        for task, path in result["files"].items()
    }
    of_text = sum(made.held_out.source.tolist().count(source) for source in (0, 1))
    assert sum(map(len, held.values())) == sum(result["examples"].values()) == of_text > 40
    for rows in held.values():
        for row in rows:
            assert not any(f"input: {row['input'].lower()}\nanswer" in text for text in learned), row["input"]
    found = documents("tfns", EvaluateData(files=result["files"]), 5, 0)
    assert (len(found.rows), found.total) == (5, len(held["tfns"]))
    assert {row["label"] for row in held["tfns"]} == {"negative", "neutral", "positive"}


def test_files_without_a_financial_task_are_refused(tmp_path: Path) -> None:
    alpaca = jsonl(tmp_path / "a.jsonl", [{"instruction": "say", "input": "", "output": "so"}])
    with pytest.raises(ConfigError, match="holds out no example of a financial task"):
        hold_out(HoldOutConfig(source=[alpaca], out=str(tmp_path / "out")))
