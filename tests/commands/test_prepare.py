import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from finhpc.cluster.tasks import UnfinishedError
from finhpc.commands import prepare
from finhpc.commands.prepare import prepare as run
from finhpc.data.shards.shards import Shards
from finhpc.data.text import encoding, sources
from finhpc.data.text import pack_shards as packing
from finhpc.data.text.pack_shards import entropy_nats, first_occurrences
from finhpc.errors import ConfigError, DataError, RunBusyError
from finhpc.settings.prepare import PrepareConfig
from tests.data.corpus import make_texts, write_jsonl

pytestmark = pytest.mark.usefixtures("ray_cluster")


def settings(folder: Path, **changes) -> PrepareConfig:
    values = {"source": [str(folder / "text")], "out": str(folder / "out"), "tokenizer": "train:300"}
    values |= {"block_len": 64, "shard_blocks": 32, "val_fraction": 0.2}
    return PrepareConfig(**values | changes)


@pytest.fixture
def corpus(tmp_path) -> tuple[Path, list[str]]:
    """Six files of twenty documents; some empty, some repeated in the same and in another file."""
    texts = make_texts(114)
    texts[50], texts[51] = "", " \n"
    texts += [texts[3], texts[3], texts[90], "A text that says <|endoftext|> in the middle. " * 3, texts[0], texts[1]]
    (tmp_path / "text").mkdir()
    for part in range(6):
        write_jsonl(tmp_path / "text" / f"{part}.jsonl", texts[part * 20 : part * 20 + 20])
    return tmp_path, texts


def documents(shards: Shards, split) -> list[list[int]]:
    """Ids of the documents in a split's blocks; the last may be cut."""
    ids = np.concatenate([shards.read_shard(split, i).reshape(-1) for i in range(len(shards.manifest.splits[split]))])
    ends = np.flatnonzero(ids == shards.manifest.eot_id)
    return [part[:-1].tolist() for part in np.split(ids, ends + 1) if len(part)]


def shas(out: Path) -> list[str]:
    return [shard.sha256 for split in Shards.open(out).manifest.splits.values() for shard in split]


def test_shards_hold_every_document_once_with_the_hugging_face_ids(corpus):
    from transformers import AutoTokenizer

    folder, texts = corpus
    result = run(settings(folder))
    shards = Shards.open(folder / "out")
    shards.verify()
    tokenizer = AutoTokenizer.from_pretrained(shards.tokenizer)
    unique = list(dict.fromkeys(text for text in texts if text.strip()))
    expected = [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in unique]
    found = {split: documents(shards, split) for split in ("train", "val")}
    held = {text for text in unique if is_held_out(text, 0.2)}
    for split, ids in found.items():
        wanted = [ids_ for text, ids_ in zip(unique, expected, strict=True) if (text in held) == (split == "val")]
        assert len(ids) >= len(wanted) - 3  # the tail that fills no block
        assert ids[:-1] == wanted[: len(ids) - 1]
    manifest = shards.manifest
    assert result["documents"] == len(unique) == 113
    assert result["documents_val"] == manifest.counts["val"].documents == len(held)
    assert result["bytes"] == sum(len(text.encode()) for text in unique)
    total = sum(map(len, expected)) + len(unique)
    assert manifest.dropped == {"duplicate": 5, "tail_tokens": total - result["tokens"], "empty": 2, "broken": 0}
    assert result["tokens"] == 64 * sum(shard.blocks for split in manifest.splits.values() for shard in split)
    assert manifest.versions.keys() >= {"finhpc", "python", "pyarrow", "tokenizers"}
    assert json.loads((folder / "out" / "result.json").read_bytes()) == result
    assert not (folder / "out" / ".work").exists()


def is_held_out(text: str, fraction: float) -> bool:
    return int.from_bytes(encoding.digest(text.encode())[:8], "little") / 2**64 < fraction


def test_a_tokeniser_that_tiktoken_cannot_do_works_as_well_and_is_said(corpus, capsys):
    folder, _ = corpus
    run(settings(folder))
    assert "Hugging Face" not in capsys.readouterr().err
    other = folder / "tokenizer"
    shutil.copytree(folder / "out" / "tokenizer", other)
    tree = json.loads((other / "tokenizer.json").read_bytes()) | {"normalizer": {"type": "NFC"}}
    (other / "tokenizer.json").write_text(json.dumps(tree))
    run(settings(folder, tokenizer=str(other), out=str(folder / "other")))
    said = capsys.readouterr().err
    assert "Hugging Face's code, slower than tiktoken: it normalizes text (NFC)" in said
    assert shas(folder / "other") == shas(folder / "out")  # this text is NFC already


