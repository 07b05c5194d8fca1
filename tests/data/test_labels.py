"""What labels mean: words, codes, names in the file, labels of one's own, and templates of one's own."""

from __future__ import annotations

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finhpc.data.examples.examples import make_examples
from finhpc.data.examples.instructions import read_examples
from finhpc.data.examples.templates import listing
from finhpc.errors import ConfigError
from finhpc.settings.base import build
from finhpc.settings.finetune import FinetuneConfig, Instructions
from tests.data.instructing import jsonl, tokenizer

TOK = tokenizer()
CODES = "text,label\nprofit fell,0\nit stayed,1\nprofit rose,2\n"


def read(*sources, **settings):
    return read_examples([str(source) for source in sources], Instructions(**settings))


def answers(source, **settings):
    return [example.answer.strip() for example in read(source, **settings)[0].examples]


def refusal(*sources, **settings):
    with pytest.raises(ConfigError) as error:
        read(*sources, **settings)
    return str(error.value)


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("header", ["text,label", "sentence,label", "input,label", "text,sentiment"])
def test_codes_without_a_meaning_are_refused_with_the_remedy(tmp_path, header):
    path = write(tmp_path / "news.csv", CODES.replace("text,label", header))
    message = refusal(path)
    assert "its labels are codes (0, 1, 2), and their meaning is unknown" in message
    assert "--data.labels 0=... 1=... 2=..." in message
    assert "news.csv:tfns if they are 0 negative, 1 positive, 2 neutral" in message
    assert answers(f"{path}:tfns") == ["negative", "positive", "neutral"]
    assert answers(f"{path}:phrasebank") == ["negative", "neutral", "positive"]
    given = {"labels": ["0=negative", "1=neutral", "2=positive"]}
    assert answers(path, **given) == ["negative", "neutral", "positive"]
    (found,) = read(path, **given)
    assert any("0 = negative, 1 = neutral, 2 = positive" in note for note in found.notes)
    assert found.template == "phrasebank"


def test_files_of_tfns_are_known_by_name_and_it_is_reported(tmp_path):
    (found,) = read(write(tmp_path / "sent_train.csv", CODES))
    assert [example.answer for example in found.examples] == [" negative", " positive", " neutral"]
    assert any("read as tfns" in note and "0 = negative, 1 = positive, 2 = neutral" in note for note in found.notes)
    assert "data.labels says that 1 is neutral, but in" in refusal(
        tmp_path / "sent_train.csv", labels={"0": "negative", "1": "neutral", "2": "positive"}
    )
    other = {"labels": {"0": "negative", "1": "neutral", "2": "positive"}}
    assert answers(f"{tmp_path / 'sent_train.csv'}:labelled", **other) == ["negative", "neutral", "positive"]
    assert "its labels are codes" in refusal(f"{tmp_path / 'sent_train.csv'}:labelled")


@pytest.mark.parametrize(
    "codes",
    [(0.0, 1.0, 2.0), ("0.0", "1.0", "2.0"), (" 0", "1 ", "2"), (0, 1, 2), ("Negative", "POSITIVE ", "neutral")],
)
def test_codes_and_words_are_read_however_they_are_written(tmp_path, codes):
    rows = [{"text": f"t{i}", "label": code} for i, code in enumerate(codes)]
    assert answers(jsonl(tmp_path / "tfns.jsonl", rows)) == ["negative", "positive", "neutral"]
    write(tmp_path / "tfns.csv", "text,label\n" + "".join(f"t{i},{code}\n" for i, code in enumerate(codes)))
    assert answers(tmp_path / "tfns.csv") == ["negative", "positive", "neutral"]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("0.5", "label holds the number 0.5, which is not a label"),
        ("NaN", "line 1: the label (label) is empty"),
        ("null", "line 1: the label (label) is empty"),
        ("[0]", "label holds a list, which is not a label"),
        ("Infinity", "label holds the number inf, which is not a label"),
    ],
)
def test_a_label_that_is_none_is_refused(tmp_path, label, message):
    path = write(tmp_path / "tfns.jsonl", f'{{"text": "a", "label": {label}}}\n{{"text": "b", "label": 1}}\n')
    assert message in refusal(path)


