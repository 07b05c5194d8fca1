"""Files as people have them: byte order marks, line ends, delimiters, long fields, and values that are not text."""

from __future__ import annotations

import datetime
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finhpc.data.examples.examples import make_examples
from finhpc.data.examples.instructions import read_examples
from finhpc.errors import ConfigError
from finhpc.settings.finetune import Instructions
from finhpc.textfile import parse_json, parse_yaml, read_text
from tests.data.instructing import jsonl, tokenizer

TOK = tokenizer()


def examples(source, **settings):
    (found,) = read_examples([str(source)], Instructions(**settings))
    return found


def answers(source, **settings):
    return [example.answer.strip() for example in examples(source, **settings).examples]


def refusal(source, **settings):
    with pytest.raises(ConfigError) as error:
        examples(source, **settings)
    return str(error.value)


ALPACA = '{"instruction": "Say it", "input": "", "output": "é yes"}'
CSV = "text,label\né rose,positive\nit fell,negative\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("file", ["a.jsonl", "a.csv", "a.txt", "a.json"])
def test_marks_and_line_ends_change_nothing(tmp_path, encoding, end, file):
    text = {
        "a.jsonl": f"{ALPACA}\n{ALPACA}\n",
        "a.json": f"[{ALPACA},\n{ALPACA}]\n",
        "a.csv": CSV,
        "a.txt": "é rose@positive\nit fell@negative\n",
    }[file]
    plain = tmp_path / "plain" / file
    plain.parent.mkdir()
    plain.write_text(text, encoding="utf-8")
    (tmp_path / file).write_bytes(text.replace("\n", end).encode(encoding))
    told = [[(e.prompt, e.answer) for e in examples(path).examples] for path in (plain, tmp_path / file)]
    assert told[0] == told[1]
    assert len(told[0]) == 2


def test_a_line_separator_is_text_not_a_line_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"context": "a\u2028b\x85c", "target": "d"}, ensure_ascii=False), encoding="utf-8")
    assert examples(path).examples[0].prompt == "a\u2028b\x85c"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,label\na\0b,positive\n", "line 2: a NUL character"),
        ("text,label\nup,positive\n".encode("utf-16-le"), "NUL character, so it is not text, or UTF-16"),
        (b"\x1f\x8b\x08\x00", "gzip archive, not text"),
        (b"PK\x03\x04", "ZIP archive or an Excel file"),
        ("text,label\nGewinn f\xe4llt,negative\n".encode("latin-1"), "line 2: byte 0xe4 is not utf-8"),
    ],
)
def test_what_is_not_text_is_refused_with_its_line(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    assert message in refusal(tmp_path / "a.csv")


def test_a_field_longer_than_csv_allows_by_default_is_read(tmp_path):
    filing = "word " * 40_000
    (tmp_path / "a.csv").write_text(f'text,label\n"{filing}",positive\nshort,negative\n')
    found = examples(tmp_path / "a.csv").examples
    assert [example.answer for example in found] == [" positive", " negative"]
    assert len(found[0].input) == len(filing)


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")])
def test_other_delimiters_are_read_and_reported(tmp_path, mark, name):
    path = tmp_path / "a.csv"
    path.write_text(f"id{mark}text{mark} label\n1{mark}up, and up{mark}positive\n2{mark}down{mark}negative\n")
    found = examples(path)
    assert [example.input for example in found.examples] == ["up, and up", "down"]
    assert f"{path}: read as separated by {name}" in found.notes
    path.write_text(f"sep={mark}\ntext{mark}label\nup{mark}positive\ndown{mark}negative\n")
    assert answers(path) == ["positive", "negative"]
    path.write_text(f"text{mark}label\nup{mark}positive{mark}x\n")
    assert f"line 2: 3 values, but the first line names 2 columns (text, label); put text with {name}" in refusal(path)


def test_a_line_number_counts_the_lines_of_fields_before_it(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"two\nlines",positive\nup,\n')
    assert "line 4: the label (label) is empty" in refusal(tmp_path / "a.csv")


def test_what_spreadsheets_write_beside_a_table_is_left_out(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("v1,v2,,,\nham,so it is,,,\nspam,win it,,,\n,,,,\n")
    found = examples(path, columns={"input": "v2", "label": "v1"})
    assert [example.answer for example in found.examples] == [" ham", " spam"]
    assert found.skipped == {"rows without a value": 1}
    path.write_text(",text,label\n0,it rose,positive\n1,it fell,negative\n   \n")
    assert answers(path) == ["positive", "negative"]
    assert f"{path}: values of columns without a name are not used, of 2 rows" in examples(path).notes


def test_spaces_after_a_comma_do_not_make_quotation_marks_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text, label\n"it rose, again", "positive"\n"it fell", "negative"\n')
    assert answers(path) == ["positive", "negative"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", 'text\tlabel\n"a quote\tpositive\nits end"\tnegative\n', "line 2: a quotation mark joins"),
        ("a.tsv", 'text\tlabel\n"a quote\tpositive\nits end\tnegative\n', "a quotation mark is never closed"),
        ("a.csv", 'text,label\n"say \\"buy\\"",positive\n', "contains others doubled"),
        ("a.csv", "positive,it rose\nnegative,it fell\n", "write a first line with the columns' names above it"),
        ("a.json", '{"data": [{"text": "a", "label": "b"}]}', "holds a list under the name 'data'"),
        ("a.json", '{"text": {"0": "a", "1": "b"}, "label": {"0": "x", "1": "y"}}', "orient='records'"),
    ],
)  # fmt: skip
def test_tables_that_would_be_misread_are_refused_with_the_remedy(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    assert message in refusal(tmp_path / name)


def test_words_with_tags_are_known_by_the_ending(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("John\tI-PER\nlives\tO\n")
    assert (examples(path).format, answers(path)) == ("conll", ["person"])


def test_the_encoding_that_is_advised_reads_the_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\nit’s up,positive\ndown,negative\n".encode("cp1252"))
    assert "give --data.encoding cp1252, or convert it to UTF-8 (iconv -f CP1252 -t UTF-8)" in refusal(path)
    assert examples(path, encoding="cp1252").examples[0].input == "it’s up"
    path.write_bytes("text,label\né up,positive\ndown,negative\n".encode("latin-1"))
    assert "give --data.encoding latin-1" in refusal(path)


@pytest.mark.parametrize("text", ["text,text,label\na,b,positive\n", "text, text,label\na,b,positive\n"])
def test_a_column_that_stands_twice_is_refused(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    assert "the column 'text' occurs twice" in refusal(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"context": NaN, "target": "b"}', "line 1: the prompt's context (context) is empty"),
        ('{"context": "a", "target": NaN}', "line 1: the answer (target) is empty"),
        ('{"context": null, "target": "b"}', "the prompt's context (context) is empty"),
        ('{"context": Infinity, "target": "b"}', "context holds the number inf, not text"),
        ('{"context": "a", "target": 5}', "target holds the number 5, not text; write it as text, in quotation marks"),
        ('{"context": "a", "target": 0.1}', "target holds the number 0.1, not text"),
        ('{"context": "a", "target": true}', "target holds the boolean True, not text"),
        ('{"context": "a", "target": ["b"]}', "target holds a list, not text"),
        ('{"context": {"a": 1}, "target": "b"}', "context holds an object, not text"),
        ('{"context": "a", "context": "b", "target": "c"}', "line 1: broken JSON (the key 'context' is duplicated"),
        ('{"context": "a\\ud800", "target": "c"}', "half a surrogate pair"),
    ],
)
def test_a_value_that_is_not_text_is_refused_with_its_line(tmp_path, record, message):
    (tmp_path / "a.jsonl").write_text(record)
    assert message in refusal(tmp_path / "a.jsonl")


def test_a_missing_optional_input_is_empty_not_a_word(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"instruction": "Say", "input": NaN, "output": "b"}\n')
    nan = examples(tmp_path / "a.jsonl").examples[0].prompt
    records = [{"instruction": "Say", "output": "b"}]
    assert nan == examples(jsonl(tmp_path / "b.jsonl", records)).examples[0].prompt
    assert "Input" not in nan


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array([1.0, math.nan]), "row 1: text holds the number 1.0, not text"),
        (pa.array([b"a", b"b"]), "row 1: text holds bytes, not text"),
        (pa.array([datetime.date(2024, 1, 1)] * 2), "row 1: text holds a date, not text"),
        (pa.array(["a", None]), "row 2: the prompt's input (text) is empty"),
        (pa.array([["a"], ["b"]]), "row 1: text holds a list"),
    ],
)
def test_parquet_columns_that_are_not_text_are_refused_with_their_row(tmp_path, values, message):
    pq.write_table(pa.table({"text": values, "label": ["positive", "negative"]}), tmp_path / "a.parquet")
    assert message in refusal(tmp_path / "a.parquet")


