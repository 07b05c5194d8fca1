"""Every command of the table: its help shows its own defaults, its dry run starts and writes nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

import finhpc
from finhpc.bench.settings import DataBench, PrepareBench
from finhpc.cli import USAGE, main
from finhpc.commands import COMMANDS, SAME, Command
from finhpc.errors import ConfigError
from finhpc.settings.base import flatten, keys, load
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.pretrain import Data, PretrainConfig
from finhpc.settings.training import Optimizer, Train
from tests.evaluation.tasks import write_data, write_model
from tests.tiny import WORDS, tiny_shards

CLASSES = {name: row.settings_class() for name, row in COMMANDS.items() if row.settings}


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """Setting -> what help shows in brackets."""
    assert main([*words, "--help"]) == 0
    return dict(re.findall(r"^  --(\S+) \((.*?)\)  ", capsys.readouterr().out, flags=re.MULTILINE))


def as_flags(settings: Any) -> dict[str, str]:
    """Setting -> its resolved value, written as help writes values."""
    found = {}
    for name, value in flatten(settings).items():
        if value is None or value in ("", [], {}):
            found[name] = "none"
        elif isinstance(value, bool):
            found[name] = str(value).lower()
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            found[name] = text.removeprefix(f"{Path.cwd()}/")
    return found


@pytest.mark.parametrize("verb", CLASSES)
def test_help_shows_what_a_command_resolves_to(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    found, resolved = shown(capsys, *verb.split()), as_flags(load(CLASSES[verb], None))
    assert set(found) == set(resolved)
    differ = {found[name] for name in found if found[name] != resolved[name]}
    assert differ <= {"by train.epochs", "as in the scale", "the preset's"}


def test_help_shows_a_places_own_defaults_and_a_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("finetune", "sweep finetune", "estimate finetune"):
        found = shown(capsys, *verb.split())
        assert (found["optimizer.weight_decay"], found["parallel.micro_batch_size"]) == ("0.0", "16"), verb
        assert found["train.steps"] == "by train.epochs"
    assert shown(capsys, "sweep")["run.name"] == "sweep"
    assert shown(capsys, "evaluate")["run.name"] == "evaluate"
    found = shown(capsys, "ui")
    assert found["run.name"] == "none"
    assert "run.max_failures" not in found
    assert shown(capsys, "bench", "train")["resources.threads"] == "2"
    assert shown(capsys, "reproduce")["resources.threads"] == "as in the scale"
    demo = load(PretrainConfig, "demo")
    found = shown(capsys, "pretrain", "--config", "demo")
    assert found.items() >= {k: v for k, v in as_flags(demo).items() if found[k] != "the preset's"}.items()
    assert found["model.layers"] == str(demo.model.layers)
    assert shown(capsys, "estimate", "finetune", "--config=finetune-llama2-7b")["quantization.bits"] == "4"


@pytest.mark.parametrize("verb", CLASSES)
def test_every_setting_is_described_and_an_absent_one_explained(verb: str) -> None:
    for name, field in keys(CLASSES[verb]).items():
        assert field.description, name
        if field.get_default(call_default_factory=True) is None and not field.json_schema_extra:
            assert re.search(r"default|required|by ", field.description), f"{name}: what does none mean?"


@pytest.mark.parametrize("width", [80, 120])
def test_help_fits_the_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for verb in COMMANDS:
        assert main([*verb.split(), "--help"]) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= width, verb


def test_usage_fits_a_screen_and_unknown_commands_name_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert max(map(len, USAGE.splitlines())) <= 80
    for wrong, near in {"swep": "sweep", "benhc": "bench", "pretrian": "pretrain"}.items():
        assert main([wrong]) == 2
        assert f"error: unknown command '{wrong}'; did you mean '{near}'?" in capsys.readouterr().err
    assert main(["zzz"]) == 2
    listed = capsys.readouterr().err
    assert all(verb.split()[0] in listed for verb in COMMANDS)


@pytest.mark.parametrize("words", [["--help"], ["pretrain", "--help"], ["pretrain", "--print_config"], ["--version"]])
def test_a_reader_that_leaves_is_no_error(words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "finhpc.cli", *words], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


# -- dry runs -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every command needs to begin with."""
    folder = tmp_path_factory.mktemp("files")
    tiny_shards(folder / "shards")
    write_model(folder / "model")
    write_data(folder / "data", 40)
    (folder / "text.txt").write_text(" ".join(WORDS) * 20)
    (folder / "prompts.txt").write_text("The bank\nThe rate\n")
    (folder / "study.yaml").write_text("study: {variants: {dense: {settings: {method: {kind: dense}}, lr: [0.001]}}}\n")
    return folder


