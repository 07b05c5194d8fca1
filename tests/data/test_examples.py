from __future__ import annotations

import json
import os
import tracemalloc
from collections import Counter

import pytest
from tokenizers import AddedToken

from finhpc.data.examples import tokenize
from finhpc.data.examples.examples import load, make_examples, read_sources
from finhpc.data.examples.templates import template, templates
from finhpc.errors import ConfigError, DataError
from finhpc.models.files.tokens import decoded, prompt_ids
from finhpc.settings.finetune import Instructions
from tests.data.instructing import jsonl, phrases, sentences, tokenizer
from tests.data.kinds import KINDS
from tests.data.kinds import tokenizer as of_kind

TOK = tokenizer()


def make(source, seed=0, tok=TOK, **settings):
    sources = source if isinstance(source, list) else [source]
    return make_examples(Instructions(**{"source": sources, "eval_fraction": 0.0, **settings}), tok, seed)


def said(arrays, index=0, tok=TOK):
    """Text, and the part of it that carries loss."""
    tokens, answer = arrays.example(index)
    return tok.decode(tokens), tok.decode(tokens[answer])


def test_labels_are_tokenised_as_the_plain_loop_does(tmp_path):
    found = make(phrases(tmp_path / "a.txt", ["Profit rose .@positive"]))
    prompt = template("phrasebank").render({"input": "Profit rose ."}).prompt
    tokens, answer = found.train.example(0)
    assert tokens.tolist() == TOK(prompt + " positive")["input_ids"]
    assert tokens[~answer].tolist() == TOK(prompt)["input_ids"]
    assert said(found.train)[1] == " positive"


def test_every_format_is_known_by_its_columns(tmp_path):
    (tmp_path / "tfns.csv").write_text('text,label\n"A, b",0\nC,1\nD,2\n')
    fiqa = {str(i): {"sentence": f"S{i}", "info": [{"sentiment_score": s}]} for i, s in enumerate((-0.11, -0.1, 0.11))}
    (tmp_path / "fiqa.json").write_text(json.dumps(fiqa))
    (tmp_path / "ner.txt").write_text("-DOCSTART- -X- O O\n\nSILICON NNP - I-ORG\nBANK NNP - I-ORG\nlends VB - O\n\n")
    for name, answers in {
        "tfns.csv": [" negative", " positive", " neutral"],
        "fiqa.json": [" negative", " neutral", " positive"],
        "ner.txt": [" organization"],
    }.items():
        found = make(str(tmp_path / name))
        assert [said(found.train, i)[1] for i in range(len(found.train))] == answers
    assert "'SILICON BANK'" in said(found.train)[0]
    alpaca = jsonl(tmp_path / "al.jsonl", [{"instruction": "Say hi", "input": "", "output": "hi there"}])
    assert said(make(alpaca).train)[1] == "\nhi there<|im_end|>"
    written = jsonl(tmp_path / "ct.jsonl", [{"context": "Input: x\nAnswer: ", "target": "good"}])
    assert said(make(written).train) == ("Input: x\nAnswer: good<|im_end|>", " good<|im_end|>")


