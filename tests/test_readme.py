"""Every command of the README: read as it stands, and, where it can, run in the order in which it stands there."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

import pytest

from finhpc.cli import main
from tests.commands.test_start import with_tokenizer
from tests.evaluation.tasks import write_data
from tests.models.dense import saved, tiny_llama
from tests.tiny import WORDS, tiny_shards

ROOT = Path(__file__).parents[1]


def blocks(language: str = "") -> list[str]:
    """What stands between ```LANGUAGE and ```."""
    fenced = (ROOT / "README.md").read_text().split("\n```")[1:]
    return [text.partition("\n")[2] + "\n" for text in fenced[::2] if text.partition("\n")[0] == language]


def commands() -> Iterator[list[str]]:
    """The words of each command, continued lines joined, comments left out."""
    for block in blocks():
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.partition("#")[0].split("; "):
                if words := shlex.split(part):
                    yield words


COMMANDS = list(commands())
FINHPC = [words[1:] for words in COMMANDS if words[0] == "finhpc"]


def test_there_is_one_of_every_verb() -> None:
    from tests.test_submission import VERBS

    assert {words[0] for words in FINHPC} == set(VERBS)


@pytest.mark.parametrize("words", FINHPC, ids=" ".join)
def test_its_settings_are_settings(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--print_config"]) == 0, capsys.readouterr().err


def test_the_others_name_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of Ray, of make and of the shell, which other tests run (test_jobs, and all of this by `make test`)."""
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for words in (words for words in COMMANDS if words[0] != "finhpc"):
        match words:
            case ["make", target]:
                assert target in targets
            case ["ray", "job", "submit", *rest]:
                script, *settings = rest[rest.index("--") + 2 :]
                assert (ROOT / script).is_file()
                assert main([Path(script).stem, *settings, "--print_config"]) == 0, capsys.readouterr().err
            case ["ray", "job", ("logs" | "status" | "stop"), *_] | ["export", *_]:
                pass
            case ["cluster/start.sh", *_]:
                assert (ROOT / "cluster" / "start.sh").is_file()
            case _:
                pytest.fail(f"no test knows {words}")


# What makes a command small enough for a test, by its first words.
SMALLER = {
    "prepare": {"--out": "--val_fraction 0.2 --block_len 256 --out"},
    "pretrain": {"--train.steps 1000": "--train.steps 2 --data.eval_samples 8"},
    "pretrain --data.shards base-shards": {
        "--data.shards": "--train.steps 2 --data.eval_samples 8 --data.seq_len 64 --run.name second --data.shards",
        "--method.rank 96": "--method.rank 8",
    },
    "study": {"--data.shards": "--dry_run --data.shards"},
    "sweep --grid": {
        "--train.steps 800": "--train.steps 2 --data.eval_samples 8 --data.seq_len 64 --model.preset gpt2-tiny",
    },
    "sweep finetune": {"--run.name": "--train.steps 2 --run.name"},
    "reproduce": {"--scale cpu": "--scale cpu --dry_run"},  # test_reproduce_job runs it
    "decompose": {
        "FOLDER_OR_HUB_ID_OR_GGUF": "BASE",
        "--calibration.source": "--calibration.samples 4 --calibration.seq_len 32 --calibration.source",
    },
    "finetune": {"--run.name": "--train.steps 2 --run.name"},
    "evaluate": {"--limit 300": "--limit 4", "--data.shards": "--limit 4 --data.shards"},
}


def smaller(command: str) -> str:
    """The command with `SMALLER`'s changes, each of which must change something somewhere."""
    for start, changes in SMALLER.items():
        if command.startswith(start):
            for old, new in changes.items():
                command = command.replace(old, new)
    return command


def expanded(command: str) -> list[str]:
    """The words as a shell gives them."""
    return [found for word in shlex.split(command) for found in (sorted(glob(word)) if "/*." in word else [word])]


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the README's commands name."""
    monkeypatch.chdir(tmp_path)
    for folder in ("news", "filings"):
        (tmp_path / folder).mkdir()
    lines = [
        json.dumps({"text": " ".join(WORDS[(i + j) % len(WORDS)] for j in range(300)) + str(i)}) for i in range(60)
    ]
    (tmp_path / "news" / "one.jsonl").write_text("\n".join(lines[:30]))
    (tmp_path / "news" / "two.jsonl").write_text("\n".join(lines[30:]))
    (tmp_path / "filings" / "ten-k.txt").write_text("The company has risks. " * 50)
    shards = tiny_shards(tmp_path / "of-the-base")
    for name in ("BASE", "FOLDER"):
        with_tokenizer(saved(tiny_llama(context=512), tmp_path / name), shards)
    data = write_data(tmp_path / "DATA", 40)
    for name, file in {"fpb.txt": "fpb.txt", "tweets.csv": "tfns.csv", "tfns.csv": "tfns.csv",
                       "fiqa.json": "fiqa.json", "held-out.txt": "fpb.txt"}.items():  # fmt: skip
        (tmp_path / name).write_bytes((data / file).read_bytes())
    for general in data.glob("*.jsonl"):
        (tmp_path / "FOLDER" / general.name).write_bytes(general.read_bytes())
    rows = [{"prompt": "The bank", "adapter": "news"}, {"prompt": "The rate"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.mark.slow
def test_a_newcomers_path(
    newcomer: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    changed: set[str] = set()
    failed: list[str] = []
    for words in FINHPC:
        if words[0] in ("ui", "bench"):  # a server; minutes each (tests/bench runs them small)
            continue
        before = shlex.join(words)
        command = smaller(before)
        changed |= {start for start in SMALLER if before.startswith(start) and command != before}
        monkeypatch.setattr(sys, "stdin", io.StringIO("The bank\n"))
        code = main(expanded(command))
        said = capfd.readouterr().err
        if code:
            failed.append(f"finhpc {command}\n{said[-1500:]}")
        if words[:3] == ["pretrain", "--data.shards", "shards"] and "first" in words:
            opened: dict[str, Any] = {}
            exec(blocks("python")[0], opened)
            assert callable(opened["model"].generate)
    assert not failed, "\n\n".join(failed)
    assert changed == set(SMALLER), f"nothing was made smaller by {set(SMALLER) - changed}"
    for left in ("shards/manifest.json", "runs/first/model", "runs/ranks/trials.csv", "report/report.html", "low-rank",
                 "first-merged", "first-4bit", "runs/sentiment/model", "runs/compare/result.json",
                 "answers.jsonl"):  # fmt: skip
        assert (newcomer / left).exists(), left