def test_the_unigram_entropy_is_the_held_out_splits(corpus):
    folder, _ = corpus
    run(settings(folder))
    manifest = Shards.open(folder / "out").manifest
    ids = np.concatenate(
        [Shards.open(folder / "out").read_shard("val", i).reshape(-1) for i in range(len(manifest.splits["val"]))]
    )
    p = np.unique(ids, return_counts=True)[1] / len(ids)
    assert manifest.val_unigram_entropy_nats == pytest.approx(-(p * np.log(p)).sum())
    assert entropy_nats(np.array([5, 0, 5])) == pytest.approx(np.log(2))


def test_one_worker_or_two_the_shards_are_the_same(corpus):
    folder, _ = corpus
    run(settings(folder, out=str(folder / "one"), workers=1))
    run(settings(folder, out=str(folder / "two"), workers=2))
    assert shas(folder / "one") == shas(folder / "two")
    assert len(shas(folder / "one")) > 2
    fingerprints = {Shards.open(folder / out).manifest.fingerprint for out in ("one", "two")}
    assert len(fingerprints) == 1


def test_a_second_run_only_reports_and_another_is_refused(corpus, capsys, monkeypatch):
    folder, _ = corpus
    first = run(settings(folder))
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_encode", None)  # calling it would raise
        assert run(settings(folder, workers=2)) == first
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"already holds shards made with other settings .* choose another --out"):
        run(settings(folder, block_len=32))
    os.utime(folder / "text" / "0.jsonl")
    with pytest.raises(ConfigError, match="from another source"):
        run(settings(folder))