def test_parquet_categories_are_read_as_their_words(tmp_path):
    columns = {"text": pa.array(["a", "b"]).dictionary_encode(), "label": pa.array(["positive", "negative"])}
    columns["label"] = columns["label"].dictionary_encode()
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert answers(tmp_path / "a.parquet") == ["positive", "negative"]


@pytest.mark.parametrize("score", ['"nan"', "NaN", "7", "null", '"high"'])
def test_a_score_of_fiqa_that_is_none_is_refused(tmp_path, score):
    (tmp_path / "fiqa.json").write_text(f'{{"1": {{"sentence": "a", "info": [{{"sentiment_score": {score}}}]}}}}')
    assert "record 1" in refusal(tmp_path / "fiqa.json")


def test_sentences_of_fiqa_without_a_score_are_counted(tmp_path):
    scored = {"sentence": "a", "info": [{"sentiment_score": "0.5"}]}
    path = jsonl(tmp_path / "fiqa.jsonl", [scored, {"sentence": "b", "info": None}])
    found = examples(path)
    assert [example.answer for example in found.examples] == [" positive"]
    assert found.skipped["sentences without a score"] == 1


def test_one_fault_of_many_records_is_told_once(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"context": "a", "target": ""}] * 40 + [{"context": "a", "target": 1}])
    assert refusal(path).splitlines() == [
        f"{path} line 1: the answer (target) is empty; write one or remove the record. The same applies to 39 more.",
        f"{path} line 41: target holds the number 1, not text; write it as text, in quotation marks.",
    ]
    bare = tokenizer()
    bare.chat_template = None
    chats = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 40
    with pytest.raises(ConfigError) as error:
        make_examples(Instructions(source=[jsonl(tmp_path / "c.jsonl", chats)] * 2), bare, 0)
    assert len(error.value.problems) == 1


def test_settings_and_json_refuse_a_key_that_stands_twice(tmp_path):
    with pytest.raises(ValueError, match="'a' is duplicated"):
        parse_json('{"a": 1, "b": {"a": 2, "a": 3}}')
    with pytest.raises(Exception, match="the key lr is duplicated"):
        parse_yaml("optimizer:\n  lr: 1\n  lr: 2\n")
    assert parse_yaml("a: &x {b: 1}\nc:\n  <<: *x\n  d: 2\n") == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}


@pytest.mark.parametrize("encoding", ["rot13", "undefined", "nonsense"])
def test_an_encoding_that_is_none_is_refused(tmp_path, encoding):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=f"data.encoding={encoding} is not an encoding"):
        read_text(tmp_path / "a.txt", encoding)