TRAIN = "--data.shards shards --data.seq_len 32 --method.rank 8 --data.eval_samples 4"
DRY: dict[str, str] = {
    "prepare": "--source text.txt --out out --tokenizer train:300",
    "pretrain": TRAIN,
    "estimate": "--method.rank 8",
    "estimate finetune": "--model.path model --estimate.tokens 128",
    "sweep": TRAIN + " --grid train.seed=[0,1]",
    "sweep finetune": "--model.path model --data.source data/fpb.txt --data.max_len 128 --grid lora.rank=[2,4]",
    "study": "--config study.yaml --data.shards shards --data.seq_len 32",
    "decompose": "--model model --out out --rank 4",
    "finetune": "--model.path model --data.source data/fpb.txt --data.max_len 128",
    "export": "--model model --out out",
    "evaluate": "--model model --tasks fpb boolq perplexity --data.folder data --data.shards shards",
    "generate": "--model model --prompts prompts.txt --out out.jsonl",
    "serve": "--model model --port 58321",
    "reproduce": "--finance data/fpb.txt",
}
REFUSED = {  # what each says of its dry run
    "bench": ("data", "bench data has no --dry_run, because it only measures"),
    "estimate": ("--estimate.device this-machine", "omit --dry_run"),
    "report": ("", "does not exist: nothing was tracked there yet"),
    "ui": ("", "does not exist: nothing was tracked there yet"),
}


def test_no_command_is_left_out() -> None:
    assert {*DRY, *REFUSED} == {name for name in COMMANDS if not name.startswith("bench ")}


