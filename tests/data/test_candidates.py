"""What the examples of a run choose among, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finhpc.data.examples.choices.candidates import Candidates
from finhpc.data.examples.examples import make_examples
from finhpc.errors import ConfigError
from finhpc.settings.base import build
from finhpc.settings.finetune import FinetuneConfig, Instructions
from tests.data.instructing import tokenizer

LABELS = ["up"] * 6 + ["down"] * 3 + ["flat"]


def settings(folder: Path, **more: Any) -> Instructions:
    file = folder / "moves.csv"
    file.write_text("text,label\n" + "".join(f"share {i} moved,{label}\n" for i, label in enumerate(LABELS)))
    named = {"labels": ["up", "down", "flat", "gone"], "source": [str(file)], "eval_fraction": 0.0, "loss": "labels"}
    return build(FinetuneConfig, {"data": named | more}).data


def weights(folder: Path, **more: Any) -> dict[str, float]:
    """The weight of each label, and 0 for one without examples."""
    data = settings(folder, **more)
    tok = tokenizer()
    examples = make_examples(data, tok, 0)
    candidates = Candidates.of(data, examples)
    assert len(candidates.answers[0]) == 4, "a label that no example has can be chosen, too"
    found = {}
    for i in range(len(examples.train)):
        choice = candidates.choice(examples.train, i)
        found[tok.decode(list(choice.answers[choice.gold])).strip()] = sum(choice.shares)
        plain = candidates.choice(examples.train, i, learned=False)
        assert plain.shares == [float(place == choice.gold) for place in range(4)]
    return found


def test_rare_labels_count_more_if_balanced(tmp_path: Path) -> None:
    balanced = {"up": 10 / (3 * 6), "down": 10 / (3 * 3), "flat": 10 / 3}
    assert weights(tmp_path, balanced=True) == pytest.approx(balanced)
    own = weights(tmp_path, balanced=True, class_weights={"down": 2}, label_smoothing=0.3)
    assert own == pytest.approx(balanced | {"down": 2 * balanced["down"]})
    assert weights(tmp_path, class_weights={"flat": 0}) == pytest.approx({"up": 1, "down": 1, "flat": 0})


def test_texts_and_unknown_labels_are_refused(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"context": "q {i}", "target": "answer {i} of many"}}\n' for i in range(30)))
    both = settings(tmp_path, class_weights={"sideways": 2.0})
    both = both.model_copy(update={"source": [*both.source, str(texts)]})
    with pytest.raises(ConfigError) as caught:
        Candidates.of(both, make_examples(both, tokenizer(), 0))
    told = str(caught.value)
    assert "data.loss=labels chooses among labels, and the answers of" in told
    assert "texts.jsonl are texts" in told
    assert "data.class_weights has sideways, and the labels are down, flat, gone, up" in told


def test_settings_of_labels_are_refused_without_their_loss() -> None:
    config = build(FinetuneConfig, {"data": {"label_smoothing": 0.1, "balanced": True}})
    told = "\n".join(config.problems())
    assert "data.label_smoothing=0.1 is for data.loss=labels or preferences, and data.loss is answers" in told
    assert "data.balanced=true is for data.loss=labels" in told
