"""The command: quick help, clear refusals, clean stdout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import finhpc
from finhpc.cli import main, parse
from finhpc.commands import COMMANDS
from finhpc.errors import ConfigError
from finhpc.plugins import load_installed
from finhpc.settings.base import load
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.prepare import PrepareConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.sweep import StudyConfig
from tests.tiny import tiny_shards


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv=['finhpc','--help']; from finhpc.cli import main; main();"
        "heavy={'torch','ray','mlflow','transformers','deepspeed','pyarrow','numpy'} & set(sys.modules);"
        "assert not heavy, heavy; assert len(sys.modules) < 250, len(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pretrain" in done.stdout


def test_flags_are_parsed_by_the_type_of_their_setting() -> None:
    line = "--config demo --optimizer.lr 1e-3 --method.ranks.mlp 8 --run.name 123 --optimizer.betas [0.9,0.99]"
    words = line.split()
    options, values, _ = parse(words, PretrainConfig)
    assert options == {"config": "demo"}
    assert values == {"optimizer.lr": 1e-3, "method.ranks.mlp": 8, "run.name": "123", "optimizer.betas": [0.9, 0.99]}
    _, values, _ = parse(["--source", "a", "--source=b", "--json"], PrepareConfig)
    assert values == {"source": ["a", "b"]}
    _, values, _ = parse(["--train.seed", "-1", "--study.seeds", "[0, 1]", "--study.seeds", "2", "3"], StudyConfig)
    assert values == {"train.seed": -1, "study.seeds": [0, 1, "2", "3"]}
    _, values, _ = parse(["--source", "[1", "--source", "a b"], PrepareConfig)
    assert values == {"source": ["[1", "a b"]}
    _, values, _ = parse(["--source", "a", "b", "c", "--out", "d"], PrepareConfig)
    assert values == {"source": ["a", "b", "c"], "out": "d"}


def test_every_wrong_word_is_named() -> None:
    _, _, problems = parse(["first", "--metod.rank", "3", "word", "--json", "1", "--train.steps"], PretrainConfig)
    assert problems == [
        "'first' is not a flag; write settings as --key value.",
        "--metod.rank is not a setting; did you mean 'method.rank'?",
        "'word' is not a flag; write settings as --key value.",
        "'1' is not a flag; write settings as --key value.",
        "--train.steps has no value; give one: --train.steps VALUE.",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrian"], "did you mean 'pretrain'?"),
        (["pretrain"], "data.shards is not set"),
        (["pretrain", "--data.shards", "/no/such/folder"], "is not a folder"),
        (["pretrain", "--config", "demmo"], "did you mean 'demo'?"),
        (["prepare", "--source", "/no/such/file"], "out is not set"),
        (
            ["prepare", "--source", str(Path(__file__).parent.parent / "constraints.txt"), "--out", "/proc/shards"],
            "out=/proc/shards",
        ),
    ],
)
def test_a_users_mistake_exits_2_without_a_traceback(
    words: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capfd.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_json_is_the_only_line_on_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shards = tiny_shards(tmp_path / "shards")
    words = [
        "pretrain",
        "--data.shards",
        str(shards),
        "--data.seq_len",
        "32",
        "--method.rank",
        "8",
        "--dry_run",
        "--json",
    ]
    assert main([*words, "--run.storage", str(tmp_path / "runs")]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert result["status"] == "dry_run"
    assert result["params_total"] < result["params_dense"]
    assert result["train_loss"] is None
    assert "compression" in err
    assert not (tmp_path / "runs").exists(), "a dry run writes nothing"


def test_print_config_round_trips(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--config", "demo", "--method.rank", "5", "--print_config"]) == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capfd.readouterr().out)
    assert main(["pretrain", "--config", str(file), "--print_config"]) == 0
    assert capfd.readouterr().out == file.read_text()


def test_settings_of_several_names_take_key_equals_value() -> None:
    line = "--data.columns input=headline label=mood --data.labels 0=dovish --data.labels 1=hawkish"
    words = line.split()
    _, overrides, _ = parse(words, FinetuneConfig)
    data = load(FinetuneConfig, None, overrides).data
    assert data.columns == {"input": "headline", "label": "mood"}
    assert data.labels == {"0": "dovish", "1": "hawkish"}
    for written in (["--data.labels", "yes", "no"], ["--data.labels", "yes", "--data.labels", "no"]):
        assert load(FinetuneConfig, None, parse(written, FinetuneConfig)[1]).data.labels == {"yes": "yes", "no": "no"}
    mapping = parse(["--data.columns", "{input: headline}", "--data.columns.label", "mood"], FinetuneConfig)[1]
    assert load(FinetuneConfig, None, mapping).data.columns == {"input": "headline", "label": "mood"}
    with pytest.raises(ConfigError, match="0 is given twice"):
        parse(["--data.labels", "0=a", "1=b", "--data.labels", "0=c"], FinetuneConfig)
    with pytest.raises(ConfigError, match=r"data\.columns=\['headline'\] is refused.*input=headline"):
        load(FinetuneConfig, None, parse(["--data.columns", "headline"], FinetuneConfig)[1])


HELLO = """
from finhpc.commands import COMMANDS, Command
from finhpc.settings.base import Section


class HelloConfig(Section):
    name: str = "world"


def hello(settings, dry_run=False):
    return {"greeted": settings.name}


COMMANDS["hello"] = Command("hello", "greet somebody", "hello_command:HelloConfig", "hello_command:hello")
"""


def test_an_installed_plugin_adds_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hello_command.py").write_text(HELLO)
    info = tmp_path / "hello_command-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hello-command\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[finhpc.plugins]\nhello = hello_command\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("finhpc.plugins._loaded", [])
    load_installed.cache_clear()
    try:
        assert main(["hello", "--name", "reader", "--json"]) == 0
        assert finhpc.hello(name="you") == {"greeted": "you"}
    finally:
        COMMANDS.pop("hello", None)
        load_installed.cache_clear()
    assert json.loads(capsys.readouterr().out) == {"greeted": "reader"}
    monkeypatch.undo()
    assert main(["hello"]) == 2
    assert "unknown command 'hello'" in capsys.readouterr().err


def test_templates_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("stance: {prompt: '{headline}?', answer: '{label}'}")
    assert main(["finetune", "--list_templates", "--data.templates", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "phrasebank: fields input, label; labels: negative, neutral, positive" in shown
    assert "stance: fields headline, label; labels: those of the data" in shown
    assert main(["pretrain", "--list_templates"]) == 2