def test_an_interruption_while_packing_is_continued(corpus, capsys, monkeypatch):
    folder, _ = corpus
    run(settings(folder, out=str(folder / "whole")))
    with monkeypatch.context() as patch:
        patch.setattr(packing.Packer, "close", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(settings(folder))
    assert not (folder / "out" / "manifest.json").exists()
    with pytest.raises(ConfigError, match="interrupted"):
        Shards.open(folder / "out")
    run(settings(folder))
    assert "continuing: 6 of 6 units are done" in capsys.readouterr().err
    assert shas(folder / "out") == shas(folder / "whole")


def test_other_settings_discard_the_interrupted_work(corpus, capsys, monkeypatch):
    folder, _ = corpus
    with monkeypatch.context() as patch:
        patch.setattr(packing.Packer, "close", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(settings(folder))
    assert len(list((folder / "out").glob("train-*.parquet"))) > 1
    run(settings(folder, tokenizer="train:310", shard_blocks=4096))
    assert "discarding the unfinished work" in capsys.readouterr().err
    assert Shards.open(folder / "out").manifest.vocab_size == 310
    files = sorted(path.name for path in (folder / "out").glob("*.parquet"))
    assert files == ["train-00000.parquet", "val-00000.parquet"]  # no shard of the first run is left


def test_a_killed_run_leaves_nothing_finished_and_continues(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for part in range(20):
        write_jsonl(tmp_path / "text" / f"{part:02d}.jsonl", make_texts(1500, seed=part))
    config = settings(tmp_path, workers=1, shard_blocks=4096)
    code = "import sys, finhpc.commands.prepare as p\np.prepare(p.PrepareConfig.model_validate_json(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", code, config.model_dump_json()], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out" / ".work").glob("unit-*.arrow"))) < 3:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "manifest.json").exists()
    time.sleep(1)  # what the killed driver's Ray still had in hand
    run(config)
    said = capsys.readouterr().err
    assert "continuing: " in said
    assert "20 of 20 units are done" not in said
    run(settings(tmp_path, out=str(tmp_path / "whole"), shard_blocks=4096))
    assert shas(tmp_path / "out") == shas(tmp_path / "whole")


def test_two_runs_on_one_folder_are_refused(corpus):
    folder, _ = corpus
    with (
        prepare._workplace(folder / "out", "settings"),
        pytest.raises(RunBusyError, match=r"out=\S+ is busy: process \d+ .* wait until that ends"),
    ):
        run(settings(folder))


def test_a_broken_line_is_one_clear_error_or_counted(corpus):
    folder, _ = corpus
    with open(folder / "text" / "4.jsonl", "a") as file:
        file.write('{"txt": "no text"}\n')
    whole = settings(folder, tokenizer="gpt2")
    with pytest.raises(
        DataError, match=r'4\.jsonl line 21: no field "text"; use --text_field with one of: txt'
    ) as error:
        run(whole)
    assert "Traceback" not in str(error.value)
    assert not (folder / "out").exists(), "text that is refused leaves nothing: the mended file makes it another run"
    result = run(whole.model_copy(update={"on_error": "skip"}))
    assert result["dropped"]["broken"] == 1
    assert result["documents"] == 113
    assert result["vocab_size"] == 50257


def test_what_cannot_work_is_refused_before_anything_is_written(corpus):
    folder, _ = corpus
    with pytest.raises(ConfigError) as refused:
        run(settings(folder, out="", tokenizer="train:5", source=[str(folder / "nowhere")]))
    for problem, words in zip(
        refused.value.problems, ("out is not set; give --out", "at least 257", "does not exist"), strict=True
    ):
        assert words in problem
    with pytest.raises(ConfigError, match="holds other files; choose an empty or new folder"):
        run(settings(folder, out=str(folder / "text")))
    assert not (folder / "out").exists()


def test_a_corpus_too_small_for_one_block_says_what_to_change(corpus):
    folder, _ = corpus
    with pytest.raises(ConfigError) as refused:
        run(settings(folder, block_len=100_000))
    for split, problem in zip(("train", "held-out"), refused.value.problems, strict=True):
        assert re.match(rf"the {split} split has \d+ documents with .* a smaller --block_len \(now 100000\)", problem)
    with pytest.raises(ConfigError, match="the held-out split has 0 documents") as refused:
        run(settings(folder, val_fraction=1e-6))
    assert not (folder / "out").exists()
    assert "--block_len" not in str(refused.value)
    advice = re.search(r"raise --val_fraction to (\S+) \(now 1e-06\)", str(refused.value))
    assert advice is not None
    assert run(settings(folder, val_fraction=float(advice[1]), out=str(folder / "advised")))["documents_val"] > 0
    (folder / "out").mkdir()  # the user's own
    with pytest.raises(ConfigError, match="smaller --block_len"):
        run(settings(folder, block_len=100_000))
    assert not list((folder / "out").iterdir())


def test_a_failure_of_the_machine_keeps_what_is_done(corpus, monkeypatch):
    folder, _ = corpus

    def fail(*_):
        raise UnfinishedError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "run_tasks", fail)
        with pytest.raises(UnfinishedError, match="disk full"):
            run(settings(folder))
    assert (folder / "out" / ".work" / "tokenizer").is_dir()
    run(settings(folder))
    assert mode(folder / "out") == 0o700


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_tokeniser_learns_from_the_train_split_evenly_over_units(corpus, monkeypatch):
    folder, texts = corpus
    config = settings(folder)
    units, _ = sources.units(config)
    assert list(encoding.training_sample(units, config)) == [text for text in texts if not is_held_out(text, 0.2)]
    monkeypatch.setattr("finhpc.data.text.tokenizer.TRAINING_BYTES", 2)  # 600 bytes for train:300, 100 from each unit
    sample = list(encoding.training_sample(units, config))
    assert 580 < sum(len(text.encode()) for text in sample) <= 600
    assert len(sample) >= len(units)


def test_first_occurrences_win():
    rng = np.random.default_rng(0)
    digests = rng.integers(0, 4, (500, 2)).astype(np.uint64)  # 16 different rows, and equal halves in different rows
    seen, expected = set(), []
    for row in map(tuple, digests.tolist()):
        expected.append(row not in seen)
        seen.add(row)
    assert first_occurrences(digests).tolist() == expected
    assert first_occurrences(digests[:0]).tolist() == []


def test_memory_stays_bounded_by_batches():
    texts = iter(make_texts(3000) * 10)
    sizes = [sum(map(len, batch)) for batch in encoding._batches(texts, prepare.Counter())]
    assert max(sizes) < encoding.BATCH_BYTES * 1.01
    assert len(sizes) > 5


def test_packing_keeps_no_file_mapped(corpus, monkeypatch):
    """Held-out documents are few: were they kept as views, every file read so far would stay in memory."""
    folder, _ = corpus
    mapped = []

    def close(self, whole=packing.Packer.close):
        files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
        mapped.append([file for file in files if "unit-" in file and file.startswith(str(folder))])
        return whole(self)

    monkeypatch.setattr(packing.Packer, "close", close)
    run(settings(folder))
    assert len(mapped) == 2
    assert all(len(files) <= 1 for files in mapped), "the last file read, at most"


@pytest.mark.slow
def test_real_text(shared_data, tmp_path):
    result = run(PrepareConfig(source=[str(shared_data / "text")], tokenizer="gpt2", out=str(tmp_path / "out")))
    assert result["documents"] == 1728
    assert result["dropped"]["duplicate"] == 1
    assert 4_000_000 < result["tokens"] < 5_000_000
    Shards.open(tmp_path / "out").verify()