def test_a_long_conversation_loses_later_turns_then_the_end_of_its_first_message(tmp_path):
    long = " ".join(f"word{i}" for i in range(40))
    turns = [("system", "be brief"), ("user", long), ("assistant", "yes it is"), ("user", "why"), ("assistant", "so")]
    source = jsonl(tmp_path / "c.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    whole, first = (len(make(source, max_len=size).train.tokens) for size in (512, 330))
    text, loss = said(make(source, max_len=first).train)
    assert loss == "yes it is<|im_end|>", "the second answer is left out, the first whole"
    assert long in text
    assert first < whole
    found = make(source, max_len=first - 60)
    text, loss = said(found.train)
    assert loss == "yes it is<|im_end|>"
    begin = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n"
    rest = text.removeprefix(begin).removesuffix("<|im_end|>\n<|im_start|>assistant\nyes it is<|im_end|>")
    assert len(rest) == len(text) - len(begin) - len("<|im_end|>\n<|im_start|>assistant\nyes it is<|im_end|>")
    assert long.startswith(rest)
    assert 0 < len(rest) < len(long) - 50
    assert found.counts["cut"] == 1
    assert len(found.train.tokens) <= first - 60
    with pytest.raises(ConfigError, match=r"c\.jsonl.*: \d+ tokens"):
        make(source, max_len=first - 60, cut="refuse")
    with pytest.raises(ConfigError, match="no room for the answer of 1 of 1"):
        make(source, max_len=20)


def test_an_answer_before_the_user_speaks_is_never_cut_into(tmp_path):
    turns = [("system", "greet the guest " * 12), ("assistant", "good day"), ("user", "hi"), ("assistant", "yes")]
    record = {"messages": [{"role": r, "content": c} for r, c in turns]}
    source = jsonl(tmp_path / "c.jsonl", [record])
    with pytest.raises(ConfigError, match="no room for the answer of 1 of 1"):
        make(source, max_len=100)


def test_parquet_and_data_sets_give_what_json_lines_give(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [{"instruction": f"Say {i}", "input": f"text {i}", "output": f"{i} it is"} for i in range(40)]
    plain = make(jsonl(tmp_path / "a.jsonl", records), eval_fraction=0.3)
    (tmp_path / "set").mkdir()
    table = pa.Table.from_pylist(records)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    pq.write_table(table, tmp_path / "set" / "train-00000.parquet")
    for source in (str(tmp_path / "a.parquet"), f"hf:{tmp_path / 'set'}"):
        assert make(source, eval_fraction=0.3).fingerprint == plain.fingerprint
    assert len(plain.held_out) > 0
    with pytest.raises(ConfigError, match=r"--data\.hf_split test cannot be opened"):
        make(f"hf:{tmp_path / 'set'}", hf_split="test")


def test_a_conversation_carries_loss_on_the_assistants_turns_alone(tmp_path):
    turns = [("user", "a b"), ("assistant", "c"), ("user", "d"), ("assistant", "e f")]
    source = jsonl(tmp_path / "c.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    text, loss = said(make(source).train)
    assert text == TOK.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)
    assert loss == "c<|im_end|>e f<|im_end|>"


def test_the_end_of_a_long_input_is_cut_and_counted(tmp_path):
    source = phrases(tmp_path / "a.txt", ["A b .@neutral", "word " * 200 + ".@positive"])
    found = make(source, max_len=120)
    text, loss = said(found.train, 1)
    assert len(found.train.example(1)[0]) <= 120
    assert len(found.train.example(1)[0]) > 110
    assert text.endswith("\nAnswer: positive")
    assert loss == " positive"
    assert found.counts["cut"] == 1
    assert any("1 inputs longer" in note for note in found.notes)
    with pytest.raises(ConfigError, match="max_len=120 is less than 1 examples need"):
        make(source, max_len=120, cut="refuse")


def test_an_answer_without_room_is_counted_and_refused_above_a_share(tmp_path):
    records = [{"instruction": f"Say {i}", "input": "", "output": "x y z " * (200 if i == 0 else 1)} for i in range(10)]
    source = jsonl(tmp_path / "a.jsonl", records)
    with pytest.raises(ConfigError, match=r"answer of 1 of 10 examples \(.*line 1\).*max_dropped=0.01"):
        make(source, max_len=400)
    found = make(source, max_len=400, max_dropped=0.1)
    assert (found.counts["dropped"], len(found.train)) == (1, 9)


def test_the_same_input_is_never_on_both_sides_whatever_seed_or_source(tmp_path):
    lines = sentences(200)
    again = [line.replace(" .@", ".@").upper().replace("@POSITIVE", "@positive") for line in lines[2::3]]
    one, two = phrases(tmp_path / "a.txt", lines), phrases(tmp_path / "b.txt", again)
    sides = []
    for seed, sources in ((0, [one, two]), (1, [two, one])):
        found = make(sources, seed, eval_fraction=0.3)
        texts = [
            {
                said(side, i)[0].split("\nInput: ")[1].split("\nAnswer")[0].lower().replace(" .", ".")
                for i in range(len(side))
            }
            for side in (found.train, found.held_out)
        ]
        assert not texts[0] & texts[1]
        assert len(texts[0] | texts[1]) == 200
        assert 30 < len(texts[1]) < 90
        sides.append(texts[1])
    assert sides[0] == sides[1]
    given = make(one, eval_source=[two])
    assert given.counts["leaked"] == len(again) == len(given.held_out)
    assert len(given.train) == 200 - len(again)


def test_limit_is_drawn_by_the_seed_and_files_come_back_whole(tmp_path):
    source = phrases(tmp_path / "a.txt", sentences(100))
    first, other = make(source, 0, limit=20), make(source, 1, limit=20)
    assert len(first.train) == len(other.train) == 20
    assert first.counts["not_drawn"] == 80
    assert first.fingerprint == make(source, 0, limit=20).fingerprint != other.fingerprint
    path = tmp_path / "e.safetensors"
    assert first.save(path) == load(path).fingerprint
    assert load(path).counts == first.counts
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"fingerprint|whole"):
        load(path)


def test_bad_records_are_told_together(tmp_path):
    source = phrases(tmp_path / "a.txt", ["A .@good", "B .@neutral", "C .@", "D .@neutrl"])
    with pytest.raises(ConfigError) as error:
        make(source)
    assert [problem.split(": ")[0].split()[-1] for problem in error.value.problems] == ["1", "3", "4"]
    assert "'good' is not a label of template phrasebank; it has negative, neutral, positive" in str(error.value)
    empty = jsonl(tmp_path / "a.jsonl", [{"instruction": "x", "input": "", "output": " "}])
    with pytest.raises(ConfigError, match=r"line 1: the answer \(output\) is empty"):
        make(empty)


def test_columns_that_do_not_exist_are_told_with_those_that_do(tmp_path):
    (tmp_path / "t.csv").write_text("headline,mood\nA b,positive\n")
    source = str(tmp_path / "t.csv")
    with pytest.raises(ConfigError, match="no column 'feeling' for label; columns: headline, mood"):
        make(source, columns={"input": "headline", "label": "feeling"})
    with pytest.raises(
        ConfigError, match="no column 'label' or 'sentiment' or 'output' for label; columns: headline, mood"
    ):
        make(source + ":tfns", columns={"input": "headline"})
    with pytest.raises(ConfigError, match="headline, mood"):
        make(source)
    assert said(make(source, columns={"input": "headline", "label": "mood"}).train)[1] == " positive"


def test_a_tokeniser_without_an_end_token_is_refused_where_answers_need_one(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"context": "x", "target": "y"}])
    with pytest.raises(ConfigError, match="no end token"):
        make(source, tok=tokenizer(eos=False))
    bare = tokenizer(eos=False)
    bare.pad_token = None
    assert len(make(phrases(tmp_path / "a.txt", sentences(3)), tok=bare).train) == 3


