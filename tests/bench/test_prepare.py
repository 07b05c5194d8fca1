from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finhpc.bench import memory
from finhpc.bench.corpus import write_salted
from finhpc.bench.measures import prepare
from finhpc.bench.settings import PrepareBench
from finhpc.data.text.tokenizer import Encoder, save
from finhpc.errors import DataError
from finhpc.settings.base import build
from tests.data.corpus import make_texts, write_jsonl

TOKENS = 30_000


def settings(folder: Path, **changes: Any) -> PrepareBench:
    source = write_jsonl(folder / "source.jsonl", make_texts(20))
    tree: dict[str, Any] = {"bench": {"repeats": 1, "out": str(folder / "bench")}, "source": [str(source)]}
    return build(PrepareBench, tree | {"tokens": TOKENS, "block_len": 64, "val_fraction": 0.2, "workers": 2} | changes)


def test_every_way_gives_the_same_ids_and_memory_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = prepare.bench_prepare(settings(tmp_path))
    assert [path.name for path in (tmp_path / "bench").iterdir()] == [Path(result["folder"]).name], "corpora are gone"
    assert set(result["ratios"]) == {"prepare_over_datasets_map", "prepare_memory_10x_over_1x"}
    rows = {row["way"]: row for row in result["rows"]}
    assert len({tuple(row) for row in result["rows"]}) == 1, "the same keys in each"
    assert rows["finhpc"]["tokens"] == rows["datasets.map"]["tokens"] >= TOKENS
    assert rows["finhpc"]["documents"] == rows["datasets.map"]["documents"]
    assert rows["finhpc, a tenth"]["tokens"] == rows["tiktoken, one core"]["tokens"] < TOKENS / 8
    for row in result["rows"]:
        assert row["peak_memory_bytes"] >= row["memory_before_bytes"] > 10_000_000
    said = capsys.readouterr().err
    assert "datasets.map takes about" in said
    assert "writing 30,000 tokens of salted text" in said


@pytest.mark.slow
def test_other_ids_are_an_error(tmp_path: Path) -> None:
    """The shards that the plain way's ids are held against are of another tokeniser."""
    shop = prepare.Workshop(tmp_path, settings(tmp_path, tokenizer="train:300"), 2)
    prepare._furnish(shop)
    shop.measure(prepare.FINHPC)
    save("gpt2", tmp_path / "tokenizer", lambda: iter(()))
    with pytest.raises(DataError, match=r"the ids of finhpc are not those of datasets\.map"):
        shop.measure(prepare.PLAIN)


@pytest.mark.slow
def test_a_way_that_fails_says_why(tmp_path: Path) -> None:
    given = settings(tmp_path, block_len=8192)
    with pytest.raises(
        DataError, match=r"(?s)finhpc failed, .*\nerror: the .* split has .* less than one block of 8192"
    ):
        prepare.bench_prepare(given)
    assert list((tmp_path / "bench").iterdir()) == [], "corpora are gone"


def test_a_salted_corpus_repeats_no_document_and_names_no_special_token(tmp_path: Path) -> None:
    save("gpt2", tmp_path / "tokenizer", lambda: iter(()))
    texts = [*make_texts(5), "This one says <|endoftext|> in the middle.", " "]
    source = write_jsonl(tmp_path / "source.jsonl", texts)
    encoder = Encoder(tmp_path / "tokenizer")
    documents = write_salted(tmp_path / "corpus", [str(source)], encoder, 5000)
    lines = [line for path in (tmp_path / "corpus").iterdir() for line in path.read_text().splitlines()]
    found = [json.loads(line)["text"] for line in lines]
    assert len(found) == len(set(found)) == documents > 10
    assert {text.partition("] ")[2] for text in found} == set(texts[:5])
    tokens = int(encoder.encode(found)[1].sum()) - documents
    assert 5000 <= tokens < 5500
    write_jsonl(source, texts[5:])
    with pytest.raises(DataError, match="has no text; give another --source"):
        write_salted(tmp_path / "none", [str(source)], encoder, 5000)


def test_memory_of_a_grandchild_is_counted(tmp_path: Path) -> None:
    grandchild = "import time; block = bytearray(200_000_000); block[::4096] = b'x' * len(block[::4096]); time.sleep(1)"
    code = f"import subprocess, sys; input(); subprocess.run([sys.executable, '-c', {grandchild!r}])"
    with (
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True) as process,
        memory.PeakMemory(process.pid) as peak,
    ):
        process.communicate("go\n")
    assert peak.first < 50_000_000
    assert peak.peak > 200_000_000