@pytest.mark.parametrize(
    ("verb", "words", "message"), [(v, w, "") for v, w in DRY.items()] + [(v, *wm) for v, wm in REFUSED.items()]
)
def test_a_dry_run_starts_and_writes_nothing(
    verb: str,
    words: str,
    message: str,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import ray

    def started(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.chdir(files)
    monkeypatch.setattr(ray, "init", started)
    monkeypatch.setattr(ray, "remote", started)
    before, children = sorted(files.rglob("*")), psutil.Process().children()
    code = main([*verb.split(), *words.split(), "--dry_run", "--json"])
    out, err = capsys.readouterr()
    assert code == (2 if message else 0), err
    assert message in err
    assert ('"status": "dry_run"' in out) == (not message)
    assert sorted(files.rglob("*")) == before
    assert psutil.Process().children() == children


def test_a_dry_run_counts_what_there_is(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    prepared = finhpc.prepare(finhpc.PrepareConfig(source=["text.txt"], out="out", tokenizer="shards/tokenizer"), True)
    assert (prepared["files"], prepared["bytes"]) == (1, (files / "text.txt").stat().st_size)
    assert prepared["vocab_size"] > 256
    generated = finhpc.generate(finhpc.GenerateConfig(model="model", prompts="prompts.txt"), True)
    assert (generated["prompts"], generated["new_tokens_at_most"]) == (2, 256)
    assert generated["size_bytes"] == (files / "model" / "model.safetensors").stat().st_size


def test_files_that_prepare_does_not_read_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.txt", "b.csv", "c.xlsx"):
        (tmp_path / name).write_text("the bank")
    config = finhpc.PrepareConfig(source=[str(tmp_path)], out=str(tmp_path / "out"), tokenizer="train:300")
    assert finhpc.prepare(config, True)["files"] == 1
    told = capsys.readouterr().err
    assert f"{tmp_path}: skipped 2 files of other formats" in told
    assert "dry run: 1 file, 0.0 MB, in 1 unit ->" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("prepare --source text.txt --out /proc/shards", "out=/proc/shards cannot be written"),
        ("prepare --source text.txt --out model", "holds other files"),
        ("prepare --source text.txt --out out --tokenizer shards", "tokenizer=shards"),
        ("generate --model model --prompt x --sampling.max_new_tokens 256", "leaves no room for a prompt"),
        ("generate --model model --prompt x --adapters a=nowhere", "adapter=nowhere is not a folder on this machine"),
        ("ui --port 1", "does not exist"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(
    words: str, message: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(files)
    assert main([*words.split(), "--dry_run"]) == 2
    assert message in capsys.readouterr().err


# -- Python ---------------------------------------------------------------------------------


def test_every_command_is_a_function_of_the_package() -> None:
    for verb, row in COMMANDS.items():
        assert callable(getattr(finhpc, verb.split()[0])), verb
        if row.settings.startswith("finhpc.settings."):
            assert getattr(finhpc, row.settings.partition(":")[2]) is CLASSES[verb]
    with pytest.raises(ConfigError, match="bench data has no --dry_run"):
        finhpc.bench(DataBench(), dry_run=True)
    with pytest.raises(ConfigError, match="not PretrainConfig"):
        finhpc.bench(finhpc.PretrainConfig())
    with pytest.raises(ConfigError, match="sweep takes SweepConfig or FinetuneSweepConfig, not PrepareConfig"):
        finhpc.sweep(finhpc.PrepareConfig())  # type: ignore[arg-type]
    assert finhpc.estimate(finhpc.FinetuneEstimateConfig(model={"preset": "llama-tiny"}))["status"] == "dry_run"


def recorded(settings: Any, dry_run: bool = False) -> dict[str, Any]:
    return {"settings": settings, "dry_run": dry_run}


def rehearsed(settings: Any) -> dict[str, Any]:
    return {"rehearsed": settings}


def test_python_takes_settings_as_an_object_a_mapping_or_keywords() -> None:
    command: Command[PretrainConfig] = COMMANDS["pretrain"]._replace(
        function="tests.test_commands:recorded", dry_run=SAME
    )
    expected = load(PretrainConfig, "demo", {"data.shards": "s", "train.steps": 3, "method.ranks": {"mlp": 8}})
    keys = {"train.steps": 3, "method": {"ranks": {"mlp": 8}}}
    given = [
        command(expected, True),
        command(keys, config="demo", data={"shards": "s"}, dry_run=True),
        command(config="demo", data=Data(shards="s"), train=Train(steps=3), method={"ranks": {"mlp": 8}}, dry_run=True),
    ]
    assert all(one == {"settings": expected, "dry_run": True} for one in given)
    with pytest.raises(ConfigError) as caught:
        command(config="demo", train={"stepz": 3}, data={"seq_len": "long"}, **{"method.rnak": 4})
    assert {problem for problem in caught.value.problems if not problem.startswith("data.seq_len='long'")} == {
        "train.stepz is not a setting; did you mean 'train.steps'?",
        "method.rnak is not a setting; did you mean 'method.rank'?",
    }
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match="give one of the two"):
        command(expected, config="demo")
    with pytest.raises(ConfigError, match="bench takes an object of one of its settings classes: TrainBench or"):
        finhpc.bench()
    with pytest.raises(
        ConfigError,
        match="a mapping or keywords, not 'demo'; give a recipe or YAML file by name",
    ):
        command("demo")  # type: ignore[arg-type]
    apart = command._replace(dry_run="tests.test_commands:rehearsed")
    assert apart(expected, dry_run=True) == {"rehearsed": expected}


def test_editors_see_every_command_and_settings_class() -> None:
    text = Path(finhpc.__file__).read_text().partition("if TYPE_CHECKING:")[2].partition("__version__")[0]
    functions = dict(re.findall(r"^    (\w+): Command\[(.+)\]$", text, flags=re.MULTILINE))
    classes = {name: re.findall(r"\w+", kinds) for name, kinds in functions.items()}
    expected: dict[str, list[str]] = {}
    for name, row in COMMANDS.items():
        if row.settings.startswith("finhpc.settings."):
            expected.setdefault(name.split()[0], []).append(row.settings.partition(":")[2])
    assert classes == expected
    imported = set(re.findall(r"import (\w+) as \1$", text, flags=re.MULTILINE))
    assert imported | {"bench", "__version__"} | set(functions) == set(finhpc.__all__)
    assert all(hasattr(finhpc, name) for name in finhpc.__all__)


def test_python_gets_the_messages_of_the_command_line() -> None:
    with pytest.raises(ConfigError) as caught:
        finhpc.PretrainConfig(train={"stepz": 3, "precision": "bf61"}, optimizer={"lr": -1}, methd={})
    assert set(caught.value.problems) == {
        "train.stepz is not a setting; did you mean 'train.steps'?",
        "train.precision='bf61' is refused: input should be 'fp32', 'bf16' or 'bf16-weights' (did you mean 'bf16'?).",
        "optimizer.lr=-1 is refused: input should be greater than 0 (optimizer.lr: peak learning rate).",
        "methd is not a setting; did you mean 'method'?",
    }
    settings = finhpc.PretrainConfig()
    with pytest.raises(ConfigError, match="stepz is not a setting; did you mean 'steps"):
        settings.train.stepz = 3
    with pytest.raises(ConfigError, match="steps='many' is refused"):
        settings.train.steps = "many"
    assert settings.train.steps == 300


def test_settings_given_in_part_mean_the_same_in_python_and_on_the_command_line() -> None:
    line = load(FinetuneConfig, None, {"optimizer.lr": 1e-4})
    assert finhpc.FinetuneConfig(optimizer={"lr": 1e-4}) == line
    assert finhpc.FinetuneConfig(optimizer=Optimizer(lr=1e-4)) == line
    assert finhpc.FinetuneConfig(optimizer=Optimizer(lr=1e-4, weight_decay=0.1)).optimizer.weight_decay == 0.1
    assert PrepareBench(bench={"out": "elsewhere"}).bench.repeats == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_is_infinite_or_none(value: float) -> None:
    with pytest.raises(ConfigError, match="lr_adamw="):
        load(PretrainConfig, None, {"optimizer.lr_adamw": value})