@pytest.mark.parametrize("form", ["parquet", "folder", "disk"])
def test_the_names_of_numbered_classes_are_used(tmp_path, form):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neutral", "positive", "negative"])}
    )
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 2]}, features=features)
    folder = tmp_path / "set"
    folder.mkdir()
    if form == "disk":
        table.save_to_disk(folder)
    else:
        table.to_parquet(folder / "train.parquet")
    source = folder / "train.parquet" if form == "parquet" else f"hf:{folder}"
    assert answers(source) == ["neutral", "positive", "negative"]


def test_a_split_that_is_not_there_and_a_folder_are_refused_with_the_remedy(tmp_path):
    made = datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})
    datasets.DatasetDict({"test": made}).save_to_disk(str(tmp_path / "set"))
    assert "it has the splits test" in refusal(f"hf:{tmp_path}/set")
    assert f"hf:{tmp_path}/set for a data set that is a folder" in refusal(f"{tmp_path}/set")
    assert len(read(f"hf:{tmp_path}/set", hf_split="test")[0].examples) == 2


def test_the_home_folder_is_found_in_settings_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.csv", "text,label\na,0\nb,1\n")
    assert answers("~/a.csv:tfns") == ["negative", "positive"]


def test_numbered_classes_without_names_are_codes(tmp_path):
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0, 1]}), tmp_path / "a.parquet")
    assert "its labels are codes (0, 1)" in refusal(tmp_path / "a.parquet")


STANCE = "text,label\nraise rates,Hawkish\ncut rates,dovish\nhold,neutral\nraise more,hawkish\n"


def test_labels_of_the_data_become_the_choice(tmp_path):
    path = write(tmp_path / "fomc.csv", STANCE + "raise again,hawkish \n")
    (found,) = read(path)
    assert found.labels == ("dovish", "hawkish", "neutral")
    assert found.template == "classify"
    assert [example.answer for example in found.examples[:3]] == [" hawkish", " dovish", " neutral"]
    assert "{dovish/hawkish/neutral}" in found.examples[0].prompt
    assert any("labels: dovish 1, hawkish 3, neutral 1" in note for note in found.notes)
    assert make_examples(Instructions(source=[str(path)], eval_fraction=0.0), TOK, 0).labels == found.labels


@pytest.mark.parametrize("two", [("AAA", "AA"), ("uncertain", "certain"), ("class_a", "class_b"), ("tier 1", "tier 2")])
def test_a_rare_label_is_no_slip_of_one_that_is_named_alike(tmp_path, two):
    rows = [f"a,{two[0]}", *(f"t{i},{two[1]}" for i in range(5))]
    (found,) = read(write(tmp_path / "a.csv", "\n".join(["text,label", *rows])))
    assert found.labels == tuple(sorted(two, key=str.lower))


def test_labels_can_be_listed_in_an_order_and_a_spelling(tmp_path):
    path = write(tmp_path / "fomc.csv", STANCE)
    (found,) = read(path, labels=["Hawkish", "Dovish", "neutral", "mixed"])
    assert "{Hawkish/Dovish/neutral/mixed}" in found.examples[0].prompt
    assert found.examples[3].answer == " Hawkish"
    assert "'neutral' is not a label" in refusal(path, labels=["hawkish", "dovish"])
    binary = write(tmp_path / "a.txt", "up@good\ndown@bad\n")
    assert "'good' is not a label of template phrasebank" in refusal(binary)
    assert answers(f"{binary}", labels=["good", "bad"]) == ["good", "bad"]


def test_files_of_one_data_set_share_their_labels(tmp_path):
    one = write(tmp_path / "a.csv", STANCE)
    two = write(tmp_path / "b.csv", "text,label\nx,hawkish\ny,dovish\n")
    other = write(tmp_path / "c.csv", "text,label\nx,sports\ny,politics\n")
    found = read(two, one, other)
    assert [source.labels for source in found] == [("dovish", "hawkish", "neutral")] * 2 + [("politics", "sports")]
    assert "{dovish/hawkish/neutral}" in found[0].examples[0].prompt


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a,positive", "b,negative", "c,neutral", "d,neutral", "e,neutrl"], "did you mean 'neutral'?"),
        (["a,hawkish", "b,hawkish"], "all records have the label 'hawkish'"),
        ([f"t{i},text number {i}" for i in range(101)], "101 different labels are more than 100"),
        (["a,hawkish", "b,0"], "its labels are codes (0)"),
        (["a,LABEL_0", "b,LABEL_1"], "its labels are codes (LABEL_0, LABEL_1)"),
        (["a,0.85", "b,-0.2"], "its labels are codes (-0.2, 0.85)"),
        (["a,-1", "b,0", "c,1"], "give --data.labels -1=... 0=... 1=... with a word for each."),
        ([f"t{i},{i}" for i in range(11)], "codes (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...)"),
        ([f"t{i},{i / 7}" for i in range(101)], "its labels are 101 numbers"),
    ],
)
def test_labels_of_the_data_that_cannot_be_meant_are_refused(tmp_path, rows, message):
    assert message in refusal(write(tmp_path / "a.csv", "\n".join(["text,label", *rows])))