@pytest.mark.parametrize(
    ("written", "read", "message"),
    [
        ("latin-1", "utf-8", "line 2: byte 0xe4 is not utf-8; PhraseBank comes in latin-1"),
        ("utf-8", "latin-1", "it is UTF-8, but would be read as latin-1"),
        ("cp1252", "latin-1", "cp1252"),
        ("utf-16-le", None, "NUL"),
    ],
)
def test_a_wrong_encoding_is_told(tmp_path, written, read, message):
    euro = " €" if written == "cp1252" else ""
    source = phrases(tmp_path / "a.txt", ["A b .@neutral", f"Hämeenlinna{euro} .@positive"], written)
    with pytest.raises(ConfigError, match=message):
        make(source, encoding=read)


@pytest.mark.parametrize("written", ["latin-1", "utf-8"])
def test_phrasebank_is_read_in_either_encoding_and_it_is_said(tmp_path, written):
    found = make(phrases(tmp_path / "a.txt", ["Hämeenlinna .@positive"], written))
    assert "Hämeenlinna" in said(found.train)[0]
    assert any(f"read as {written}" in note for note in found.notes)


def test_labels_of_every_template_can_be_had():
    assert template("phrasebank").labels == ("negative", "neutral", "positive")
    assert all(entry.chooses or entry.end for entry in templates().values())
    with pytest.raises(ConfigError, match="did you mean 'phrasebank"):
        template("phrasebnak")


def test_real_sets(shared_data):
    finance = shared_data / "finance"
    found = make([str(finance / name) for name in ("fpb_train_50agree.txt", "fiqa_sa_train.json", "FIN5.txt")])
    assert [source["records"] for source in found.counts["by_source"]] == [3628, 688, 1161]
    assert found.counts["examples"] == len(found.train) == 5477
    assert found.counts["by_source"][2]["skipped"]["entities of type MISC"] == 7


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_read_as_generation_reads_it_and_its_answer_follows(tmp_path, kind):
    """Also if the two merge where they meet: ids of the prompt alone, then of an answer that begins no text."""
    for form, begin in (("plain", False), ("merging", True)):
        tok = of_kind(kind, begin=begin, end=begin)
        if form == "merging":
            tok.add_tokens([AddedToken(":\n", normalized=False)])
        source = jsonl(tmp_path / "a.jsonl", [{"instruction": "What is it", "input": "", "output": "bread is"}])
        tokens, answer = make(source, tok=tok).train.example(0)
        prompt = template("alpaca").render({"instruction": "What is it", "input": ""}).prompt
        assert tokens[~answer].tolist() == prompt_ids(tok, prompt)
        assert tokens[-1] == tok.eos_token_id
        said = decoded(tok, tokens[~answer].tolist(), tokens[answer][:-1].tolist())
        assert said == (" bread is" if kind == "word piece" else "\nbread is")


