"""Tasks of the user's own, and files whose labels two commands must read alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finhpc.data.examples.choices.candidates import candidates_of
from finhpc.data.examples.examples import load, make_examples
from finhpc.data.examples.instructions import read_examples
from finhpc.errors import ConfigError
from finhpc.evaluation.label_scores import label_scores
from finhpc.evaluation.language_model import LanguageModel
from finhpc.evaluation.models import load_for_evaluation
from finhpc.evaluation.scores import score
from finhpc.evaluation.tasks import TaskFile, load_task, prepare_tasks
from finhpc.settings.base import build
from finhpc.settings.evaluate import EvaluateConfig
from finhpc.settings.finetune import Instructions
from tests.evaluation.tasks import write_model

STANCE = "headline,mood\nraise rates,hawkish\ncut rates,dovish\nhold,neutral\nraise more,hawkish\n"
CODES = "text,label\nprofit fell,0\nit stayed,1\nprofit rose,2\n"


def prepared(tmp_path: Path, tasks: list[str], **data: object) -> list[TaskFile]:
    return prepare_tasks(build(EvaluateConfig, {"tasks": tasks, "data": data}), tmp_path / "tasks")


def labels(task: TaskFile) -> list[str]:
    return [json.loads(line)["label"] for line in task.path.with_suffix(".jsonl").read_text().splitlines()]


def test_a_task_of_ones_own_reads_what_finetuning_learned_from(tmp_path: Path) -> None:
    file = tmp_path / "fomc.csv"
    file.write_text(STANCE)
    columns = {"input": "headline", "label": "mood"}
    (learned,) = read_examples([str(file)], Instructions(columns=columns))
    (task,) = prepared(tmp_path, ["stance"], files={"stance": str(file)}, columns=columns)
    opened = load_task(task)
    documents = list(opened.test_docs())
    assert [opened.doc_to_text(doc) for doc in documents] == [example.prompt for example in learned.examples]
    chosen = [opened.doc_to_choice(doc)[opened.doc_to_target(doc)] for doc in documents]
    assert chosen == [example.label for example in learned.examples]
    assert tuple(opened.doc_to_choice(documents[0])) == learned.labels == ("dovish", "hawkish", "neutral")
    assert opened.config.target_delimiter + learned.examples[0].label == learned.examples[0].answer
    assert any("labels: dovish 1, hawkish 2, neutral 1" in note for note in task.notes)


@pytest.mark.parametrize(("file", "task"), [("tweets.csv", "tfns"), ("tweets.csv", "fpb"), ("sent_mine.csv", "tfns")])
def test_codes_need_a_meaning_in_evaluation_as_in_finetuning(tmp_path: Path, file: str, task: str) -> None:
    path = tmp_path / file
    path.write_text(CODES)
    with pytest.raises(ConfigError, match=r"codes \(0, 1, 2\), and their meaning is unknown"):
        prepared(tmp_path, [task], files={task: str(path)})
    with pytest.raises(ConfigError, match=r"codes \(0, 1, 2\), and their meaning is unknown"):
        read_examples([str(path)], Instructions())
    for spec, given in (
        (f"{path}:phrasebank", {}),
        (str(path), {"labels": {0: "negative", 1: "neutral", 2: "positive"}}),
    ):
        (made,) = prepared(tmp_path, [task], files={task: spec}, **given)
        assert labels(made) == ["negative", "neutral", "positive"]
        (learned,) = read_examples([spec], Instructions(**given))
        assert labels(made) == [example.label for example in learned.examples]


def test_codes_of_tfns_are_reported(tmp_path: Path) -> None:
    (tmp_path / "tfns.csv").write_text(CODES)
    (made,) = prepared(tmp_path, ["tfns"], folder=str(tmp_path))
    assert labels(made) == ["negative", "positive", "neutral"]
    assert any("0 = negative, 1 = positive, 2 = neutral" in note for note in made.notes)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"instruction": "a", "input": "", "output": "b"}', "are text, but a task chooses among labels"),
        ("a.csv", "text,label\nx,0\ny,1\n", "its labels are codes"),
        ("a.csv", "text,label\nx,good\n,bad\n", "line 3: the prompt's input"),
    ],
)
def test_files_that_are_no_task_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        prepared(tmp_path, ["mine"], files={"mine": str(tmp_path / name)})


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("boolq", '{"question": "q", "passage": NaN, "answer": true}', "no value for passage"),
        ("boolq", '{"question": 5, "passage": "p", "answer": true}', "question holds the number 5, not text"),
        ("piqa", '{"goal": "g", "sol1": ["a"], "sol2": "b", "label": 0}', "sol1 holds a list, not text"),
        ("piqa", '{"goal": "g", "sol1": "a", "sol2": "b", "label": 0.5}', "not a label"),
        ("ner", '{"sentence": "s", "entity": null, "label": "person"}', "the prompt's entity"),
        (
            "fpb",
            '{"sentence": "s", "label": "positive"}\n{"sentence": 1, "label": "positive"}',
            "line 2: sentence holds",
        ),
    ],
)
def test_values_of_evaluation_files_follow_the_same_rule(tmp_path: Path, task: str, row: str, message: str) -> None:
    (tmp_path / f"{task}.jsonl").write_text(row)
    with pytest.raises(ConfigError, match=message):
        prepared(tmp_path, [task], files={task: str(tmp_path / f"{task}.jsonl")})


def test_a_whole_number_written_as_a_float_is_a_label(tmp_path: Path) -> None:
    (tmp_path / "piqa.jsonl").write_text('{"goal": "g", "sol1": "a", "sol2": "b", "label": 1.0}')
    (made,) = prepared(tmp_path, ["piqa"], files={"piqa": str(tmp_path / "piqa.jsonl")})
    assert labels(made) == [1]


def test_codes_of_tfns_are_not_taken_for_those_of_another_task(tmp_path: Path) -> None:
    (tmp_path / "tfns.csv").write_text(CODES)
    with pytest.raises(ConfigError, match="their meaning is unknown"):
        prepared(tmp_path, ["fpb"], files={"fpb": str(tmp_path / "tfns.csv")})
    (made,) = prepared(tmp_path, ["fpb"], files={"fpb": f"{tmp_path / 'tfns.csv'}:tfns"})
    assert labels(made) == ["negative", "positive", "neutral"]


@pytest.mark.parametrize(
    "given", [{"labels": ["hawkish", "dovish"]}, {"columns": {"input": "text"}}, {"template": "classify"}]
)
def test_settings_of_a_task_of_ones_own_are_not_dropped(tmp_path: Path, given: dict[str, object]) -> None:
    (tmp_path / "tfns.csv").write_text(CODES)
    with pytest.raises(ConfigError, match=rf"data.{next(iter(given))} is given, but is for a task of your own alone"):
        prepared(tmp_path, ["tfns"], folder=str(tmp_path), **given)


def test_a_label_that_no_record_has_can_be_chosen_in_finetuning_too(tmp_path: Path) -> None:
    """Records of two labels, a template of three: finetuning chooses among three, as evaluation does."""
    rows = [f"news {i} of the bank {i * 7 % 5},{('negative', 'positive')[i % 2]}" for i in range(40)]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *rows[:20]]))
    (tmp_path / "b.csv").write_text("\n".join(["text,label", *rows[20:]]))
    model, words = load_for_evaluation(str(write_model(tmp_path / "model")))
    files = {"source": [str(tmp_path / "a.csv")], "eval_source": [str(tmp_path / "b.csv")]}
    examples = make_examples(Instructions(**files), words, 0)
    assert [len(found) for found in candidates_of(examples).values()] == [3, 3]
    examples.save(tmp_path / "examples.safetensors")
    assert candidates_of(load(tmp_path / "examples.safetensors")) == candidates_of(examples)
    held_out = label_scores(model, words, examples, None)["phrasebank"]
    (task,) = prepared(tmp_path, ["stance"], files={"stance": str(tmp_path / "b.csv")})
    scores, _ = score(LanguageModel(model, words, 4), task, 0, 0)
    assert scores["acc"] == pytest.approx(held_out["acc"])
    assert scores["weighted_f1"] == pytest.approx(held_out["weighted_f1"])


def test_labels_that_look_like_dates_are_labels(tmp_path: Path) -> None:
    rows = [f"news {i} of the bank,{2020 + i % 2}-01-01" for i in range(6)]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *rows]))
    model, words = load_for_evaluation(str(write_model(tmp_path / "model")))
    (task,) = prepared(tmp_path, ["year"], files={"year": str(tmp_path / "a.csv")})
    scores, _ = score(LanguageModel(model, words, 4), task, 0, 0)
    assert scores["majority"]["acc"] == pytest.approx(0.5)


def test_a_task_of_ones_own_scores_as_finetuning_scores_what_it_held_out(tmp_path: Path) -> None:
    stances = ("Hawkish", "dovish", "neutral")
    for name, rows in (("a.csv", range(12)), ("b.csv", range(20, 38))):
        lines = [f"rate {i} of the bank {i * 7 % 5};{i % (3 if name == 'a.csv' else 2)}.0" for i in rows]
        (tmp_path / name).write_text("\n".join(["headline;mood", *lines]))
    (tmp_path / "mine.yaml").write_text('stance: {prompt: "{headline}\\nOne of {labels}:", answer: "{label}"}')
    given = {
        "template": "stance",
        "templates": str(tmp_path / "mine.yaml"),
        "columns": {"label": "mood"},
        "labels": dict(enumerate(stances)),
    }
    model, words = load_for_evaluation(str(write_model(tmp_path / "model")))
    files = {"source": [str(tmp_path / "a.csv")], "eval_source": [str(tmp_path / "b.csv")]}
    examples = make_examples(Instructions(**files, **given), words, 0)
    held_out = label_scores(model, words, examples, None)["stance"]
    (task,) = prepared(tmp_path, ["stance"], files={"stance": str(tmp_path / "b.csv")}, **given)
    scores, rows = score(LanguageModel(model, words, 4), task, 0, 0)
    assert len(rows) == held_out["n"] == 18
    assert rows[0]["n_choices"] == 3, "neutral can be chosen, though no example of the file is neutral"
    assert scores["acc"] == pytest.approx(held_out["acc"])
    assert scores["weighted_f1"] == pytest.approx(held_out["weighted_f1"])