def test_settings_that_no_source_can_follow_are_refused(tmp_path):
    alpaca = jsonl(tmp_path / "a.jsonl", [{"instruction": "a", "input": "", "output": "b"}])
    assert "data.labels is given, but the answers of all sources are text" in refusal(alpaca, labels=["a", "b"])
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    assert "data.template=alpaca is not for conversations" in refusal(
        jsonl(tmp_path / "c.jsonl", chat), template="alpaca"
    )
    assert "names in its prompt (person, location, organization)" in refusal(
        write(tmp_path / "n.csv", "sentence,entity,label\na,b,good\nc,d,bad\n"), labels=["good", "bad"]
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([True, False], "YAML reads yes, no, true and false as booleans"),
        (["a"], "at least two different labels"),
        (["a", "a"], "given twice"),
        ({"0": None, "1": "a"}, "None is not a label"),
    ],
)
def test_labels_that_are_none_are_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        build(FinetuneConfig, {"data": {"labels": value}})


OWN = """
stance:
  prompt: "{headline} ({ticker})\\nOne of {labels}:"
  answer: "{label}"
summary: {prompt: "Shorten: {text}", answer: "{short}", separator: "\\n"}
"""


def test_templates_of_ones_own(tmp_path):
    file = write(tmp_path / "mine.yaml", OWN)
    data = write(tmp_path / "a.csv", "headline,ticker,label\nup,ABC,good\ndown,DEF,bad\n")
    (found,) = read(data, template="stance", templates=str(file))
    assert found.examples[0].prompt == "up (ABC)\nOne of bad/good:"
    assert [example.answer for example in found.examples] == [" good", " bad"]
    assert found.examples[0].input == "ABC"
    text = write(tmp_path / "b.csv", "body,short\nlong text,brief\n")
    (found,) = read(text, template="summary", templates=str(file), columns={"text": "body"})
    assert (found.examples[0].prompt, found.examples[0].answer) == ("Shorten: long text", "\nbrief")
    assert found.examples[0].end
    assert "did you mean 'stance'?" in refusal(data, template="stanse", templates=str(file))
    assert "stance: fields headline, ticker, label; labels: those of the data" in listing(str(file))
    assert "phrasebank: fields input, label; labels: negative, neutral, positive" in listing(str(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {prompt: 'x {input}'}", "template a: answer is missing"),
        ("a: {prompt: 'x', answer: '{label}'}", "template a: prompt must hold a field"),
        ("a: {prompt: 'x {label}', answer: '{label}'}", "prompt must hold a field of the record in braces"),
        ("a: {promt: 'x {input}', answer: '{label}'}", "promt is not a part; did you mean 'prompt'?"),
        ("a: {prompt: '{input}', answer: '{label}', labels: [yes, no]}", "in quotation marks"),
        ("a: {prompt: '{input}', answer: '{label}', cut: text}", "cut must be a field of the prompt"),
        ("a: {prompt: '{input}', answer: '{label}', labels: [x]}", "at least two different labels"),
        ("alpaca: {prompt: '{input}', answer: '{label}'}", "has a template of that name"),
        ("a: {prompt: '{input}', answer: x}\na: {prompt: '{input}', answer: y}", "the key a is duplicated"),
        ("- a", "has no template"),
        ("a: text", "it must hold prompt and answer"),
    ],
)
def test_a_file_of_templates_that_cannot_be_used_is_refused(tmp_path, text, message):
    file = write(tmp_path / "mine.yaml", text)
    data = write(tmp_path / "a.csv", "input,label\nup,good\n")
    assert message in refusal(data, template="a", templates=str(file))


def test_what_is_guessed_names_the_columns_that_are_not_used(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "history": "c"}])
    (found,) = read(path)
    assert (found.examples[0].prompt, found.examples[0].answer) == ("a", " b")
    assert found.notes == [
        f"{path}: read as context_target (columns prompt, completion; not used: history), template context_target"
    ]
    assert "has no examples" in refusal(write(tmp_path / "empty.jsonl", ""))