def test_tokens_take_a_few_bytes_each(tmp_path):
    record = {"context": "word " * 600, "target": "good"}
    source = jsonl(tmp_path / "a.jsonl", [record | {"target": f"good {i}"} for i in range(50)])
    settings = Instructions(source=[source], eval_fraction=0.0, max_len=2000)
    given = [example for read in read_sources(settings) for example in read.examples]
    tracemalloc.start()
    items, _ = tokenize.tokenized(given, TOK, settings.max_len, may_cut=True)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    tokens = sum(len(item.row.tokens) for item in items)
    assert tokens > 20_000
    assert kept / tokens < 8


def test_the_same_examples_are_tokenized_once(tmp_path, monkeypatch):
    source = phrases(tmp_path / "a.txt", ["Profit rose .@positive", "Profit fell .@negative"])
    first = make(source)
    parallel = os.environ.get(tokenize.PARALLEL)
    monkeypatch.setattr("finhpc.data.examples.examples.tokenized", lambda *given: pytest.fail("tokenized again"))
    assert make(source) is first
    assert os.environ.get(tokenize.PARALLEL) == parallel
    with pytest.raises(pytest.fail.Exception, match="tokenized again"):
        make(source, seed=1)


def shares(examples, sources=2):
    return [int((examples.train.source == number).sum()) for number in range(sources)]


def test_a_weight_says_how_often_a_pass_takes_each_example_of_a_source(tmp_path):
    lines = sentences(60)
    files = [phrases(tmp_path / "large.txt", lines[:50]), phrases(tmp_path / "small.txt", lines[50:])]
    plain = make(files)
    assert shares(plain) == [50, 10]
    assert make(files, weights={"small.txt": 1.0}).fingerprint == plain.fingerprint
    found = make(files, weights={"small.txt": 2.5, files[0]: 0.5})
    assert shares(found) == [25, 25]
    times = Counter(said(found.train, i)[0] for i in range(len(found.train)))
    small = {said(plain.train, i)[0] for i in range(50, 60)}
    assert sorted(times[text] for text in small) == [2] * 5 + [3] * 5
    assert all(times[text] == 1 for text in times if text not in small)
    assert make(files, seed=1, weights={"small.txt": 2.5, files[0]: 0.5}).fingerprint != found.fingerprint
    assert [source["in_a_pass"] for source in found.counts["by_source"]] == [25, 25]
    assert found.counts["examples"] == 60, "different ones"
    held = make(files, weights={"small.txt": 3.0}, eval_fraction=0.5)
    assert len(held.held_out) == len(make(files, eval_fraction=0.5).held_out), "held-out examples count once"


def test_a_temperature_gives_small_sources_more_of_a_pass(tmp_path):
    lines = sentences(110)
    files = [phrases(tmp_path / "large.txt", lines[:100]), phrases(tmp_path / "small.txt", lines[100:])]
    assert shares(make(files, temperature=2.0)) == [100, 32]  # 100 * (10 / 100) ** (1 / 2) = 31.6
    assert shares(make(files, temperature=1000.0)) == [100, 100]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weights": {"other.txt": 2}}, "data.weights: other.txt is no source; the sources are "),
        ({"weights": {"a.txt": 2}}, "data.weights: a.txt names 2 sources"),
        ({"weights": {"b.txt": 0.001}}, "data.weights: 0.001 leaves none of the 9 examples"),
        ({"weights": {"b.txt": 2}, "temperature": 3}, "data.weights and data.temperature=3 both set the shares"),
    ],
)
def test_weights_that_cannot_be_followed_are_refused(tmp_path, settings, words):
    (tmp_path / "more").mkdir()
    files = [phrases(tmp_path / name, sentences(9)) for name in ("a.txt", "more/a.txt", "b.txt")]
    with pytest.raises(ConfigError) as error:
        make(files, **settings)
    assert words in str(error.value)
